//! How long Builder is without a primary: from the applied configuration to the first write that the new primary
//! accepts, of few and of many packages. On real servers.
//!
//! `scripts/bench handover [--smoke] [--runs N]`.

mod common;
use common::{Plan, median};
use std::time::{Duration, Instant};
use support::follow::{prepare, until_following};
use support::pair::{
    PROMOTE, Pair, Writers, first_write, forced, lost, returning, until_primary, until_settled,
    write,
};
use support::service::SOON;
use support::{Cluster, Factory, Package, Result, Service, Site, Spec, packages, wait_until};

/// Without the debug lines; the replaced databases would fill the disk.
const QUIET: &str = "log_level = \"info\"\nreplication.keep_generations = 0\n";
/// For the copy of many packages.
const LIMIT: Duration = Duration::from_secs(1800);
/// A failback looks at all of them.
const MANY_RUNS: usize = 3;
const WRITERS: usize = 4;
/// Between two uploads: 20 a second.
const UPLOAD_EVERY: Duration = Duration::from_millis(50);
/// More than are uploaded before the old primary refuses one.
const UPLOADS: usize = 600;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Idle,
    Loaded,
    Failover,
}

/// What is measured, its name, and the most milliseconds that it may take.
const KINDS: [(Kind, &str, f64); 3] = [
    (Kind::Idle, "switchover, idle", 2000.0),
    (Kind::Loaded, "switchover, under load", 5000.0),
    (Kind::Failover, "failover", 1000.0),
];

/// One handover, in milliseconds since the configuration was applied.
struct Timed {
    written: f64,
    /// When each step was announced, and at last the promotion.
    steps: Vec<(String, f64)>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let plan = Plan::read_with(5);
    if !plan.wants("handover") {
        return Ok(());
    }
    let (few, many) = if plan.smoke {
        (50, 200)
    } else {
        (1000, 100_000)
    };
    let few = measure(few, plan.runs).await?;
    let many = measure(many, plan.runs.min(MANY_RUNS)).await?;
    println!("handover: many packages against few, by the medians");
    for ((_, what, _), (few, many)) in KINDS.iter().zip(few.iter().zip(&many)) {
        println!("  {what:<34} {:8.2} times as long", many / few);
    }
    Ok(())
}

/// The median of each kind with so many packages.
async fn measure(packages: usize, runs: usize) -> Result<[f64; 3]> {
    println!("handover: {packages} packages, {runs} runs");
    let mut factory = Factory::new(3);
    let pair = start(&mut factory, packages).await?;
    let (mut site, mut other) = (&pair.there, &pair.back);
    let mut service = Service::start(site, QUIET);
    until_following(&service).await;
    let mut found = KINDS.map(|_| Vec::new());
    let mut epoch = 1;
    // A journey: every handover goes the other way, and only the last one needs no failback.
    for run in 1..=runs {
        for (at, times) in found.iter_mut().enumerate() {
            epoch += 1;
            times.push(hand_over(&mut service, KINDS[at].0, epoch, &mut factory).await?);
            if run == runs && at + 1 == KINDS.len() {
                break;
            }
            let next = come_back(&service, other).await?;
            service.stop().await.ok();
            service = next;
            (site, other) = (other, site);
        }
    }
    service.stop().await.ok();
    let mut medians = [0.0; 3];
    for ((times, (_, what, target)), middle) in found.iter().zip(KINDS).zip(&mut medians) {
        *middle = show(times, what, target);
    }
    Ok(medians)
}

/// Two clusters whose servers wait for their disks, as an operator's do, and the first copy made.
async fn start(factory: &mut Factory, packages: usize) -> Result<Pair> {
    let durable = || support::follow::logical().setting("fsync", "on");
    let site = Site::builder("handover").primary(durable());
    let site = site.spare(durable()).own_stores().start().await?;
    let began = Instant::now();
    factory
        .bulk_artifacts_of(&site.primary, packages, 300, 1000)
        .await?;
    let made = began.elapsed();
    site.write_config(QUIET);
    prepare(&site).await;
    let first = site.spawn(&["sync"]).wait(LIMIT).await?.ok();
    println!(
        "  made in {:.1} s, first copy {:.1} s",
        made.as_secs_f64(),
        first.took.as_secs_f64()
    );
    Pair::of(site)
}

async fn hand_over(
    service: &mut Service<'_>,
    kind: Kind,
    epoch: i64,
    factory: &mut Factory,
) -> Result<Timed> {
    let site = service.site;
    write(&site.primary, &format!("before-{epoch}")).await?;
    until_following(service).await;
    write_back(site).await?;
    let load = match kind {
        Kind::Loaded => Some(Load::start(site, factory, epoch).await?),
        Kind::Failover => {
            site.primary.pg.kill9();
            service.until_hold("peer_unreachable").await;
            None
        }
        Kind::Idle => None,
    };
    let wish = match kind {
        Kind::Failover => forced(epoch),
        _ => PROMOTE.into(),
    };
    let timed = timed(service, &format!("{QUIET}{wish}"), epoch).await?;
    until_primary(service, epoch).await;
    if let Some(load) = load {
        load.check(&site.spare).await?;
    }
    let before = std::collections::BTreeMap::from([(format!("before-{epoch}"), 0)]);
    none_lost(lost(&site.spare, &before).await?)?;
    Ok(timed)
}

/// What the copy before left to be written would be counted as the handover's, and it grows with the packages.
async fn write_back(site: &Site) -> Result<()> {
    for cluster in [&site.primary, &site.spare] {
        cluster.conn().await?.batch_execute("CHECKPOINT").await?;
    }
    Ok(tokio::task::spawn_blocking(rustix::fs::sync).await?)
}

/// Applies the configuration, tries to write until that is accepted, and notes what the service says meanwhile.
async fn timed(service: &mut Service<'_>, wish: &str, epoch: i64) -> Result<Timed> {
    let new = service.site.spare.clone();
    service.running.forget();
    let applied = Instant::now();
    let since = |at: Instant| (at - applied).as_secs_f64() * 1e3;
    service.reconfigure(wish);
    let writing = tokio::spawn(async move { first_write(&new, &format!("first-{epoch}")).await });
    let mut steps = Vec::new();
    loop {
        let told = |line: &str| line.contains(": step ") || line.contains("promoted by ");
        let line = service.running.wait_for_line(told, SOON).await?;
        let step = line.split_once(": step ");
        let step = step.and_then(|(_, step)| step.split(": ").nth(1)?.split(' ').next());
        steps.push((
            step.unwrap_or("to the first write").to_string(),
            since(Instant::now()),
        ));
        if step.is_none() {
            break;
        }
    }
    Ok(Timed {
        written: since(writing.await??),
        steps,
    })
}

/// The old primary comes back as the spare.
async fn come_back<'a>(service: &Service<'_>, back: &'a Site) -> Result<Service<'a>> {
    // It was killed, or is there all the time.
    if back.spare.conn().await.is_err() {
        back.spare.pg.start_again().await?;
    }
    until_settled(service).await;
    let next = returning(back, QUIET).await;
    // A first copy back reads every artifact that was never hashed there.
    wait_until("the old primary is the spare", LIMIT, || async {
        match next.status().await?["state"] == "following" {
            true => Ok(()),
            false => Err(next.running.stderr().join("\n").into()),
        }
    })
    .await;
    until_following(&next).await;
    Ok(next)
}

/// Clients at work: rows, and packages with their artifacts.
struct Load {
    writers: Writers,
    uploads: tokio::task::JoinHandle<Vec<Package>>,
}

impl Load {
    async fn start(site: &Site, factory: &mut Factory, epoch: i64) -> Result<Load> {
        factory.origin(&site.primary, "bench").await?;
        let made: Vec<Package> = (0..UPLOADS)
            .map(|number| Spec::new("bench", "load", &format!("{epoch}.0.{number}")).size(20_000))
            .map(|spec| factory.make(spec))
            .collect();
        let uploads = tokio::spawn(upload(site.primary.clone(), made));
        let sides = [&site.primary, &site.spare];
        let writers = Writers::named(
            sides,
            WRITERS,
            &format!("writer-{epoch}"),
            Duration::from_millis(1),
        );
        writers.until_written(0, 1000).await;
        Ok(Load { writers, uploads })
    }

    /// All that either side acknowledged must be on the new primary, artifacts too.
    async fn check(self, new: &Cluster) -> Result<()> {
        self.writers.until_written(1, 100).await;
        let rows = self.writers.stop().await;
        let uploaded = self.uploads.await?;
        if uploaded.is_empty() || uploaded.len() == UPLOADS {
            return Err(format!("{} uploads are no load", uploaded.len()).into());
        }
        let mut missing = lost(new, &rows).await?;
        let client = new.conn().await?;
        let sql = "SELECT FROM origin_packages WHERE ident = $1 AND checksum = $2";
        for package in &uploaded {
            let row = client
                .query_opt(sql, &[&package.ident, &package.checksum])
                .await?;
            let stored = new.s3().head(&new.bucket, &package.key).await?;
            if row.is_none() || stored.is_none_or(|head| head.size != package.size) {
                missing.push(package.ident.clone());
            }
        }
        none_lost(missing)
    }
}

fn none_lost(missing: Vec<String>) -> Result<()> {
    match missing.first() {
        None => Ok(()),
        Some(one) => Err(format!(
            "{} acknowledged rows are lost, such as {one}",
            missing.len()
        )
        .into()),
    }
}

/// Uploads at a steady pace until one is refused, and returns those that were not.
async fn upload(primary: Cluster, made: Vec<Package>) -> Vec<Package> {
    let mut pace = tokio::time::interval(UPLOAD_EVERY);
    let mut uploaded = Vec::new();
    for package in made {
        pace.tick().await;
        if packages::upload(&primary, &package).await.is_err() {
            break;
        }
        uploaded.push(package);
    }
    uploaded
}

/// Prints one kind, and returns its median.
fn show(times: &[Timed], what: &str, target: f64) -> f64 {
    let mut written: Vec<f64> = times.iter().map(|timed| timed.written).collect();
    let middle = median(&mut written);
    let most = written[written.len() - 1];
    let verdict = if most <= target { "within" } else { "OVER" };
    // The first one of a cluster also makes a database there, to keep the fence's record in.
    let each: Vec<String> = times.iter().map(|t| format!("{:.0}", t.written)).collect();
    println!(
        "  {what:<34} p50 {middle:6.0} ms, max {most:6.0} ms (wanted: {target:.0}): {verdict}"
    );
    // From one announcement to the next, by the medians.
    let (mut from, mut shown) = ("until it begins", Vec::new());
    let names = times[0].steps.iter().map(|(name, _)| name.as_str());
    for (at, name) in names.chain(["first write"]).enumerate() {
        let until = |timed: &Timed| timed.steps.get(at).map_or(timed.written, |step| step.1);
        let since = |timed: &Timed| at.checked_sub(1).map_or(0.0, |at| timed.steps[at].1);
        let mut took: Vec<f64> = times.iter().map(|t| until(t) - since(t)).collect();
        shown.push(format!("{from} {:.0}", median(&mut took)));
        from = name;
    }
    println!("    of it: {} ms", shown.join(", "));
    println!("    each: {} ms", each.join(", "));
    middle
}
