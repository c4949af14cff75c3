//! Names of databases beside Builder's own.

/// Maximum length of a name in bytes. PostgreSQL cuts a longer name, and so would use another one
/// than the name that we record.
const MAX_NAME_BYTES: usize = 63;

/// Returns a name under which a replaced database is kept: its own with the time of now.
pub(crate) fn replaced_name(database: &str) -> String {
    let now = chrono::Utc::now().format("_%Y%m%dt%H%M%S%3fz");
    beside(database, &now.to_string())
}

/// Returns the database's name with that ending. A long name is cut to fit, and gets a few digits
/// that distinguish it from names with the same beginning.
pub(super) fn beside(database: &str, ending: &str) -> String {
    if database.len() + ending.len() <= MAX_NAME_BYTES {
        return format!("{database}{ending}");
    }
    let hash = blake2b_simd::Params::new()
        .hash_length(4)
        .hash(database.as_bytes());
    let ending = format!("_{}{ending}", hash.to_hex());
    let mut room = MAX_NAME_BYTES
        .saturating_sub(ending.len())
        .min(database.len());
    while !database.is_char_boundary(room) {
        room -= 1;
    }
    format!("{}{ending}", &database[..room])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_cut_so_that_the_server_need_not() {
        assert_eq!(beside("builder", "_incoming"), "builder_incoming");
        let long = "a".repeat(54);
        assert_eq!(beside(&long, "_incoming").len(), 63);
        let names = ["a".repeat(63), "a".repeat(62), "ä".repeat(31)];
        let found: Vec<String> = names.iter().map(|n| beside(n, "_incoming")).collect();
        assert!(found.iter().all(|name| name.len() <= 63), "{found:?}");
        assert!(found.iter().all(|name| name.ends_with("_incoming")));
        assert_ne!(found[0], found[1]);
    }
}
