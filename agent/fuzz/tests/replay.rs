//! Every target on its seeds, and on the same many changes of them each time: what `cargo xtask fuzz` does for long, for a moment.

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use sluice_fuzz::{TARGETS, Target, scratch};

/// Changes of each target's seeds together.
const CHANGES: usize = 2000;
/// An input larger than that only takes longer.
const LARGEST: usize = 64 << 10;
/// Of targets that start a program for each input.
const SLOW: (&str, usize) = ("provider", 200);

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(top().join("seeds").join(target))
        .unwrap_or_else(|error| panic!("the target {target} has no seeds: {error}"))
        .map(|entry| entry.expect("an entry").path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "the target {target} has no seeds");
    paths.iter().map(|path| fs::read(path).expect("a seed")).collect()
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 16) as usize % limit.max(1)
    }

    /// One to four changes: bits, bytes, numbers at their ends, pieces removed, repeated, or taken from another seed.
    fn changed(&mut self, seed: &[u8], other: &[u8]) -> Vec<u8> {
        let mut bytes = seed.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            let len = 1 + self.below(bytes.len().saturating_sub(at).min(64));
            let end = (at + len).min(bytes.len());
            match self.below(7) {
                0 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
                1 if !bytes.is_empty() => bytes[at] = self.below(256) as u8,
                2 => bytes[at..end].fill([0, 0xff, 0x7f, 0x80, b'9'][self.below(5)]),
                3 => drop(bytes.drain(at..end)),
                4 => {
                    let piece = bytes[at..end].repeat(1 + self.below(8));
                    bytes.splice(at..at, piece);
                }
                5 => {
                    let from = self.below(other.len());
                    let piece = other[from..(from + len).min(other.len())].to_vec();
                    bytes.splice(at..at, piece);
                }
                _ => bytes.truncate(at),
            }
        }
        bytes.truncate(LARGEST);
        bytes
    }
}

/// Runs a target; what it must not be stopped by is kept to be looked at.
fn run(name: &str, target: Target, input: &[u8]) {
    if catch_unwind(AssertUnwindSafe(|| target(input))).is_err() {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}"));
        fs::write(&kept, input).expect("written");
        panic!("the target {name} failed; its input is in {}", kept.display());
    }
}

#[test]
fn every_target_stands_its_seeds_and_changes_of_them() {
    let began = std::time::Instant::now();
    for (name, target) in TARGETS {
        let seeds = seeds(name);
        for seed in &seeds {
            run(name, target, seed);
        }
        let mut random =
            Random(name.bytes().fold(7, |hash: u64, byte| hash.wrapping_mul(31) + u64::from(byte)));
        for _ in 0..if name == SLOW.0 { SLOW.1 } else { CHANGES } {
            let (seed, other) = (&seeds[random.below(seeds.len())], &seeds[random.below(seeds.len())]);
            if seed.len() <= LARGEST {
                run(name, target, &random.changed(seed, other));
            }
        }
        eprintln!("{name}: {} seeds, {:.1} s so far", seeds.len(), began.elapsed().as_secs_f64());
    }
    scratch::remove();
}

/// Changes of what is refused at once would find nothing.
#[test]
fn seeds_are_understood() {
    use sluice_registry::{Client, ResolvedImage, outside};
    let read = |name: &str| fs::read(top().join("seeds").join(name)).expect("a seed");
    let manifest = read("manifest/one-layer");
    let len = usize::from(u16::from_le_bytes([manifest[0], manifest[1]]));
    let (manifest, config) = manifest[2..].split_at(len);
    let reference = Client::parse("registry.example/app:1").expect("a reference");
    let [manifest, config] = [manifest, config].map(bytes::Bytes::copy_from_slice);
    ResolvedImage::from_parts(reference, "sha256:0".to_owned(), manifest, config).expect("an image");
    let pack = read("pack/two-frames");
    let table = sluice_prefetch::PackTable::parse(&pack[1..], pack.len() as u64 - 1).expect("a pack");
    assert!(matches!(table, sluice_prefetch::Head::Table(table) if !table.frames().is_empty()));
    let elf = read("elf/program");
    let mut bytes = sluice_prefetch::ElfBytes::new(elf.len() as u64);
    bytes.add(0, elf);
    let sluice_prefetch::Elf::Needs(needs) = bytes.look() else { panic!("no program") };
    assert_eq!(needs.libraries, [b"libneeded.so"]);
    let job = sluice_batch::parse(&read("batch/job")).expect("a job");
    job.check(true).expect("it keeps the rules");
    serde_json::from_slice::<sluice_registry_server::Faults>(&read("faults/all")).expect("faults");
    let hosts = outside::hosts(&top().join("seeds/hosts/mirrors"), "registry.example").expect("hosts");
    assert_eq!(hosts.len(), 3, "{hosts:?}");
    assert_eq!(
        outside::challenge(&read("challenge/bearer")[1..]).as_deref(),
        Some("https://auth.example/token")
    );
    assert_eq!(outside::retry_after(&read("challenge/seconds")[1..]).map(|pause| pause.as_secs()), Some(120));
    assert_eq!(outside::referrers(&read("referrers/two"), "application/vnd.sluice.index.v1").len(), 2);
    let config = top().join("seeds/docker_config/auths");
    assert!(outside::docker_login(&config, "registry.example").expect("a login").is_some());
    for seed in ["short", "tag"] {
        Client::parse(&String::from_utf8(read(&format!("reference/{seed}"))).expect("text"))
            .expect("a reference");
    }
}

#[test]
fn every_module_is_a_target() {
    let modules: BTreeSet<String> = fs::read_dir(top().join("src/targets"))
        .expect("targets")
        .map(|entry| {
            entry.expect("an entry").path().file_stem().expect("a name").to_string_lossy().into_owned()
        })
        .filter(|name| name != "mod")
        .collect();
    let names: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(modules, names);
}
