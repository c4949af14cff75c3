//! The recorded role: the role of this cluster, its epoch, and how it got it. Facts that must be
//! true together are written together: a promotion, its epoch and the lifted fence are one
//! transaction.

use super::DATABASE;
use super::lineage::{LINEAGE, Lineage, descent};
use super::state::{RecoveryPoint, StateDb, StateError};
use super::working_lock::Lock;
use crate::cluster::fence::setting::lift_statement;
use crate::cluster::postgres::datastore_error::printable;
use crate::cluster::postgres::kept::KeptSessions;
use crate::cluster::postgres::rows::Row;
use crate::cluster::postgres::session::Session;
use crate::cluster::{DatastoreError, DatastoreFault};
use crate::config::Datastore;
use crate::domain::{EventKind, PromotionKind, Role, Transition};
use crate::killpoint;
use chrono::{DateTime, Utc};
use tokio_postgres::types::ToSql;

/// The way in which a cluster became a primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promotion {
    pub epoch: i64,
    /// Its id in the lineage; empty if it was read back.
    pub id: String,
    pub kind: PromotionKind,
    pub time: DateTime<Utc>,
    /// The recovery point at which it was promoted, and the server of that point; empty if no
    /// server was followed.
    pub lsn: String,
    pub commit_time: Option<DateTime<Utc>>,
    pub system_id: String,
    pub timeline: i32,
    /// The old primary's own cluster id; empty: it keeps no state of ours.
    pub peer_cluster: String,
    /// The names of our objects on the old primary.
    pub slot: String,
    pub publication: String,
    /// True: the old primary was seen fenced under this epoch.
    pub peer_fenced: bool,
    /// True: nothing is left to be done there.
    pub settled: bool,
}

impl Promotion {
    /// Returns a promotion at no recovery point. Its id is still to be set.
    pub fn new(epoch: i64, kind: PromotionKind, time: DateTime<Utc>) -> Promotion {
        Promotion {
            epoch,
            id: String::new(),
            kind,
            time,
            lsn: String::new(),
            commit_time: None,
            system_id: String::new(),
            timeline: 0,
            peer_cluster: String::new(),
            slot: String::new(),
            publication: String::new(),
            peer_fenced: false,
            settled: false,
        }
    }

    /// Returns the same promotion at a point of the old primary's history.
    pub fn at(self, point: &RecoveryPoint) -> Promotion {
        Promotion {
            lsn: point.lsn.clone(),
            commit_time: Some(point.commit_time),
            system_id: point.system_id.clone(),
            timeline: point.timeline,
            peer_cluster: point.peer_cluster.clone().unwrap_or_default(),
            slot: point.slot().to_string(),
            ..self
        }
    }
}

/// The reason why this cluster is fenced although it was no spare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FenceRecord {
    pub epoch: i64,
    /// The cluster that took the epoch.
    pub by_cluster: String,
    pub since: DateTime<Utc>,
    /// True: that cluster is the primary now; until then it may withdraw the fence.
    pub settled: bool,
    /// True: somebody had lifted the fence, and it was set again. Rows written in between exist
    /// nowhere else.
    pub lifted: bool,
}

/// The record about itself that a cluster keeps on its own server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    pub cluster_id: String,
    pub role: Option<Role>,
    pub epoch: i64,
    pub fence: Option<FenceRecord>,
    /// The latest promotion.
    pub promotion: Option<Promotion>,
    /// The server of its copy, and the time at which that copy was last known to be complete.
    pub copied_from: Option<String>,
    pub confirmed: Option<DateTime<Utc>>,
    pub lineage: Lineage,
    /// The servers that it followed before each of its promotions.
    pub followed: Vec<String>,
    /// Its own server.
    pub system_id: String,
    /// The epoch of a takeover that it has begun and not undone. None: there is none.
    pub handover: Option<i64>,
}

impl Record {
    /// Returns whether two clusters have a common lineage: both know a promotion, or one has
    /// followed the other.
    pub fn is_kin(&self, system_id: &str, other: &Record, others_system_id: &str) -> bool {
        self.lineage.shares_with(&other.lineage)
            || self.has_followed(others_system_id)
            || other.has_followed(system_id)
    }

    /// Returns whether a spare with this record follows the other as a primary: the primary's epoch
    /// and lineage continue the spare's.
    pub fn goes_on_with(&self, primary: &Record) -> bool {
        let ours = self.epoch.max(1);
        primary.role == Some(Role::Primary)
            && (ours..=ours.saturating_add(EPOCH_STEP_MAX)).contains(&primary.epoch)
            && self.copied_from.as_deref() == Some(primary.system_id.as_str())
            && (primary.lineage.is_empty() || primary.lineage.goes_on_from(&self.lineage))
    }

    fn has_followed(&self, system_id: &str) -> bool {
        !system_id.is_empty()
            && (self.copied_from.as_deref() == Some(system_id)
                || self.followed.iter().any(|followed| followed == system_id))
    }
}

const PROMOTION: &str = "SELECT epoch, kind, time, lsn, commit_time, system_id, timeline, peer_cluster, slot, publication, \
     peer_fenced, settled FROM public.promotion ORDER BY epoch DESC LIMIT 1";
const HANDOVER: &str = "SELECT epoch FROM public.transition WHERE kind <> 'failback' AND step NOT IN ('', 'preflight', 'undone')";
const FENCE: &str = "SELECT epoch, by_cluster, since, settled, lifted FROM public.fence ORDER BY epoch DESC LIMIT 1";
const OWN: &str = "SELECT id, role, epoch, (SELECT system_id FROM public.copied), (SELECT time FROM public.confirmation), \
     ARRAY(SELECT DISTINCT system_id FROM public.promotion WHERE system_id <> '' LIMIT 10000), \
     to_regclass('public.lineage') IS NOT NULL, (SELECT system_identifier::text FROM pg_catalog.pg_control_system()) \
     FROM public.cluster";
/// Maximum step of a promotion's epoch above the last one. A cluster with a larger step is broken,
/// or wants to use the numbers up.
pub const EPOCH_STEP_MAX: i64 = 1000;

/// Reads the record from the database `warm_spare` of the session.
async fn record(session: &Session, doing: &str) -> Result<Record, DatastoreError> {
    let row = session.row(doing, OWN, &[]).await?;
    let lineage = match row.get(6)? {
        true => session.rows(doing, LINEAGE, &[]).await?,
        false => Vec::new(),
    };
    let malformed = |text: &str| session.origin(doing).malformed(text.to_string());
    let epoch: i64 = row.get(2)?;
    if epoch < 0 {
        return Err(malformed(&format!("its epoch is {epoch}")));
    }
    let lineage = Lineage::of(lineage.iter().map(descent).collect::<Result<_, _>>()?)
        .ok_or_else(|| malformed("its lineage is not valid: ids, parents and epochs do not fit"))?;
    Ok(Record {
        cluster_id: row.get(0)?,
        role: row.get(1)?,
        epoch,
        fence: first(&session.rows(doing, FENCE, &[]).await?, fence)?,
        promotion: first(&session.rows(doing, PROMOTION, &[]).await?, promotion)?,
        copied_from: row.get(3)?,
        confirmed: row.get(4)?,
        lineage,
        followed: row.get(5)?,
        system_id: row.get(7)?,
        handover: first(&session.rows(doing, HANDOVER, &[]).await?, |row| row.get(0))?,
    })
}

fn first<T>(
    rows: &[Row],
    read: impl Fn(&Row) -> Result<T, DatastoreError>,
) -> Result<Option<T>, DatastoreError> {
    rows.first().map(read).transpose()
}

fn promotion(row: &Row) -> Result<Promotion, DatastoreError> {
    Ok(Promotion {
        id: String::new(),
        epoch: row.get(0)?,
        kind: row.get(1)?,
        time: row.get(2)?,
        lsn: row.get(3)?,
        commit_time: row.get(4)?,
        system_id: row.get(5)?,
        timeline: row.get(6)?,
        peer_cluster: row.get(7)?,
        slot: row.get(8)?,
        publication: row.get(9)?,
        peer_fenced: row.get(10)?,
        settled: row.get(11)?,
    })
}

fn fence(row: &Row) -> Result<FenceRecord, DatastoreError> {
    Ok(FenceRecord {
        epoch: row.get(0)?,
        by_cluster: printable(row.get(1)?),
        since: row.get(2)?,
        settled: row.get(3)?,
        lifted: row.get(4)?,
    })
}

/// Reads the peer's record about itself; None: it keeps no state of ours, or that of an older
/// program.
pub(in crate::cluster) async fn peers_record(
    to: &Datastore,
    kept: &KeptSessions,
) -> Result<Option<Record>, DatastoreError> {
    let session = match kept.open(to, DATABASE).await {
        Ok(session) => session,
        Err(error) if error.fault == DatastoreFault::NoDatabase => return Ok(None),
        Err(error) => return Err(error),
    };
    let doing = "reading the peer's record";
    let sql = "SELECT to_regclass('public.promotion') IS NOT NULL";
    if !session.row(doing, sql, &[]).await?.get::<bool>(0)? {
        return Ok(None);
    }
    Ok(Some(record(&session, doing).await?))
}

impl StateDb {
    /// Reads the record of this cluster, in the form in which its peer reads it.
    pub async fn own_record(&self) -> Result<Record, StateError> {
        Ok(record(&self.session, "reading our own record").await?)
    }

    pub async fn fence_record(&self) -> Result<Option<FenceRecord>, StateError> {
        let rows = self.session.rows("reading the fence", FENCE, &[]).await?;
        Ok(first(&rows, fence)?)
    }

    /// Lifts the fence of `database`, unless this cluster has a role, or another cluster has fenced it.
    /// Returns whether it was lifted. The session must be the caller's own, because it gets a
    /// transaction. A fence that another cluster raises at the same time waits for it.
    pub async fn lift_unneeded_fence(&self, database: &str) -> Result<bool, StateError> {
        let doing = "lifting the fence";
        self.session
            .batch(
                doing,
                "BEGIN; LOCK TABLE cluster, fence IN SHARE ROW EXCLUSIVE MODE",
            )
            .await?;
        let sql = "SELECT NOT EXISTS (SELECT FROM cluster WHERE role IS NOT NULL) AND NOT EXISTS (SELECT FROM fence)";
        let unneeded: bool = self.session.row(doing, sql, &[]).await?.get(0)?;
        let end = match unneeded {
            true => format!("{}; COMMIT", lift_statement(database)),
            false => "ROLLBACK".to_string(),
        };
        self.session.batch(doing, &end).await?;
        Ok(unneeded)
    }

    /// Returns the latest promotion.
    pub async fn promotion(&self) -> Result<Option<Promotion>, StateError> {
        let doing = "reading the last promotion";
        let rows = self.session.rows(doing, PROMOTION, &[]).await?;
        Ok(first(&rows, promotion)?)
    }

    pub async fn transition(&self) -> Result<Option<Transition>, StateError> {
        let sql = "SELECT kind, epoch, nullif(step, ''), started, asked, undone FROM transition";
        let rows = self.session.rows("reading the journal", sql, &[]).await?;
        let transition = |row: &Row| {
            Ok(Transition {
                kind: row.get(0)?,
                epoch: row.get(1)?,
                step: row.get(2)?,
                started: row.get(3)?,
                asked: row.get(4)?,
                undone: row.get(5)?,
            })
        };
        Ok(first(&rows, transition)?)
    }

    /// Writes the journal, durably before the step begins, and only for the holder of the lock.
    pub async fn journal(&self, lock: Lock, entry: &Transition) -> Result<(), StateError> {
        let sql = "WITH ours AS (SELECT 1 FROM meta WHERE token = $7), old AS (DELETE FROM transition WHERE EXISTS (SELECT 1 FROM ours)) \
                   INSERT INTO transition (kind, epoch, step, started, asked, undone) \
                   SELECT $1, $2, $3, $4, $5, $6 FROM ours";
        let written = self
            .session
            .execute(
                "writing the journal",
                sql,
                &[
                    &entry.kind,
                    &entry.epoch,
                    &entry.step_name(),
                    &entry.started,
                    &entry.asked,
                    &entry.undone,
                    &lock.token,
                ],
            )
            .await?;
        match written {
            1 => Ok(()),
            _ => Err(StateError::Superseded),
        }
    }

    pub async fn close_journal(&self, lock: Lock) -> Result<(), StateError> {
        let sql = "DELETE FROM transition WHERE EXISTS (SELECT 1 FROM meta WHERE token = $1)";
        let doing = "closing the journal";
        self.session.execute(doing, sql, &[&lock.token]).await?;
        Ok(())
    }

    /// Commits the promotion of this cluster: role, epoch, history and the lifted fence of
    /// `database`. The last replaced database from before the promotion is pinned.
    pub async fn promote(
        &self,
        lock: Lock,
        database: &str,
        by: &Promotion,
        from_role: Option<Role>,
        told: (&str, &str),
    ) -> Result<(), StateError> {
        let promoted = self
            .promote_within(lock, database, by, from_role, told)
            .await;
        if promoted.is_err() {
            let _ = self
                .session
                .batch("rolling the promotion back", "ROLLBACK")
                .await;
        }
        promoted
    }

    async fn promote_within(
        &self,
        lock: Lock,
        database: &str,
        by: &Promotion,
        from_role: Option<Role>,
        (text, change): (&str, &str),
    ) -> Result<(), StateError> {
        let session = &self.session;
        self.begin_as_holder(lock, "beginning the promotion")
            .await?;
        let sql = "UPDATE cluster SET role = 'primary', epoch = $1, since = now(), coming_back = false \
                   WHERE role IS NOT DISTINCT FROM $2 AND epoch < $1";
        let changed = session
            .execute("recording the promotion", sql, &[&by.epoch, &from_role])
            .await?;
        if changed != 1 {
            return Err(StateError::Superseded);
        }
        let sql = "INSERT INTO promotion (epoch, kind, lsn, commit_time, system_id, timeline, peer_cluster, slot, publication, \
                     peer_fenced, settled) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)";
        session
            .execute(
                "recording the promotion",
                sql,
                &[
                    &by.epoch,
                    &by.kind,
                    &by.lsn,
                    &by.commit_time,
                    &by.system_id,
                    &by.timeline,
                    &by.peer_cluster,
                    &by.slot,
                    &by.publication,
                    &by.peer_fenced,
                    &by.settled,
                ],
            )
            .await?;
        let sql = "INSERT INTO lineage (epoch, id, parent, cluster, system_id) \
                   SELECT $1, $2, coalesce((SELECT id FROM lineage ORDER BY epoch DESC LIMIT 1), ''), \
                     (SELECT id FROM cluster), (SELECT system_identifier::text FROM pg_control_system())";
        session
            .execute("recording the promotion", sql, &[&by.epoch, &by.id])
            .await?;
        self.event(EventKind::Promotion, text, change).await?;
        let keep = "UPDATE generation SET pinned = true, unproven = false WHERE name = \
                    (SELECT name FROM generation ORDER BY created DESC, name DESC LIMIT 1); DELETE FROM fence; \
                    UPDATE lease SET fenced_for = NULL, touched = false";
        session.batch("recording the promotion", keep).await?;
        let lift = lift_statement(database);
        session.batch("lifting the fence", &lift).await?;
        killpoint::reach("promote.before_commit");
        session.batch("committing the promotion", "COMMIT").await?;
        killpoint::reach("promote.after_commit");
        Ok(())
    }

    /// Records a cluster that was the primary before any role was set: nothing else changes.
    pub async fn declare_primary(&self, lock: Lock, epoch: i64) -> Result<(), StateError> {
        let sql = "WITH root AS (INSERT INTO lineage (epoch, id, parent, cluster, system_id) \
                     SELECT $1, 'root-' || system_identifier::text, '', (SELECT id FROM cluster), system_identifier::text \
                     FROM pg_control_system() WHERE NOT EXISTS (SELECT 1 FROM lineage) \
                       AND EXISTS (SELECT 1 FROM meta WHERE token = $2) AND EXISTS (SELECT 1 FROM cluster WHERE role IS NULL)) \
                   UPDATE cluster SET role = 'primary', epoch = $1, since = now() \
                   WHERE role IS NULL AND EXISTS (SELECT 1 FROM meta WHERE token = $2)";
        let changed = self
            .session
            .execute("recording our role", sql, &[&epoch, &lock.token])
            .await?;
        match changed {
            1 => Ok(()),
            _ => Err(StateError::Superseded),
        }
    }

    /// Turns a fenced primary into a spare. It stays fenced, and copies when its peer may be copied
    /// from.
    pub async fn return_as_spare(&self, lock: Lock, epoch: i64) -> Result<(), StateError> {
        let sql = "WITH ours AS (SELECT 1 FROM meta WHERE token = $2), gone AS (DELETE FROM fence WHERE EXISTS (SELECT 1 FROM ours)), \
                     old AS (DELETE FROM copied WHERE EXISTS (SELECT 1 FROM ours)) \
                   UPDATE cluster SET role = 'spare', epoch = greatest(epoch, $1), since = now(), coming_back = true \
                   WHERE EXISTS (SELECT 1 FROM ours)";
        let changed = self
            .session
            .execute("recording our role", sql, &[&epoch, &lock.token])
            .await?;
        match changed {
            1 => Ok(()),
            _ => Err(StateError::Superseded),
        }
    }

    pub async fn peer_was_fenced(&self, epoch: i64, settled: bool) -> Result<(), StateError> {
        let sql =
            "UPDATE promotion SET peer_fenced = true, settled = settled OR $2 WHERE epoch = $1";
        self.session
            .execute("recording the peer's fence", sql, &[&epoch, &settled])
            .await?;
        Ok(())
    }

    /// Notes that the old primary was found writable. Rows written there in between must be looked
    /// for, as after a failover, and the old primary counts as open until its fence is final.
    pub async fn peer_was_open(&self, epoch: i64) -> Result<(), StateError> {
        let sql = "UPDATE promotion SET peer_fenced = false, settled = false, \
                     kind = CASE kind WHEN 'switchover' THEN 'failover' ELSE kind END WHERE epoch = $1";
        self.session
            .execute("recording the open fence", sql, &[&epoch])
            .await?;
        Ok(())
    }

    /// Records the epoch of the primary that a spare follows, so that the next one is higher than
    /// both.
    pub async fn raise_known_epoch(&self, lock: Lock, epoch: i64) -> Result<(), StateError> {
        let sql = "UPDATE cluster SET epoch = greatest(epoch, $1) WHERE role = 'spare' AND epoch < $1 \
                   AND EXISTS (SELECT 1 FROM meta WHERE token = $2)";
        let doing = "recording the primary's epoch";
        let is: [&(dyn ToSql + Sync); 2] = [&epoch, &lock.token];
        self.session.execute(doing, sql, &is).await?;
        Ok(())
    }
}
