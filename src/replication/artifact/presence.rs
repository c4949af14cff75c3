//! Decides for which rows of a full copy it is enough that the listing of a shared bucket shows
//! their artifacts. They are hashed afterwards.

use crate::config::ArtifactsMode;

/// The rows of a full copy whose artifacts are admitted by their presence. The stream reads and
/// hashes each artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    /// No row: each artifact is hashed before its row is visible.
    NoRow,
    /// The rows that the visible copy has already. New rows wait until their artifacts are hashed.
    VisibleRows,
    /// All rows: this is the first copy over the bucket.
    AllRows,
}

/// Chooses the rows. `has_copy`: a copy with a recovery point is visible here. `is_known_place`: a
/// pass has looked at all artifacts in this bucket, in this mode.
pub(crate) fn presence(mode: ArtifactsMode, has_copy: bool, is_known_place: bool) -> Presence {
    match mode {
        ArtifactsMode::Shared if has_copy && is_known_place => Presence::VisibleRows,
        ArtifactsMode::Shared => Presence::AllRows,
        ArtifactsMode::External | ArtifactsMode::Replicate => Presence::NoRow,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_first_copy_over_a_shared_bucket_hashes_no_new_row() {
        for (has_copy, is_known, expected) in [
            (false, false, Presence::AllRows),
            (false, true, Presence::AllRows),
            (true, false, Presence::AllRows),
            (true, true, Presence::VisibleRows),
        ] {
            assert_eq!(
                presence(ArtifactsMode::Shared, has_copy, is_known),
                expected
            );
            for mode in [ArtifactsMode::External, ArtifactsMode::Replicate] {
                assert_eq!(presence(mode, has_copy, is_known), Presence::NoRow);
            }
        }
    }
}
