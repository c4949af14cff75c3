//! Records a new copy in the transaction in which its database becomes the visible one.

use super::lineage::{Lineage, record_lineage};
use super::state::{RecoveryPoint, StateDb, StateError, TableContent};
use super::upkeep::NOTE_VANISHED;
use crate::cluster::postgres::datastore_error::DatastoreError;
use std::collections::BTreeMap;

/// The facts about a new visible database.
pub struct NewCopy<'a> {
    pub point: &'a RecoveryPoint,
    /// The epoch of its primary.
    pub epoch: i64,
    /// True: an operator has approved that epoch, although it may be a lower one.
    pub epoch_approved: bool,
    pub lineage: &'a Lineage,
    pub contents: &'a [TableContent],
    /// The primary's file of each table at the snapshot.
    pub files: &'a BTreeMap<String, i64>,
    pub vanished_packages: &'a [String],
    pub vanished_artifacts: &'a [String],
    /// An operator has seen and approved this change, and with it the earlier ones: the fuse starts
    /// counting again.
    pub approved: bool,
    pub event: &'a str,
    /// The number of the change that the operator has given.
    pub change: &'a str,
}

impl StateDb {
    /// Records a database that was replaced, in the open transaction. `unproven`: nothing has
    /// proven that the primary's history continues it.
    pub async fn record_generation(&self, name: &str, unproven: bool) -> Result<(), StateError> {
        let session = &self.session;
        // A spare that came back replaces its database as a primary. An operator may have given
        // newer rows up.
        let sql = "SELECT coming_back OR approved <> '' FROM cluster";
        let row = session.query_one("reading our role", sql, &[]).await?;
        let pinned: bool = row.get(0);
        let sql =
            "INSERT INTO generation (name, pinned, unproven) VALUES ($1, $2 OR $3, $3 AND NOT $2)";
        let doing = "remembering the generation";
        session
            .execute(doing, sql, &[&name, &pinned, &unproven])
            .await?;
        // Pinned databases must not accumulate. The oldest is from before any copy of a primary
        // that was set back; the newest has the rows that the last such copy replaced.
        let sql = "UPDATE generation SET pinned = false, unproven = false WHERE unproven AND created NOT IN \
                     (SELECT unnest(ARRAY[min(created), max(created)]) FROM generation WHERE unproven)";
        let doing = "unpinning the generations in between";
        session.execute(doing, sql, &[]).await?;
        Ok(())
    }

    /// Unpins generations that nothing proved, and that are older than this number of seconds.
    pub async fn unpin_expired(&self, seconds: f64) -> Result<(), StateError> {
        let sql = "UPDATE generation SET pinned = false, unproven = false \
                   WHERE unproven AND created <= now() - $1 * interval '1 second'";
        let doing = "unpinning expired generations";
        self.session.execute(doing, sql, &[&seconds]).await?;
        Ok(())
    }

    /// Removes the record of a generation, whose database is dropped.
    pub async fn forget_generation(&self, name: &str) -> Result<(), StateError> {
        let sql = "DELETE FROM generation WHERE name = $1";
        let doing = "forgetting a generation";
        self.session.execute(doing, sql, &[&name]).await?;
        Ok(())
    }

    /// Records the copy in the open transaction. It fails if this cluster is not a spare any more.
    pub async fn record_copy(&self, copy: &NewCopy<'_>) -> Result<(), StateError> {
        let sql = "DELETE FROM copied; DELETE FROM content; DELETE FROM compared; DELETE FROM replacement";
        let doing = "forgetting the old recovery point";
        self.session.batch(doing, sql).await?;
        self.record_recovery_point(copy.point).await?;
        self.record_tables(copy).await?;
        self.record_vanished(copy).await?;
        self.record_spare(copy).await?;
        record_lineage(&self.session, copy.lineage, None).await?;
        let sql = "INSERT INTO event (kind, text, change) VALUES ('baseline', $1, $2)";
        let doing = "recording the event";
        self.session
            .execute(doing, sql, &[&copy.event, &copy.change])
            .await?;
        Ok(())
    }

    async fn record_recovery_point(&self, p: &RecoveryPoint) -> Result<(), DatastoreError> {
        let sql = "INSERT INTO copied (lsn, commit_time, system_id, timeline, transactions, server_started, sequences, schema, slot, peer_cluster) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)";
        self.session
            .execute(
                "remembering the recovery point",
                sql,
                &[
                    &p.lsn,
                    &p.commit_time,
                    &p.system_id,
                    &p.timeline,
                    &p.transactions,
                    &p.server_started,
                    &p.sequences,
                    &p.schema(),
                    &p.slot(),
                    &p.peer_cluster.as_deref().unwrap_or_default(),
                ],
            )
            .await?;
        Ok(())
    }

    async fn record_tables(&self, copy: &NewCopy<'_>) -> Result<(), DatastoreError> {
        let tables: Vec<&str> = copy.contents.iter().map(|c| c.table.as_str()).collect();
        let rows: Vec<i64> = copy.contents.iter().map(|c| c.rows).collect();
        let hashes: Vec<&str> = copy.contents.iter().map(|c| c.hash.as_str()).collect();
        let sql = "INSERT INTO content (table_name, rows, hash) SELECT * FROM unnest($1::text[], $2::int8[], $3::text[])";
        let doing = "remembering the tables' hashes";
        self.session
            .execute(doing, sql, &[&tables, &rows, &hashes])
            .await?;
        let tables: Vec<&str> = copy.files.keys().map(String::as_str).collect();
        let files: Vec<i64> = copy.files.values().copied().collect();
        let sql =
            "INSERT INTO compared (table_name, file) SELECT * FROM unnest($1::text[], $2::int8[])";
        let doing = "remembering the tables' files";
        self.session.execute(doing, sql, &[&tables, &files]).await?;
        Ok(())
    }

    async fn record_vanished(&self, copy: &NewCopy<'_>) -> Result<(), DatastoreError> {
        if copy.approved {
            let doing = "resetting the fuse's count";
            return self.session.batch(doing, "DELETE FROM vanished").await;
        }
        let (packages, artifacts) = (copy.vanished_packages, copy.vanished_artifacts);
        if packages.is_empty() && artifacts.is_empty() {
            return Ok(());
        }
        let doing = "recording vanished packages";
        self.session
            .execute(doing, NOTE_VANISHED, &[&packages, &artifacts, &""])
            .await?;
        Ok(())
    }

    /// Records the role. Somebody may have made this cluster the primary during the copy.
    async fn record_spare(&self, copy: &NewCopy<'_>) -> Result<(), StateError> {
        let sql = "UPDATE cluster SET role = 'spare', epoch = CASE WHEN $2 THEN $1 ELSE greatest(epoch, $1) END, \
                     coming_back = false, fence_begun = false, approved = '', \
                     since = CASE WHEN role = 'spare' THEN since ELSE now() END \
                   WHERE coalesce(role, 'spare') = 'spare'";
        let doing = "remembering our role";
        let changed = self
            .session
            .execute(doing, sql, &[&copy.epoch, &copy.epoch_approved])
            .await?;
        match changed {
            1 => Ok(()),
            _ => Err(StateError::Superseded),
        }
    }
}
