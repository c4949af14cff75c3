//! The database that Builder on the spare sees, and what our schema in it records.

use super::checks::Facts;
use crate::cluster::{BuilderDb, LocalCluster, SpareDb, WriteSession};
use crate::config::Config;
use crate::replication::error::ReplicationError;
use std::collections::HashSet;

/// The database that Builder on the spare sees, if it exists and is Builder's.
pub(super) struct Visible {
    pub(super) rows: Option<WriteSession>,
    pub(super) ours: bool,
}

impl Visible {
    pub(super) async fn open(config: &Config, facts: &Facts) -> Result<Visible, ReplicationError> {
        if !facts.visible {
            return Ok(Visible {
                rows: None,
                ours: false,
            });
        }
        let session = LocalCluster::of(config).builder().await?;
        let rows = BuilderDb::of(&session).has_packages().await?;
        let ours = SpareDb::of(&session).exists().await?;
        Ok(Visible {
            rows: rows.then_some(session),
            ours,
        })
    }

    pub(super) fn session_of_ours(&self) -> Option<&WriteSession> {
        self.rows.as_ref().filter(|_| self.ours)
    }

    /// Returns the bytes (key and checksum) that are recorded as unavailable.
    pub(super) async fn known(&self) -> Result<HashSet<(String, String)>, ReplicationError> {
        let Some(session) = self.session_of_ours() else {
            return Ok(HashSet::new());
        };
        Ok(SpareDb::of(session).unavailable_bytes().await?)
    }
}
