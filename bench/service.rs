//! What the service costs: idle, asked for metrics, and asking a primary that has not changed. On real servers.
//!
//! `scripts/bench service [--smoke]`.

mod common;
use common::{Plan, median, memory, ticks};
use std::time::{Duration, Instant};
use support::service::{SOON, get};
use support::{Factory, Result, Service, Site};
use warm_spare::cluster::LocalCluster;
use warm_spare::config::{self, Config};
use warm_spare::observe::Clock;
use warm_spare::replication::probe;

#[tokio::main]
async fn main() -> Result<()> {
    let plan = Plan::read();
    if !plan.wants("service") {
        return Ok(());
    }
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (packages, idle, times) = if plan.smoke {
        (200, Duration::from_secs(5), 20)
    } else {
        (100_000, Duration::from_secs(120), 200)
    };
    let site = Site::builder("bench").start().await?;
    let mut factory = Factory::new(3);
    factory
        .bulk_artifacts_of(&site.primary, packages, 300, 1000)
        .await?;
    println!("service: {packages} packages");
    let config = config::load(&site.write_config("log_level = \"warn\""))?;
    let first = site
        .spawn(&["sync"])
        .wait(Duration::from_secs(1800))
        .await?
        .ok();
    println!(
        "  first copy                         {:8.1} s",
        first.took.as_secs_f64()
    );
    unchanged(&site, &config, times).await?;
    let service = Service::start(
        &site,
        "log_level = \"warn\"\n[replication]\ninterval = \"1m\"",
    );
    service.until_level().await;
    at_rest(&service, idle).await;
    metrics(&service, times).await?;
    let stopped = Instant::now();
    service.stop().await.ok();
    println!(
        "  from SIGTERM to its end            {:8.1} ms (wanted: under 2000)",
        stopped.elapsed().as_secs_f64() * 1e3
    );
    Ok(())
}

async fn at_rest(service: &Service<'_>, idle: Duration) {
    let pid = service.running.pid();
    let (before, began) = (ticks(pid), Instant::now());
    tokio::time::sleep(idle).await;
    let used = (ticks(pid) - before) as f64 / 100.0;
    println!(
        "  at rest for {:>3} s: processor        {:8.2} % of a core (wanted: under 1)",
        idle.as_secs(),
        100.0 * used / began.elapsed().as_secs_f64()
    );
    println!(
        "  at rest: resident memory           {:8} KiB (wanted: under 30720); most so far {} KiB",
        memory(pid, "VmRSS"),
        memory(pid, "VmHWM")
    );
}

async fn metrics(service: &Service<'_>, times: usize) -> Result<()> {
    let mut took = Vec::new();
    let mut bytes = 0;
    for _ in 0..times {
        let began = Instant::now();
        bytes = get(service.port, "/metrics").await?.text.len();
        took.push(began.elapsed().as_secs_f64() * 1e3);
    }
    let middle = median(&mut took);
    println!(
        "  /metrics ({bytes} bytes), connection included {middle:5.2} ms, worst of {times} {:.2} ms (wanted: under 5)",
        took[took.len() - 1]
    );
    Ok(())
}

/// The question whether the primary has changed, beside sessions that ask nothing.
async fn unchanged(site: &Site, config: &Config, times: usize) -> Result<()> {
    let state = LocalCluster::of(config).existing_state().await?;
    let point = state.ok_or("no state")?.recovery_point().await?;
    let clock = Clock::real();
    let (mut ours, mut empty) = (Vec::new(), Vec::new());
    let (mut ours_read, mut empty_read) = (0, 0);
    for _ in 0..times {
        let (before, began) = (buffers(site).await?, Instant::now());
        let found = probe(config, point.as_ref(), &clock).await?;
        ours.push(began.elapsed().as_secs_f64() * 1e3);
        if let Some(why) = found.changed {
            return Err(format!("it was to be at rest: {why}").into());
        }
        let between = buffers(site).await?;
        ours_read += between - before;
        let began = Instant::now();
        let session = site.primary.conn().await?;
        session.query_one("SELECT 1", &[]).await?;
        empty.push(began.elapsed().as_secs_f64() * 1e3);
        drop(session);
        empty_read += buffers(site).await? - between;
    }
    let (mine, theirs) = (median(&mut ours), median(&mut empty));
    println!(
        "  nothing new, the whole question    {mine:8.2} ms, worst of {times} {:.2} ms (wanted: under 200); {:.1} times a session that asks nothing",
        ours[ours.len() - 1],
        mine / theirs
    );
    println!(
        "  buffers read on the primary        {:8} a question, {} of them by any session",
        ours_read / times as i64,
        empty_read / times as i64
    );
    Ok(())
}

/// Buffers that finished sessions have read in Builder's database. A session tells them when it ends.
async fn buffers(site: &Site) -> Result<i64> {
    let watcher = site.primary.pg.conn("postgres").await?;
    // None of ours is left.
    support::wait_until("the sessions end", SOON, || async {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'builder'";
        match watcher.query_one(sql, &[]).await?.get::<_, i64>(0) {
            0 => Ok(()),
            left => Err(format!("{left} are left").into()),
        }
    })
    .await;
    let sql = "SELECT blks_hit + blks_read FROM pg_stat_database WHERE datname = 'builder'";
    Ok(watcher.query_one(sql, &[]).await?.get(0))
}
