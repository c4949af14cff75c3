//! Two sites exchange their roles again and again while clients read and write through balancers in front of them. What
//! each client sees is counted.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::balancer::{Addresses, Balancer, Kind};
use super::builder_front::Front;
use super::follow::{followed, prepare, until_following};
use super::pair::{PROMOTE, Pair, until_primary, until_settled};
use super::service::SOON;
use super::visitors::{Seen, Visitors};
use super::{Cluster, Factory, Result, Service, Spec, wait_until};

/// Maximum time after a promotion in which clients are still answered by the old side.
pub const NEW_SIDE_LIMIT: Duration = Duration::from_secs(5);
/// Reads and writes that each side must answer before and after an exchange.
pub const ENOUGH: usize = 5;
pub const LARGE_BYTES: u64 = 4 << 20;
/// One exchange of this number ends with a restart of the old side's frontend, as by its operator.
const RESTARTS_ONE_OF: u32 = 3;

/// The counts of all clients of one balancer.
#[derive(Debug, Clone)]
pub struct Counts {
    pub kind: Kind,
    pub switchovers: usize,
    pub reads: usize,
    pub reads_failed: Vec<String>,
    pub downloads: usize,
    pub cut: usize,
    pub accepted: usize,
    pub refused: usize,
    pub bare_500: usize,
    pub odd: Vec<String>,
    /// The longest time from the last write that the old side accepted to the first of the new side.
    pub write_gap: Duration,
    /// The longest time from a promotion to the last request that began then and was answered by the old side.
    pub new_side: Duration,
}

impl Counts {
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            switchovers: 0,
            reads: 0,
            reads_failed: Vec::new(),
            downloads: 0,
            cut: 0,
            accepted: 0,
            refused: 0,
            bare_500: 0,
            odd: Vec::new(),
            write_gap: Duration::ZERO,
            new_side: Duration::ZERO,
        }
    }

    pub fn add(&mut self, other: Counts) {
        self.switchovers += other.switchovers;
        self.reads += other.reads;
        self.reads_failed.extend(other.reads_failed);
        self.downloads += other.downloads;
        self.cut += other.cut;
        self.accepted += other.accepted;
        self.refused += other.refused;
        self.bare_500 += other.bare_500;
        self.odd.extend(other.odd);
        self.write_gap = self.write_gap.max(other.write_gap);
        self.new_side = self.new_side.max(other.new_side);
    }

    /// Takes the measures of one exchange: `old` was the primary until the instant `promoted`. Returns the time from the
    /// last write that the old side accepted to the first of the new side.
    pub fn measure(
        &mut self,
        seen: &Seen,
        old: usize,
        wished: Instant,
        promoted: Instant,
    ) -> Option<Duration> {
        let by_old = seen.writes.iter().filter(|write| write.side == old);
        let by_new = seen.writes.iter().filter(|write| write.side != old);
        let last = by_old.map(|write| write.ended).max();
        let first = by_new
            .map(|write| write.ended)
            .filter(|ended| *ended > wished)
            .min();
        let gap = first.zip(last).map(|(first, last)| first - last);
        self.write_gap = self.write_gap.max(gap.unwrap_or_default());
        let late = seen.reads.iter().chain(&seen.writes);
        let late = late.filter(|visit| visit.side == old && visit.begun > promoted);
        if let Some(last) = late.map(|visit| visit.begun).max() {
            self.new_side = self.new_side.max(last - promoted);
        }
        gap
    }

    pub fn take(&mut self, seen: Seen) {
        self.reads += seen.reads.len() + seen.reads_failed.len();
        self.reads_failed.extend(seen.reads_failed);
        self.downloads += seen.downloads + seen.cut;
        self.cut += seen.cut;
        self.accepted += seen.writes.len();
        self.refused += seen.refused;
        self.bare_500 += seen.bare_500;
        self.odd.extend(seen.odd);
    }

    /// Returns what breaks the promise of the snippets.
    pub fn faults(&self) -> Vec<String> {
        let mut faults: Vec<String> = self.reads_failed.iter().take(5).cloned().collect();
        faults.extend(self.odd.iter().take(5).map(|odd| format!("a write: {odd}")));
        if self.bare_500 > 0 {
            faults.push(format!("{} writes were answered 500", self.bare_500));
        }
        if self.new_side > NEW_SIDE_LIMIT {
            faults.push(format!(
                "clients were on the old side for {:.1?}",
                self.new_side
            ));
        }
        faults
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(
            f,
            "{:?}: {} switchovers; reads {}, failed {}; downloads {}, cut in mid-body {}; writes accepted {}, 503 {}, 500 {}, other {}; longest without an accepted write {:.2?}; last answer by the old side {:.2?} after the promotion",
            self.kind,
            self.switchovers,
            self.reads,
            self.reads_failed.len(),
            self.downloads,
            self.cut,
            self.accepted,
            self.refused,
            self.bare_500,
            self.odd.len(),
            self.write_gap,
            self.new_side
        )
    }
}

/// The balancers, before the sites, with their clients.
struct Watched {
    balancer: Balancer,
    visitors: Visitors,
    counts: Counts,
}

/// Exchanges the roles so many times. Returns the counts of each balancer; an error is a fault of the trial itself, or a
/// write that was lost or carried out twice.
pub async fn trial(
    seed: u64,
    switchovers: usize,
    kinds: &[Kind],
    talks: bool,
) -> Result<Vec<Counts>> {
    let pair = Pair::start("front").await?;
    let mut factory = Factory::new(seed);
    let first = &pair.there.primary;
    let small = factory
        .package(first, Spec::new("core", "small", "1"))
        .await?;
    let large = Spec::new("core", "large", "1").size(LARGE_BYTES);
    let large = factory.package(first, large).await?;
    let on_b = followed(&pair.there, "").await?;
    let on_a = Service::start(&pair.back, PROMOTE);
    until_primary(&on_a, 1).await;
    let fronts = [
        Front::load_on(&pair.there.primary, 0)?,
        Front::load_on(&pair.there.spare, 1)?,
    ];
    fronts[0].until_running().await;
    let services = [&on_a, &on_b];
    let addresses = [0, 1].map(|side| Addresses::here(fronts[side].port(), services[side].port));
    until_answers_primary(&on_a).await;
    let mut watched = Vec::new();
    for (number, kind) in kinds.iter().enumerate() {
        let balancer = Balancer::start(*kind, addresses).await?;
        let name = format!("{kind:?}").to_lowercase();
        let seed = seed.wrapping_add(number as u64 * 1000);
        let visitors = Visitors::start(balancer.port(), &name, &small, &large, seed);
        watched.push(Watched {
            balancer,
            visitors,
            counts: Counts::new(*kind),
        });
    }
    let mut rng = StdRng::seed_from_u64(seed);
    let moves_by_itself = kinds.iter().all(|kind| kind.has_snippet());
    for round in 0..switchovers {
        let (old, new) = (round % 2, 1 - round % 2);
        let began = Instant::now();
        for one in &watched {
            one.visitors.write(true);
            one.visitors.until_answered_by(old, began, ENOUGH).await;
        }
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..500))).await;
        let wished = Instant::now();
        services[new].reconfigure(PROMOTE);
        until_answers_primary(services[new]).await;
        let promoted = Instant::now();
        until_primary(services[new], round as i64 + 2).await;
        fronts[new].until_running().await;
        // A plain balancer stays with the old side as long as its frontend answers.
        let restarts = !moves_by_itself || rng.random_ratio(1, RESTARTS_ONE_OF);
        if !moves_by_itself {
            fronts[old].restart().await;
        }
        for one in &watched {
            one.visitors.until_answered_by(new, promoted, ENOUGH).await;
        }
        // The clients have moved: the operator stops Builder on the old side.
        if moves_by_itself && restarts {
            fronts[old].restart().await;
        }
        // Long enough that a request to the wrong side would show.
        tokio::time::sleep(Duration::from_millis(300)).await;
        for one in &mut watched {
            let seen = one.visitors.seen();
            one.counts.measure(&seen, old, wished, promoted);
            one.counts.switchovers += 1;
            one.visitors.write(false);
            if talks {
                println!(
                    "{:3} seed {seed} to dc{} {:?}: failed {}, cut {}, 503 {}, 500 {}, other {}, gap so far {:.2?}, old side so far {:.2?}",
                    round + 1,
                    new + 1,
                    one.balancer.kind,
                    seen.reads_failed.len(),
                    seen.cut,
                    seen.refused,
                    seen.bare_500,
                    seen.odd.len(),
                    one.counts.write_gap,
                    one.counts.new_side
                );
            }
        }
        until_settled(services[new]).await;
        services[old].until_state("fenced").await;
        services[old].site.write_config("");
        prepare(services[old].site).await;
        services[old].reconfigure("");
        until_following(services[old]).await;
    }
    let mut all = Vec::new();
    let primary = [&pair.there.primary, &pair.there.spare][switchovers % 2];
    for one in watched {
        let mut counts = one.counts;
        let seen = one.visitors.stop().await;
        has_all(primary, &seen).await?;
        counts.take(seen);
        all.push(counts);
    }
    each_upload_came_once(&fronts)?;
    on_a.stop().await.ok();
    on_b.stop().await.ok();
    Ok(all)
}

/// An error names an accepted write that is lost.
pub async fn has_all(primary: &Cluster, seen: &Seen) -> Result<()> {
    let idents: Vec<&str> = seen.accepted.keys().map(String::as_str).collect();
    let sql = "SELECT n FROM unnest($1::text[]) n WHERE NOT EXISTS (SELECT FROM origin_packages WHERE ident = n)";
    let lost = primary.conn().await?.query(sql, &[&idents]).await?;
    match lost.first() {
        None => Ok(()),
        Some(row) => {
            let (number, name) = (lost.len(), row.get::<_, &str>(0));
            Err(format!("{number} accepted writes are lost: {name}").into())
        }
    }
}

pub fn each_upload_came_once(fronts: &[Front; 2]) -> Result<()> {
    let mut times = fronts[0].uploads();
    for (upload, count) in fronts[1].uploads() {
        *times.entry(upload).or_default() += count;
    }
    let twice: Vec<_> = times.iter().filter(|(_, count)| **count > 1).collect();
    match twice.is_empty() {
        true => Ok(()),
        false => Err(format!("uploads came more than once: {twice:?}").into()),
    }
}

/// Waits until the service tells balancers that its side is the primary.
pub async fn until_answers_primary(service: &Service<'_>) {
    wait_until("/primary answers 200", SOON, || async {
        match service.get("/primary").await?.status {
            200 => Ok(()),
            other => Err(format!("{other}, {:?}", service.running.last_said(10)).into()),
        }
    })
    .await;
}
