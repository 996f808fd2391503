//! `local`, `signed` and `any`, as another node meets them that did not make the index.

use crate::rig::Node;

/// One whose image has an index that another node published as a referrer, made with `options`.
fn beside_another(options: &[&str]) -> Node {
    let node = Node::new("");
    node.ok(&[&["index"], options, &[&node.image()]].concat());
    node.become_another();
    node
}

fn configure(node: &Node, trust: &str) {
    std::fs::write(node.path("config.toml"), format!("[stream]\nfill = false\n[trust]\n{trust}\n")).unwrap();
}

/// Whether a container is streamed by the published index; it runs in any case.
#[track_caller]
fn streams(node: &Node) -> bool {
    node.become_another();
    assert_eq!(node.shell("cat /data/changed"), "after");
    let state = node.status()["images"][0]["state"].clone();
    assert!(state == "streaming" || state == "local", "{state}");
    state == "streaming"
}

#[test]
fn by_default_a_strangers_index_changes_nothing_and_check_says_why() {
    let node = beside_another(&[]);
    let output = node.run(&["check", &node.image()]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stdout).unwrap();
    for word in ["not trusted", "not made on this node", "`local`", "index_store", "`signed`"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    configure(&node, "");
    assert!(!streams(&node), "it was pulled in order");
    configure(&node, "mode = \"any\"");
    assert!(streams(&node), "the operator said so");
}

#[test]
fn what_was_made_here_is_believed_and_an_own_store_too() {
    let node = Node::new("[stream]\nfill = false\n");
    node.ok(&["index", &node.image()]);
    assert!(node.ok(&["check", &node.image()]).ends_with("streamable\n"));
    let url = format!("file://{}", node.path("indexes").display());
    node.ok(&["index", "--store", &url, &node.image()]);
    node.become_another();
    let config = format!("index_store = {url:?}\n[stream]\nfill = false\n");
    std::fs::write(node.path("config.toml"), config).unwrap();
    assert!(streams(&node));
}

#[test]
fn signed_indexes_are_believed_by_key_and_keys_rotate() {
    let node = beside_another(&[]);
    let key = |name: &str| {
        let path = node.path(name);
        node.ok(&["key", "generate", &path.to_string_lossy()]);
        (path.with_extension("key").display().to_string(), path.with_extension("pub").display().to_string())
    };
    let ((_, old_public), (new, new_public), (strange, _)) = (key("old"), key("new"), key("strange"));
    let only_old = format!("mode = \"signed\"\nkeys = [{old_public:?}]");
    let both = format!("mode = \"signed\"\nkeys = [{old_public:?}, {new_public:?}]");
    configure(&node, &both);
    assert!(!streams(&node), "it is not signed");
    let check = |node: &Node| String::from_utf8(node.run(&["check", &node.image()]).stdout).unwrap();
    assert!(check(&node).contains("is not signed"), "{}", check(&node));

    let said = node.ok(&["index", "--sign", &new, &node.image()]);
    assert!(said.contains(", signed"), "{said}");
    assert!(streams(&node), "signed by the new key, while both are valid");
    // What a stranger pushes after it, signed or not, neither is used nor hides it.
    node.ok(&["index", "--sign", &strange, &node.image()]);
    node.ok(&["index", &node.image()]);
    assert!(streams(&node));

    configure(&node, &only_old);
    assert!(check(&node).contains("not trusted"), "{}", check(&node));
    assert!(!streams(&node), "the new key is not configured");
}

#[test]
fn a_configuration_that_could_believe_nobody_is_refused() {
    let node = Node::new("[trust]\nmode = \"signed\"\n");
    let complaint = node.complaint(&["check", &node.image()]);
    assert!(complaint.contains("keys"), "{complaint}");
    configure(&node, "mode = \"signed\"\nkeys = [\"/nonexistent.pub\"]");
    let complaint = node.complaint(&["check", &node.image()]);
    assert!(complaint.contains("/nonexistent.pub"), "{complaint}");
}
