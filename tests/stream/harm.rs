//! Who is followed stops, starts and is upgraded as if nobody followed: each line was a real trap.

use std::time::{Duration, Instant};
use support::follow::{
    KEYLESS, assert_slot_is_not_ahead, audit, copies, logical, prepare, prepared, slot,
    until_equal, until_following, until_read,
};
use support::packages::{insert, put};
use support::{Factory, Result, Service, Site, Spec};

/// After so long the Supervisor kills.
const GRACE: Duration = Duration::from_secs(8);

#[derive(Clone, Copy, Debug)]
enum How {
    Smart,
    Fast,
}

/// Commits something, shuts the primary down and starts it again.
async fn shutdown(site: &Site, how: How, when: &str) -> Result<()> {
    audit(site, &format!("{when} {how:?}")).await?;
    let began = Instant::now();
    match how {
        How::Smart => {
            let took = site.primary.pg.stop_smart(GRACE).await?;
            assert!(took.is_some(), "{when}: a smart shutdown waits");
        }
        How::Fast => site.primary.pg.stop_fast().await?,
    }
    let took = began.elapsed();
    println!("{when}: {how:?} shutdown in {took:?}");
    assert!(took < GRACE, "{when}: {how:?} shutdown in {took:?}");
    site.primary.pg.start_again().await?;
    assert_slot_exists(site, when).await
}

async fn assert_slot_exists(site: &Site, when: &str) -> Result<()> {
    assert!(slot(site).await?.is_some(), "{when}: the slot is gone");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdowns_do_not_wait_for_us_while_nothing_happens_or_the_gate_waits() -> Result<()> {
    let site = Site::builder("shutdown").primary(logical()).own_stores();
    let site = site.start().await?;
    prepare(&site).await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    let before = copies(&service).await?;

    for how in [How::Smart, How::Fast] {
        until_read(&site).await;
        shutdown(&site, how, "idle").await?;
    }
    until_equal(&site).await?;
    until_following(&service).await;

    let late = factory.make(Spec::new("core", "late", "1"));
    put(&site.primary, &late).await?;
    site.primary.minio.sigstop();
    insert(&site.primary, &late).await?;
    service
        .until("the gate waits", |status| {
            status["replication"]["gate_waiting"].as_u64() >= Some(1)
        })
        .await;
    for how in [How::Smart, How::Fast] {
        until_read(&site).await;
        assert_slot_is_not_ahead(&site).await?;
        shutdown(&site, how, "the gate waits").await?;
    }
    assert_slot_is_not_ahead(&site).await?;
    site.primary.minio.sigcont();
    until_equal(&site).await?;
    assert!(site.spare.get(&late.key).await?.is_some());
    until_following(&service).await;
    assert_slot_is_not_ahead(&site).await?;
    assert_eq!(copies(&service).await?, before, "no new baseline");
    service.stop().await.ok();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdowns_do_not_wait_for_us_while_the_spare_is_frozen_or_down() -> Result<()> {
    let site = prepared("spare_down").await?;
    Factory::seeded().fill(&site.primary, 2).await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    let before = copies(&service).await?;

    for how in [How::Smart, How::Fast] {
        until_read(&site).await;
        site.spare.pg.sigstop();
        shutdown(&site, how, "the spare is frozen").await?;
        site.spare.pg.sigcont();
        until_equal(&site).await?;
        until_following(&service).await;
        assert_slot_is_not_ahead(&site).await?;
    }

    until_read(&site).await;
    site.spare.pg.kill9();
    for how in [How::Smart, How::Fast] {
        shutdown(&site, how, "the spare is down").await?;
    }
    site.spare.pg.start_again().await?;
    until_equal(&site).await?;
    until_following(&service).await;
    assert_slot_is_not_ahead(&site).await?;
    assert_eq!(copies(&service).await?, before, "no new baseline");
    Ok(())
}

/// Builder-datastore's upgrade does so, and where the server refuses to start, puts an empty database in its place.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_our_slot_starts_without_builders_configuration() -> Result<()> {
    let site = prepared("bare_start").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    let before = copies(&service).await?;
    let pg = &site.primary.pg;
    pg.stop_fast().await?;
    pg.start_without_configuration().await?;
    assert_slot_exists(&site, "without configuration").await?;
    audit(&site, "without configuration").await?;
    until_equal(&site).await?;
    until_following(&service).await;
    assert_eq!(copies(&service).await?, before, "no new baseline");

    // Without what `prepare` has set, the trap closes.
    service.stop().await.ok();
    pg.stop_fast().await?;
    let auto = pg.data_dir().join("postgresql.auto.conf");
    let kept = std::fs::read(&auto)?;
    std::fs::write(&auto, "")?;
    let refused = pg.start_without_configuration().await;
    let text = refused.expect_err("a slot needs wal_level").to_string();
    assert!(text.contains("wal_level"), "{text}");
    std::fs::write(&auto, kept)?;

    pg.start_again().await?;
    site.warm_spare(&["release"]).await.ok();
    assert_eq!(slot(&site).await?, None);
    pg.stop_fast().await?;
    pg.start_without_configuration().await?;
    let row = site.primary.conn().await?;
    let row = row.query_one("SHOW wal_level", &[]).await?;
    assert_eq!(row.get::<_, String>(0), "replica");
    Ok(())
}

/// A publication of all tables would refuse half of these.
#[tokio::test(flavor = "multi_thread")]
async fn every_change_of_tables_without_a_key_works_and_arrives() -> Result<()> {
    let site = prepared("keyless").await?;
    let mut factory = Factory::seeded();
    factory
        .package(&site.primary, Spec::new("core", "a", "1"))
        .await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    let builder = site.primary.conn().await?;
    builder.batch_execute(KEYLESS).await?;
    for table in ["audit_package", "audit_package_group", "audit_origin"] {
        let copy = format!("INSERT INTO {table} SELECT * FROM {table}");
        let again = format!("DELETE FROM {table} WHERE ctid = (SELECT min(ctid) FROM {table})");
        // Those with a key refuse a second one of each; the rest must take it.
        let keyed = "SELECT EXISTS (SELECT 1 FROM pg_index WHERE indrelid = $1::text::regclass AND indisprimary)";
        let keyed: bool = builder.query_one(keyed, &[&table]).await?.get(0);
        if !keyed {
            builder.batch_execute(&copy).await?;
        }
        builder.batch_execute(&again).await?;
    }
    audit(&site, "twice").await?;
    audit(&site, "twice").await?;
    until_equal(&site).await?;
    assert_eq!(copies(&service).await?, 1, "no new baseline");
    Ok(())
}
