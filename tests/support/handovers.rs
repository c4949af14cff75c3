//! Runs handovers between two clusters, one after the other, with faults during each. Afterwards
//! one cluster is writable and the other one follows it; no acknowledged row is lost without a
//! record.
//!
//! The oracle asks the servers as any client does, and does not trust the services' reports. Only
//! the operator, who is also played here, reads the services' reports, as he must.
//! also plays, reads what the services say, as he must.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use tokio::task::JoinHandle;

use super::follow::{logical, prepare, until_following};
use super::pair::{PROMOTE, Pair, Writers, forced, is_writable};
use super::process::alive;
use super::service::{Halt, approval, approval_id};
use super::{Cluster, Factory, Result, Service, Site, content, inventory};

/// Maximum time until one cluster is the primary and the other one follows it.
const SETTLED_LIMIT: Duration = Duration::from_secs(150);
/// Maximum time with two writable clusters, if an old primary came back by itself: the time of its
/// fencing.
const FENCED_LIMIT: Duration = Duration::from_secs(30);
/// Time that an operator waits before he acts.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause between two rows of the writer.
const PAUSE: Duration = Duration::from_millis(15);
/// Maximum time for a service to reach the step at which it is to be killed or frozen.
const STEP_PATIENCE: Duration = Duration::from_secs(8);

const STEPS: [&str; 9] = [
    "preflight",
    "fence",
    "drain",
    "compare",
    "sequences",
    "promote",
    "fence.recorded",
    "promote.before_commit",
    "promote.after_commit",
];

/// The operator's wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Planned,
    /// Forced: the primary's datastore is killed first.
    Forced,
    /// Planned, and called off a moment later.
    CalledOff,
    /// No wish: but the faults strike all the same.
    Nothing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Primary,
    Spare,
}

/// The fault during a handover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    /// The spare's service is killed at a step.
    Killed(&'static str),
    /// The service stops between a check and the act, loses its sessions and its lock to another
    /// process, and wakes up.
    Frozen(&'static str),
    DatastoreKilled(Side),
    ClockStepped(Side, i64),
    SessionEnded(Side),
    /// The data directory is set back to the beginning, with the same configuration as before.
    SetBack(Side),
}

impl Trouble {
    fn random(rng: &mut StdRng) -> Self {
        let side = [Side::Primary, Side::Spare][rng.random_range(0..2)];
        let step = STEPS.choose(rng).expect("there are steps");
        match rng.random_range(0..12) {
            0 => Trouble::None,
            1..3 => Trouble::Killed(step),
            3..5 => Trouble::Frozen(step),
            5..7 => Trouble::DatastoreKilled(side),
            7..9 => Trouble::ClockStepped(side, [3600, -3600][rng.random_range(0..2)]),
            9 => Trouble::SessionEnded(side),
            _ => Trouble::SetBack(side),
        }
    }
}

/// The observations of a sampler of three clusters, as a client sees them.
#[derive(Debug, Default)]
struct Seen {
    both_since: Option<Instant>,
    longest_both: Duration,
    third_was_writable: bool,
}

struct Ring<'a> {
    /// The sites, by the cluster that is local there.
    sites: [&'a Site; 2],
    services: [Option<Service<'a>>; 2],
    /// The configuration that the operator gave to each.
    told: [String; 2],
    third: &'a Site,
    third_service: Service<'a>,
    primary: usize,
    /// True: the operator forced a cluster, whatever the other one was about to do.
    forced: bool,
    /// The cluster that the operator wants to be the primary.
    wanted: usize,
    halts: Vec<Halt>,
    /// True for a cluster whose datastore was killed.
    down: [bool; 2],
    /// Acknowledged rows that are on the primary, or were acknowledged since the last judgement.
    rows: BTreeSet<String>,
    seen: Arc<Mutex<Seen>>,
    sampler: JoinHandle<()>,
}

impl Drop for Ring<'_> {
    fn drop(&mut self) {
        self.sampler.abort();
    }
}

/// Runs this number of handovers from one seed, and prints a line for each.
pub async fn trial(seed: u64, rounds: usize) -> Result<BTreeMap<String, usize>> {
    let site = Site::builder("handovers")
        .primary(logical().own_clock())
        .spare(logical().own_clock());
    let there = site.own_stores().start().await?;
    Factory::new(seed).fill(&there.primary, 4).await?;
    prepare(&there).await;
    let third = there.other_spare("handovers-third").await?;
    prepare(&third).await;
    let pair = Pair::of(there)?;
    pair.back.write_config("");
    let mut ring = Ring::begin(&pair, &third).await?;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut kinds = BTreeMap::new();
    let mut seen = Vec::new();
    for round in 0..rounds {
        let wishes = [Wish::Planned, Wish::Forced, Wish::CalledOff, Wish::Nothing];
        let wish = *wishes
            .choose_weighted(&mut rng, |wish| match wish {
                Wish::Planned => 4,
                Wish::Forced => 3,
                Wish::CalledOff => 2,
                Wish::Nothing => 1,
            })
            .expect("there are wishes");
        let trouble = Trouble::random(&mut rng);
        let mut own = StdRng::from_rng(&mut rng);
        let began = Instant::now();
        let line = format!(
            "{:3} seed {seed} from dc{} {wish:?}, {trouble:?}",
            round + 1,
            ring.primary + 1
        );
        seen.push(line.clone());
        let outcome = ring.round(round, wish, trouble, &mut own).await;
        let told = outcome.map_err(|error| {
            format!(
                "{error}\n--- seed {seed}\n{}\n{}",
                seen.join("\n"),
                ring.log_tail()
            )
        })?;
        println!("{line}: {told}, {:.1?}", began.elapsed());
        *kinds.entry(format!("{wish:?}")).or_default() += 1;
        let trouble = format!("{trouble:?}");
        let kind = trouble.split(['(', ',']).next().unwrap_or_default();
        *kinds.entry(format!("  {kind}")).or_default() += 1;
    }
    ring.third_follows_its_own().await?;
    Ok(kinds)
}

impl<'a> Ring<'a> {
    /// Begins: the first cluster is the primary, the second and the third follow it. The data of
    /// both of the first two are copied.
    async fn begin(pair: &'a Pair, third: &'a Site) -> Result<Ring<'a>> {
        let sites = [&pair.back, &pair.there];
        let service = Service::start(&pair.there, "");
        until_following(&service).await;
        service.stop().await.ok();
        for site in sites {
            site.spare.pg.stop_fast().await?;
            site.spare.pg.keep_data().await?;
            site.spare.pg.start_again().await?;
        }
        let service = Service::start(&pair.there, "");
        until_following(&service).await;
        let third_service = Service::start(third, "");
        until_following(&third_service).await;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let clusters = [
            sites[0].spare.clone(),
            sites[1].spare.clone(),
            third.spare.clone(),
        ];
        let sampler = tokio::spawn(sample(clusters, seen.clone()));
        Ok(Ring {
            sites,
            services: [None, Some(service)],
            told: Default::default(),
            third,
            third_service,
            primary: 0,
            wanted: 0,
            forced: false,
            halts: Vec::new(),
            down: [false; 2],
            rows: BTreeSet::new(),
            seen,
            sampler,
        })
    }

    fn cluster(&self, number: usize) -> &'a Cluster {
        &self.sites[number].spare
    }

    fn tell(&mut self, number: usize, words: &str) {
        self.told[number] = words.into();
        if let Some(service) = &self.services[number] {
            service.reconfigure(words);
        }
    }

    fn start(&mut self, number: usize) {
        if self.services[number].is_none() {
            let service = Service::start(self.sites[number], &self.told[number]);
            self.services[number] = Some(service);
        }
    }

    fn kill(&mut self, number: usize) {
        if let Some(service) = self.services[number].take() {
            let _ = service.running.kill9();
        }
    }

    async fn status(&self, number: usize) -> Value {
        match &self.services[number] {
            Some(service) => service.status().await.unwrap_or_default(),
            None => Value::Null,
        }
    }

    /// Returns the epoch of the lineage, as far as either cluster reports it.
    async fn epoch(&self) -> i64 {
        let mut epoch = 1;
        for number in 0..2 {
            let status = self.status(number).await;
            for of in ["epoch", "next_epoch"] {
                let told = status["role"][of].as_i64().unwrap_or_default();
                epoch = epoch.max(told - i64::from(of == "next_epoch"));
            }
        }
        epoch
    }

    async fn round(
        &mut self,
        round: usize,
        wish: Wish,
        trouble: Trouble,
        rng: &mut StdRng,
    ) -> Result<String> {
        let (primary, spare) = (self.primary, 1 - self.primary);
        self.wanted = spare;
        self.seen.lock().expect("no panic").longest_both = Duration::ZERO;
        let clusters = [self.cluster(primary), self.cluster(spare)];
        let begin_writing =
            |word: &str| Writers::named(clusters, 1, &format!("r{round}-{word}"), PAUSE);
        let mut writers = begin_writing("a");
        writers.until_written(0, 5).await;
        if let Trouble::SetBack(side) = trouble {
            // Rows that only the lost server had are on no other cluster.
            self.rows.extend(writers.stop().await.into_keys());
            self.until_equal().await?;
            writers = begin_writing("b");
            let side = self.number(side);
            self.set_back(side).await?;
        }
        if wish == Wish::Forced {
            self.kill_datastore(primary);
        }
        let epoch = self.epoch().await;
        let words = match wish {
            Wish::Planned | Wish::CalledOff => PROMOTE.to_string(),
            Wish::Forced => forced(epoch + 1),
            Wish::Nothing => String::new(),
        };
        self.befall(spare, &words, wish, trouble, rng).await?;
        if wish == Wish::CalledOff {
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..1500))).await;
            self.tell(spare, "");
        }
        self.start(spare);
        if wish == Wish::Forced {
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..4000))).await;
        }
        for number in 0..2 {
            self.cluster(number).pg.set_clock(0)?;
            if std::mem::take(&mut self.down[number]) {
                self.cluster(number).pg.start_again().await?;
            }
        }
        let settled = self.settle().await;
        self.rows.extend(writers.stop().await.into_keys());
        settled?;
        self.until_equal().await?;
        let may_be_both =
            wish == Wish::Forced || self.forced || matches!(trouble, Trouble::SetBack(_));
        self.forced = false;
        let lost = self.judge(may_be_both).await?;
        Ok(format!(
            "dc{} is the primary, {} rows, {lost} of them in a record",
            self.primary + 1,
            self.rows.len()
        ))
    }

    fn number(&self, side: Side) -> usize {
        match side {
            Side::Primary => self.primary,
            Side::Spare => 1 - self.primary,
        }
    }

    /// Lets the operator state his wish, and strikes the fault while it is carried out.
    async fn befall(
        &mut self,
        spare: usize,
        words: &str,
        wish: Wish,
        trouble: Trouble,
        rng: &mut StdRng,
    ) -> Result<()> {
        let kind = if wish == Wish::Forced {
            "failover"
        } else {
            "switchover"
        };
        let point = |step: &str| match step.contains('.') {
            true => step.to_string(),
            false => format!("{kind}.{step}"),
        };
        match trouble {
            Trouble::Killed(step) => {
                self.kill(spare);
                self.told[spare] = words.into();
                let doomed = Service::doomed(self.sites[spare], words, &point(step));
                let deadline = Instant::now() + STEP_PATIENCE;
                while alive(doomed.running.pid()) && Instant::now() < deadline {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                // If it did not reach that step, it is killed here.
                let _ = doomed.running.kill9();
            }
            Trouble::Frozen(step) => {
                self.kill(spare);
                self.told[spare] = words.into();
                let (frozen, halt) = Service::halting(self.sites[spare], words, &point(step));
                if halt.is_reached_within(STEP_PATIENCE).await {
                    let beside = frozen.beside(words);
                    let pg = &self.cluster(spare).pg;
                    for session in inventory::lasting_sessions(pg).await.unwrap_or_default() {
                        let _ = inventory::end(pg, &session).await;
                    }
                    let moment = Duration::from_millis(rng.random_range(500..4000));
                    tokio::time::sleep(moment).await;
                    halt.go();
                    tokio::time::sleep(Duration::from_millis(500)).await;
                    beside.running.kill9()?;
                }
                halt.go();
                // The service reaches the point again, and waits for ever in a folder that is being
                // removed.
                self.halts.push(halt);
                self.services[spare] = Some(frozen);
            }
            _ => {
                self.tell(spare, words);
                tokio::time::sleep(Duration::from_millis(rng.random_range(0..900))).await;
            }
        }
        match trouble {
            Trouble::DatastoreKilled(side) => self.kill_datastore(self.number(side)),
            Trouble::ClockStepped(side, by) => self.cluster(self.number(side)).pg.set_clock(by)?,
            Trouble::SessionEnded(side) => {
                let pg = &self.cluster(self.number(side)).pg;
                let sessions = inventory::lasting_sessions(pg).await.unwrap_or_default();
                if let Some(session) = sessions.choose(rng) {
                    let _ = inventory::end(pg, session).await;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn kill_datastore(&mut self, number: usize) {
        if !std::mem::replace(&mut self.down[number], true) {
            self.cluster(number).pg.kill9();
        }
    }

    async fn set_back(&self, number: usize) -> Result<()> {
        let pg = &self.cluster(number).pg;
        pg.stop_fast().await?;
        pg.restore_data().await?;
        pg.start_again().await
    }

    /// Does the operator's work, according to the services' reports and the runbook.
    async fn settle(&mut self) -> Result<()> {
        let began = Instant::now();
        let (mut alone_since, mut none_since) = (Instant::now(), Instant::now());
        let mut answered: BTreeMap<usize, String> = BTreeMap::new();
        let mut before = String::new();
        loop {
            self.start(0);
            self.start(1);
            let writable = [
                is_writable(self.cluster(0)).await,
                is_writable(self.cluster(1)).await,
            ];
            let said = [self.status(0).await, self.status(1).await];
            let brief = |number: usize| {
                let (status, hold) = (&said[number], &said[number]["hold"]["reason"]);
                let step = &status["transition"]["step"];
                let open = if writable[number] {
                    "writable"
                } else {
                    "read-only"
                };
                let told = self.told[number].replace('\n', ", ");
                format!(
                    "dc{} {open}, told [{told}], says {} {hold} {step}",
                    number + 1,
                    status["state"]
                )
            };
            let now = format!("{}; {}", brief(0), brief(1));
            if now != before {
                println!("      {:5.1} s: {now}", began.elapsed().as_secs_f64());
                before = now;
            }
            if writable.iter().any(|writable| *writable) {
                none_since = Instant::now();
            }
            let one = match writable {
                [true, false] => Some(0),
                [false, true] => Some(1),
                _ => None,
            };
            if one.is_none() {
                alone_since = Instant::now();
            }
            if let Some(one) = one
                && !self.told[1 - one].contains("primary")
                && said[1 - one]["state"] == "following"
                && said[1 - one]["hold"].is_null()
                && (said[one]["state"] == "primary" || said[one]["hold"]["reason"] == "role_unset")
            {
                self.primary = one;
                if said[1 - one]["replication"]["mode"] == "stream" {
                    return Ok(());
                }
                // The runbook demands this after every change of roles.
                self.sites[1 - one].warm_spare(&["prepare"]).await.ok();
            }
            if began.elapsed() > SETTLED_LIMIT {
                return Err(format!(
                    "not settled after {SETTLED_LIMIT:?}: writable {writable:?}; dc1 says {:#}; dc2 says {:#}",
                    said[0], said[1]
                )
                .into());
            }
            if let Some(one) = one {
                let done = said[one]["state"] == "primary" && self.told[one].contains("primary");
                let patience = if done && self.wanted == one {
                    PATIENCE / 4
                } else {
                    3 * PATIENCE
                };
                // The wish came true, or the operator gives it up: the other cluster shall be the
                // spare.
                if self.told[1 - one].contains("primary") && alone_since.elapsed() > patience {
                    self.tell(1 - one, "");
                }
                if said[one]["hold"]["reason"] == "conflict" && self.told[one].is_empty() {
                    self.tell(one, PROMOTE);
                }
            }
            if none_since.elapsed() > 2 * PATIENCE {
                let newest = self.newest().await;
                let epoch = self.epoch().await;
                self.wanted = newest;
                self.forced = true;
                self.tell(newest, &forced(epoch + 1));
                none_since = Instant::now();
            }
            for (number, status) in said.iter().enumerate() {
                if let Some(id) = approval_id(status)
                    && answered.insert(number, id.into()).as_deref() != Some(id)
                {
                    let words = format!("{}\n[fuse]\napprove = \"{id}\"", self.told[number]);
                    if let Some(service) = &self.services[number] {
                        service.reconfigure(&words);
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// Returns the cluster that has more of the rows.
    async fn newest(&self) -> usize {
        let mut count = [0, 0];
        for (number, count) in count.iter_mut().enumerate() {
            let sql = "SELECT count(*) FROM accounts";
            if let Ok(client) = self.cluster(number).conn().await
                && let Ok(row) = client.query_one(sql, &[]).await
            {
                *count = row.get::<_, i64>(0);
            }
        }
        usize::from(count[1] >= count[0])
    }

    async fn are_equal(&self) -> Result<bool> {
        let primary = content(self.cluster(self.primary)).await?;
        Ok(primary == content(self.cluster(1 - self.primary)).await?)
    }

    /// Waits until the clusters are equal; no client writes any more.
    async fn until_equal(&self) -> Result<()> {
        let began = Instant::now();
        loop {
            let both = self.are_equal().await;
            match both {
                Ok(true) => return Ok(()),
                _ if began.elapsed() < SETTLED_LIMIT => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                other => {
                    let said = self.status(1 - self.primary).await;
                    return Err(format!(
                        "the spare's rows are not the primary's after {SETTLED_LIMIT:?} ({other:?}); it says {said:#}"
                    )
                    .into());
                }
            }
        }
    }

    /// Returns the number of rows that are not on the primary but in a record of the product.
    async fn judge(&mut self, may_be_both: bool) -> Result<usize> {
        let (both, third) = {
            let seen = self.seen.lock().expect("no panic");
            (seen.longest_both, seen.third_was_writable)
        };
        let limit = if may_be_both {
            FENCED_LIMIT
        } else {
            Duration::ZERO
        };
        if both > limit {
            return Err(format!("SPLIT BRAIN: both were writable for {both:?}").into());
        }
        if third {
            return Err("INVARIANT 6: the third cluster was writable".into());
        }
        let present = names(self.cluster(self.primary), "builder").await?;
        let missing: BTreeSet<String> = self.rows.difference(&present).cloned().collect();
        let mut recorded = BTreeSet::new();
        for number in 0..2 {
            recorded.append(&mut recorded_names(self.cluster(number)).await?);
        }
        let lost: Vec<&String> = missing.difference(&recorded).collect();
        if !lost.is_empty() {
            return Err(format!(
                "LOST: {} acknowledged rows are neither on the primary nor in a divergence or a pinned generation: {:?} …",
                lost.len(),
                &lost[..lost.len().min(5)]
            )
            .into());
        }
        self.rows.retain(|row| !missing.contains(row));
        Ok(missing.len())
    }

    /// Checks, whichever cluster was promoted: the third follows the first cluster if that is the
    /// primary, and otherwise changes nothing.
    async fn third_follows_its_own(&self) -> Result<()> {
        if self.primary != 0 {
            return Ok(());
        }
        let began = Instant::now();
        let primary = content(self.cluster(0)).await?;
        // A copy that is being put in place ends sessions.
        while content(&self.third.spare).await.ok().as_ref() != Some(&primary) {
            let said = self.third_service.status().await?;
            if began.elapsed() > SETTLED_LIMIT {
                return Err(format!("the third is not level; it says {said:#}").into());
            }
            if approval_id(&said).is_some() {
                self.third_service.reconfigure(&approval(&said));
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        Ok(())
    }

    fn log_tail(&self) -> String {
        let mut lines = Vec::new();
        for (number, service) in self.services.iter().enumerate() {
            let Some(service) = service else { continue };
            lines.push(format!("--- the service of dc{}", number + 1));
            let said = service.running.stderr();
            lines.extend(said.iter().rev().take(60).rev().cloned());
        }
        lines.join("\n")
    }
}

/// Asks the clusters, as clients do, which of them accept writes.
async fn sample(clusters: [Cluster; 3], seen: Arc<Mutex<Seen>>) {
    loop {
        let first = is_writable(&clusters[0]).await;
        let second = first && is_writable(&clusters[1]).await;
        // It is asked again: otherwise the first may have become read-only before the second became
        // writable.
        let both = second && is_writable(&clusters[0]).await;
        let third = is_writable(&clusters[2]).await;
        {
            let mut seen = seen.lock().expect("no panic");
            seen.third_was_writable |= third;
            seen.both_since = match both {
                true => Some(seen.both_since.unwrap_or_else(Instant::now)),
                false => None,
            };
            if let Some(since) = seen.both_since {
                // One observation counts.
                let long = since.elapsed().max(Duration::from_millis(1));
                seen.longest_both = seen.longest_both.max(long);
            }
        }
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
}

async fn names(cluster: &Cluster, database: &str) -> Result<BTreeSet<String>> {
    let client = cluster.pg.conn(database).await?;
    let rows = client.query("SELECT name FROM accounts", &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Returns the names in divergences, and in pinned generations.
async fn recorded_names(cluster: &Cluster) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let Ok(state) = cluster.pg.conn("warm_spare").await else {
        return Ok(found);
    };
    let diverged = "SELECT new->>'name' FROM diverged_row WHERE new ? 'name'";
    let rows = state.query(diverged, &[]).await?;
    found.extend(rows.iter().map(|row| row.get::<_, String>(0)));
    let pinned = "SELECT name FROM generation JOIN pg_database ON datname = name WHERE pinned";
    for row in state.query(pinned, &[]).await? {
        found.append(&mut names(cluster, row.get(0)).await?);
    }
    Ok(found)
}
