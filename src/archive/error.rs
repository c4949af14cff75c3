//! Errors of an archive: each names the place, the file, and the next step.

use crate::domain::ErrorCode;
use crate::replication::ReplicationError;
use std::fmt::Display;

/// A request to the place failed.
pub(super) fn unreachable(place: &str, doing: &str, cause: &dyn Display) -> ReplicationError {
    ReplicationError::Precondition {
        check: ErrorCode::ArchiveUnreachable,
        text: format!("archive {place}: {doing}: {cause}"),
        next_step: format!(
            "check the keys of archive {place} in the configuration, and that the place can be reached and written; then run it again"
        ),
    }
}

/// The place has no room.
pub(super) fn full(place: &str, doing: &str, cause: &dyn Display) -> ReplicationError {
    ReplicationError::Precondition {
        check: ErrorCode::DiskFull,
        text: format!("archive {place}: {doing}: {cause}"),
        next_step: format!(
            "make room at archive {place}, or run `warm-spare archive prune`; nothing that is listed was changed"
        ),
    }
}

/// A file is not what it must be.
pub(super) fn damaged(place: &str, path: &str, text: &str) -> ReplicationError {
    ReplicationError::Precondition {
        check: ErrorCode::ArchiveDamaged,
        text: format!("archive {place}: {path}: {text}"),
        next_step: "run `warm-spare archive verify --all`: it names each generation that is whole; use one of them".into(),
    }
}

/// A newer program wrote it.
pub(super) fn newer(place: &str, path: &str, found: u32) -> ReplicationError {
    ReplicationError::Precondition {
        check: ErrorCode::NewerFormat,
        text: format!(
            "archive {place}: {path} has format {found}, and this program reads formats up to {}",
            super::format::FORMAT
        ),
        next_step: "use the newer warm-spare that wrote it".into(),
    }
}

/// A safety rule refuses.
pub(super) fn refused(rule: ErrorCode, text: String, next_step: String) -> ReplicationError {
    ReplicationError::Refused {
        rule,
        text,
        next_step,
    }
}

/// Two rows name one artifact with different checksums.
pub(super) fn two_rows(key: &str) -> ReplicationError {
    ReplicationError::Precondition {
        check: ErrorCode::ArchiveDamaged,
        text: format!("local: two rows of origin_packages name {key} with different checksums"),
        next_step: "remove the wrong package on the primary: only one of them can be downloaded"
            .into(),
    }
}

/// No such generation.
pub(super) fn no_generation(place: &str, name: &str) -> ReplicationError {
    refused(
        ErrorCode::NoGeneration,
        format!("archive {place} has no generation {name}"),
        "`warm-spare archive list` names them".into(),
    )
}
