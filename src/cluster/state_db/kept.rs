//! The replaced databases that are kept, with the facts by which one is pinned.

use super::state::StateDb;
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::cluster::postgres::rows::Row;
use chrono::{DateTime, Utc};

/// A replaced database.
#[derive(Debug, Clone)]
pub struct KeptDatabase {
    pub name: String,
    pub created: DateTime<Utc>,
    pub pinned: bool,
    pub bytes: u64,
    /// Epoch of the primary to which this cluster came back with this database.
    pub diverged: Option<i64>,
    /// Epoch of the promotion before which it was the last one.
    pub promoted: Option<i64>,
    /// Nothing proved that the primary's history continued it.
    pub unproven: bool,
}

/// Pinned are the last database from before each promotion, the database of a returning primary,
/// and for a time unproven ones.
const KEPT: &str = "
SELECT g.name, g.created, g.pinned, pg_database_size(d.oid),
       (SELECT max(v.epoch) FROM divergence v WHERE v.found <= g.created
          AND NOT EXISTS (SELECT 1 FROM generation o WHERE o.created >= v.found AND o.created < g.created)),
       (SELECT max(p.epoch) FROM promotion p WHERE p.time >= g.created
          AND NOT EXISTS (SELECT 1 FROM generation o WHERE o.created <= p.time AND o.created > g.created)),
       g.unproven
FROM generation g JOIN pg_database d ON d.datname = g.name
ORDER BY g.created DESC, g.name DESC";

impl StateDb {
    /// Returns the kept databases, the latest first.
    pub async fn kept_databases(&self) -> Result<Vec<KeptDatabase>, DatastoreError> {
        let doing = "reading the generations";
        let rows = self.session.rows(doing, KEPT, &[]).await?;
        let kept = |row: &Row| {
            Ok(KeptDatabase {
                name: row.get(0)?,
                created: row.get(1)?,
                pinned: row.get(2)?,
                bytes: row.get::<i64>(3)?.unsigned_abs(),
                diverged: row.get(4)?,
                promoted: row.get(5)?,
                unproven: row.get(6)?,
            })
        };
        rows.iter().map(kept).collect()
    }
}
