//! Names of databases that stand beside Builder's own.

/// PostgreSQL cuts what is longer, and so would give another name than the one that we remember.
const LONGEST: usize = 63;

/// The database's name with that ending. Of a long name as much stays as there is room for, and a few digits that tell it
/// from others that begin alike.
pub fn beside(database: &str, ending: &str) -> String {
    if database.len() + ending.len() <= LONGEST {
        return format!("{database}{ending}");
    }
    let hash = blake2b_simd::Params::new()
        .hash_length(4)
        .hash(database.as_bytes());
    let ending = format!("_{}{ending}", hash.to_hex());
    let mut room = LONGEST.saturating_sub(ending.len()).min(database.len());
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
