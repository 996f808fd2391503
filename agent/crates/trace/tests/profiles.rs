//! Laws of profiles: merging in any order is the same, nothing is planned twice, rare things come last, bytes come back.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use sluice_trace::{ContentKey, FileFacts, Profile, ProfileError, ProfileKey, Sample, SampleRange};

const PAGE: u64 = 4096;
const FILE_PAGES: u32 = 64;

fn key() -> ProfileKey {
    ProfileKey { image: "sha256:1234".to_owned(), entry: "python# app.py".to_owned() }
}

fn facts(number: u8) -> FileFacts {
    let size = u64::from(FILE_PAGES) * PAGE - u64::from(number);
    FileFacts { content: ContentKey([number; 16]), size, path: format!("usr/lib/{number}").into_bytes() }
}

/// A start that touched single pages of files, in order; each page once.
fn sample(recorded_at: u64, touches: &[(u8, u32)]) -> Sample {
    let mut files: Vec<FileFacts> = Vec::new();
    let mut ranges = Vec::new();
    let mut seen = BTreeSet::new();
    for (at_ms, touch) in touches.iter().enumerate() {
        if !seen.insert(*touch) {
            continue;
        }
        let facts = facts(touch.0);
        let file = files.iter().position(|one| *one == facts).unwrap_or_else(|| {
            files.push(facts);
            files.len() - 1
        });
        ranges.push(SampleRange { file: file as u32, first_page: touch.1, pages: 1, at_ms: at_ms as u32 });
    }
    Sample { recorded_at, inherited: false, files, ranges }
}

fn profile(samples: &[Sample]) -> Profile {
    let mut profile = Profile::new(key());
    samples.iter().cloned().for_each(|sample| profile.add(sample));
    profile
}

fn merged(one: &Profile, other: &Profile) -> Profile {
    let mut one = one.clone();
    one.merge(other.clone()).expect("the same key");
    one
}

/// Pages of a plan, in its order: file number, page, weight.
fn pages(profile: &Profile) -> Vec<(u8, u32, f64)> {
    let plan = profile.plan();
    let pages = plan.iter().flat_map(|one| {
        let ContentKey(content) = one.file.content;
        let first = one.offset / PAGE;
        (first..(one.offset + one.len).div_ceil(PAGE)).map(move |page| (content[0], page as u32, one.weight))
    });
    pages.collect()
}

prop_compose! {
    fn any_sample()(
        recorded_at in 0..50_u64,
        inherited in proptest::bool::weighted(0.2),
        touches in proptest::collection::vec((0..4_u8, 0..FILE_PAGES), 1..30),
    ) -> Sample {
        Sample { inherited, ..sample(recorded_at, &touches) }
    }
}

fn any_profile() -> impl Strategy<Value = Profile> {
    proptest::collection::vec(any_sample(), 0..12).prop_map(|samples| profile(&samples))
}

proptest! {
    #[test]
    fn merging_is_the_same_in_any_order(a in any_profile(), b in any_profile(), c in any_profile()) {
        prop_assert_eq!(merged(&a, &b), merged(&b, &a));
        prop_assert_eq!(merged(&merged(&a, &b), &c), merged(&a, &merged(&b, &c)));
        prop_assert_eq!(merged(&a, &a), a.clone());
        prop_assert_eq!(merged(&merged(&a, &b), &b), merged(&a, &b));
        prop_assert_eq!(merged(&a, &b).plan(), merged(&b, &a).plan());
    }

    #[test]
    fn bytes_come_back(mut profile in any_profile(), last_used: u64) {
        profile.last_used = last_used;
        let bytes = profile.encode().expect("encoded");
        let decoded = Profile::decode(&bytes);
        prop_assert_eq!(decoded.as_ref(), Ok(&profile));
        prop_assert_eq!(decoded.expect("decoded").encode().expect("encoded"), bytes);
    }

    #[test]
    fn a_plan_holds_every_page_once_and_the_rare_ones_last(samples in proptest::collection::vec(any_sample(), 1..12)) {
        let own: Vec<&Sample> = samples.iter().filter(|sample| !sample.inherited).collect();
        let counted: Vec<&Sample> = if own.is_empty() { samples.iter().collect() } else { own };
        // Equal starts at the same second are one.
        let counted: BTreeSet<_> =
            counted.iter().map(|one| (one.recorded_at, one.files.clone(), one.ranges.clone())).collect();
        let mut expected: BTreeMap<(u8, u32), usize> = BTreeMap::new();
        for (_, files, ranges) in &counted {
            for range in ranges {
                let ContentKey(content) = files[range.file as usize].content;
                *expected.entry((content[0], range.first_page)).or_default() += 1;
            }
        }
        let plan = pages(&profile(&samples));
        let mut found = BTreeMap::new();
        for (file, page, weight) in &plan {
            let seen = (weight * counted.len() as f64).round() as usize;
            prop_assert_eq!(found.insert((*file, *page), seen), None, "planned twice");
        }
        prop_assert_eq!(found, expected);
        let first_rare = plan.iter().position(|(_, _, weight)| *weight < 0.5).unwrap_or(plan.len());
        prop_assert!(plan[first_rare..].windows(2).all(|pair| pair[0].2 >= pair[1].2), "the most frequent first");
        prop_assert!(plan[first_rare..].iter().all(|(_, _, weight)| *weight < 0.5));
    }

    #[test]
    fn whatever_is_decoded_comes_to_an_end(
        profile in any_profile(),
        changes in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..8),
        cut: u16,
        garbage in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut bytes = profile.encode().expect("encoded");
        for (at, value) in changes {
            let at = usize::from(at) % bytes.len();
            bytes[at] = value;
        }
        bytes.truncate(usize::from(cut) % (bytes.len() + 1));
        // What it says does not matter, only that it says something.
        drop(Profile::decode(&bytes));
        // The same below the compression.
        let mut inside = Vec::from(*b"SLUICEPF\x01\x00");
        inside.extend(zstd::bulk::compress(&garbage, 1).expect("compressed"));
        drop(Profile::decode(&inside));
    }
}

#[test]
fn the_order_is_that_of_the_starts() {
    let learned = profile(&[
        sample(1, &[(0, 5), (1, 0), (2, 9)]),
        sample(2, &[(0, 5), (1, 0), (3, 1), (2, 9)]),
        sample(3, &[(1, 0), (0, 5), (2, 9)]),
    ]);
    let order: Vec<(u8, u32)> = pages(&learned).iter().map(|(file, page, _)| (*file, *page)).collect();
    assert_eq!(order, [(0, 5), (1, 0), (2, 9), (3, 1)], "what one of three touched is last");
}

#[test]
fn the_latest_samples_stay() {
    let learned = profile(&(0..40).map(|at| sample(at, &[(0, at as u32)])).collect::<Vec<_>>());
    let times: Vec<u64> = learned.samples().map(|sample| sample.recorded_at).collect();
    assert_eq!(times, (24..40).rev().collect::<Vec<_>>());
    assert_eq!(learned.last_used, 39);
    assert!(learned.is_expired(100, 60) && !learned.is_expired(99, 60));
}

#[test]
fn a_new_version_inherits_the_files_it_still_has() {
    let old = profile(&[sample(1, &[(0, 1), (1, 2), (2, 3)]), sample(2, &[(1, 4)])]);
    let new_key = ProfileKey { image: "sha256:5678".to_owned(), ..key() };
    // File 1 is gone, file 2 has moved.
    let find = |content: &ContentKey| match content {
        ContentKey([0, ..]) => Some(facts(0)),
        ContentKey([2, ..]) => Some(FileFacts { path: b"moved".to_vec(), ..facts(2) }),
        _ => None,
    };
    let mut heir = old.inherited_by(new_key.clone(), find).expect("something is left");
    assert!(heir.is_inherited());
    assert_eq!((heir.key.clone(), heir.samples().len()), (new_key, 1));
    let plan = heir.plan();
    assert_eq!(
        plan.iter().map(|one| one.file.path.as_slice()).collect::<Vec<_>>(),
        [&b"usr/lib/0"[..], b"moved"]
    );
    assert!(old.inherited_by(key(), |_| None).is_none());
    // Its own first start counts alone.
    heir.add(sample(9, &[(3, 7)]));
    assert!(!heir.is_inherited());
    assert_eq!(pages(&heir), [(3, 7, 1.0)]);
}

#[test]
fn profiles_of_other_things_are_not_merged() {
    let mut one = profile(&[]);
    let other = Profile::new(ProfileKey { entry: "other".to_owned(), ..key() });
    assert!(matches!(one.merge(other), Err(ProfileError::OtherKey { .. })));
}

#[test]
fn foreign_and_newer_bytes_are_refused() {
    assert_eq!(Profile::decode(b""), Err(ProfileError::NotAProfile));
    assert_eq!(Profile::decode(b"SLUICEPX\x01\x00"), Err(ProfileError::NotAProfile));
    assert_eq!(Profile::decode(b"SLUICEPF\x02\x00"), Err(ProfileError::Version(2)));
    assert_eq!(Profile::decode(&[0; (16 << 20) + 1]), Err(ProfileError::TooLong));
    // A frame that would be larger than any profile.
    let mut bomb = Vec::from(*b"SLUICEPF\x01\x00");
    bomb.extend(zstd::bulk::compress(&vec![0; 65 << 20], 1).expect("compressed"));
    assert_eq!(Profile::decode(&bomb), Err(ProfileError::TooLong));
}

#[test]
fn the_golden_profile_is_read() {
    let expected = profile(&[
        sample(1_700_000_000, &[(0, 0), (0, 1), (1, 63), (2, 7)]),
        sample(1_700_000_100, &[(0, 0), (2, 7)]),
        Sample { inherited: true, ..sample(1_600_000_000, &[(3, 3)]) },
    ]);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/profile-v1.bin");
    if std::env::var_os("SLUICE_WRITE_GOLDEN").is_some() {
        std::fs::write(path, expected.encode().expect("encoded")).expect("written");
    }
    assert_eq!(Profile::decode(&std::fs::read(path).expect("read")), Ok(expected));
}
