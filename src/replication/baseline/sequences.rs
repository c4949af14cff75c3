//! Copies sequences, because the stream does not carry them.

use super::tables::changed_in_form;
use crate::cluster::{DatastoreError, LocalCluster, Sequence, SequenceName, Session, WriteSession};
use crate::config::Config;
use crate::domain::ErrorCode;
use crate::replication::error::ReplicationError;

/// Reads all sequences of the session's database.
pub(crate) async fn sequences(of: &Session) -> Result<Vec<Sequence>, ReplicationError> {
    sequence_values(of, of.sequence_names().await?).await
}

/// Reads these sequences, whose names may be from an earlier snapshot.
pub(crate) async fn sequence_values(
    of: &Session,
    names: Vec<SequenceName>,
) -> Result<Vec<Sequence>, ReplicationError> {
    let values = of.sequence_values(names).await;
    values.map_err(|error| changed_in_form(error.into(), "its sequences"))
}

/// Sets them in a database that nobody sees yet.
pub(crate) async fn set_in_copy(
    inside: &WriteSession,
    values: &[Sequence],
) -> Result<(), ReplicationError> {
    all_of(values, inside.set_sequences(values).await?)
}

/// Sets them in a local database, as the process whose token is in its recovery point, and fails
/// unless all of them are set.
pub async fn set_all_as_holder(
    inside: &WriteSession,
    values: &[Sequence],
    token: i64,
) -> Result<(), ReplicationError> {
    let set = inside.set_sequences_as_holder(values, token).await?;
    all_of(values, set)
}

fn all_of(values: &[Sequence], set: u64) -> Result<(), ReplicationError> {
    if set == values.len() as u64 {
        return Ok(());
    }
    Err(ReplicationError::Precondition {
        check: ErrorCode::Sequences,
        text: format!(
            "local: {set} of the primary's {} sequences could be set; the others do not exist here, or have other bounds",
            values.len()
        ),
        next_step: "compare both sides' sequences with \\ds in psql".into(),
    })
}

/// Number of values by which sequences are moved past their last known one: a failover does not
/// know how far they went.
const AHEAD_VALUES: i64 = 1024;

/// Moves every sequence of the local database past all values that the primary may have given out
/// unseen.
pub async fn next_sequences(config: &Config) -> Result<(), ReplicationError> {
    let inside = LocalCluster::of(config).builder().await?;
    Ok(advance_sequences(&inside).await?)
}

/// Does the same in the database of a session.
pub async fn advance_sequences(inside: &WriteSession) -> Result<(), DatastoreError> {
    inside.advance_sequences(AHEAD_VALUES).await
}
