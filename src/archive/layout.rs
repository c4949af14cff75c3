//! The names of the files of an archive. `docs/archive-format.md` describes them.

use crate::package::Checksum;
use chrono::{DateTime, SecondsFormat, Utc};

/// The text for people who restore without this program.
pub(super) const README: &str = "README.txt";
/// The head of the archive: format, lineage.
pub(super) const HEAD: &str = "archive.json";
/// The cluster that writes into the archive.
pub(super) const WRITER: &str = "writer.json";
/// Files that a prune may remove at its next pass.
pub(super) const DOOMED: &str = "doomed.json";
/// Folder of the generations.
pub(super) const GENERATIONS: &str = "generations/";
/// Folder of the artifacts, each under Builder's own key.
pub(super) const ARTIFACTS: &str = "artifacts/";
/// Folder of other bytes of a key that is in `artifacts/` already.
pub(super) const REPLACED: &str = "replaced/";
/// Folder of the lists of artifacts.
pub(super) const LISTS: &str = "lists/";
/// Folder of the pins.
pub(super) const PINS: &str = "pins/";

/// Returns the path of an artifact's first bytes.
pub(super) fn artifact(key: &str) -> String {
    format!("{ARTIFACTS}{key}")
}

/// Returns the path of other bytes of a key.
pub(super) fn replaced(key: &str, checksum: &Checksum) -> String {
    format!("{REPLACED}{checksum}/{key}")
}

/// Returns the path of a list, which is named by its SHA-256.
pub(super) fn list(sha256: &str) -> String {
    format!("{LISTS}{sha256}.jsonl")
}

pub(super) fn manifest(generation: &str) -> String {
    format!("{GENERATIONS}{generation}/manifest.json")
}

pub(super) fn dump(generation: &str) -> String {
    format!("{GENERATIONS}{generation}/builder.dump")
}

pub(super) fn pin(generation: &str) -> String {
    format!("{PINS}{generation}.json")
}

/// Returns the generation of a path in its folder.
pub(super) fn generation_of(path: &str) -> Option<&str> {
    let (name, _) = path.strip_prefix(GENERATIONS)?.split_once('/')?;
    is_generation(name).then_some(name)
}

/// Returns a name for a generation that is made now. Names sort by time.
pub(super) fn new_generation(now: DateTime<Utc>) -> String {
    now.to_rfc3339_opts(SecondsFormat::Millis, true)
        .replace([':', '.'], "-")
}

/// Returns whether a generation can have this name: it is a file name of letters, digits and `-`.
pub(super) fn is_generation(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '-';
    (1..=64).contains(&name.len()) && name.chars().all(fits) && !name.starts_with('-')
}

/// Returns whether a manifest or a list may name this path. Nothing outside of the archive can be
/// named.
pub(super) fn is_path(path: &str) -> bool {
    let parts_fit = path
        .split('/')
        .all(|part| !part.is_empty() && part != "." && part != "..");
    path.len() <= 1024 && parts_fit && !path.contains(|c: char| c.is_control() || c == '\\')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_generations_sort_by_time_and_are_file_names() {
        let name = |text: &str| new_generation(text.parse().unwrap());
        let (first, second) = (
            name("2026-12-01T09:59:59.999Z"),
            name("2026-12-01T10:00:00Z"),
        );
        assert_eq!(first, "2026-12-01T09-59-59-999Z");
        assert!(first < second && is_generation(&first), "{first} {second}");
        for bad in ["", "..", "a/b", "a.b", "-x", "a b", &"a".repeat(65)] {
            assert!(!is_generation(bad), "{bad:?}");
        }
        assert_eq!(generation_of(&manifest(&first)), Some(first.as_str()));
        assert_eq!(generation_of("lists/x"), None);
    }

    #[test]
    fn a_path_stays_within_the_archive() {
        assert!(is_path("artifacts/core/redis/1/2/x.hart"));
        for bad in [
            "", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a\nb", "a\\b",
        ] {
            assert!(!is_path(bad), "{bad:?}");
        }
    }
}
