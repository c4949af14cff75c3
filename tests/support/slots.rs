//! Changes that a DBA, or an accident, may make to the replication slot on the primary.

use std::time::{Duration, Instant};

use tokio_postgres::Client;

use super::{Cluster, Result};

/// Maximum time until the walsender of a slot in use releases it after its end, unless the slot is
/// taken again first.
const PATIENCE: Duration = Duration::from_secs(5);

struct Slot {
    name: String,
    plugin: String,
}

/// Any slot of a spare.
pub const ANY: &str = "warm_spare_%";

async fn ours(client: &Client, name: &str) -> Result<Option<Slot>> {
    let sql = "SELECT slot_name::text, plugin::text FROM pg_replication_slots
               WHERE slot_name LIKE $1 AND NOT temporary AND plugin IS NOT NULL ORDER BY 1 LIMIT 1";
    let row = client.query_opt(sql, &[&name]).await?;
    Ok(row.map(|row| Slot {
        name: row.get(0),
        plugin: row.get(1),
    }))
}

/// Returns the name of the only slot.
pub async fn name(primary: &Cluster) -> Result<String> {
    let slot = ours(&primary.conn().await?, ANY).await?;
    Ok(slot.ok_or("no slot of ours")?.name)
}

/// Runs the statement together with ending the walsender, again and again until it runs between two
/// of its connections.
async fn with_force(client: &Client, slot: &Slot, statement: &str) -> Result<bool> {
    let end = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active_pid IS NOT NULL";
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        client.execute(end, &[&slot.name]).await?;
        if client.execute(statement, &[&slot.name]).await.is_ok() {
            return Ok(true);
        }
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    Ok(false)
}

/// Drops the slot. False: there is none, or it was never free.
pub async fn drop_slot(primary: &Cluster, name: &str) -> Result<bool> {
    let client = primary.conn().await?;
    match ours(&client, name).await? {
        Some(slot) => with_force(&client, &slot, "SELECT pg_drop_replication_slot($1::text)").await,
        None => Ok(false),
    }
}

/// Creates a slot with the same name at another position.
pub async fn make_anew(primary: &Cluster, name: &str) -> Result<bool> {
    let client = primary.conn().await?;
    let Some(slot) = ours(&client, name).await? else {
        return Ok(false);
    };
    if !with_force(&client, &slot, "SELECT pg_drop_replication_slot($1::text)").await? {
        return Ok(false);
    }
    let make = "SELECT pg_create_logical_replication_slot($1::text, $2::text)";
    // Its owner may have created it again already, or may be creating it.
    Ok(client
        .execute(make, &[&slot.name, &slot.plugin])
        .await
        .is_ok())
}

/// Moves the slot past the spare's position.
pub async fn advance(primary: &Cluster, name: &str) -> Result<bool> {
    let client = primary.conn().await?;
    match ours(&client, name).await? {
        Some(slot) => {
            let sql = "SELECT pg_replication_slot_advance($1::text, pg_current_wal_lsn())";
            with_force(&client, &slot, sql).await
        }
        None => Ok(false),
    }
}
