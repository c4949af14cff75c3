//! Decides whether an artifact is missing on the primary: "no such key" is believed only if the
//! store proves to be the right one. Both gates, of a full copy and of the stream, use these rules.

use crate::cluster::{Store, StoreError};
use crate::domain::{ErrorCode, MissingReason};
use crate::replication::error::ReplicationError;

/// Returns the reason for an artifact that a store refused.
pub(crate) fn reason_of(error: &StoreError) -> MissingReason {
    match error.is_of_the_key() {
        true => MissingReason::Unstorable,
        false => MissingReason::Unreadable,
    }
}

/// Checks, before "no such key" is believed, that the primary's bucket answers, and that it has one
/// of the objects that it served before.
pub(crate) async fn bucket_is_right(
    peer: &Store,
    served: &[String],
) -> Result<(), ReplicationError> {
    peer.check_bucket().await?;
    serves_one(peer, served).await
}

/// Checks the same for a bucket that has just answered.
pub(crate) async fn serves_one(peer: &Store, served: &[String]) -> Result<(), ReplicationError> {
    for key in served {
        // One is enough: any single object may have been deleted since.
        if peer.head(key).await?.is_some() {
            return Ok(());
        }
    }
    let Some(example) = served.first() else {
        return Ok(());
    };
    Err(another_bucket(format!(
        "the peer's bucket {} does not have some artifacts, nor {} others that it served before (for example {example})",
        peer.bucket(),
        served.len()
    )))
}

/// Makes the error for a bucket that is not the primary's, or has lost its objects.
pub(crate) fn another_bucket(text: String) -> ReplicationError {
    ReplicationError::Precondition {
        check: ErrorCode::MissingArtifacts,
        text,
        next_step: "check peer.s3.endpoint and peer.s3.bucket_name; if the primary really lost them, remove their rows there"
            .into(),
    }
}

/// Returns whether the store gives out one of the objects that it served before. Then its refusal
/// of another object is not a fault of the store.
pub(crate) async fn serves_others(peer: &Store, served: &[String]) -> Result<bool, StoreError> {
    for key in served {
        match peer.get(key).await {
            Ok(Some(_)) => return Ok(true),
            Ok(None) => {}
            // Any single object may be refused too.
            Err(error) if error.may_be_of_the_object() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}
