//! What a node leaves on the machine, and its end: nothing may stay that breaks the next test.

use std::fs;
use std::time::{Duration, Instant};

use super::Node;

impl Node {
    /// What all paths of this node contain, and no other's: one may be called as another's beginning.
    fn own_path(&self) -> String {
        format!("/{}/", self.dir.file_name().expect("a name").to_string_lossy())
    }

    /// Mount points and loop devices' files that are under this node's directory.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let name = self.own_path();
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("readable");
        let mut left: Vec<String> =
            mounts.lines().filter(|line| line.contains(&name)).map(str::to_owned).collect();
        for entry in fs::read_dir("/sys/block").expect("readable").flatten() {
            let backing = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
            if backing.contains(&name) {
                left.push(backing);
            }
        }
        left
    }

    /// Daemons of this node and their keepers. A command that was killed may have been starting one.
    fn has_daemon(&self) -> bool {
        let name = self.own_path();
        let processes = fs::read_dir("/proc").expect("readable").flatten();
        let mut lines = processes.filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok());
        lines.any(|line| line.contains(&name) && line.contains("daemon"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.run(&["node", "drain"]));
        drop(self.registry.kill());
        drop(self.registry.wait());
        if std::thread::panicking() {
            eprintln!("--- daemon's log\n{}", self.log());
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while (self.has_daemon() || !self.leftovers().is_empty()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
            if self.has_daemon() {
                drop(self.run(&["node", "drain"]));
            }
        }
        let left = self.leftovers();
        if left.is_empty() {
            drop(fs::remove_dir_all(&self.dir));
        }
        assert!(left.is_empty() || std::thread::panicking(), "left behind: {left:#?}");
    }
}
