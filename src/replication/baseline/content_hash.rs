//! A hash of a table's content: the same rows give the same hash in any order and with any split.

use std::fmt;

/// Sum of the rows' BLAKE2b hashes, lane by lane. It finds differences between honest servers, and
/// is no seal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ContentHash {
    rows: u64,
    sum: [u64; 4],
}

impl ContentHash {
    /// Adds a row, given as one line of COPY's text form.
    pub fn add(&mut self, row: &[u8]) {
        let hash = blake2b_simd::Params::new().hash_length(32).hash(row);
        let mut lanes = hash.as_bytes().chunks_exact(8);
        for sum in &mut self.sum {
            let lane = lanes.next().and_then(|bytes| bytes.try_into().ok());
            *sum = sum.wrapping_add(u64::from_le_bytes(lane.unwrap_or_default()));
        }
        self.rows += 1;
    }

    pub fn merge(&mut self, other: ContentHash) {
        self.rows += other.rows;
        for (sum, more) in self.sum.iter_mut().zip(other.sum) {
            *sum = sum.wrapping_add(more);
        }
    }

    pub fn rows(&self) -> u64 {
        self.rows
    }
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.sum
            .iter()
            .try_for_each(|lane| write!(f, "{lane:016x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rows: &[&str]) -> ContentHash {
        let mut hash = ContentHash::default();
        rows.iter().for_each(|row| hash.add(row.as_bytes()));
        hash
    }

    #[test]
    fn order_and_split_do_not_matter() {
        let mut halves = of(&["c\n"]);
        halves.merge(of(&["a\n", "b\n"]));
        assert_eq!(halves, of(&["a\n", "b\n", "c\n"]));
    }

    #[test]
    fn any_other_rows_differ() {
        let hash = of(&["a\n", "b\n"]).to_string();
        assert_ne!(hash, of(&["a\n", "c\n"]).to_string());
        assert_ne!(hash, of(&["a\n", "b\n", "b\n", "b\n"]).to_string());
        assert_ne!(of(&[]).to_string(), hash);
    }
}
