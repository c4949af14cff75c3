//! Real packages, made and signed by Habitat itself: what this crate reads in a `.hart` file is what Habitat wrote.

use std::fs;
use std::path::{Path, PathBuf};

use warm_spare::package::{Inspector, PublicKey, Signature};

/// The packages are not part of the repository; they lie beside it where it is developed.
fn folder() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/harts");
    folder.is_dir().then_some(folder)
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    paths.sort();
    paths
}

#[test]
fn real_packages_are_read_and_their_signatures_hold() {
    let Some(folder) = folder() else {
        println!("skipped: ../shared/harts is not here");
        return;
    };
    let harts = files(&folder, "hart");
    let mut good = 0;
    for path in &harts {
        let file = fs::read(path).unwrap();
        let mut inspector = Inspector::new();
        file.chunks(1000).for_each(|chunk| inspector.update(chunk));
        let found = inspector.finish();
        assert_eq!(found.bytes, file.len() as u64);
        let facts = found
            .hart
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(facts.payload_hash, facts.signed_hash, "{}", path.display());

        let key = fs::read_to_string(folder.join(format!("{}.pub", facts.key_name)))
            .ok()
            .map(|text| PublicKey::parse(&text).unwrap());
        let verdict = facts.verify(key.as_ref());
        println!("{}: {} {verdict:?}", path.display(), found.checksum);
        match key {
            Some(_) => assert_eq!(verdict, Signature::Good, "{}", path.display()),
            None => assert_eq!(verdict, Signature::KeyUnknown(facts.key_name)),
        }
        good += usize::from(verdict == Signature::Good);
    }
    // A folder without packages, or keys that match none, would prove nothing.
    assert!(
        good > 0,
        "no signature could be checked among {} packages",
        harts.len()
    );
}
