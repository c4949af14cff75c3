//! What a DBA, or an accident, may do to the replication slot on the primary.

use std::time::{Duration, Instant};

use tokio_postgres::Client;

use super::{Cluster, Result};

/// A slot in use is given up by its walsender soon after that was ended, unless it is taken again first.
const PATIENCE: Duration = Duration::from_secs(5);

struct Slot {
    name: String,
    plugin: String,
}

async fn ours(client: &Client) -> Result<Option<Slot>> {
    let sql = "SELECT slot_name::text, plugin::text FROM pg_replication_slots
               WHERE slot_name LIKE 'warm_spare_%' AND NOT temporary AND plugin IS NOT NULL ORDER BY 1 LIMIT 1";
    let row = client.query_opt(sql, &[]).await?;
    Ok(row.map(|row| Slot {
        name: row.get(0),
        plugin: row.get(1),
    }))
}

/// Does it in one statement with ending the walsender, again and again until it comes between two connections of it.
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

/// False: there is none, or it was never free.
pub async fn drop_slot(primary: &Cluster) -> Result<bool> {
    let client = primary.conn().await?;
    match ours(&client).await? {
        Some(slot) => with_force(&client, &slot, "SELECT pg_drop_replication_slot($1::text)").await,
        None => Ok(false),
    }
}

/// The same name, and another position.
pub async fn make_anew(primary: &Cluster) -> Result<bool> {
    let client = primary.conn().await?;
    let Some(slot) = ours(&client).await? else {
        return Ok(false);
    };
    if !with_force(&client, &slot, "SELECT pg_drop_replication_slot($1::text)").await? {
        return Ok(false);
    }
    let make = "SELECT pg_create_logical_replication_slot($1::text, $2::text)";
    // Its owner may have made it anew already, or be at it.
    Ok(client
        .execute(make, &[&slot.name, &slot.plugin])
        .await
        .is_ok())
}

/// Past what the spare has.
pub async fn advance(primary: &Cluster) -> Result<bool> {
    let client = primary.conn().await?;
    match ours(&client).await? {
        Some(slot) => {
            let sql = "SELECT pg_replication_slot_advance($1::text, pg_current_wal_lsn())";
            with_force(&client, &slot, sql).await
        }
        None => Ok(false),
    }
}
