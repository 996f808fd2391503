//! `vm-images/kernels.toml`: which packages a kernel is made of. Comments stay when it is moved.

use std::path::Path;

use anyhow::{Context, Result};
use toml_edit::{ArrayOfTables, DocumentMut, InlineTable, Item, Table, Value};

/// The file.
#[derive(Debug)]
pub(super) struct Lock {
    document: DocumentMut,
    pub(super) kernels: Vec<Locked>,
}

/// A kernel in it.
#[derive(Debug, Clone)]
pub(super) struct Locked {
    pub(super) name: String,
    pub(super) suite: String,
    /// The package whose dependencies are the suite's kernel.
    pub(super) follows: String,
    pub(super) rebuild: Option<Rebuild>,
    pub(super) packages: Vec<Package>,
}

/// A module that is made anew.
#[derive(Debug, Clone)]
pub(super) struct Rebuild {
    /// Name of the file beside the lock.
    pub(super) patch: String,
    /// Its directory in the kernel's sources.
    pub(super) module: String,
}

/// A package, exactly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Package {
    pub(super) name: String,
    pub(super) version: String,
    pub(super) sha256: String,
}

impl Lock {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    fn parse(text: &str) -> Result<Self> {
        let document: DocumentMut = text.parse()?;
        let kernels = document.get("kernel").and_then(Item::as_array_of_tables).context("no [[kernel]]")?;
        let kernels = kernels.iter().map(locked).collect::<Result<_>>()?;
        Ok(Self { document, kernels })
    }

    pub(super) fn set_packages(&mut self, number: usize, packages: Vec<Package>) {
        let mut array = toml_edit::Array::new();
        for package in &packages {
            let mut table = InlineTable::new();
            table.insert("name", package.name.as_str().into());
            table.insert("version", package.version.as_str().into());
            table.insert("sha256", package.sha256.as_str().into());
            let mut value = Value::InlineTable(table);
            value.decor_mut().set_prefix("\n  ");
            array.push_formatted(value);
        }
        array.set_trailing("\n");
        array.set_trailing_comma(true);
        let tables = self.document.get_mut("kernel").and_then(Item::as_array_of_tables_mut);
        if let Some(table) = tables.and_then(|tables: &mut ArrayOfTables| tables.get_mut(number)) {
            table.insert("packages", toml_edit::value(array));
        }
        if let Some(kernel) = self.kernels.get_mut(number) {
            kernel.packages = packages;
        }
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        std::fs::write(path, self.document.to_string())
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

fn locked(table: &Table) -> Result<Locked> {
    let packages = table.get("packages").and_then(Item::as_array).context("a kernel without packages")?;
    let package = |value: &Value| -> Result<Package> {
        let one = value.as_inline_table().context("a package is { name, version, sha256 }")?;
        let field = |name: &str| {
            let found = one.get(name).and_then(Value::as_str).map(str::to_owned);
            found.with_context(|| format!("a package without {name}"))
        };
        Ok(Package { name: field("name")?, version: field("version")?, sha256: field("sha256")? })
    };
    let rebuild = match (text(table, "patch"), text(table, "module")) {
        (Ok(patch), Ok(module)) => Some(Rebuild { patch, module }),
        _ => None,
    };
    Ok(Locked {
        name: text(table, "name")?,
        suite: text(table, "suite")?,
        follows: text(table, "follows")?,
        rebuild,
        packages: packages.iter().map(package).collect::<Result<_>>()?,
    })
}

fn text(table: &Table, name: &str) -> Result<String> {
    let found = table.get(name).and_then(Item::as_str).map(str::to_owned);
    found.with_context(|| format!("a kernel without {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_projects_lock_is_whole_and_moves_without_losing_its_comments() {
        let path = crate::run::top().join("vm-images/kernels.toml");
        let mut lock = Lock::read(&path).expect("reads");
        let names: Vec<_> = lock.kernels.iter().map(|kernel| kernel.name.as_str()).collect();
        assert_eq!(names, ["5.10", "6.1", "6.1-fault", "6.12", "newest"]);
        let digests = lock.kernels.iter().flat_map(|kernel| &kernel.packages).map(|package| &package.sha256);
        assert!(digests.into_iter().all(|digest| digest.len() == 64));
        let before = lock.document.to_string();
        let same = lock.kernels.first().map(|kernel| kernel.packages.clone()).unwrap_or_default();
        lock.set_packages(0, same);
        assert_eq!(lock.document.to_string(), before);
        let other = Package { name: "a".into(), version: "1".into(), sha256: "b".repeat(64) };
        lock.set_packages(1, vec![other.clone()]);
        let again = Lock::parse(&lock.document.to_string()).expect("parses");
        assert_eq!(again.kernels.get(1).map(|kernel| kernel.packages.clone()), Some(vec![other]));
        assert!(lock.document.to_string().starts_with("# The kernels"));
    }
}
