//! A prepared primary, a service that follows it, and questions to both.

use serde_json::Value;

use super::service::SOON;
use super::{Postgres, Result, Service, Site, content, postgres, wait_until};

const DONE: &str = "warm_spare_baselines_total{result=\"done\"}";

/// Returns a primary that can be followed, as after `prepare` and a restart.
pub fn logical() -> postgres::Builder {
    Postgres::builder().logical()
}

/// Runs an operator's `warm-spare prepare`.
pub async fn prepare(site: &Site) {
    if !site.config_file().exists() {
        site.write_config("");
    }
    site.warm_spare(&["prepare"]).await.ok();
}

pub async fn prepared(name: &str) -> Result<Site> {
    let site = Site::builder(name).primary(logical()).start().await?;
    prepare(&site).await;
    Ok(site)
}

/// A service that follows a prepared primary.
pub async fn followed<'a>(site: &'a Site, extra: &str) -> Result<Service<'a>> {
    let service = Service::start(site, extra);
    until_following(&service).await;
    Ok(service)
}

pub async fn until_following(service: &Service<'_>) -> Value {
    let follows = |status: &Value| {
        status["state"] == "following"
            && status["replication"]["mode"] == "stream"
            && status["lag"]["bytes"] == 0
    };
    loop {
        service.until("following by the stream", follows).await;
        until_read(service.site).await;
        // The status is the same before a copy, and a copy reads the slot as well.
        if let Ok(status) = service.status().await
            && follows(&status)
        {
            return status;
        }
    }
}

/// Waits until a session reads our slot.
pub async fn until_read(site: &Site) {
    wait_until("the stream is read", SOON, || async {
        let sql = "SELECT FROM pg_replication_slots WHERE active AND NOT temporary";
        let rows = site.primary.conn().await?.query(sql, &[]).await?;
        let nobody = || "nobody reads".into();
        (!rows.is_empty()).then_some(()).ok_or_else(nobody)
    })
    .await;
}

/// Returns the number of baselines that this process of the service has finished.
pub async fn copies(service: &Service<'_>) -> Result<u64> {
    Ok(service.metric(DONE).await?.unwrap_or_default() as u64)
}

/// Waits until the spare has all rows of the primary's present state, each as often.
pub async fn until_equal(site: &Site) -> Result<()> {
    let expected = content(&site.primary).await?;
    wait_until("the spare has the primary's rows", SOON, || async {
        let found = content(&site.spare).await?;
        if found == expected {
            return Ok(());
        }
        let only = |one: &[String], other: &[String]| {
            let lines = one.iter().filter(|line| !other.contains(line));
            lines.take(3).cloned().collect::<Vec<_>>()
        };
        let (primary, spare) = (only(&expected, &found), only(&found, &expected));
        Err(format!("the primary alone: {primary:#?}\nthe spare alone: {spare:#?}").into())
    })
    .await;
    Ok(())
}

/// Waits until one more copy is counted: its rows are there a moment before.
pub async fn until_copied(service: &Service<'_>, before: u64) {
    wait_until("a new baseline", SOON, || async {
        match copies(service).await? {
            done if done > before => Ok(()),
            done => {
                let told = service.running.stderr().join("\n");
                Err(format!("{done} copies\n{told}").into())
            }
        }
    })
    .await;
}

/// Returns the reasons why a new baseline became necessary, oldest first.
pub fn gaps(status: &Value) -> Vec<String> {
    events(status, "gap")
}

pub fn events(status: &Value, kind: &str) -> Vec<String> {
    let all = status["events"].as_array().cloned().unwrap_or_default();
    let wanted = all.iter().filter(|event| event["kind"] == kind);
    wanted
        .map(|event| event["text"].as_str().unwrap_or_default().to_string())
        .collect()
}

/// Waits until a gap with these words was noticed and a new baseline has closed it.
pub async fn until_closed(service: &Service<'_>, words: &str, copies_before: u64) -> Result<()> {
    let status = service
        .until(&format!("a gap: {words}"), |status| {
            gaps(status).iter().any(|text| text.contains(words))
        })
        .await;
    drop(status);
    until_copied(service, copies_before).await;
    until_following(service).await;
    until_equal(service.site).await
}

/// Returns our slot on the primary: its position, and its `wal_status`.
pub async fn slot(site: &Site) -> Result<Option<(String, String)>> {
    let sql = "SELECT coalesce(confirmed_flush_lsn::text, ''), coalesce(wal_status, '') FROM pg_replication_slots
               WHERE slot_name LIKE 'warm\\_spare\\_%' AND NOT temporary";
    let row = site.primary.conn().await?.query_opt(sql, &[]).await?;
    Ok(row.map(|row| (row.get(0), row.get(1))))
}

/// Checks that the slot never confirms more than is stored here.
pub async fn assert_slot_is_not_ahead(site: &Site) -> Result<()> {
    // The order matters: the slot may move on in between, and the spare then was there before it.
    let Some((confirmed, _)) = slot(site).await? else {
        panic!("there is no slot");
    };
    let sql = "SELECT lsn >= $1::text::pg_lsn, lsn::text FROM warm_spare.recovery_point";
    let row = site
        .spare
        .conn()
        .await?
        .query_one(sql, &[&confirmed])
        .await?;
    let (safe, point): (bool, String) = (row.get(0), row.get(1));
    assert!(safe, "the slot is at {confirmed}, the spare at {point}");
    Ok(())
}

/// Returns all permanent slots on the primary.
pub async fn lasting_slots(site: &Site) -> Result<Vec<String>> {
    let sql = "SELECT slot_name::text FROM pg_replication_slots WHERE NOT temporary ORDER BY 1";
    let rows = site.primary.conn().await?.query(sql, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Changes the spare's database past the fence, as nobody should.
pub async fn tamper(site: &Site, sql: &str) -> Result<()> {
    let client = site.spare.conn().await?;
    client
        .batch_execute("SET default_transaction_read_only = off")
        .await?;
    Ok(client.batch_execute(sql).await?)
}

/// Returns the artifacts that the spare has recorded as unavailable on the primary.
pub async fn unavailable(site: &Site) -> Result<Vec<String>> {
    let sql = "SELECT key FROM warm_spare.unavailable ORDER BY key";
    let rows = site.spare.conn().await?.query(sql, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Returns the checksum of the object under the key in the spare's bucket.
pub async fn bytes_of(site: &Site, key: &str) -> Result<Option<String>> {
    site.spare.s3().checksum(&site.spare.bucket, key).await
}

/// Adds a row to a table without a key, where a change that is applied twice is seen.
pub async fn audit(site: &Site, ident: &str) -> Result<()> {
    let sql = "INSERT INTO audit_package (operation, trigger, requester_id, requester_name, origin, channel, package_ident)
               VALUES ('promote', 'hab_client', 1, 'me', 'core', 'stable', $1)";
    site.primary.conn().await?.execute(sql, &[&ident]).await?;
    Ok(())
}

/// Changes of every kind in tables without a key, as Builder makes them; they must work at any
/// time.
pub const KEYLESS: &str = "
    UPDATE origin_members SET member_role = 'owner' WHERE origin = 'core';
    INSERT INTO audit_package (operation, trigger, requester_id, requester_name, origin, channel, package_ident)
        VALUES ('promote', 'hab_client', 1, 'me', 'core', 'stable', 'core/a/1/2');
    INSERT INTO origin_members (origin, account_id) SELECT 'core', id FROM accounts
        WHERE id NOT IN (SELECT account_id FROM origin_members WHERE origin = 'core') LIMIT 1;
    UPDATE audit_package SET channel = 'unstable' WHERE package_ident = 'core/a/1/2';
    DELETE FROM audit_package WHERE package_ident = 'core/a/1/2';
    DELETE FROM origin_members WHERE origin = 'core' AND member_role <> 'owner';";

/// Checks that a verification finds no difference.
pub async fn verified(site: &Site) -> Result<()> {
    let found = site.warm_spare(&["verify", "--json"]).await.ok().json();
    assert_eq!(found["differences"], serde_json::json!([]), "{found:#}");
    Ok(())
}
