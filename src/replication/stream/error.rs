//! Why following ended: by a failure that may pass, or because the spare can only be right again by a new baseline.

use super::super::descent::Doubt;
use super::super::error::PassError;
use super::spool::SpoolError;
use crate::cluster::{DatastoreError, DatastoreFault, StoreError};
use std::sync::Arc;

#[derive(Debug, thiserror::Error)]
pub enum Gap {
    /// As a pass may fail: tried again, or waits for an operator.
    #[error(transparent)]
    Failed(#[from] PassError),
    /// What the gate could not find out.
    #[error(transparent)]
    Waited(#[from] Arc<PassError>),
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// Several transactions together are too much for the fuse: they come again one by one.
    #[error("several transactions together would blow the fuse")]
    Careful,
    #[error("the tables' form differs: {0}")]
    Schema(String),
    #[error(
        "{doing} in {table} changed {changed} rows of the spare where the primary changed others"
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
    /// A comparison found what no change in the stream explains: the table was rewritten, as a rule.
    #[error("{rows} rows of {table} are on one side only, and the stream did not bring them")]
    Content { table: String, rows: u64 },
    #[error("the stream cannot be read: {0}")]
    Decoding(String),
    /// The gentler bound than the server's own: the log held for us is given up, and copied anew.
    #[error(
        "slot holds {held} bytes of write-ahead log on the primary, more than replication.wal_hold_limit = {limit}"
    )]
    Held { held: u64, limit: u64 },
    /// The primary's history does not go on from ours.
    #[error("{}", .0.text)]
    WentBack(Doubt),
    /// What the slot gives does not join what is here.
    #[error("the stream does not join: {0}")]
    Broken(String),
}

impl Gap {
    /// The spare itself is whole and stays so, but can no longer be brought forward by single changes.
    pub fn needs_baseline(&self) -> bool {
        !matches!(
            self,
            Gap::Failed(_) | Gap::Waited(_) | Gap::Spool(_) | Gap::Careful
        )
    }

    /// The failure, if it is one; else the gap, which only a baseline closes.
    pub fn failure(self) -> Result<PassError, Gap> {
        match self {
            Gap::Failed(error) => Ok(error),
            Gap::Waited(error) => Ok(match Arc::try_unwrap(error) {
                Ok(error) => error,
                Err(shared) => PassError::Waited(shared),
            }),
            Gap::Spool(error) => Ok(PassError::Spool(error)),
            gap => Err(gap),
        }
    }

    /// A statement that a table of ours refuses for what is in it is a difference; one that is not answered is a failure.
    pub fn statement(table: &str, error: DatastoreError) -> Gap {
        if error.fault == DatastoreFault::Statement {
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
