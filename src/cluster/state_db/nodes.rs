//! The processes of a cluster that is fed from its primary's site, as each has written of itself. The
//! process that pushes and the one that waits at the spare's site cannot reach each other elsewhere.

use super::state::{StateDb, StateError};
use crate::cluster::postgres::datastore_error::printable;
use crate::config::{Direction, WantedRole};
use std::time::{Duration, Instant};

/// The record that a process writes of itself for the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeTold {
    pub direction: Direction,
    /// Name of its node, and the port of its HTTP interface.
    pub name: String,
    pub site: String,
    /// The role that its configuration asks for.
    pub role: WantedRole,
    pub force_epoch: u64,
    /// True: it is at work, and clients may use the cluster as the primary.
    pub serves: bool,
    /// Why it applies nothing; empty: it applies, or waits.
    pub hold: String,
    /// The checks that only its own node can make, in the form of room `role`; empty: none.
    pub checks: String,
    /// Disk of the local server. None: the server is on another machine.
    pub disk: Option<Disk>,
}

/// The disk on which the local server keeps Builder's database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub directory: String,
    /// In bytes.
    pub free: u64,
    pub total: u64,
}

/// A process, as it was last heard of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub told: NodeTold,
    /// Time at which it wrote this, by a clock that nobody sets. None: before this machine was
    /// started, or at no possible time.
    pub heard: Option<Instant>,
}

impl Node {
    /// Longest time between two records of a living process, which writes one every few seconds.
    const ALIVE_FOR: Duration = Duration::from_secs(30);

    /// Returns the time since it wrote this. None: too long ago to be known.
    pub fn age(&self) -> Option<Duration> {
        self.heard.map(|heard| heard.elapsed())
    }

    pub fn is_alive(&self) -> bool {
        self.age().is_some_and(|age| age <= Node::ALIVE_FOR)
    }

    /// Returns the node for people.
    pub fn place(&self) -> String {
        match self.told.site.as_str() {
            "" => self.told.name.clone(),
            site => format!("{} at {site}", self.told.name),
        }
    }
}

impl StateDb {
    /// Records what this process tells, and forgets processes that have told nothing for a day.
    pub async fn tell(&self, told: &NodeTold) -> Result<(), StateError> {
        let sql = "WITH gone AS (DELETE FROM nodes WHERE seen < now() - interval '1 day') \
                   INSERT INTO nodes (direction, name, site, seen, role, force_epoch, serves, hold, checks, \
                     disk_directory, disk_free, disk_total) \
                   VALUES ($1, $2, $3, now(), $4, $5, $6, $7, $8, $9, $10, $11) \
                   ON CONFLICT (direction, name) DO UPDATE SET site = excluded.site, seen = excluded.seen, \
                     role = excluded.role, force_epoch = excluded.force_epoch, serves = excluded.serves, \
                     hold = excluded.hold, checks = excluded.checks, disk_directory = excluded.disk_directory, \
                     disk_free = excluded.disk_free, disk_total = excluded.disk_total";
        let number = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let disk = told.disk.as_ref();
        self.session()
            .execute(
                "recording this node",
                sql,
                &[
                    &told.direction.as_str(),
                    &told.name,
                    &told.site,
                    &told.role.as_str(),
                    &number(told.force_epoch),
                    &told.serves,
                    &told.hold,
                    &told.checks,
                    &disk.map(|disk| &disk.directory),
                    &disk.map(|disk| number(disk.free)),
                    &disk.map(|disk| number(disk.total)),
                ],
            )
            .await?;
        Ok(())
    }

    /// Takes back what other processes of this direction tell of whether the cluster serves: this one is
    /// at work now.
    pub async fn silence_others(&self, direction: Direction, name: &str) -> Result<(), StateError> {
        let sql = "UPDATE nodes SET serves = false WHERE direction = $1 AND name <> $2 AND serves";
        let doing = "taking back what other nodes have told";
        let told: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&direction.as_str(), &name];
        self.session().execute(doing, sql, &told).await?;
        Ok(())
    }

    /// Returns the processes of one direction, the one that was heard of last first. A record that
    /// cannot be read counts as none.
    pub async fn nodes(&self, direction: Direction) -> Result<Vec<Node>, StateError> {
        // A record of a time to come is of a process that is gone: the server's clock was set back since,
        // and a living process has written another one.
        let sql = "SELECT name, site, CASE WHEN seen > now() + interval '1 second' THEN 1e9 \
                     ELSE extract(epoch FROM greatest(now() - seen, interval '0')) END::float8, role, \
                     force_epoch, serves, hold, checks, disk_directory, disk_free, disk_total \
                   FROM nodes WHERE direction = $1 ORDER BY 3, name";
        let doing = "reading the other nodes";
        let now = Instant::now();
        let rows = self
            .session()
            .query(doing, sql, &[&direction.as_str()])
            .await?;
        let node = |row: &tokio_postgres::Row| {
            let disk = |directory, free: Option<i64>, total: Option<i64>| {
                Some(Disk {
                    directory,
                    free: free?.unsigned_abs(),
                    total: total?.unsigned_abs(),
                })
            };
            Some(Node {
                heard: Duration::try_from_secs_f64(row.get(2))
                    .ok()
                    .and_then(|age| now.checked_sub(age)),
                told: NodeTold {
                    direction,
                    name: shown(row.get(0)),
                    site: shown(row.get(1)),
                    role: WantedRole::parse(row.get(3))?,
                    force_epoch: row.get::<_, i64>(4).unsigned_abs(),
                    serves: row.get(5),
                    hold: shown(row.get(6)),
                    checks: row.get(7),
                    disk: row
                        .get::<_, Option<String>>(8)
                        .and_then(|directory| disk(directory, row.get(9), row.get(10))),
                },
            })
        };
        Ok(rows.iter().filter_map(node).collect())
    }
}

/// Returns a text of another process as it may be shown.
fn shown(text: &str) -> String {
    const LONGEST: usize = 1000;
    printable(text).chars().take(LONGEST).collect()
}
