//! What users of other replicators reported of harm to their primary, tried with ours. Each test names the reports.

use std::time::Duration;
use support::follow::{
    audit, followed, logical, prepare, prepared, until_equal, until_following, until_read,
};
use support::inventory::{Inventory, until_nothing_is_held};
use support::packages::{insert, put};
use support::service::SOON;
use support::{Factory, Result, Service, Site, Spec, wait_until};

/// The Supervisor kills a service that has not stopped after so long.
const SUPERVISORS_PATIENCE: Duration = Duration::from_secs(8);

/// A server that stops waits until each reader of its log has confirmed all of it; ours confirms nothing that the gate holds.
/// (debezium DBZ-1839, eulerto/wal2json 176)
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_stops_while_the_gate_waits() -> Result<()> {
    let site = prepared("stops").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 1).await?;
    let service = followed(
        &site,
        "[replication]\ngate_grace = \"1h\"\nretry_missing = \"1s\"",
    )
    .await?;
    let late = factory.make(Spec::new("core", "late", "1"));
    insert(&site.primary, &late).await?;
    service
        .until("the gate holds it", |status| {
            status["replication"]["gate_waiting"] == 1
        })
        .await;
    let took = site.primary.pg.stop_smart(SUPERVISORS_PATIENCE).await?;
    assert!(took.is_some(), "the stream held the primary up");
    site.primary.pg.start_again().await?;
    put(&site.primary, &late).await?;
    until_following(&service).await;
    until_equal(&site).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_stops_while_it_is_copied_and_while_it_is_followed() -> Result<()> {
    for place in ["baseline.tables", "catch_up.begin"] {
        let site = prepared("stops_too").await?;
        Factory::seeded().fill(&site.primary, 1).await?;
        let (service, halt) = Service::halting(&site, "", place);
        halt.reached().await;
        let took = site.primary.pg.stop_smart(SUPERVISORS_PATIENCE).await?;
        assert!(took.is_some(), "{place}: we held the primary up");
        site.primary.pg.start_again().await?;
        halt.go();
        until_following(&service).await;
        let took = site.primary.pg.stop_smart(SUPERVISORS_PATIENCE).await?;
        assert!(took.is_some(), "following: we held the primary up");
        site.primary.pg.start_again().await?;
        until_following(&service).await;
        until_equal(&site).await?;
    }
    Ok(())
}

/// The copy is long, and the watch beside it has looked more than once before the server begins to stop.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_stops_in_the_middle_of_a_long_copy() -> Result<()> {
    let primary = logical()
        .setting("log_connections", "on")
        .setting("log_line_prefix", "'%a|'");
    let site = Site::builder("stops_long").primary(primary).start().await?;
    prepare(&site).await;
    Factory::seeded().fill(&site.primary, 1).await?;
    // Two minutes of rows that do not shrink on their way.
    site.primary
        .conn()
        .await?
        .batch_execute(
            "CREATE TABLE long_copy AS SELECT n, (SELECT string_agg(md5(n::text || m), '') FROM generate_series(1, 30) m) \
             FROM generate_series(1, 2500) n",
        )
        .await?;
    let service = Service::start(&site, "[replication]\nbandwidth_limit = \"20KB/s\"");
    service
        .until("its rows are copied", |status| {
            status["replication"]["baseline"]["phase"] == "tables"
        })
        .await;
    let sessions = || {
        let log = site.primary.pg.log();
        let lines = log.lines();
        lines
            .filter(|line| line.contains("connection authorized") && line.contains("warm-spare"))
            .count()
    };
    let before = sessions();
    wait_until("it has looked twice", SOON, || async {
        match sessions() - before {
            0 | 1 => Err("it has not".into()),
            _ => Ok(()),
        }
    })
    .await;
    let took = site.primary.pg.stop_smart(SUPERVISORS_PATIENCE).await?;
    assert!(took.is_some(), "the copy held the primary up");
    service.stop().await.ok();
    Ok(())
}

/// Only another database of the server is written to, and the slot holds its log as well.
/// (alias2k/flusso 111, risingwavelabs/risingwave 16697, npgsql 6143)
#[tokio::test(flavor = "multi_thread")]
async fn the_slot_moves_on_with_what_another_database_writes() -> Result<()> {
    let site = prepared("other_database").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = followed(&site, "").await?;
    let admin = site.primary.pg.conn("postgres").await?;
    admin
        .batch_execute(
            "CREATE TABLE noise AS SELECT n, repeat(md5(n::text), 30) FROM generate_series(1, 100000) n; CHECKPOINT",
        )
        .await?;
    let sql = "SELECT pg_current_wal_lsn()::text";
    let written: String = admin.query_one(sql, &[]).await?.get(0);
    wait_until("the slot lets go of it", SOON, || async {
        let sql = "SELECT restart_lsn >= $1::text::pg_lsn, restart_lsn::text FROM pg_replication_slots WHERE NOT temporary";
        // A server looks for a new place to start from as it writes what runs, every 15 s, and at a checkpoint.
        admin.batch_execute("CHECKPOINT").await?;
        let row = admin.query_one(sql, &[&written]).await?;
        let place: String = row.get(1);
        row.get::<_, bool>(0).then_some(()).ok_or_else(|| format!("{place} < {written}").into())
    })
    .await;
    service.stop().await.ok();
    Ok(())
}

/// The line is lost and the service killed: the server still has the former reader, which nobody hears of.
/// (xtdb 6076, 2ndQuadrant/bdr 170)
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_a_lost_reader_still_holds_is_taken_over() -> Result<()> {
    let site = prepared("lost_reader").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let line = support::proxy::Proxy::start(site.primary.pg.port()).await?;
    let service = followed(&site, &line.to_peer("")).await?;
    line.set(support::proxy::Mode::Hold).await;
    service.running.kill9()?;
    audit(&site, "meanwhile").await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    until_equal(&site).await?;
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'walsender'";
    let admin = site.primary.pg.conn("postgres").await?;
    assert_eq!(admin.query_one(sql, &[]).await?.get::<_, i64>(0), 1);
    Ok(())
}

/// (toluaina/pgsync 138, debezium DBZ-9003)
#[tokio::test(flavor = "multi_thread")]
async fn a_followed_primary_bears_no_transaction_of_ours() -> Result<()> {
    let site = prepared("no_transaction").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let _service = followed(&site, "").await?;
    for _ in 0..5 {
        until_nothing_is_held(&site.primary.pg, SOON).await;
        let found = Inventory::of(&site.primary.pg).await?;
        assert!(found.sessions <= 4, "{found:?}");
        let builder = site.primary.conn().await?;
        for statement in [
            "SET lock_timeout = '5s'",
            "ALTER TABLE accounts ADD COLUMN more int",
            "ALTER TABLE accounts DROP COLUMN more",
            "REINDEX TABLE CONCURRENTLY accounts",
        ] {
            builder.batch_execute(statement).await?;
        }
        until_read(&site).await;
    }
    Ok(())
}

/// Errors that come again at each look bury those that matter. (A replicator that asked for a database which is not there
/// filled its source's log.)
#[tokio::test(flavor = "multi_thread")]
async fn no_error_of_ours_is_in_the_primarys_log() -> Result<()> {
    let primary = logical().setting("log_line_prefix", "%a|");
    let site = Site::builder("log").primary(primary).start().await?;
    prepare(&site).await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 1).await?;
    let service = followed(&site, "[replication]\ninterval = \"1s\"").await?;
    for n in 0..20 {
        audit(&site, &n.to_string()).await?;
        until_equal(&site).await?;
    }
    site.warm_spare(&["preflight"]).await;
    site.warm_spare(&["status"]).await;
    service.stop().await.ok();
    let log = site.primary.pg.log();
    let ours: Vec<&str> = log
        .lines()
        .filter(|line| line.starts_with("warm-spare|"))
        .filter(|line| {
            ["ERROR:", "FATAL:"]
                .iter()
                .any(|level| line.contains(level))
        })
        // A question that is given up while its answer is on its way.
        .filter(|line| !line.contains("connection to client lost"))
        .collect();
    assert!(log.contains("warm-spare|"), "no line of ours: {log}");
    assert!(ours.is_empty(), "{ours:#?}");
    Ok(())
}
