//! The costs of a spare at the other end of a long line: the lag of an upload, its round trips, and a first
//! copy. The process is beside the primary, and the spare's datastore and store are far. On real servers.
//!
//! `scripts/bench distance [--smoke]`.

mod common;
use common::Plan;
use common::uploads::{ARTIFACT, durable, follow, latency};
use std::time::Duration;

use support::proxy::{Mode, Proxy};
use support::{Factory, Result, Service, Site, Spec, packages, wait_until};

/// One way: half of a round trip of 40 ms.
const WAY: Duration = Duration::from_millis(20);

/// The lines to the spare.
struct Lines {
    pg: Proxy,
    s3: Proxy,
}

#[tokio::main]
async fn main() -> Result<()> {
    let plan = Plan::read();
    if !plan.wants("distance") {
        return Ok(());
    }
    let (packages, uploads, single) = if plan.smoke {
        (50, 150, 10)
    } else {
        (500, 1500, 30)
    };
    let mut copies = Vec::new();
    let mut lags = Vec::new();
    for mode in [Mode::Pass, Mode::Far(WAY)] {
        let site = Site::builder("distance")
            .primary(durable().logical())
            .spare(durable())
            .start()
            .await?;
        let mut factory = Factory::new(5);
        factory
            .bulk_artifacts_of(&site.primary, packages, 300, 1000)
            .await?;
        let lines = Lines {
            pg: Proxy::start(site.spare.pg.port()).await?,
            s3: Proxy::start(site.spare.minio.port()).await?,
        };
        lines.pg.set(mode).await;
        lines.s3.set(mode).await;
        let far = format!(
            "[local.datastore]\nport = {}\n[local.s3]\nendpoint = \"http://127.0.0.1:{}\"\n",
            lines.pg.port(),
            lines.s3.port()
        );
        println!("distance: {mode:?}, one way");
        site.write_config(&format!("log_level = \"warn\"\n{far}"));
        site.warm_spare(&["prepare"]).await.ok();
        let before = lines.turns();
        let first = site
            .spawn(&["sync"])
            .wait(Duration::from_secs(3600))
            .await?
            .ok();
        let (pg, s3) = lines.since(&before);
        println!(
            "  first copy of {packages} packages        {:8.1} s, {} turns with the datastore on {} connections, {} with the store on {}",
            first.took.as_secs_f64(),
            pg.iter().sum::<u64>(),
            pg.len(),
            s3.iter().sum::<u64>(),
            s3.len()
        );
        copies.push(first.took.as_secs_f64());
        let service = follow(&site, &far).await;
        one_by_one(&site, &lines, &mut factory, single).await?;
        let before = lines.turns();
        let lag = latency(&site, &mut factory, uploads).await?;
        let (pg, s3) = lines.since(&before);
        println!(
            "  upload of 100 KiB, {:4.1} a second: COMMIT there to row here, p50 {:.1} ms, p99 {:.1} ms (wanted: under 1000), worst {:.1} ms of {uploads}",
            lag.rate, lag.p50, lag.p99, lag.worst
        );
        println!(
            "    turns for each upload: {:.2} with the datastore, {:.2} with the store",
            pg.iter().sum::<u64>() as f64 / uploads as f64,
            s3.iter().sum::<u64>() as f64 / uploads as f64
        );
        lags.push(lag);
        rest(&service, &lines).await;
        service.stop().await.ok();
    }
    println!(
        "far against near: first copy {:.1} times, p50 {:.1} times, p99 {:.1} times",
        copies[1] / copies[0],
        lags[1].p50 / lags[0].p50,
        lags[1].p99 / lags[0].p99
    );
    Ok(())
}

impl Lines {
    fn turns(&self) -> (Vec<u64>, Vec<u64>) {
        let of = |line: &Proxy| line.turns().iter().map(|(_, turns)| *turns).collect();
        (of(&self.pg), of(&self.s3))
    }

    /// Returns the turns since then of each connection that had any, most first.
    fn since(&self, (pg, s3): &(Vec<u64>, Vec<u64>)) -> (Vec<u64>, Vec<u64>) {
        let more = |now: Vec<u64>, then: &[u64]| {
            let then = then.iter().copied().chain(std::iter::repeat(0));
            let mut more: Vec<u64> = now.iter().zip(then).map(|(now, then)| now - then).collect();
            more.retain(|turns| *turns > 0);
            more.sort_unstable_by(|one, other| other.cmp(one));
            more
        };
        let (pg_now, s3_now) = self.turns();
        (more(pg_now, pg), more(s3_now, s3))
    }
}

/// The round trips of one upload by itself. Each row is waited for before the next upload.
async fn one_by_one(site: &Site, lines: &Lines, factory: &mut Factory, uploads: u64) -> Result<()> {
    factory.origin(&site.primary, "single").await?;
    let spare = site.spare.conn().await?;
    let seen = spare
        .prepare("SELECT FROM origin_packages WHERE ident = $1")
        .await?;
    let mut before = lines.turns();
    // The first one brings the descriptions of the tables.
    for number in 0..=uploads {
        if number == 1 {
            before = lines.turns();
        }
        let spec = Spec::new("single", "upload", &format!("1.0.{number}")).size(ARTIFACT);
        let package = factory.make(spec);
        packages::put(&site.primary, &package).await?;
        packages::insert(&site.primary, &package).await?;
        wait_until("the row", Duration::from_secs(60), || async {
            match spare.query(&seen, &[&package.ident]).await?.len() {
                1 => Ok(()),
                _ => Err("not yet".into()),
            }
        })
        .await;
    }
    let (pg, s3) = lines.since(&before);
    let each = |turns: &[u64]| {
        let each = turns.iter().take(5);
        let each = each.map(|turns| format!("{:.2}", *turns as f64 / uploads as f64));
        each.collect::<Vec<_>>().join(", ")
    };
    println!(
        "  one upload alone: turns {:.2} with the store; with the datastore, by connection, {}",
        s3.iter().sum::<u64>() as f64 / uploads as f64,
        each(&pg)
    );
    Ok(())
}

/// The turns of a spare that has nothing to do: they are within the figures above.
async fn rest(service: &Service<'_>, lines: &Lines) {
    const SECONDS: u64 = 10;
    service.until_level().await;
    let before = lines.turns();
    tokio::time::sleep(Duration::from_secs(SECONDS)).await;
    let (pg, s3) = lines.since(&before);
    println!(
        "  at rest: {:.1} turns a second with the datastore, {:.1} with the store",
        pg.iter().sum::<u64>() as f64 / SECONDS as f64,
        s3.iter().sum::<u64>() as f64 / SECONDS as f64
    );
}
