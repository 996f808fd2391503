//! Users and groups of an image: its own /etc/passwd and /etc/group, never the node's.

use std::os::fd::OwnedFd;
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use crate::ContainerError;

/// Whom a container's process runs as.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

/// Reads a file of the image without leaving its root through symbolic links; empty if it is not there.
fn read_inside(root: &Path, path: &str) -> String {
    let how = OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let open = |path: &Path| -> Option<OwnedFd> {
        let root = std::fs::File::open(root).ok()?;
        openat2(&root, path, how).ok()
    };
    let Some(file) = open(Path::new(path)) else { return String::new() };
    let mut text = Vec::new();
    let mut limited = std::io::Read::take(std::fs::File::from(file), 16 << 20);
    match std::io::Read::read_to_end(&mut limited, &mut text) {
        Ok(_) => String::from_utf8_lossy(&text).into_owned(),
        Err(_) => String::new(),
    }
}

/// Resolves `USER[:GROUP]`, by name or number, as the image specification says.
pub(crate) fn resolve(root: &Path, wanted: &str) -> Result<User, ContainerError> {
    let (user, group) = wanted.split_once(':').map_or((wanted, None), |(user, group)| (user, Some(group)));
    let user = if user.is_empty() { "0" } else { user };
    let passwd = read_inside(root, "etc/passwd");
    let groups = read_inside(root, "etc/group");
    let fields = |line: &str| line.split(':').map(str::to_owned).collect::<Vec<_>>();
    let number = user.parse::<u32>().ok();
    let entry = passwd.lines().map(fields).find(|line| {
        line.len() >= 6 && (line[0] == user || number.is_some_and(|uid| line[2].parse() == Ok(uid)))
    });
    let (name, uid, gid, home) = match (&entry, number) {
        (Some(line), _) => {
            let id = |at: usize| line[at].parse().unwrap_or(0);
            (Some(line[0].clone()), id(2), id(3), line[5].clone())
        }
        (None, Some(uid)) => (None, uid, 0, "/".to_owned()),
        (None, None) => {
            return Err(ContainerError::User { kind: "user", name: user.to_owned(), file: "passwd" });
        }
    };
    let known: Vec<Vec<String>> = groups.lines().map(fields).filter(|line| line.len() >= 3).collect();
    let mut resolved = User { uid, gid, groups: Vec::new(), home };
    match group {
        Some(group) => {
            let by_name = known.iter().find(|line| line[0] == group).and_then(|line| line[2].parse().ok());
            let gid = by_name.or_else(|| group.parse().ok());
            resolved.gid =
                gid.ok_or_else(|| ContainerError::User { kind: "group", name: group.to_owned(), file: "group" })?;
        }
        // Supplementary groups only when no group was named.
        None => {
            let member = |line: &&Vec<String>| {
                line.get(3).zip(name.as_ref()).is_some_and(|(members, name)| members.split(',').any(|one| one == name))
            };
            resolved.groups = known.iter().filter(member).filter_map(|line| line[2].parse().ok()).collect();
        }
    }
    Ok(resolved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_come_from_the_image() {
        let root = tempfile::tempdir().expect("dir");
        std::fs::create_dir(root.path().join("etc")).expect("create");
        std::fs::write(root.path().join("etc/passwd"), "root:x:0:0::/root:/bin/sh\napp:x:7:8::/home/app:/bin/sh\n")
            .expect("write");
        std::fs::write(root.path().join("etc/group"), "app:x:8:\nextra:x:99:app,other\n").expect("write");
        let app = User { uid: 7, gid: 8, groups: vec![99], home: "/home/app".to_owned() };
        assert_eq!(resolve(root.path(), "app").expect("app"), app);
        assert_eq!(resolve(root.path(), "7").expect("7"), app);
        let named = resolve(root.path(), "app:extra").expect("app:extra");
        assert_eq!((named.uid, named.gid, named.groups.len()), (7, 99, 0));
        assert_eq!(resolve(root.path(), "1234:55").expect("numbers").gid, 55);
        assert_eq!(resolve(root.path(), "").expect("root").uid, 0);
        assert!(resolve(root.path(), "nobody-here").is_err());
        assert!(resolve(root.path(), "app:nogroup").is_err());
    }

    #[test]
    fn a_link_out_of_the_root_stays_inside() {
        let root = tempfile::tempdir().expect("dir");
        std::fs::create_dir(root.path().join("etc")).expect("create");
        std::os::unix::fs::symlink("/etc/passwd", root.path().join("etc/passwd")).expect("link");
        assert_eq!(read_inside(root.path(), "etc/passwd"), "");
    }
}
