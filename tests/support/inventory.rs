//! Reads our objects on a server at present: sessions, the things that they hold, and slots. It
//! relies on the server only.

use std::time::Duration;

use super::{Postgres, Result, wait_until};

/// A session of the program under test.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Session {
    pub database: String,
    pub kind: String,
    pub pid: i32,
    /// The last thing that it did, for people.
    pub did: String,
}

/// The things that hold something back on a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory {
    pub sessions: i64,
    /// Readers of a slot, and sessions that create one.
    pub walsenders: i64,
    /// Sessions that keep rows from being vacuumed.
    pub snapshots: i64,
    /// Sessions with a transaction that is open and idle.
    pub idle_in_transaction: i64,
    /// Locks on tables.
    pub locks: i64,
    pub temporary_slots: i64,
}

impl Inventory {
    pub async fn of(server: &Postgres) -> Result<Inventory> {
        let sql = "WITH ours AS (SELECT * FROM pg_stat_activity WHERE application_name = 'warm-spare')
            SELECT count(*), count(*) FILTER (WHERE backend_type = 'walsender'),
                count(*) FILTER (WHERE backend_xmin IS NOT NULL),
                count(*) FILTER (WHERE state LIKE 'idle in transaction%'),
                (SELECT count(*) FROM pg_locks JOIN ours USING (pid) WHERE locktype = 'relation' AND mode <> 'AccessShareLock'),
                (SELECT count(*) FROM pg_replication_slots WHERE temporary AND slot_name LIKE 'warm\\_spare%')
            FROM ours";
        let row = server.conn("postgres").await?.query_one(sql, &[]).await?;
        Ok(Inventory {
            sessions: row.get(0),
            walsenders: row.get(1),
            snapshots: row.get(2),
            idle_in_transaction: row.get(3),
            locks: row.get(4),
            temporary_slots: row.get(5),
        })
    }

    /// Returns whether there is nothing but a reader of our slot, and at most a question that is
    /// just being asked.
    pub fn holds_nothing(&self) -> bool {
        self.holds_nothing_of(1)
    }

    /// Returns the same for this number of spares.
    pub fn holds_nothing_of(&self, spares: i64) -> bool {
        self.walsenders <= spares
            && self.snapshots == 0
            && self.idle_in_transaction == 0
            && self.locks == 0
            && self.temporary_slots == 0
    }
}

/// Waits until a primary that is followed, and not being copied, has nothing of ours that holds
/// something back. For a campaign: after every fault.
pub async fn until_nothing_is_held(primary: &Postgres, within: Duration) -> Inventory {
    wait_until("nothing of ours is held on the primary", within, || async {
        let found = Inventory::of(primary).await?;
        match found.holds_nothing() {
            true => Ok(found),
            false => Err(format!("{found:?}").into()),
        }
    })
    .await
}

/// Returns our sessions that stay: short ones are left out.
pub async fn lasting_sessions(server: &Postgres) -> Result<Vec<Session>> {
    let sql = "SELECT coalesce(datname::text, ''), backend_type, pid, query FROM pg_stat_activity
               WHERE application_name = 'warm-spare' AND backend_start < clock_timestamp() - interval '300 milliseconds'
                 AND state <> 'active' OR application_name = 'warm-spare' AND backend_type = 'walsender'
               ORDER BY datname, backend_type, backend_start, pid";
    sessions(server, sql).await
}

/// Returns every session of ours, whatever it does.
pub async fn all_sessions(server: &Postgres) -> Result<Vec<Session>> {
    let sql = "SELECT coalesce(datname::text, ''), backend_type, pid, query FROM pg_stat_activity
               WHERE application_name = 'warm-spare' AND backend_type IN ('client backend', 'walsender')
               ORDER BY datname, backend_type, backend_start, pid";
    sessions(server, sql).await
}

async fn sessions(server: &Postgres, sql: &str) -> Result<Vec<Session>> {
    let rows = server.conn("postgres").await?.query(sql, &[]).await?;
    Ok(rows
        .iter()
        .map(|row| Session {
            database: row.get(0),
            kind: row.get(1),
            pid: row.get(2),
            did: row.get(3),
        })
        .collect())
}

/// Ends a session. False: it is gone already.
pub async fn end(server: &Postgres, session: &Session) -> Result<bool> {
    let sql = "SELECT pg_terminate_backend($1)";
    let client = server.conn("postgres").await?;
    Ok(client.query_one(sql, &[&session.pid]).await?.get(0))
}
