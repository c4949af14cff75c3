//! Reasons why following ended: a failure that may be transient, or a gap that only a new baseline
//! closes.

use super::spool::SpoolError;
use crate::cluster::{DatastoreError, DatastoreFault, HolderError, SqlState, StoreError};
use crate::replication::descent::Doubt;
use crate::replication::error::ReplicationError;
use std::sync::Arc;

#[derive(Debug, thiserror::Error)]
pub enum Gap {
    /// A failure as of a full copy: it is tried again, or waits for an operator.
    #[error(transparent)]
    Failed(#[from] ReplicationError),
    /// A failure that keeps the gate from deciding about an artifact.
    #[error(transparent)]
    Waited(#[from] Arc<ReplicationError>),
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// Several transactions together are too much for the fuse: they are read again and applied one
    /// by one.
    #[error("several transactions together would blow the fuse")]
    Careful,
    #[error("the tables' form differs: {0}")]
    Schema(String),
    #[error(
        "{doing} in {table} changed {changed} rows of the spare, which is not the number that the primary changed"
    )]
    Row {
        table: String,
        doing: &'static str,
        changed: u64,
    },
    #[error("the spare's table {table} refuses a change that the primary made: {error}")]
    Refused {
        table: String,
        error: Box<DatastoreError>,
    },
    /// A comparison found a difference that no change in the stream explains. As a rule the table
    /// was rewritten.
    #[error("{rows} rows of {table} are on one side only, and the stream did not bring them")]
    Content { table: String, rows: u64 },
    #[error("the stream cannot be read: {0}")]
    Decoding(String),
    /// The slot holds more log than we allow. Our limit is below the server's own: the slot is
    /// given up, and a new copy is made.
    #[error(
        "slot holds {held} bytes of write-ahead log on the primary, more than replication.wal_hold_limit = {limit}"
    )]
    Held { held: u64, limit: u64 },
    /// The primary's history does not continue the spare's.
    #[error("{}", .0.text)]
    WentBack(Doubt),
    /// The slot's first change does not follow the spare's last one.
    #[error("the stream does not join: {0}")]
    Broken(String),
}

impl From<HolderError> for Gap {
    fn from(error: HolderError) -> Self {
        Gap::Failed(error.into())
    }
}

impl Gap {
    /// Returns true if the spare is correct and stays so, but single changes can no longer bring it
    /// forward.
    pub fn needs_baseline(&self) -> bool {
        !matches!(
            self,
            Gap::Failed(_) | Gap::Waited(_) | Gap::Spool(_) | Gap::Careful
        )
    }

    /// Returns the failure, if it is one; otherwise the gap, which only a baseline closes.
    pub fn failure(self) -> Result<ReplicationError, Gap> {
        match self {
            Gap::Failed(error) => Ok(error),
            Gap::Waited(error) => Ok(match Arc::try_unwrap(error) {
                Ok(error) => error,
                Err(shared) => ReplicationError::Waited(shared),
            }),
            Gap::Spool(error) => Ok(ReplicationError::Spool(error)),
            gap => Err(gap),
        }
    }

    /// Returns the gap or the failure for a failed statement. A statement that a local table
    /// refuses for its content is a difference; a statement without an answer is a failure.
    pub fn statement(table: &str, error: DatastoreError) -> Gap {
        // A statement behind a BEGIN that failed says nothing about its rows.
        let no_transaction = [
            SqlState::IN_FAILED_SQL_TRANSACTION,
            SqlState::READ_ONLY_SQL_TRANSACTION,
        ];
        let state = error.sql_state.as_ref();
        let is_behind = state.is_some_and(|state| no_transaction.contains(state));
        if error.fault == DatastoreFault::Statement && !is_behind {
            return Gap::Refused {
                table: table.to_string(),
                error: Box::new(error),
            };
        }
        Gap::Failed(error.into())
    }
}

impl From<StoreError> for Gap {
    fn from(error: StoreError) -> Self {
        Gap::Failed(error.into())
    }
}

impl From<crate::cluster::StateError> for Gap {
    fn from(error: crate::cluster::StateError) -> Self {
        Gap::Failed(error.into())
    }
}
