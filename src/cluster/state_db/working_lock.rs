//! The lock that one process holds on a cluster while its session in the state database lives, and
//! the facts that other processes see about its holder.
//!
//! A process that is killed loses its session at once. A process whose machine or connection is
//! lost keeps the session, because its server cannot notice it. So the holder gives a sign of life
//! every few seconds, and the others check for it.

use super::DATABASE;
use super::state::{StateDb, StateError};
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::cluster::postgres::session::WriteSession;
use crate::config::Direction;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// Key of the advisory lock: "warm" in ASCII.
const LOCK_KEY: i64 = 0x7761_726d;
const LOCK_TRIES: u32 = 15;
const LOCK_STEP: Duration = Duration::from_millis(200);
const SIGN_OF_LIFE_INTERVAL: Duration = Duration::from_secs(3);
/// Time until a session counts as waiting in the queue of the lock, and interval between two looks.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(5);
const QUEUE_STEP: Duration = Duration::from_millis(20);

/// Sessions in the queue of the lock.
const QUEUED: &str = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objsubid = 1 \
     AND classid = 0 AND objid::bigint = $1 \
     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

/// Settings of the session that has the lock or waits for it: the server notices within 20 s that
/// the machine at the other end is gone. A waiting session reads nothing from its client, so only
/// the second setting shows that the client has closed it. Servers before 12 and 14 do not have
/// them.
const NOTICE_A_LOST_CLIENT: &str = "SELECT set_config(name, given, false) FROM pg_settings JOIN (VALUES \
     ('tcp_user_timeout', '20s'), ('client_connection_check_interval', '5s')) wanted (name, given) USING (name)";

/// Proof that this process holds the working lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lock {
    pub token: i64,
}

/// The session that holds the lock, as the server knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    pub pid: i32,
    pub since: String,
    /// Address of its machine; None: it is connected by a socket on the server's own machine.
    pub address: Option<String>,
    /// A text that changes after each statement. While a statement runs, it differs at every check.
    sign_of_life: String,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "server process {}", self.pid)?;
        if let Some(address) = &self.address {
            write!(f, ", from {address}")?;
        }
        write!(f, ", connected since {}", self.since)
    }
}

impl StateDb {
    /// Returns the server process of another session in our database. `other` is a session on the
    /// same server, outside of that database.
    pub async fn other_session(&self, other: &WriteSession) -> Result<Option<i32>, DatastoreError> {
        let doing = "looking for other sessions";
        let sql = "SELECT pg_backend_pid()";
        let own: i32 = self.session.row(doing, sql, &[]).await?.get(0)?;
        let sql = "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND pid <> $2 LIMIT 1";
        let others = other.rows(doing, sql, &[&DATABASE, &own]).await?;
        others.first().map(|row| row.get(0)).transpose()
    }

    /// Begins a transaction as the holder of the working lock. Nobody can take the lock until it
    /// ends.
    pub async fn begin_as_holder(&self, lock: Lock, doing: &str) -> Result<(), StateError> {
        self.session.batch(doing, "BEGIN").await?;
        let sql = "SELECT token FROM meta FOR UPDATE";
        let held = self.session.row("checking our token", sql, &[]).await?;
        match held.get::<i64>(0)? == lock.token {
            true => Ok(()),
            false => Err(StateError::Superseded),
        }
    }

    /// Takes the working lock, for as long as this session lives. `direction` is of the process
    /// that takes it.
    pub async fn lock(&self, direction: Direction) -> Result<Lock, StateError> {
        let sql = "SELECT pg_try_advisory_lock($1)";
        let mut tries = 0;
        let got = loop {
            let row = self
                .session
                .query_one("taking the working lock", sql, &[&LOCK_KEY])
                .await?;
            tries += 1;
            // The server may take a moment to notice that a holder's connection is gone.
            if row.get(0) || tries == LOCK_TRIES {
                break row.get::<_, bool>(0);
            }
            tokio::time::sleep(LOCK_STEP).await;
        };
        if !got {
            let holder = holder(&self.session).await?.map(Box::new);
            return Err(StateError::Locked { holder });
        }
        self.notice_a_lost_client().await?;
        self.became_holder(direction).await
    }

    async fn notice_a_lost_client(&self) -> Result<(), StateError> {
        let doing = "preparing the session of the working lock";
        Ok(self.session.batch(doing, NOTICE_A_LOST_CLIENT).await?)
    }

    async fn became_holder(&self, direction: Direction) -> Result<Lock, StateError> {
        give_signs_of_life(&self.session);
        let sql = "UPDATE meta SET token = token + 1, held_for = $1 RETURNING token";
        let direction = direction.as_str();
        let row = self
            .session
            .query_one("taking a new token", sql, &[&direction])
            .await?;
        Ok(Lock { token: row.get(0) })
    }

    /// Returns the holder of the lock. None: nobody holds it.
    pub async fn holder(&self) -> Result<Option<Holder>, DatastoreError> {
        holder(&self.session).await
    }

    /// Returns whether the holder of the lock pushes.
    pub async fn holder_pushes(&self) -> Result<bool, StateError> {
        let sql = "SELECT held_for FROM meta";
        let doing = "reading the direction of the lock's holder";
        let row = self.session.query_one(doing, sql, &[]).await?;
        Ok(row.get::<_, &str>(0) == Direction::Push.as_str())
    }

    /// Returns whether a process waits in the queue of the lock.
    pub async fn is_awaited(&self) -> Result<bool, StateError> {
        let doing = "looking for processes that wait for the working lock";
        let waiting = self.session.query(doing, QUEUED, &[&LOCK_KEY]).await?;
        Ok(!waiting.is_empty())
    }

    /// Takes a place in the queue of the lock, with this session. `looking` is another session of
    /// the same database. When this returns, the session is in the queue, or has the lock.
    pub async fn queue(self, direction: Direction, looking: &StateDb) -> Result<Turn, StateError> {
        self.notice_a_lost_client().await?;
        let doing = "waiting for the working lock";
        let sql = "SELECT pg_backend_pid()";
        let pid: i32 = self.session.query_one(doing, sql, &[]).await?.get(0);
        let mut waiting = JoinSet::new();
        waiting.spawn(async move {
            let sql = format!("SELECT pg_advisory_lock({LOCK_KEY})");
            let taking = self.session.client().batch_execute(&sql);
            self.session.unlimited(doing, taking).await?;
            let lock = self.became_holder(direction).await?;
            Ok((self, lock))
        });
        let in_queue = async {
            loop {
                let queued = looking.session.query(doing, QUEUED, &[&LOCK_KEY]).await?;
                if queued.iter().any(|row| row.get::<_, i32>(0) == pid) {
                    return Ok::<_, StateError>(None);
                }
                match waiting.try_join_next() {
                    Some(ended) => return Ok(Some(ended)),
                    None => tokio::time::sleep(QUEUE_STEP).await,
                }
            }
        };
        let ended = match tokio::time::timeout(QUEUE_TIMEOUT, in_queue).await {
            Ok(ended) => ended?,
            // It is tried all the same.
            Err(_) => None,
        };
        let ended = ended.map(|ended| ended.unwrap_or(Err(StateError::Superseded)));
        Ok(Turn { waiting, ended })
    }

    /// Checks that the lock is still the newest. Its holder may have been paused, or lost its
    /// session, without noticing.
    pub async fn still_ours(&self, lock: Lock) -> Result<(), StateError> {
        let row = self
            .session
            .query_one("reading the token", "SELECT token FROM meta", &[])
            .await?;
        if row.get::<_, i64>(0) == lock.token {
            Ok(())
        } else {
            Err(StateError::Superseded)
        }
    }

    /// Ends the session of a holder that gives no sign of life, if it is still the same. If its
    /// process still lives, it finds its session ended, as it would after any other cause.
    pub async fn end_holder(&self, holder: &Holder) -> Result<(), DatastoreError> {
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                   WHERE pid = $1 AND backend_start::text = $2";
        self.session
            .query(
                "ending the silent holder's session",
                sql,
                &[&holder.pid, &holder.since],
            )
            .await?;
        Ok(())
    }
}

type TurnEnd = Result<(StateDb, Lock), StateError>;

/// A place in the queue of the lock. It is given up when this is dropped.
pub struct Turn {
    waiting: JoinSet<TurnEnd>,
    ended: Option<TurnEnd>,
}

impl Turn {
    /// Waits for the lock, at most that long. None: another process has it still.
    pub async fn wait(&mut self, at_most: Duration) -> Option<TurnEnd> {
        if self.ended.is_some() {
            return self.ended.take();
        }
        match tokio::time::timeout(at_most, self.waiting.join_next()).await {
            Err(_) => None,
            Ok(Some(Ok(ended))) => Some(ended),
            Ok(_) => Some(Err(StateError::Superseded)),
        }
    }
}

/// Returns the holder. None: it has just released the lock.
async fn holder(session: &WriteSession) -> Result<Option<Holder>, DatastoreError> {
    let sql = "SELECT a.pid, coalesce(a.backend_start::text, ''), host(a.client_addr), \
                 CASE WHEN a.state LIKE 'idle%' THEN a.query_start::text ELSE clock_timestamp()::text END \
               FROM pg_locks l JOIN pg_stat_activity a USING (pid) \
               WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 \
                 AND l.classid = 0 AND l.objid::bigint = $1 \
                 AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let found = session
        .query("looking for the lock's holder", sql, &[&LOCK_KEY])
        .await?;
    Ok(found.first().map(|row| Holder {
        pid: row.get(0),
        since: row.get(1),
        address: row.get(2),
        sign_of_life: row.get::<_, Option<String>>(3).unwrap_or_default(),
    }))
}

/// Gives signs of life until the session ends, or is given up.
fn give_signs_of_life(session: &WriteSession) {
    let client = Arc::downgrade(session.shared_client());
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(SIGN_OF_LIFE_INTERVAL).await;
            let Some(client) = client.upgrade() else {
                return;
            };
            // An empty query is no statement, so a transaction that is open on this session is not
            // changed.
            if client.batch_execute("").await.is_err() {
                return;
            }
        }
    });
}

/// The observations of a process that waits for the lock. Checks are counted, not time: a server or
/// a process that hangs for a while proves nothing about another process.
#[derive(Debug, Default)]
pub struct Watch {
    holder: Option<Holder>,
    unchanged: u32,
}

impl Watch {
    /// Takes in a check of the lock's holder. Returns the number of consecutive checks at which the
    /// holder had done nothing.
    pub fn see(&mut self, holder: Option<Holder>) -> u32 {
        self.unchanged = match holder.is_some() && holder == self.holder {
            true => self.unchanged + 1,
            false => 0,
        };
        self.holder = holder;
        self.unchanged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_looks_in_a_row_count() {
        let holder = |pid, sign: &str| {
            Some(Holder {
                pid,
                since: "then".into(),
                address: None,
                sign_of_life: sign.into(),
            })
        };
        let mut watch = Watch::default();
        assert_eq!(watch.see(None), 0);
        assert_eq!(watch.see(None), 0);
        assert_eq!(watch.see(holder(1, "a")), 0);
        assert_eq!(watch.see(holder(1, "a")), 1);
        assert_eq!(watch.see(holder(1, "a")), 2);
        assert_eq!(watch.see(holder(1, "b")), 0);
        assert_eq!(watch.see(holder(1, "b")), 1);
        // Another process with the same sign.
        assert_eq!(watch.see(holder(2, "b")), 0);
    }
}
