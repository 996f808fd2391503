//! Users and groups of an image: its own /etc/passwd and /etc/group, never the node's.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::inside::open_inside;
use crate::{ContainerError, OnFile};

/// Most that is read of a user database, in bytes.
const MAX_DATABASE: u64 = 16 << 20;

/// Whom a container's process runs as.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

/// Reads a file of the image without leaving its root; empty if it is not there or no regular file.
fn read_inside(root: &Path, path: &str) -> Result<String, ContainerError> {
    let read = || -> io::Result<Vec<u8>> {
        let file = open_inside(&File::open(root)?, path.as_bytes(), OFlag::empty())?;
        let mut text = Vec::new();
        if file.metadata()?.is_file() {
            file.take(MAX_DATABASE).read_to_end(&mut text)?;
        }
        Ok(text)
    };
    let absent = [Errno::ENOENT, Errno::ENOTDIR, Errno::ELOOP, Errno::ENXIO].map(|errno| errno as i32);
    match read() {
        Err(error) if error.raw_os_error().is_some_and(|errno| absent.contains(&errno)) => Ok(String::new()),
        other => Ok(String::from_utf8_lossy(&other.on("read", &root.join(path))?).into_owned()),
    }
}

/// Resolves `USER[:GROUP]`, by name or number, as the image specification says.
pub(crate) fn resolve(root: &Path, wanted: &str) -> Result<User, ContainerError> {
    let (user, group) = wanted.split_once(':').map_or((wanted, None), |(user, group)| (user, Some(group)));
    let user = if user.is_empty() { "0" } else { user };
    let passwd = read_inside(root, "etc/passwd")?;
    let groups = read_inside(root, "etc/group")?;
    let fields = |line: &str| line.split(':').map(str::to_owned).collect::<Vec<_>>();
    let number = user.parse::<u32>().ok();
    let entry = passwd.lines().map(fields).find(|line| {
        line.len() >= 6 && (line[0] == user || number.is_some_and(|uid| line[2].parse() == Ok(uid)))
    });
    let (name, uid, gid, home) = match (&entry, number) {
        (Some(line), _) => {
            // A number that is none must not become root's.
            let id = |at: usize| {
                line[at].parse().map_err(|_not_a_number| ContainerError::UserNumber {
                    name: line[0].clone(),
                    file: "passwd",
                })
            };
            (Some(line[0].clone()), id(2)?, id(3)?, line[5].clone())
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
            resolved.gid = gid.ok_or_else(|| ContainerError::User {
                kind: "group",
                name: group.to_owned(),
                file: "group",
            })?;
        }
        // Supplementary groups only when no group was named.
        None => {
            let member = |line: &&Vec<String>| {
                line.get(3)
                    .zip(name.as_ref())
                    .is_some_and(|(members, name)| members.split(',').any(|one| one == name))
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
        std::fs::write(
            root.path().join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\napp:x:7:8::/home/app:/bin/sh\n",
        )
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
        assert_eq!(read_inside(root.path(), "etc/passwd").expect("read"), "");
    }

    #[test]
    fn a_damaged_number_is_not_root() {
        let root = tempfile::tempdir().expect("dir");
        std::fs::create_dir(root.path().join("etc")).expect("create");
        std::fs::write(root.path().join("etc/passwd"), "app:x:seven:8::/:/bin/sh\n").expect("write");
        assert!(matches!(resolve(root.path(), "app"), Err(ContainerError::UserNumber { .. })));
    }

    #[test]
    fn a_fifo_for_a_database_does_not_block() {
        let root = tempfile::tempdir().expect("dir");
        std::fs::create_dir(root.path().join("etc")).expect("create");
        nix::unistd::mkfifo(&root.path().join("etc/passwd"), nix::sys::stat::Mode::S_IRWXU).expect("fifo");
        assert_eq!(resolve(root.path(), "5").expect("number").uid, 5);
    }
}
