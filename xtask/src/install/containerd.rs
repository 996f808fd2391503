//! containerd's configuration: the changes that make Sluice its snapshotter, and nothing else of the file.
//!
//! A drop-in could bring the proxy plugin, but containerd 1.6 and 1.7 replace a plugin's whole section by an imported one,
//! and the operator's CRI section with it. So the file itself is edited, with its comments and order kept.

use anyhow::{Context, Result, bail};
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, value};

/// The plugin behind containerd's transfer service.
const TRANSFER: &str = "io.containerd.transfer.v1.local";

/// The name that containerd knows the snapshotter by.
const NAME: &str = "sluice";

/// `text` with Sluice as a proxy plugin at `socket` and as the CRI plugin's snapshotter. An empty text is a new file.
pub(super) fn with_sluice(text: &str, socket: &str) -> Result<String> {
    let mut document: DocumentMut = text.parse().context("containerd's configuration is not valid TOML")?;
    let version = match document.get("version") {
        None if text.trim().is_empty() => 2,
        None => 1,
        Some(version) => version.as_integer().context("containerd's configuration has no valid version")?,
    };
    // Version 3 came with containerd 2.0, which split the CRI plugin.
    let (images, sections): (&str, &[&str]) = match version {
        2 => ("io.containerd.grpc.v1.cri", &["containerd"]),
        3 => ("io.containerd.cri.v1.images", &[]),
        other => bail!(
            "containerd's configuration has version {other}; `containerd config migrate` makes it one of version 2 or later"
        ),
    };
    if document.get("version").is_none() {
        document.insert("version", value(version));
    }
    let plugin = table(document.as_table_mut(), &["proxy_plugins", NAME])?;
    set(plugin, "type", "snapshot");
    set(plugin, "address", socket);
    // containerd 1.7 and later: the transfer service labels layers for us, as the CRI plugin does.
    let exports = table(document.as_table_mut(), &["proxy_plugins", NAME, "exports"])?;
    set(exports, "enable_remote_snapshot_annotations", "true");
    unpack(document.as_table_mut())?;
    let path = [&["plugins", images], sections].concat();
    let cri = table(document.as_table_mut(), &path)?;
    set(cri, "snapshotter", NAME);
    if cri.get("disable_snapshot_annotations").and_then(Item::as_bool) != Some(false) {
        keep_decor(cri, "disable_snapshot_annotations", value(false));
    }
    // A runtime may have a snapshotter of its own, which would go round ours; that is the operator's wish.
    Ok(document.to_string())
}

/// `text` without what [`with_sluice`] put there: for a file that was changed since, else its first text comes back.
pub(super) fn without_sluice(text: &str) -> Result<String> {
    let mut document: DocumentMut = text.parse().context("containerd's configuration is not valid TOML")?;
    if let Some(plugins) = document.get_mut("proxy_plugins").and_then(Item::as_table_mut) {
        plugins.remove(NAME);
        if plugins.is_empty() {
            document.remove("proxy_plugins");
        }
    }
    let transfer = document.get_mut("plugins").and_then(|plugins| plugins.get_mut(TRANSFER));
    let entries = transfer.and_then(|transfer| transfer.get_mut("unpack_config"));
    if let Some(entries) = entries.and_then(Item::as_array_of_tables_mut) {
        entries.retain(|entry| entry.get("snapshotter").and_then(Item::as_str) != Some(NAME));
    }
    for path in [
        &["plugins", "io.containerd.grpc.v1.cri", "containerd"][..],
        &["plugins", "io.containerd.cri.v1.images"],
    ] {
        let mut item = Some(document.as_item_mut());
        for key in path {
            item = item.and_then(|item| item.get_mut(key));
        }
        let Some(cri) = item.and_then(Item::as_table_mut) else { continue };
        if cri.get("snapshotter").and_then(Item::as_str) == Some(NAME) {
            cri.remove("snapshotter");
            cri.remove("disable_snapshot_annotations");
        }
    }
    Ok(document.to_string())
}

/// Lets the transfer service unpack onto our snapshots (containerd 1.7 and later; `ctr images pull` of 2.0 goes that way).
fn unpack(root: &mut Table) -> Result<()> {
    let transfer = table(root, &["plugins", TRANSFER])?;
    let entries =
        transfer.entry("unpack_config").or_insert_with(|| Item::ArrayOfTables(ArrayOfTables::new()));
    let entries = entries
        .as_array_of_tables_mut()
        .context("`unpack_config` of containerd's configuration is no list")?;
    let ours = |entry: &Table| entry.get("snapshotter").and_then(Item::as_str) == Some(NAME);
    if entries.iter().any(ours) {
        return Ok(());
    }
    // A list that is there takes the place of containerd's own, which is one entry for the default.
    for snapshotter in if entries.is_empty() { &[NAME, "overlayfs"][..] } else { &[NAME] } {
        let mut entry = Table::new();
        let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        entry.insert("platform", value(format!("linux/{arch}")));
        entry.insert("snapshotter", value(*snapshotter));
        entries.push(entry);
    }
    Ok(())
}

/// The table at `path`, made where it is missing.
fn table<'a>(root: &'a mut Table, path: &[&str]) -> Result<&'a mut Table> {
    let mut current = root;
    for (depth, key) in path.iter().enumerate() {
        let last = depth + 1 == path.len();
        let item = current.entry(key).or_insert_with(|| {
            let mut new = Table::new();
            new.set_implicit(!last);
            Item::Table(new)
        });
        current = item
            .as_table_mut()
            .with_context(|| format!("`{key}` of containerd's configuration is no section"))?;
    }
    Ok(current)
}

fn set(table: &mut Table, key: &str, wanted: &str) {
    if table.get(key).and_then(Item::as_str) != Some(wanted) {
        keep_decor(table, key, value(wanted));
    }
}

/// Sets a value and keeps the comments around it.
fn keep_decor(table: &mut Table, key: &str, mut new: Item) {
    if let (Some(old), Some(new)) = (table.get(key).and_then(Item::as_value), new.as_value_mut()) {
        *new.decor_mut() = old.decor().clone();
    }
    table.insert(key, new);
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOCKET: &str = "/run/sluice/snapshotter.sock";

    #[test]
    fn a_new_file_says_all_that_is_needed() {
        let text = with_sluice("", SOCKET).expect("valid");
        for line in [
            "version = 2",
            "[proxy_plugins.sluice]",
            "address = \"/run/sluice/snapshotter.sock\"",
            "[plugins.\"io.containerd.grpc.v1.cri\".containerd]",
            "snapshotter = \"sluice\"",
            "disable_snapshot_annotations = false",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert_eq!(with_sluice(&text, SOCKET).expect("valid"), text, "again: nothing changes");
    }

    #[test]
    fn the_operators_own_lines_stay() {
        let text = "# mine\nversion = 2\nroot = \"/data\" # big disk\n\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"pause:3\"\n  [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n    snapshotter = \"overlayfs\" # the default\n";
        let with = with_sluice(text, SOCKET).expect("valid");
        for line in [
            "# mine",
            "root = \"/data\" # big disk",
            "sandbox_image = \"pause:3\"",
            "snapshotter = \"sluice\" # the default",
        ] {
            assert!(with.contains(line), "{line} is not in\n{with}");
        }
        let without = without_sluice(&with).expect("valid");
        assert!(!without.contains("sluice") && without.contains("# mine"), "{without}");
    }

    #[test]
    fn version_three_has_its_own_section() {
        let text = with_sluice("version = 3\n", SOCKET).expect("valid");
        assert!(text.contains("[plugins.\"io.containerd.cri.v1.images\"]"), "{text}");
    }

    #[test]
    fn an_old_file_is_refused_with_advice() {
        let error = with_sluice("root = \"/x\"\n", SOCKET).expect_err("accepted");
        assert!(error.to_string().contains("migrate"), "{error}");
    }
}
