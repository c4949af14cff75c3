//! What following costs the primary is bounded: its log, its bandwidth, and how long anybody waits.

use std::time::{Duration, Instant};
use support::follow::{
    audit, copies, events, gaps, logical, prepare, prepared, slot, until_closed, until_equal,
    until_following,
};
use support::http_fault::{Fault, HttpFault};
use support::proxy::Proxy;
use support::service::SOON;
use support::{Factory, Result, Service, Site, Spec, wait_until};
use tokio::sync::watch;

/// A segment of the primary's log.
const SEGMENT: u64 = 16 << 20;

/// Fills so many segments, without writing as much.
async fn write_segments(site: &Site, count: usize) -> Result<()> {
    for number in 0..count {
        audit(site, &format!("segment {number}")).await?;
        let client = site.primary.conn().await?;
        client.batch_execute("SELECT pg_switch_wal()").await?;
        if number % 4 == 3 {
            client.batch_execute("CHECKPOINT").await?;
        }
    }
    Ok(())
}

async fn size_of_log(site: &Site) -> Result<u64> {
    let sql = "SELECT sum(size)::int8 FROM pg_ls_waldir()";
    let row = site.primary.conn().await?.query_one(sql, &[]).await?;
    Ok(row.get::<_, i64>(0).unsigned_abs())
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_service_dead_the_server_bounds_its_log_by_itself() -> Result<()> {
    let primary = logical()
        .setting("max_slot_wal_keep_size", "64MB")
        .setting("max_wal_size", "64MB")
        .setting("min_wal_size", "32MB");
    let site = Site::builder("bounded").primary(primary).start().await?;
    prepare(&site).await;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    let Service { running, port, .. } = service;
    running.kill9()?;
    write_segments(&site, 24).await?;
    let found = slot(&site).await?.expect("it is still listed");
    assert_eq!(found.1, "lost");
    let size = size_of_log(&site).await?;
    assert!(size < 14 * SEGMENT, "{size} bytes of log are kept");

    let service = Service {
        site: &site,
        port,
        running: site.spawn(&["run"]),
    };
    until_closed(&service, "max_slot_wal_keep_size", 0).await?;
    assert_ne!(slot(&site).await?.expect("a new one").1, "lost");
    audit(&site, "after").await?;
    until_equal(&site).await?;
    assert_eq!(copies(&service).await?, 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_wal_hold_limit_gives_the_slot_up() -> Result<()> {
    let site = prepared("held").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let limit = "[replication]\nwal_hold_limit = \"48MB\"\n";
    let service = Service::start(&site, limit);
    until_following(&service).await;
    service.reconfigure(&format!("paused = true\n{limit}"));
    service.until_hold("paused").await;
    assert!(slot(&site).await?.is_some(), "a pause alone keeps it");
    write_segments(&site, 5).await?;
    service
        .until("the slot is given up", |status| {
            events(status, "slot")
                .iter()
                .any(|text| text.contains("dropped"))
        })
        .await;
    assert_eq!(slot(&site).await?, None);
    assert_eq!(copies(&service).await?, 1, "it is paused");
    service.reconfigure(limit);
    until_closed(&service, "is gone", 1).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bandwidth_limit_is_kept_and_changed_while_an_artifact_comes() -> Result<()> {
    const RATE: f64 = 4e6;
    const MOST: f64 = 60e6;
    let site = prepared("bandwidth").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 1).await?;
    let line = Proxy::start(site.primary.minio.port()).await?;
    let through = format!(
        "[peer.s3]\nendpoint = \"http://127.0.0.1:{}\"\n",
        line.port()
    );
    let service = Service::start(&site, &through);
    until_following(&service).await;
    let limited = format!("{through}[replication]\nbandwidth_limit = \"4MB/s\"\n");
    service.reconfigure(&limited);
    service
        .until("the limit is in force", |status| {
            let told = events(status, "config");
            told.iter().any(|text| text.contains("in force"))
        })
        .await;
    let before = line.bytes().1;
    let moved = || (line.bytes().1 - before) as f64;
    let past = async |bytes: f64| {
        wait_until("bytes move", SOON, || async {
            match moved() {
                moved if moved >= bytes => Ok((moved, Instant::now())),
                moved => Err(format!("{moved}").into()),
            }
        })
        .await
    };
    let big = Spec::new("core", "big", "1").size(MOST as u64);
    let big = factory.package(&site.primary, big).await?;
    // What the sockets hold on the way is full by then.
    let (first, began) = past(14e6).await;
    let (last, ended) = past(first + 24e6).await;
    let rate = (last - first) / (ended - began).as_secs_f64();
    println!("{rate} bytes a second of {RATE}");
    assert!((rate / RATE - 1.0).abs() < 0.1, "{rate} instead of {RATE}");
    let began = Instant::now();
    service.reconfigure(&through);
    until_equal(&site).await?;
    assert!(site.spare.get(&big.key).await?.is_some());
    // At the limit it would have taken another five seconds, and the rest of it is here sooner on any machine.
    println!("without a limit the rest took {:?}", began.elapsed());
    assert_eq!(copies(&service).await?, 1, "no new baseline");
    assert_eq!(gaps(&service.status().await?), Vec::<String>::new());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_during_the_copy_is_not_held_up() -> Result<()> {
    let site = prepared("migration").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let builder = site.primary.conn().await?;
    let noise = "INSERT INTO audit_package (operation, trigger, requester_id, requester_name, origin, channel, package_ident)
                 SELECT 'promote', 'hab_client', 1, 'me', 'core', 'stable',
                   (SELECT string_agg(md5(n::text || m::text), '') FROM generate_series(1, 300) m)
                 FROM generate_series(1, 300) n";
    builder.batch_execute(noise).await?;
    let slow = "[replication]\nbandwidth_limit = \"200KB/s\"\n";
    let mut service = Service::start(&site, slow);
    service
        .running
        .wait_for_line(|line| line.ends_with("phase tables"), SOON)
        .await?;
    wait_until("the copy holds the table", SOON, || async {
        let sql = "SELECT 1 FROM pg_locks WHERE relation = 'audit_package'::regclass AND pid <> pg_backend_pid()";
        let rows = builder.query(sql, &[]).await?;
        (!rows.is_empty()).then_some(()).ok_or("nobody holds it".into())
    })
    .await;
    let began = Instant::now();
    builder
        .batch_execute("ALTER TABLE audit_package ADD COLUMN extra text DEFAULT 'was'")
        .await?;
    println!("the migration waited {:?}", began.elapsed());
    assert!(
        began.elapsed() < Duration::from_secs(3),
        "{:?}",
        began.elapsed()
    );
    service.reconfigure("");
    until_following(&service).await;
    until_equal(&site).await?;
    Ok(())
}

/// The one wait that a baseline cannot spare itself: it says for whom, and nobody waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_writer_left_open_is_named_and_harms_only_the_baseline() -> Result<()> {
    let site = prepared("open").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let writer = site.primary.conn().await?;
    writer
        .batch_execute("BEGIN; UPDATE origins SET updated_at = now()")
        .await?;
    let pid: i32 = writer
        .query_one("SELECT pg_backend_pid()", &[])
        .await?
        .get(0);
    let service = Service::start(&site, "");
    let told = service
        .until("it says whom it waits for", |status| {
            let detail = status["hold"]["detail"].as_str().unwrap_or_default();
            detail.contains(&format!("process {pid}"))
        })
        .await;
    let detail = told["hold"]["detail"].as_str().unwrap_or_default();
    assert!(
        detail.contains("hab") && detail.contains("warm-spare-tests"),
        "{detail}"
    );
    let builder = site.primary.conn().await?;
    builder
        .batch_execute("SET lock_timeout = '1s'; CREATE TABLE meanwhile (id int PRIMARY KEY)")
        .await?;
    audit(&site, "meanwhile").await?;
    let sql = "SELECT count(*) FROM pg_stat_activity a, unnest(pg_blocking_pids(a.pid)) b (pid)
               JOIN pg_stat_activity o ON o.pid = b.pid WHERE o.application_name = 'warm-spare'";
    let blocked: i64 = builder.query_one(sql, &[]).await?.get(0);
    assert_eq!(blocked, 0, "somebody waits for us");
    writer.batch_execute("COMMIT").await?;
    until_following(&service).await;
    until_equal(&site).await?;
    Ok(())
}

/// An open transaction holds every slot's log, however far we have confirmed: a stream that is level is not given up for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_transaction_does_not_end_the_stream() -> Result<()> {
    let site = prepared("forgotten").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = Service::start(&site, "[replication]\nwal_hold_limit = \"48MB\"\n");
    until_following(&service).await;
    let writer = site.primary.conn().await?;
    writer
        .batch_execute("BEGIN; UPDATE origins SET updated_at = now()")
        .await?;
    let pid: i32 = writer
        .query_one("SELECT pg_backend_pid()", &[])
        .await?
        .get(0);
    write_segments(&site, 6).await?;
    // It is asked about, and named.
    let status = service
        .until("it is named", |status| {
            let reasons = status["health"]["reasons"].to_string();
            reasons.contains("open_transaction") && reasons.contains(&format!("process {pid}"))
        })
        .await;
    assert_eq!(status["health"]["level"], 1, "{status:#}");
    until_equal(&site).await?;
    audit(&site, "while it is open").await?;
    until_equal(&site).await?;
    let status = service.status().await?;
    assert_eq!(gaps(&status), Vec::<String>::new());
    assert_eq!(events(&status, "slot"), Vec::<String>::new());
    writer.batch_execute("COMMIT").await?;
    until_equal(&site).await?;
    assert_eq!(copies(&service).await?, 1, "no new baseline");
    Ok(())
}

/// What a full spool holds has been decoded and sent: it is applied, however long its gate waits, and not asked for again.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_spool_is_drained_however_long_the_gate_waits() -> Result<()> {
    const TRANSACTIONS: i64 = 50;
    let site = prepared("full").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 1).await?;
    let store = HttpFault::start(site.primary.minio.port()).await?;
    // 4 MiB in memory, and 24 on disk.
    let small = format!(
        "[peer.s3]\nendpoint = \"{}\"\n[replication]\ncopies = 1\nbuffer = \"16MiB\"\nwal_hold_limit = \"24MiB\"\n",
        store.endpoint()
    );
    let (service, time) = Service::with_own_time(&site, &small)?;
    until_following(&service).await;

    let package = factory.make(Spec::new("core", "awaited", "1"));
    let (open, opened) = watch::channel(false);
    let key = package.key.clone();
    store.set(move |request| match request.uri.path().contains(&key) {
        true => Fault::Until(opened.clone()),
        false => Fault::Forward,
    });
    support::packages::upload(&site.primary, &package).await?;
    let client = site.primary.conn().await?;
    // The server's log has it compressed.
    let large =
        "INSERT INTO audit_package (origin, package_ident) VALUES ('large', repeat('x', 1000000))";
    for _ in 0..TRANSACTIONS {
        client.batch_execute(large).await?;
    }
    // The server sees that nobody reads any more.
    let is_read = async || -> Result<bool> {
        let sql = "SELECT active FROM pg_replication_slots WHERE NOT temporary";
        Ok(site.primary.conn().await?.query_one(sql, &[]).await?.get(0))
    };
    wait_until("the spool is full", SOON, || async {
        match is_read().await? {
            false => Ok(()),
            true => Err("the stream is read".into()),
        }
    })
    .await;
    let decoded = async || -> Result<i64> {
        let sql = "SELECT total_txns FROM pg_stat_replication_slots";
        Ok(site.primary.conn().await?.query_one(sql, &[]).await?.get(0))
    };
    let before = decoded().await?;
    println!("{before} transactions were decoded");
    assert!((20..TRANSACTIONS).contains(&before), "{before}");

    // What is asked of a store has 30 s, so it asks again.
    store.forget();
    time.pass(100)?;
    wait_until("its time has passed", SOON, || async {
        match store.count("GET", &package.key) {
            0 => Err("it does not ask again".into()),
            _ => Ok(()),
        }
    })
    .await;
    assert!(!is_read().await?, "it is asked for again");
    assert_eq!(decoded().await?, before);
    open.send_replace(true);
    wait_until("all is here", SOON, || async {
        let sql = "SELECT count(*) FROM audit_package WHERE origin = 'large'";
        match site.spare.conn().await?.query_one(sql, &[]).await?.get(0) {
            TRANSACTIONS => Ok(()),
            found => Err(format!("{found}").into()),
        }
    })
    .await;
    until_following(&service).await;
    let after = decoded().await?;
    println!("{after} in the end");
    // Those that were on their way when the stream was closed come twice, and those that were here do not.
    assert!(after <= TRANSACTIONS + 1 + before / 2, "{before}, {after}");
    assert_eq!(copies(&service).await?, 1, "no new baseline");
    Ok(())
}
