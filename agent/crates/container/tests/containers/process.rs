//! The container's process: arguments, environment, user, directory, exit code.

use std::os::unix::fs::PermissionsExt;

use sluice_container::{Bundle, ContainerError, SpecOptions};

use crate::root::{RUNTIMES, Root};

#[test]
fn exit_codes_come_out() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        for (script, code) in
            [("exit 0", 0), ("exit 7", 7), ("sh -c 'kill -9 $$'", 137), ("no-such-command", 127)]
        {
            assert_eq!(root.script(script, SpecOptions::default()).code, Some(code), "{runtime}: {script}");
        }
    }
}

#[test]
fn the_image_says_what_runs_unless_the_user_does() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        assert_eq!(root.run(&SpecOptions::default()).text(), "from the image", "{runtime}");
        let other = SpecOptions {
            entrypoint: Some("cat".to_owned()),
            command: vec!["/etc/group".to_owned()],
            ..SpecOptions::default()
        };
        assert!(root.run(&other).text().starts_with("root:x:0:"), "{runtime}");
    }
}

#[test]
fn a_program_that_is_not_there_fails_and_leaves_nothing() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        let options =
            SpecOptions { entrypoint: Some("/no/such/program".to_owned()), ..SpecOptions::default() };
        let outcome = root.run(&options);
        assert!(outcome.code.is_some_and(|code| code != 0), "{runtime}: {outcome:?}");
        assert!(outcome.stderr.contains("no/such/program"), "{runtime}: {outcome:?}");
    }
}

#[test]
fn environment() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        let show = "echo $FROM $ADDED $HOME $PATH";
        let env = vec!["ADDED=with = and : in it".to_owned()];
        let outcome = root.script(show, SpecOptions { env, ..SpecOptions::default() });
        let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        assert_eq!(outcome.text(), format!("image with = and : in it /root {path}"), "{runtime}");
        let env = vec!["FROM=user".to_owned()];
        let options = SpecOptions { env, user: Some("app".to_owned()), ..SpecOptions::default() };
        assert!(root.script(show, options).text().starts_with("user /home/app"), "{runtime}");
    }
}

#[test]
fn the_working_directory_is_made() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        for (asked, got) in
            [("/new/below/new", "/new/below/new"), ("relative", "/relative"), ("/etc", "/etc")]
        {
            let options = SpecOptions { workdir: Some(asked.to_owned()), ..SpecOptions::default() };
            assert_eq!(root.script("pwd", options).text(), got, "{runtime}: {asked}");
        }
        assert_eq!(root.script("pwd", SpecOptions::default()).text(), "/", "{runtime}");
    }
}

#[test]
fn users_and_groups() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        for (user, ids) in [
            (None, "0 0 0 1003"),
            (Some("app"), "1000 1001 1001 1002 1003"),
            (Some("1000"), "1000 1001 1001 1002 1003"),
            (Some("app:extra"), "1000 1002 1002"),
            (Some("4711:4712"), "4711 4712 4712"),
            (Some("4711"), "4711 0 0"),
        ] {
            let options = SpecOptions { user: user.map(str::to_owned), ..SpecOptions::default() };
            let outcome = root.script("echo $(id -u) $(id -g) $(id -G)", options);
            assert_eq!(outcome.text(), ids, "{runtime}: {user:?}");
        }
        let unknown = SpecOptions { user: Some("nobody-here".to_owned()), ..SpecOptions::default() };
        let error = Bundle::create(root.options(), &unknown).expect_err("unknown user");
        assert!(matches!(error, ContainerError::User { .. }), "{error:?}");
        root.assert_nothing_left();
    }
}

/// The root's mode is that of the topmost layer, not of the umask under which the bundle was made.
#[test]
fn other_users_can_enter_the_root() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        std::fs::set_permissions(&root.lower, std::fs::Permissions::from_mode(0o751)).expect("mode");
        let options = SpecOptions { user: Some("app".to_owned()), ..SpecOptions::default() };
        assert_eq!(root.script("stat -c %a:%u /", options).text(), "751:0", "{runtime}");
    }
}

#[test]
fn capabilities_are_dockers_and_a_user_has_none() {
    for runtime in RUNTIMES {
        let root = Root::new(runtime);
        let script = "while read -r key value; do case $key in CapEff: | CapBnd:) echo $key$value;; esac; done \
                      </proc/self/status";
        let mine = root.script(script, SpecOptions::default());
        assert_eq!(mine.text(), "CapEff:00000000a80425fb\nCapBnd:00000000a80425fb", "{runtime}");
        let user = SpecOptions { user: Some("app".to_owned()), ..SpecOptions::default() };
        assert!(root.script(script, user).text().starts_with("CapEff:0000000000000000"), "{runtime}");
    }
}
