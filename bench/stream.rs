//! What following costs and how fast it is: latency of an upload, catching up beside the server's own logical
//! replication, rest, and whether a change costs more where more is stored. On real servers.
//!
//! `scripts/bench stream [--smoke]`.

mod common;
use common::uploads::{durable, follow, latency};
use common::{Plan, memory, ticks};
use std::time::{Duration, Instant};

use support::{Factory, Result, Service, Site, wait_until};
use tokio_postgres::Client;

#[tokio::main]
async fn main() -> Result<()> {
    let plan = Plan::read();
    if !plan.wants("stream") {
        return Ok(());
    }
    let (few, many, uploads, transactions, idle) = if plan.smoke {
        (100, 500, 50, 5000, 10)
    } else {
        (1000, 100_000, 1500, 20_000, 120)
    };
    for packages in [few, many] {
        let site = Site::builder("bench")
            .primary(durable().logical())
            .spare(durable())
            .start()
            .await?;
        let mut factory = Factory::new(3);
        factory
            .bulk_artifacts_of(&site.primary, packages, 300, 1000)
            .await?;
        println!("stream: {packages} packages");
        site.write_config("log_level = \"warn\"");
        site.warm_spare(&["prepare"]).await.ok();
        let first = site
            .spawn(&["sync"])
            .wait(Duration::from_secs(3600))
            .await?
            .ok();
        println!(
            "  first copy                         {:8.1} s",
            first.took.as_secs_f64()
        );
        let service = follow(&site, "").await;
        let lag = latency(&site, &mut factory, uploads).await?;
        println!(
            "  upload of 100 KiB, {:4.1} a second: COMMIT there to row here, p50 {:.1} ms (wanted: under 100), p99 {:.1} ms (under 500), worst {:.1} ms of {}",
            lag.rate, lag.p50, lag.p99, lag.worst, uploads
        );
        println!(
            "  resident memory, most so far       {:8} KiB (wanted: under 153600)",
            memory(service.running.pid(), "VmHWM")
        );
        at_rest(&site, &service, idle).await?;
        service.stop().await.ok();
        catching_up(&site, transactions).await?;
    }
    Ok(())
}

async fn at_rest(site: &Site, service: &Service<'_>, seconds: u64) -> Result<()> {
    let watcher = site.primary.pg.conn("postgres").await?;
    let asked = "SELECT sessions FROM pg_stat_database WHERE datname = 'builder'";
    let sessions = async || -> Result<i64> { Ok(watcher.query_one(asked, &[]).await?.get(0)) };
    service.until_level().await;
    let pid = service.running.pid();
    let (before, sessions_before, began) = (ticks(pid), sessions().await?, Instant::now());
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let used = (ticks(pid) - before) as f64 / 100.0;
    let took = began.elapsed().as_secs_f64();
    println!(
        "  at rest for {seconds:>3} s: processor        {:8.2} % of a core (wanted: under 1), resident {} KiB, {} sessions begun on the primary",
        100.0 * used / took,
        memory(pid, "VmRSS"),
        sessions().await? - sessions_before
    );
    Ok(())
}

/// The same small transactions, by ours and by the server's own apply worker, one after the other.
async fn catching_up(site: &Site, transactions: usize) -> Result<()> {
    let native = durable().start().await?;
    native.create_database("builder").await?;
    let subscriber = native.conn("builder").await?;
    subscriber.batch_execute(support::site::SCHEMA).await?;
    let primary = site.primary.conn().await?;
    // The rows that are there already are not the question, and no change below needs one of them.
    primary
        .batch_execute(
            "CREATE PUBLICATION native FOR TABLE audit_origin, origin_projects, job_graph",
        )
        .await?;
    primary
        .execute(
            "SELECT pg_create_logical_replication_slot('read', 'pgoutput')",
            &[],
        )
        .await?;
    let subscribe = format!(
        "CREATE SUBSCRIPTION native CONNECTION 'host={} port={} user={} password={} dbname=builder' PUBLICATION native WITH (copy_data = false, enabled = false)",
        site.primary.pg.host(),
        site.primary.pg.port(),
        site.primary.pg.user(),
        site.primary.pg.password()
    );
    subscriber.batch_execute(&subscribe).await?;
    let spare = site.spare.conn().await?;
    let mut service = follow(site, "").await;
    service.until_level().await;
    // It stands still where the other one does: with everything open, and nothing read.
    service.running.sigstop();
    commit(&primary, 0, transactions).await?;
    let read = merely_read(site).await?;
    let began = Instant::now();
    subscriber
        .batch_execute("ALTER SUBSCRIPTION native ENABLE")
        .await?;
    all_there(&subscriber, transactions).await;
    let theirs = began.elapsed().as_secs_f64();
    let began = Instant::now();
    service.running.sigcont();
    all_there(&spare, transactions).await;
    let ours = began.elapsed().as_secs_f64();
    println!(
        "  catching up {transactions} transactions: ours {ours:.2} s, the server's own worker {theirs:.2} s; {:.2} times as fast (wanted: 3); read and thrown away {read:.2} s",
        theirs / ours
    );
    service.stop().await.ok();
    commit(&primary, transactions, transactions).await?;
    let began = Instant::now();
    service = Service::start(site, "log_level = \"warn\"");
    all_there(&spare, 2 * transactions).await;
    println!(
        "  the same again, with the start of the process and its checks {:.2} s",
        began.elapsed().as_secs_f64()
    );
    service.stop().await.ok();
    subscriber.batch_execute("DROP SUBSCRIPTION native").await?;
    primary.batch_execute("DROP PUBLICATION native").await?;
    Ok(())
}

/// What the primary's server needs to decode and send them: nobody can be faster than that.
async fn merely_read(site: &Site) -> Result<f64> {
    let primary = site.primary.conn().await?;
    let row = primary
        .query_one("SELECT pg_current_wal_lsn()::text", &[])
        .await?;
    let pg = &site.primary.pg;
    let began = Instant::now();
    let status = tokio::process::Command::new(pg.programs().join("pg_recvlogical"))
        .args(["--host", pg.host(), "--port", &pg.port().to_string()])
        .args([
            "--username",
            pg.user(),
            "--dbname",
            "builder",
            "--slot",
            "read",
        ])
        .args(["--start", "--no-loop", "--file", "/dev/null"])
        .args(["--endpos", row.get::<_, &str>(0)])
        .args(["-o", "proto_version=1", "-o", "publication_names=native"])
        .env("PGPASSWORD", pg.password())
        .status()
        .await?;
    let took = began.elapsed().as_secs_f64();
    if !status.success() {
        return Err(format!("pg_recvlogical: {status}").into());
    }
    primary
        .execute("SELECT pg_drop_replication_slot('read')", &[])
        .await?;
    Ok(took)
}

/// Small transactions of one row each.
async fn commit(primary: &Client, from: usize, transactions: usize) -> Result<()> {
    let statement = primary
        .prepare("INSERT INTO audit_origin (id, operation, target_object, origin, requester_id, requester_name) VALUES ($1, 'origin_create', 'x', 'core', '1', 'the bench')")
        .await?;
    primary
        .batch_execute("SET synchronous_commit = off")
        .await?;
    for number in from..from + transactions {
        primary
            .execute(&statement, &[&(1_000_000 + number as i64)])
            .await?;
    }
    // The last of them must be sent too.
    primary.batch_execute("SET synchronous_commit = on").await?;
    primary
        .batch_execute("UPDATE audit_origin SET origin = origin WHERE id = 1000000")
        .await?;
    Ok(())
}

async fn all_there(client: &Client, transactions: usize) {
    let count = "SELECT count(*) FROM audit_origin WHERE requester_name = 'the bench'";
    wait_until("all of them", Duration::from_secs(600), || async {
        let found: i64 = client.query_one(count, &[]).await?.get(0);
        match found == transactions as i64 {
            true => Ok(()),
            false => Err("not yet".into()),
        }
    })
    .await;
}
