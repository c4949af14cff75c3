//! Writes on the peer. Apart from the replication connection, nothing else does.

use super::facts::{Prepared, inspect};
use super::step::{How, RELOAD, Step};
use super::{Names, publication::listed};
use crate::cluster::{DatastoreError, Session};
use crate::config::Datastore;
use crate::domain::Side;
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::time::Instant;
use tokio_postgres::error::SqlState;

/// Pause between two tries for a lock: sessions that waited behind us come first.
const RETRY_PAUSE: Duration = Duration::from_millis(800);
/// Maximum time for a server to read its configuration, and for a walsender to end.
const SERVER_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum PreparationError {
    #[error(transparent)]
    Datastore(#[from] DatastoreError),
    #[error(
        "peer datastore: {what}: its lock could not be taken for {seconds} s, with waits of 200 ms each; held by {holders}"
    )]
    Busy {
        what: String,
        seconds: u64,
        holders: String,
    },
    #[error("peer datastore: {what}: it is in use again as soon as its user's session is ended")]
    InUse { what: String },
}

/// The capability to write there. Its session is never returned to a caller.
pub struct Preparation(PreparingSession);

struct PreparingSession(Session);

impl Preparation {
    pub(in crate::cluster) async fn open(to: &Datastore) -> Result<Self, DatastoreError> {
        let session = Session::open(Side::Peer, to, &to.database, false).await?;
        Ok(Preparation(PreparingSession(session)))
    }

    pub async fn inspect(&self, names: &Names) -> Result<Prepared, DatastoreError> {
        inspect(&self.0.0, names).await
    }

    /// Runs the steps in their order; `done` is called after each. Locks are tried for until
    /// `patience` is over, for all steps together. Steps that were done before an error stay: the
    /// next plan continues from there.
    pub async fn carry_out(
        &self,
        steps: &[Step],
        patience: Duration,
        mut done: impl FnMut(&Step),
    ) -> Result<(), PreparationError> {
        let deadline = Instant::now() + patience;
        for alike in steps.chunk_by(|a, b| a.how == b.how) {
            match alike.first().map(|step| step.how) {
                Some(How::Identity | How::Publication) => {
                    self.take_turns(alike, deadline, patience, &mut done)
                        .await?;
                }
                Some(How::Alone) => {
                    for step in alike {
                        self.each(step).await?;
                        done(step);
                    }
                }
                Some(How::Slot) => {
                    for step in alike {
                        self.until_free(step).await?;
                        done(step);
                    }
                }
                None => {}
            }
        }
        Ok(())
    }

    async fn take_turns(
        &self,
        steps: &[Step],
        deadline: Instant,
        patience: Duration,
        done: &mut impl FnMut(&Step),
    ) -> Result<(), PreparationError> {
        let mut left: Vec<&Step> = steps.iter().collect();
        loop {
            let mut busy = Vec::new();
            for step in left {
                if self.try_locked(step).await? {
                    done(step);
                } else {
                    busy.push(step);
                }
            }
            if busy.is_empty() {
                return Ok(());
            }
            if Instant::now() + RETRY_PAUSE >= deadline {
                return Err(self.busy(&busy, patience).await);
            }
            left = busy;
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    /// Tries a step. False: a lock could not be taken.
    async fn try_locked(&self, step: &Step) -> Result<bool, PreparationError> {
        let session = &self.0.0;
        let result = session.batch(&step.what, &step.transaction()).await;
        let Err(error) = result else { return Ok(true) };
        // If the connection is lost, the server ends the transaction.
        let _ = session.batch(&step.what, "ROLLBACK").await;
        let passing = [
            SqlState::LOCK_NOT_AVAILABLE,
            SqlState::T_R_DEADLOCK_DETECTED,
        ];
        if passing
            .iter()
            .any(|state| error.sql_state.as_ref() == Some(state))
        {
            return Ok(false);
        }
        Err(error.into())
    }

    async fn busy(&self, steps: &[&Step], patience: Duration) -> PreparationError {
        let tables: Vec<u32> = steps.iter().flat_map(|step| step.tables.clone()).collect();
        let reading = steps.iter().all(|step| step.how == How::Publication);
        let sql = "SELECT DISTINCT a.pid, coalesce(nullif(a.application_name, ''), a.backend_type), coalesce(a.state, ''), \
                     coalesce(date_trunc('second', a.xact_start)::text, '') \
                   FROM pg_locks l JOIN pg_stat_activity a USING (pid) \
                   WHERE l.locktype = 'relation' AND l.granted AND l.relation = ANY ($1) AND l.pid <> pg_backend_pid() \
                     AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
                     AND (NOT $2 OR l.mode NOT IN ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock')) ORDER BY 4 LIMIT 3";
        let rows = self
            .0
            .0
            .rows("asking who holds the lock", sql, &[&tables, &reading])
            .await
            .unwrap_or_default();
        let holders: Vec<String> = rows
            .iter()
            .filter_map(|row| {
                let pid: i32 = row.get(0).ok()?;
                let name: String = row.get(1).ok()?;
                let state: String = row.get(2).ok()?;
                let since: String = row.get(3).ok()?;
                Some(format!(
                    "process {pid} ({name}, {state}, transaction since {since})"
                ))
            })
            .collect();
        let what: Vec<String> = steps.iter().map(|step| step.what.clone()).collect();
        PreparationError::Busy {
            what: listed(&what),
            seconds: patience.as_secs(),
            holders: if holders.is_empty() {
                "nobody at this moment".into()
            } else {
                holders.join(", ")
            },
        }
    }

    async fn each(&self, step: &Step) -> Result<(), PreparationError> {
        for sql in &step.sql {
            if sql == RELOAD {
                self.reload(&step.what, sql).await?;
            } else {
                self.0.0.batch(&step.what, sql).await?;
            }
        }
        Ok(())
    }

    /// Returns when this session, too, has read the new values.
    async fn reload(&self, doing: &str, sql: &str) -> Result<(), PreparationError> {
        let loaded = async || -> Result<String, DatastoreError> {
            let sql = "SELECT pg_conf_load_time()::text";
            self.0.0.row(doing, sql, &[]).await?.get(0)
        };
        let before = loaded().await?;
        self.0.0.batch(doing, sql).await?;
        let deadline = Instant::now() + SERVER_TIMEOUT;
        while loaded().await? == before && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Repeats the step until the slot is free. The slot's user may reconnect at once; it is ended
    /// again, but not for ever.
    async fn until_free(&self, step: &Step) -> Result<(), PreparationError> {
        let deadline = Instant::now() + SERVER_TIMEOUT;
        let mut seen = BTreeSet::new();
        loop {
            match self.each(step).await {
                Err(PreparationError::Datastore(error))
                    if error.sql_state == Some(SqlState::OBJECT_IN_USE) =>
                {
                    if seen.insert(error.text.clone()) {
                        log::info!("peer: {}: {}", step.what, error.text);
                    }
                }
                other => return other,
            }
            if Instant::now() >= deadline {
                return Err(PreparationError::InUse {
                    what: step.what.clone(),
                });
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
