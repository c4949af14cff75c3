//! The formats of database `warm_spare`, and the numbered migrations between them.

use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::cluster::postgres::session::WriteSession;
use crate::domain::Side;

/// The migration at place N makes format N of format N - 1. Each one may run again on tables that
/// it has changed before: builds between two formats made only a part of them, and such a database
/// is completed.
const MIGRATIONS: [&str; 8] = [
    include_str!("migrations/1_copies.sql"),
    include_str!("migrations/2_stream.sql"),
    include_str!("migrations/3_promotion.sql"),
    include_str!("migrations/4_lineage.sql"),
    include_str!("migrations/5_names_of_deletions.sql"),
    include_str!("migrations/6_artifact_place.sql"),
    include_str!("migrations/7_lease.sql"),
    include_str!("migrations/8_nodes.sql"),
];
/// The newest format that this program knows. It refuses a newer one.
pub(super) const FORMAT: i32 = MIGRATIONS.len() as i32;
/// The oldest format in which a fence can be recorded.
const FENCE_FORMAT: i32 = 3;

/// Serialises migrations: several processes may find an older format at once.
const BEGIN: &str = "BEGIN; SELECT pg_advisory_xact_lock(1635083374)";

/// Returns the oldest format that is used without a migration. The program of the peer may be older
/// than this one, so its tables are changed only where a fence needs them.
pub(super) fn oldest_format(side: Side) -> i32 {
    match side {
        Side::Local => FORMAT,
        Side::Peer => FENCE_FORMAT,
    }
}

/// Brings the tables to the newest format in one transaction, if their format is older than
/// `oldest`. Returns the format that they have then.
pub(super) async fn migrate(session: &WriteSession, oldest: i32) -> Result<i32, DatastoreError> {
    let found = format_of(session).await?;
    if found >= oldest {
        return Ok(found);
    }
    let migrated = migrate_within(session).await;
    if migrated.is_err() {
        let _ = session.batch("giving the migration up", "ROLLBACK").await;
    }
    migrated
}

async fn migrate_within(session: &WriteSession) -> Result<i32, DatastoreError> {
    session.batch("beginning the migration", BEGIN).await?;
    // Another process may have migrated the tables while this one waited for the lock.
    let found = format_of(session).await?;
    if found >= FORMAT {
        session.batch("ending the migration", "ROLLBACK").await?;
        return Ok(found);
    }
    for (number, sql) in (1..).zip(MIGRATIONS) {
        let doing = format!("migrating database warm_spare to format {number}");
        session.batch(&doing, sql).await?;
    }
    let sql = "UPDATE meta SET format = $1";
    session
        .execute("recording the format", sql, &[&FORMAT])
        .await?;
    session.batch("committing the migration", "COMMIT").await?;
    Ok(FORMAT)
}

/// Returns the format of the tables. 0: they do not exist yet.
async fn format_of(session: &WriteSession) -> Result<i32, DatastoreError> {
    let doing = "reading the format";
    let sql = "SELECT to_regclass('public.meta') IS NOT NULL";
    if !session.row(doing, sql, &[]).await?.get::<bool>(0)? {
        return Ok(0);
    }
    let row = session
        .row(doing, "SELECT max(format) FROM meta", &[])
        .await?;
    Ok(row.get::<Option<i32>>(0)?.unwrap_or_default())
}
