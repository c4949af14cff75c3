//! What passes is waited for, and what was read is applied once: no refusal of a moment, and no primary that goes for good,
//! costs a row or a new copy.

use rustix::process::{Pid, Signal, kill_process};
use std::time::Duration;
use support::crowd::Crowd;
use support::follow::{
    audit, copies, followed, gaps, logical, prepare, prepared, tamper, until_equal, until_following,
};
use support::packages::delete_rows;
use support::proxy::{Mode, Proxy};
use support::service::SOON;
use support::{Factory, Result, Service, Site, content, wait_until};

async fn assert_no_new_copy(service: &Service<'_>, before: u64) -> Result<()> {
    assert_eq!(gaps(&service.status().await?), Vec::<String>::new());
    assert_eq!(copies(service).await?, before, "no new baseline");
    Ok(())
}

/// Everything that the primary has written has arrived at whoever reads our slot.
async fn until_arrived(site: &Site) -> Result<()> {
    let client = site.primary.conn().await?;
    let lsn = "SELECT pg_current_wal_lsn()::text";
    let lsn: String = client.query_one(lsn, &[]).await?.get(0);
    wait_until("it has arrived", SOON, || async {
        let sql = "SELECT FROM pg_stat_replication WHERE write_lsn >= $1::text::pg_lsn";
        let rows = client.query(sql, &[&lsn]).await?;
        (!rows.is_empty()).then_some(()).ok_or("not yet".into())
    })
    .await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_had_arrived_when_the_primary_went_for_good_is_applied() -> Result<()> {
    let site = prepared("refusals_gone").await?;
    Factory::seeded().fill(&site.primary, 2).await?;
    let service = followed(&site, "").await?;
    let spare = site.spare.conn().await?;
    let hold = "BEGIN READ WRITE; LOCK TABLE audit_package IN SHARE MODE";
    spare.batch_execute(hold).await?;
    for number in 0..5 {
        audit(&site, &format!("before the end {number}")).await?;
    }
    let expected = content(&site.primary).await?;
    until_arrived(&site).await?;
    site.primary.pg.kill9();
    spare.batch_execute("ROLLBACK").await?;
    wait_until("what had arrived", SOON, || async {
        let same = content(&site.spare).await? == expected;
        same.then_some(()).ok_or("other rows".into())
    })
    .await;
    service.until_hold("peer_unreachable").await;
    assert_no_new_copy(&service, 1).await
}

/// Twice it is judged and not committed.
#[tokio::test(flavor = "multi_thread")]
async fn the_fuse_counts_a_transaction_once_however_often_it_is_tried() -> Result<()> {
    let site = prepared("refusals_fuse").await?;
    let made = Factory::seeded().fill(&site.primary, 20).await?;
    let fuse = "[fuse]\nmax_percent = 20\nmin_count = 5\n";
    followed(&site, fuse).await?.stop().await.ok();
    let client = site.primary.conn().await?;
    client.batch_execute("BEGIN").await?;
    for package in &made[..3] {
        delete_rows(&client, package.names()).await?;
    }
    client.batch_execute("COMMIT").await?;
    for _ in 0..2 {
        let doomed = Service::doomed(&site, fuse, "apply.before_commit");
        doomed.dead().await?;
    }
    let service = followed(&site, fuse).await?;
    until_equal(&site).await?;
    assert_no_new_copy(&service, 0).await?;
    let state = site.spare.pg.conn("warm_spare").await?;
    let sql = "SELECT coalesce(sum(packages), 0)::int8 FROM vanished";
    let counted: i64 = state.query_one(sql, &[]).await?.get(0);
    assert_eq!(counted, 3);
    // The next one is judged together with it.
    for package in &made[3..5] {
        delete_rows(&client, package.names()).await?;
    }
    service.until_hold("fuse").await;
    Ok(())
}

/// The fuse asks how much is gone, and not how often something went.
#[tokio::test(flavor = "multi_thread")]
async fn a_package_that_is_uploaded_again_and_again_blows_no_fuse() -> Result<()> {
    let site = prepared("refusals_again").await?;
    let made = Factory::seeded().fill(&site.primary, 20).await?;
    let fuse = "[fuse]\nmax_percent = 20\nmin_count = 5\n";
    let service = followed(&site, fuse).await?;
    let client = site.primary.conn().await?;
    let keep = "CREATE TEMP TABLE kept AS SELECT * FROM origin_packages WHERE ident = $1::text";
    let keep = keep.replace("$1::text", &format!("'{}'", made[0].ident));
    client.batch_execute(&keep).await?;
    for _ in 0..12 {
        delete_rows(&client, made[0].names()).await?;
        let again = "INSERT INTO origin_packages SELECT * FROM kept";
        client.batch_execute(again).await?;
    }
    until_equal(&site).await?;
    for package in &made[1..4] {
        delete_rows(&client, package.names()).await?;
    }
    until_equal(&site).await?;
    // What is gone counts together, whenever it went.
    client.batch_execute("BEGIN").await?;
    for package in &made[4..6] {
        delete_rows(&client, package.names()).await?;
    }
    client.batch_execute("COMMIT").await?;
    let held = service.until_hold("fuse").await;
    let detail = held["hold"]["detail"].as_str().unwrap_or_default();
    assert!(detail.contains("5 of 20 packages"), "{detail}");
    assert!(detail.contains("3 of them did already"), "{detail}");
    Ok(())
}

/// Each is raised once, whatever is tried again in between.
const REFUSE: &str = "
    CREATE SEQUENCE refusals;
    CREATE FUNCTION refuse() RETURNS boolean LANGUAGE plpgsql AS $$
    DECLARE
        codes text[] := ARRAY['40001', '40P01', '53200', '55006', '55P03'];
        code text := codes[nextval('public.refusals')];
    BEGIN
        IF code IS NOT NULL THEN
            RAISE EXCEPTION 'refused by a test' USING ERRCODE = code;
        END IF;
        RETURN true;
    END $$;
    ALTER TABLE audit_package ADD CONSTRAINT refuse CHECK (refuse()) NOT VALID";

#[tokio::test(flavor = "multi_thread")]
async fn what_the_spare_refuses_for_a_moment_is_tried_again() -> Result<()> {
    let site = prepared("refusals_spare").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = followed(&site, "").await?;
    tamper(&site, REFUSE).await?;
    audit(&site, "refused five times").await?;
    until_equal(&site).await?;
    assert_no_new_copy(&service, 1).await?;
    let sql = "SELECT last_value FROM refusals";
    let asked: i64 = site.spare.conn().await?.query_one(sql, &[]).await?.get(0);
    assert_eq!(asked, 6, "each refusal was met");
    Ok(())
}

/// The one that read it is gone, and its process on the primary has not noticed.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_still_active_is_waited_for() -> Result<()> {
    let site = prepared("refusals_active").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = followed(&site, "").await?;
    let client = site.primary.conn().await?;
    let sql = "SELECT active_pid FROM pg_replication_slots WHERE active AND NOT temporary";
    let reader = Pid::from_raw(client.query_one(sql, &[]).await?.get(0)).ok_or("a process")?;
    kill_process(reader, Signal::STOP)?;
    service.running.kill9()?;
    audit(&site, "meanwhile").await?;
    let mut service = Service::start(&site, "");
    let active = |line: &str| line.contains("is active for PID");
    let told = service.running.wait_for_line(active, SOON).await;
    let held = service.status().await?;
    kill_process(reader, Signal::CONT)?;
    println!("{}", told?);
    assert_eq!(held["hold"]["reason"], "peer_unreachable", "{held:#}");
    until_equal(&site).await?;
    until_following(&service).await;
    assert_no_new_copy(&service, 0).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_with_no_connection_left_is_waited_for() -> Result<()> {
    let primary = logical().setting("max_connections", "15");
    let site = Site::builder("refusals_full").primary(primary).start();
    let site = site.await?;
    prepare(&site).await;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = followed(&site, "").await?;
    audit(&site, "before").await?;
    until_equal(&site).await?;
    let client = site.primary.conn().await?;
    let crowd = Crowd::gather(&site.primary).await;
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_replication";
    client.batch_execute(end).await?;
    audit_by(&client).await?;
    // First it hears that its session was ended.
    let held = service
        .until("no way in", |status| {
            let detail = status["hold"]["detail"].as_str().unwrap_or_default();
            detail.contains("clients already")
        })
        .await;
    assert_eq!(held["hold"]["reason"], "peer_unreachable", "{held:#}");
    drop(crowd);
    until_equal(&site).await?;
    until_following(&service).await;
    assert_no_new_copy(&service, 1).await
}

/// On a session that is there already.
async fn audit_by(client: &tokio_postgres::Client) -> Result<()> {
    let sql = "UPDATE accounts SET email = 'while nobody comes in'";
    Ok(client.batch_execute(sql).await?)
}

/// What has arrived of a transaction is of no use without the rest, and the rest comes on another line.
#[tokio::test(flavor = "multi_thread")]
async fn a_line_cut_within_a_transaction_is_left_at_once() -> Result<()> {
    let site = prepared("refusals_cut").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let line = Proxy::start(site.primary.pg.port()).await?;
    let through = format!("peer.datastore.port = {}\n", line.port());
    let service = followed(&site, &through).await?;
    audit(&site, "before").await?;
    until_equal(&site).await?;
    line.set(Mode::Slow).await;
    let (_, before) = line.bytes();
    let many = "INSERT INTO audit_package (operation, trigger, requester_id, requester_name, origin, channel, package_ident)
        SELECT 'promote', 'unknown', 1, repeat('x', 1000), 'core', 'stable', n::text FROM generate_series(1, 2500) n";
    site.primary.conn().await?.batch_execute(many).await?;
    wait_until("a part of it has arrived", SOON, || async {
        let (_, now) = line.bytes();
        (now > before + (300 << 10))
            .then_some(())
            .ok_or("not yet".into())
    })
    .await;
    assert!(line.bytes().1 < before + (2 << 20), "and not all of it");
    line.set(Mode::Pass).await;
    let connections = line.connections();
    line.cut();
    // What was applied before is waited for, up to a minute; this is not.
    wait_until("it reads anew", Duration::from_secs(40), || async {
        let read = line.connections() > connections;
        read.then_some(()).ok_or("not yet".into())
    })
    .await;
    until_equal(&site).await?;
    until_following(&service).await;
    assert_no_new_copy(&service, 1).await
}
