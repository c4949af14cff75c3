//! Both sites are upgraded to another PostgreSQL, the spare first, while clients read and write through a balancer in
//! front of them: `docs/upgrade.md`, "Upgrade through the spare", with the acts of its commands.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use super::balancer::{Addresses, Balancer, Kind};
use super::builder_front::Front;
use super::exchanges::{
    Counts, ENOUGH, LARGE_BYTES, each_upload_came_once, has_all, until_answers_primary,
};
use super::follow::{copies, followed, logical, prepare, until_following};
use super::pair::{PROMOTE, Pair, until_primary, until_settled};
use super::visitors::Visitors;
use super::{Cluster, Factory, Result, Service, Site, Spec};

/// What an upgrade of both sites took.
#[derive(Debug)]
pub struct Upgrade {
    pub counts: Counts,
    /// From the last write that the old side accepted to the first of the new side, in each handover.
    pub gaps: Vec<Duration>,
    /// Full copies of the rows, each with its reason.
    pub copies: Vec<(&'static str, u64)>,
    /// Objects that were copied although they were there.
    pub objects_written_again: usize,
    /// Writes that a side accepted while the other one was the primary.
    pub strays: usize,
    /// The result and the reason that preflight gave before the first handover.
    pub no_way_back: (String, String),
}

impl std::fmt::Display for Upgrade {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let whole: Duration = self.gaps.iter().sum();
        write!(
            f,
            "{}; without an accepted write {:.2?} in all ({:.2?}); full copies {:?}, objects copied again {}",
            self.counts, whole, self.gaps, self.copies, self.objects_written_again
        )
    }
}

/// Upgrades both sites to the PostgreSQL of that directory.
pub async fn trial(seed: u64, kind: Kind, newer: &Path) -> Result<Upgrade> {
    let mut pair = Pair::prepared("upgrade", logical()).await?;
    has_clients_of_both(&mut pair, newer)?;
    let (first, second) = (&pair.there.primary, &pair.there.spare);
    let mut factory = Factory::new(seed).with_keys_of(super::seed());
    let small = factory
        .package(first, Spec::new("core", "small", "1"))
        .await?;
    let large = Spec::new("core", "large", "1").size(LARGE_BYTES);
    let large = factory.package(first, large).await?;
    let on_b = followed(&pair.there, "").await?;
    let on_a = Service::start(&pair.back, PROMOTE);
    until_primary(&on_a, 1).await;
    until_answers_primary(&on_a).await;
    let fronts = [Front::load_on(first, 0)?, Front::load_on(second, 1)?];
    fronts[1].stop().await;
    fronts[0].until_running().await;
    let ports = [on_a.port, on_b.port];
    let addresses = [0, 1].map(|side| Addresses::here(fronts[side].port(), ports[side]));
    let balancer = Balancer::start(kind, addresses).await?;
    let visitors = Visitors::start(balancer.port(), "upgrade", &small, &large, seed);
    let mut watch = Watch {
        visitors: &visitors,
        fronts: &fronts,
        counts: Counts::new(kind),
        gaps: Vec::new(),
        strays: 0,
        since: Instant::now(),
    };
    let began = Instant::now();
    visitors.until_answered_by(0, began, ENOUGH).await;
    let mut objects = Objects::of(second).await?;

    // dc2 first.
    on_b.stop().await.ok();
    pair.there.warm_spare(&["release"]).await.ok();
    second.pg.upgrade(newer).await?;
    watch.installer_starts_builder(1).await;
    allow_the_way_back(second).await?;
    pair.there.warm_spare(&["prepare"]).await.ok();
    let on_b = Service::start_on(ports[1], &pair.there, "", &[]);
    until_following(&on_b).await;
    let mut made = vec![("dc2 has a new server", copies(&on_b).await?)];
    let mut written = objects.written_again(second).await?;

    // To dc2.
    let no_way_back = check(&pair.there, "no_way_back").await?;
    watch.hand_over(0, &on_b, 2).await;
    until_settled(&on_b).await;
    on_a.until_state("fenced").await;

    // dc1, which no client uses now.
    objects = Objects::of(first).await?;
    fronts[0].stop().await;
    on_a.stop().await.ok();
    first.pg.upgrade(newer).await?;
    watch.installer_starts_builder(0).await;
    allow_the_way_back(first).await?;
    pair.back.write_config("");
    prepare(&pair.back).await;
    let on_a = Service::start_on(ports[0], &pair.back, "", &[]);
    until_following(&on_a).await;
    made.push(("dc1 has a new server", copies(&on_a).await?));
    written += objects.written_again(first).await?;

    // Back to dc1.
    let before = copies(&on_b).await?;
    watch.hand_over(1, &on_a, 3).await;
    until_settled(&on_a).await;
    on_b.until_state("fenced").await;
    fronts[1].stop().await;
    pair.there.write_config("");
    prepare(&pair.there).await;
    on_b.reconfigure("");
    until_following(&on_b).await;
    made.push(("dc2 is the old primary", copies(&on_b).await? - before));
    pair.there.warm_spare(&["verify", "--deep"]).await.ok();

    let Watch {
        mut counts,
        gaps,
        strays,
        ..
    } = watch;
    let seen = visitors.stop().await;
    has_all(first, &seen).await?;
    counts.take(seen);
    each_upload_came_once(&fronts)?;
    on_a.stop().await.ok();
    on_b.stop().await.ok();
    Ok(Upgrade {
        counts,
        gaps,
        copies: made,
        objects_written_again: written,
        strays,
        no_way_back,
    })
}

/// A node has the client programs of its old and of its new package.
fn has_clients_of_both(pair: &mut Pair, newer: &Path) -> Result<()> {
    let older = pair.there.primary.pg.programs().to_path_buf();
    let usual = std::env::var_os("PATH").unwrap_or_default();
    let both = [older, newer.to_path_buf()].into_iter();
    let path = std::env::join_paths(both.chain(std::env::split_paths(&usual)))?;
    let path = path.to_string_lossy().into_owned();
    for site in [&mut pair.there, &mut pair.back] {
        site.environment = vec![("PATH".into(), path.clone())];
    }
    Ok(())
}

/// Does what `docs/before-trouble.md` says of the way back, on a server that is new.
async fn allow_the_way_back(cluster: &Cluster) -> Result<()> {
    let client = cluster.pg.conn("postgres").await?;
    for setting in ["wal_level = 'logical'", "max_slot_wal_keep_size = '7630MB'"] {
        let sql = format!("ALTER SYSTEM SET {setting}");
        client.batch_execute(&sql).await?;
    }
    cluster.pg.stop_fast().await?;
    cluster.pg.start_again().await
}

/// Returns the result and the reason of one check of `preflight`.
async fn check(site: &Site, name: &str) -> Result<(String, String)> {
    let all = site.warm_spare(&["preflight", "--json"]).await.json();
    let checks = all["checks"].as_array().cloned().unwrap_or_default();
    let found = checks.iter().find(|check| check["name"] == name);
    let found = found.ok_or_else(|| format!("there is no check {name}: {all:#}"))?;
    let word = |field: &str| found[field].as_str().unwrap_or_default().to_string();
    Ok((word("result"), word("reason")))
}

/// When each object of a bucket was written.
struct Objects(BTreeMap<String, String>);

impl Objects {
    async fn of(cluster: &Cluster) -> Result<Objects> {
        let mut times = BTreeMap::new();
        for key in cluster.keys().await? {
            if key.starts_with(".warm-spare/") {
                continue;
            }
            let head = cluster.s3().head(&cluster.bucket, &key).await?;
            let head = head.ok_or_else(|| format!("no object {key}"))?;
            times.insert(key, head.modified);
        }
        Ok(Objects(times))
    }

    /// Returns the number of these objects that were written once more.
    async fn written_again(&self, cluster: &Cluster) -> Result<usize> {
        let now = Objects::of(cluster).await?;
        let changed = self
            .0
            .iter()
            .filter(|(key, time)| now.0.get(*key) != Some(time));
        Ok(changed.count())
    }
}

struct Watch<'a> {
    visitors: &'a Visitors,
    fronts: &'a [Front; 2],
    counts: Counts,
    gaps: Vec<Duration>,
    strays: usize,
    /// The last promotion.
    since: Instant,
}

impl Watch<'_> {
    /// Stock's installer starts Builder on the new server, on which no fence stands, and the operator stops it.
    async fn installer_starts_builder(&self, side: usize) {
        let front = &self.fronts[side];
        front.start();
        front.until_running().await;
        let began = Instant::now();
        self.visitors
            .until_answered_by(1 - side, began, ENOUGH)
            .await;
        front.stop().await;
    }

    /// Hands over to the service of the other side, whose operator starts Builder as soon as `/primary` says so.
    async fn hand_over(&mut self, old: usize, service: &Service<'_>, epoch: i64) {
        let new = 1 - old;
        let began = Instant::now();
        self.visitors.until_answered_by(old, began, ENOUGH).await;
        let wished = Instant::now();
        let seen = self.visitors.seen();
        let late = seen.writes.iter().filter(|write| write.begun > self.since);
        self.strays += late.filter(|write| write.side == new).count();
        service.reconfigure(PROMOTE);
        until_answers_primary(service).await;
        let promoted = Instant::now();
        self.fronts[new].start();
        until_primary(service, epoch).await;
        self.visitors.until_answered_by(new, promoted, ENOUGH).await;
        let seen = self.visitors.seen();
        let gap = self.counts.measure(&seen, old, wished, promoted);
        self.gaps
            .push(gap.expect("both sides have accepted writes"));
        self.counts.switchovers += 1;
        self.since = promoted;
    }
}
