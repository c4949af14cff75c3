//! Finds the known key that an unknown key was probably meant to be.

/// Returns the candidate nearest to `unknown`, if one is near enough to be useful.
pub(super) fn nearest<'a>(
    unknown: &str,
    candidates: impl Iterator<Item = &'a str> + Clone,
) -> Option<&'a str> {
    // A key with the right name in a wrong table, or in no table, counts as near even if the whole
    // paths differ much.
    let last = |path: &'a str| path.rsplit('.').next() == unknown.rsplit('.').next();
    let mut same_name = candidates.clone().filter(|path| last(path));
    if let (Some(only), None) = (same_name.next(), same_name.next()) {
        return Some(only);
    }
    let allowed = 1 + unknown.chars().count() / 6;
    candidates
        .map(|path| (distance(unknown, path), path))
        .filter(|(distance, _)| *distance <= allowed)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, path)| path)
}

/// Returns the Levenshtein distance: the number of insertions, deletions and replacements.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (line, wanted) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = line + 1;
        for (column, found) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(wanted != *found);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(row[column] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", "abc"), 0);
        assert_eq!(distance("kitten", "sitting"), 3);
    }

    #[test]
    fn names_the_near_and_only_the_near() {
        let keys = [
            "peer.datastore.port",
            "local.datastore.port",
            "replication.jobs",
            "role",
        ];
        let nearest = |unknown| nearest(unknown, keys.iter().copied());
        assert_eq!(nearest("peer.datastore.prot"), Some("peer.datastore.port"));
        assert_eq!(nearest("jobs"), Some("replication.jobs"));
        assert_eq!(nearest("rol"), Some("role"));
        // Two keys have this name, and neither path is near.
        assert_eq!(nearest("port"), None);
        assert_eq!(nearest("memcache"), None);
    }
}
