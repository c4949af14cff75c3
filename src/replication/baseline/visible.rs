//! The database that Builder on the spare sees, and what our schema in it records.

use super::checks::Facts;
use crate::cluster::{CopiedPoint, DatastoreFault, LocalSession, end_former_writers};
use crate::config::Config;
use crate::domain::Lsn;
use crate::replication::error::PassError;
use std::collections::HashSet;

/// The database that Builder on the spare sees, if it exists and is Builder's.
pub(super) struct Visible {
    pub(super) rows: Option<LocalSession>,
    pub(super) ours: bool,
}

impl Visible {
    pub(super) async fn open(config: &Config, facts: &Facts) -> Result<Visible, PassError> {
        if !facts.visible {
            return Ok(Visible {
                rows: None,
                ours: false,
            });
        }
        let session =
            LocalSession::open(&config.local.datastore, &config.local.datastore.database).await?;
        let sql = "SELECT to_regclass('public.origin_packages') IS NOT NULL, to_regclass('warm_spare.recovery_point') IS NOT NULL";
        let row = session
            .query_one("looking into the visible database", sql, &[])
            .await?;
        let (rows, ours): (bool, bool) = (row.get(0), row.get(1));
        Ok(Visible {
            rows: rows.then_some(session),
            ours,
        })
    }

    pub(super) fn session_of_ours(&self) -> Option<&LocalSession> {
        self.rows.as_ref().filter(|_| self.ours)
    }

    /// Returns the bytes (key and checksum) that are recorded as unavailable.
    pub(super) async fn known(&self) -> Result<HashSet<(String, String)>, PassError> {
        let Some(session) = self.session_of_ours() else {
            return Ok(HashSet::new());
        };
        let sql = "SELECT key, checksum FROM warm_spare.unavailable";
        let rows = session
            .query("reading the unavailable artifacts", sql, &[])
            .await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }
}

/// Returns artifacts recorded as missing or damaged on the primary, with the reason.
pub async fn unavailable(session: &LocalSession) -> Result<Vec<(String, String)>, PassError> {
    let sql = "SELECT key, reason FROM warm_spare.unavailable ORDER BY key";
    let rows = session
        .query("reading the unavailable artifacts", sql, &[])
        .await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Opens a session on the database that Builder on the spare sees. None: it does not exist.
pub(in crate::replication) async fn open_visible(
    config: &Config,
) -> Result<Option<LocalSession>, PassError> {
    let local = &config.local.datastore;
    match LocalSession::open(local, &local.database).await {
        Ok(session) => Ok(Some(session)),
        Err(error) if error.fault == DatastoreFault::NoDatabase => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Returns the same for the visible database as it is now. None: it does not exist, or is not ours.
pub async fn unavailable_here(config: &Config) -> Result<Option<Vec<(String, String)>>, PassError> {
    let Some(session) = open_visible(config).await? else {
        return Ok(None);
    };
    let sql = "SELECT to_regclass('warm_spare.unavailable') IS NOT NULL";
    let row = session
        .query_one("looking for our tables", sql, &[])
        .await?;
    match row.get(0) {
        true => Ok(Some(unavailable(&session).await?)),
        false => Ok(None),
    }
}

/// Returns the recovery point of the visible database, if it exists and is ours.
pub(super) async fn reached(config: &Config) -> Result<Option<Lsn>, PassError> {
    let Some(session) = open_visible(config).await? else {
        return Ok(None);
    };
    if recovery_point(&session).await?.is_none() {
        return Ok(None);
    }
    // A commit of a session that we have left may still be in progress: it is waited for. A session
    // that has not begun to commit is ended.
    end_former_writers(&session).await?;
    let sql = "SELECT lsn::text FROM warm_spare.recovery_point FOR UPDATE";
    let doing = "reading the recovery point";
    let row = session.query_one(doing, sql, &[]).await?;
    Ok(row.get::<_, String>(0).parse().ok())
}

/// Ends sessions that may still be applying to the visible database, and waits for a commit in
/// progress.
pub async fn end_appliers(config: &Config) -> Result<(), PassError> {
    reached(config).await.map(drop)
}

/// Returns the position of the visible database: the copied point, or a later one to which the
/// stream has brought it.
pub async fn stands_at(config: &Config, copied: CopiedPoint) -> Result<CopiedPoint, PassError> {
    if copied.slot.is_empty() {
        return Ok(copied);
    }
    let Some(session) = open_visible(config).await? else {
        return Ok(copied);
    };
    if recovery_point(&session).await?.is_none() {
        return Ok(copied);
    }
    let sql = "SELECT lsn::text, commit_time FROM warm_spare.recovery_point";
    let row = session
        .query_one("reading the recovery point", sql, &[])
        .await?;
    Ok(CopiedPoint {
        lsn: row.get(0),
        commit_time: row.get(1),
        ..copied
    })
}

/// Returns whether a database that records position `found` is the one that was copied here: a
/// followed one moves on from there.
pub fn is_ours(point: &CopiedPoint, found: Option<&String>) -> bool {
    match point.slot.is_empty() {
        false => found.is_some(),
        true => found == Some(&point.lsn),
    }
}

/// Returns the LSN that a database records; None: it is not ours.
pub async fn recovery_point(session: &LocalSession) -> Result<Option<String>, PassError> {
    let sql = "SELECT to_regclass('warm_spare.recovery_point') IS NOT NULL";
    let there = session
        .query_one("looking for the recovery point", sql, &[])
        .await?;
    if !there.get::<_, bool>(0) {
        return Ok(None);
    }
    let sql = "SELECT lsn::text FROM warm_spare.recovery_point";
    let rows = session
        .query("reading the recovery point", sql, &[])
        .await?;
    Ok(rows.first().map(|row| row.get(0)))
}
