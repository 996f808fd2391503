//! Which manifest of an image index this machine runs: containerd's rules (`containerd/platforms`, `images.Manifest`).
//!
//! A streamed image must be the one that an ordinary pull would get, so names are made equal and variants are tried in the
//! same order: the machine's own level, then what it can run too (amd64/v3 before v2 before v1 before 386).

use oci_spec::image::Descriptor;

/// Operating system, architecture and variant in containerd's normal form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Platform {
    os: String,
    architecture: String,
    variant: String,
}

impl std::fmt::Display for Platform {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(formatter, "/{}", self.variant) }
    }
}

impl Platform {
    /// In the normal form.
    pub(crate) fn new(os: &str, architecture: &str, variant: &str) -> Self {
        let (os, architecture, variant) =
            (os.to_lowercase(), architecture.to_lowercase(), variant.to_lowercase());
        let (architecture, variant) = match (architecture.as_str(), variant.as_str()) {
            ("i386", _) => ("386", ""),
            ("x86_64" | "x86-64" | "amd64", "v1") => ("amd64", ""),
            ("x86_64" | "x86-64" | "amd64", variant) => ("amd64", variant),
            ("aarch64" | "arm64", "8" | "v8") => ("arm64", ""),
            ("aarch64" | "arm64", variant) => ("arm64", variant),
            ("armhf", _) => ("arm", "v7"),
            ("armel", _) => ("arm", "v6"),
            ("arm", "" | "7") => ("arm", "v7"),
            ("arm", "5") => ("arm", "v5"),
            ("arm", "6") => ("arm", "v6"),
            ("arm", "8") => ("arm", "v8"),
            other => other,
        };
        Self { os, architecture: architecture.to_owned(), variant: variant.to_owned() }
    }

    /// This machine's.
    pub(crate) fn own() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86" => "386",
            "loongarch64" => "loong64",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            other => other,
        };
        Self::new("linux", architecture, level())
    }

    fn with(&self, architecture: &str, variant: &str) -> Self {
        Self::new(&self.os, architecture, variant)
    }

    /// What a machine of this platform runs, best first.
    pub(crate) fn runs(&self) -> Vec<Self> {
        let mut all = vec![self.clone()];
        let number = |text: &str| text.trim_start_matches('v').parse::<u32>().ok();
        match self.architecture.as_str() {
            "amd64" => {
                let lower = (1..number(&self.variant).unwrap_or(1)).rev();
                all.extend(lower.map(|version| self.with("amd64", &format!("v{version}"))));
                all.push(self.with("386", ""));
            }
            "arm" => {
                let lower = (5..number(&self.variant).unwrap_or(5)).rev();
                all.extend(lower.map(|version| self.with("arm", &format!("v{version}"))));
            }
            "arm64" => {
                let variant = if self.variant.is_empty() { "v8" } else { &self.variant };
                let (major, minor) = variant.split_once('.').unwrap_or((variant, "0"));
                let mut minor = number(minor).unwrap_or(0);
                let below = |major: u32, minor: u32| {
                    let name = if minor == 0 { format!("v{major}") } else { format!("v{major}.{minor}") };
                    self.with("arm64", &name)
                };
                if number(major) == Some(9) {
                    all.extend((0..minor).rev().map(|minor| below(9, minor)));
                    // v9.0 is v8.5 and more.
                    minor += 5;
                    all.push(below(8, minor));
                }
                all.extend((0..minor).rev().map(|minor| below(8, minor)));
                all.extend(self.with("arm", "v8").runs());
            }
            _ => {}
        }
        all
    }
}

/// The machine's level of its architecture.
fn level() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        // The levels of the x86-64 psABI, as far as programs can see them.
        let v2 = has!("cmpxchg16b") && has!("popcnt") && has!("sse3") && has!("ssse3") && has!("sse4.2");
        let v3 = v2 && has!("avx2") && has!("bmi1") && has!("bmi2") && has!("f16c") && has!("fma");
        let v3 = v3 && has!("lzcnt") && has!("movbe");
        let v4 = v3 && has!("avx512f") && has!("avx512bw") && has!("avx512cd");
        let v4 = v4 && has!("avx512dq") && has!("avx512vl");
        match (v2, v3, v4) {
            (_, _, true) => "v4",
            (_, true, _) => "v3",
            (true, ..) => "v2",
            _ => "v1",
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    ""
}

/// The entries of an index that may run on a machine, best first; those that do not say what they are for come last.
pub(crate) fn candidates<'a>(entries: &'a [Descriptor], machine: &Platform) -> Vec<&'a Descriptor> {
    let runs = machine.runs();
    let rank = |entry: &&Descriptor| match entry.platform() {
        Some(platform) => {
            let variant = platform.variant().as_deref().unwrap_or("");
            let platform =
                Platform::new(&platform.os().to_string(), &platform.architecture().to_string(), variant);
            runs.iter().position(|one| *one == platform)
        }
        None => Some(runs.len()),
    };
    let mut found: Vec<(usize, &Descriptor)> =
        entries.iter().filter_map(|entry| rank(&entry).map(|rank| (rank, entry))).collect();
    found.sort_by_key(|(rank, _)| *rank);
    found.into_iter().map(|(_, entry)| entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(machine: (&str, &str)) -> String {
        let runs = Platform::new("linux", machine.0, machine.1).runs();
        let names: Vec<String> = runs.iter().map(|one| one.to_string().replace("linux/", "")).collect();
        names.join(" ")
    }

    #[test]
    fn what_machines_run() {
        let table = [
            (("x86_64", "v3"), "amd64/v3 amd64/v2 amd64 386"),
            (("amd64", ""), "amd64 386"),
            (("amd64", "v1"), "amd64 386"),
            (("aarch64", ""), "arm64 arm/v8 arm/v7 arm/v6 arm/v5"),
            (("arm64", "v8"), "arm64 arm/v8 arm/v7 arm/v6 arm/v5"),
            (("arm64", "v8.2"), "arm64/v8.2 arm64/v8.1 arm64 arm/v8 arm/v7 arm/v6 arm/v5"),
            (
                ("arm64", "v9.1"),
                "arm64/v9.1 arm64/v9 arm64/v8.6 arm64/v8.5 arm64/v8.4 arm64/v8.3 arm64/v8.2 arm64/v8.1 arm64 arm/v8 \
                 arm/v7 arm/v6 arm/v5",
            ),
            (("arm", ""), "arm/v7 arm/v6 arm/v5"),
            (("armel", ""), "arm/v6 arm/v5"),
            (("s390x", ""), "s390x"),
        ];
        for (machine, wanted) in table {
            assert_eq!(names(machine), wanted, "{machine:?}");
        }
        assert!(Platform::own().to_string().starts_with("linux/"));
    }

    #[test]
    fn choices() {
        let chosen = |machine: (&str, &str), entries: &[&str]| -> Vec<usize> {
            let entry = |(at, name): (usize, &&str)| {
                let mut parts = name.split('/');
                let platform = match (parts.next(), parts.next(), parts.next()) {
                    (Some(os), Some(architecture), variant) => serde_json::json!({
                        "os": os, "architecture": architecture, "variant": variant.unwrap_or_default(),
                    }),
                    _ => serde_json::Value::Null,
                };
                let mut entry = serde_json::json!({
                    "mediaType": "application/vnd.oci.image.manifest.v1+json", "size": at,
                    "digest": format!("sha256:{at:064}"), "platform": platform,
                });
                if platform.is_null() {
                    entry.as_object_mut().expect("an object").remove("platform");
                }
                serde_json::from_value(entry).expect("a descriptor")
            };
            let entries: Vec<Descriptor> = entries.iter().enumerate().map(entry).collect();
            let machine = Platform::new("linux", machine.0, machine.1);
            candidates(&entries, &machine).iter().map(|entry| entry.size() as usize).collect()
        };
        let amd = ["linux/arm64/v8", "linux/amd64", "linux/amd64/v2", "linux/amd64/v3", "windows/amd64"];
        assert_eq!(chosen(("amd64", "v2"), &amd), [2, 1]);
        assert_eq!(chosen(("amd64", "v4"), &amd), [3, 2, 1]);
        assert_eq!(chosen(("amd64", "v1"), &amd), [1]);
        assert_eq!(chosen(("arm64", ""), &["linux/arm/v7", "linux/arm64", "linux/arm64/v8"]), [1, 2, 0]);
        assert_eq!(chosen(("arm", "v6"), &["linux/arm/v7", "linux/arm/v5", "linux/arm/v6"]), [2, 1]);
        assert_eq!(chosen(("amd64", ""), &["", "unknown/unknown", "linux/amd64"]), [2, 0]);
        assert_eq!(chosen(("riscv64", ""), &["linux/amd64", "linux/arm64"]), [0; 0]);
    }
}
