//! Strikes faults, one after the other, on a pair of clusters that is at work; after every fault
//! the oracle checks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::process::Signal;
use serde_json::Value;

use super::faults::{Fault, Server};
use super::history::History;
use super::inventory::Inventory;
use super::oracle::{self, Oracle};
use super::stage::{Lines, Stage};
use super::weather::Weather;
use super::workload::{self, Workload};
use super::{Factory, Postgres, Result, Service, Site, slots};

const HANDS: usize = 3;
/// Maximum pause between two transactions of one hand.
const PAUSE: Duration = Duration::from_millis(250);
/// Number of faults after which the spare must come level.
const LEVEL_EVERY: usize = 10;
/// Maximum time to come level after faults, including the service's own pauses after failures.
const LEVEL_LIMIT: Duration = Duration::from_secs(300);
/// Maximum time to strike a fault.
const STRIKE_LIMIT: Duration = Duration::from_secs(300);
/// Maximum time until the things that an ended or abandoned session of ours held on the primary are
/// released.
const HELD_LIMIT: Duration = Duration::from_secs(20);
/// Time before half of the faults in which the service can get back to work.
const MOVES_ON: Duration = Duration::from_secs(6);
/// Time after a fault is undone in which the service can report something new.
const NEWS: Duration = Duration::from_millis(1500);

#[derive(Debug, Clone)]
pub struct Plan {
    /// `snapshot` or `auto`.
    pub mode: String,
    pub seed: u64,
    pub faults: usize,
    /// No further fault is struck after this time.
    pub time: Duration,
    /// Named points of the program at which it is killed.
    pub points: Vec<&'static str>,
    /// If not empty, only faults of this kind (whose name begins with this).
    pub only: String,
    /// True: print a line for each fault.
    pub talks: bool,
}

impl Plan {
    pub fn new(mode: &str, seed: u64) -> Self {
        let mut points = warm_spare::killpoint::REPLICATION.to_vec();
        // One trial kills at about five of them: the next seed continues where this one ends.
        let first = (seed as usize).wrapping_mul(5) % points.len();
        points.rotate_left(first);
        Self {
            mode: mode.into(),
            seed,
            faults: usize::MAX,
            time: Duration::MAX,
            points: match mode {
                // Its copies have phases; the other points are in the stream.
                "snapshot" => Vec::new(),
                _ => points,
            },
            only: String::new(),
            talks: true,
        }
    }
}

/// The observations of one trial, or of several.
#[derive(Debug, Default)]
pub struct Summary {
    pub faults: usize,
    pub skipped: usize,
    pub kinds: BTreeMap<String, usize>,
    pub looks: usize,
    /// Number of the primary's states, and of its transactions that a fault struck.
    pub states: usize,
    pub troubles: u64,
    pub worst_level: Duration,
    pub deeds: BTreeMap<String, u64>,
}

impl Summary {
    pub fn add(&mut self, other: Summary) {
        self.faults += other.faults;
        self.skipped += other.skipped;
        self.looks += other.looks;
        self.states += other.states;
        self.troubles += other.troubles;
        self.worst_level = self.worst_level.max(other.worst_level);
        for (kind, count) in other.kinds {
            *self.kinds.entry(kind).or_default() += count;
        }
        for (deed, count) in other.deeds {
            *self.deeds.entry(deed).or_default() += count;
        }
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        writeln!(
            f,
            "{} faults ({} found nothing to befall), {} looks at the spare, {} states of the primary, {} transactions struck by a fault, level again after at most {:.1?}",
            self.faults, self.skipped, self.looks, self.states, self.troubles, self.worst_level
        )?;
        for (kind, count) in &self.kinds {
            writeln!(f, "  {count:5} {kind}")?;
        }
        let deeds: Vec<String> = self
            .deeds
            .iter()
            .map(|(deed, count)| format!("{deed} {count}"))
            .collect();
        writeln!(f, "  done on the primary: {}", deeds.join(", "))
    }
}

/// The servers of a trial.
pub async fn site(name: &str) -> Result<Site> {
    let primary = Postgres::builder()
        .logical()
        .own_clock()
        .setting("max_prepared_transactions", "5")
        .setting("min_wal_size", "32MB");
    let spare = Postgres::builder()
        .own_clock()
        .setting("min_wal_size", "32MB");
    let builder = Site::builder(name).primary(primary).spare(spare);
    builder.own_stores().start().await
}

/// Runs one pair of clusters with one seed and many faults. An error says which rule was violated,
/// and how to repeat it.
pub async fn trial(plan: &Plan) -> Result<Summary> {
    let site = site("trial").await?;
    let other = site.other_spare("trial-other").await?;
    let mut seen = Vec::new();
    let mut tail = Vec::new();
    let outcome = run(&site, &other, plan, &mut seen, &mut tail).await;
    outcome.map_err(|error| {
        format!(
            "{error}\n--- mode {}, seed {}; its faults:\n{}\n--- the service's log\n{}",
            plan.mode,
            plan.seed,
            seen.join("\n"),
            tail.join("\n")
        )
        .into()
    })
}

/// The oracles of the spare that faults strike, and of the other one.
struct Judges {
    struck: Oracle,
    other: Oracle,
}

async fn set_stage<'a>(
    site: &'a Site,
    other: &'a Site,
    plan: &Plan,
) -> Result<(Stage<'a>, Judges)> {
    workload::prepare(site, plan.seed, HANDS).await?;
    Factory::new(plan.seed).fill(&site.primary, 12).await?;
    let lines = Lines::start(site).await?;
    let other_extra = format!(
        "peer.datastore.port = {}\npeer.s3.endpoint = \"http://127.0.0.1:{}\"\n\
         [replication]\nmode = \"{}\"\nretry_missing = \"3s\"\nartifact_retention = \"4s\"\n[fuse]\nmax_percent = 100\n",
        lines.datastore.port(),
        lines.store.port(),
        plan.mode
    );
    let own_store = lines.own_store.port();
    let extra = format!("local.s3.endpoint = \"http://127.0.0.1:{own_store}\"\n{other_extra}");
    let history = History::start(&site.primary).await?;
    let weather = Arc::new(Weather::default());
    if plan.mode != "snapshot" {
        site.write_config(&extra);
        site.warm_spare(&["prepare"]).await.ok();
    }
    let service = Service::start(site, &extra);
    service.until_level().await;
    let slot = match plan.mode.as_str() {
        "snapshot" => "none".into(),
        _ => slots::name(&site.primary).await?,
    };
    if plan.mode != "snapshot" {
        other.write_config(&other_extra);
        other.warm_spare(&["prepare"]).await.ok();
    }
    let beside = Service::start(other, &other_extra);
    beside.until_level().await;
    let workload = Workload::start(site, plan.seed, HANDS, PAUSE, &history, &weather);
    let oracle = || Oracle::new(&history, &weather, plan.mode != "snapshot");
    let judges = Judges {
        struck: oracle(),
        other: oracle(),
    };
    let stage = Stage::new(
        service,
        history,
        weather,
        workload,
        lines,
        (extra, other_extra),
        (slot, beside),
    );
    Ok((stage, judges))
}

async fn run(
    site: &Site,
    other: &Site,
    plan: &Plan,
    seen: &mut Vec<String>,
    tail: &mut Vec<String>,
) -> Result<Summary> {
    let (mut stage, mut judges) = set_stage(site, other, plan).await?;
    let mut summary = Summary::default();
    let played = play(plan, &mut stage, &mut judges, &mut summary, seen).await;
    *tail = stage.log_tail(60);
    played?;
    summary.states = stage.history.states().await;
    summary.troubles = stage.workload.troubles();
    for (deed, count) in stage.workload.done() {
        summary.deeds.insert(format!("{deed:?}"), count);
    }
    Ok(summary)
}

async fn play(
    plan: &Plan,
    stage: &mut Stage<'_>,
    judges: &mut Judges,
    summary: &mut Summary,
    seen: &mut Vec<String>,
) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(plan.seed);
    let mut points = plan.points.iter().cycle();
    let began = Instant::now();
    while summary.faults < plan.faults && began.elapsed() < plan.time {
        let mut fault = Fault::random(&mut rng, &plan.points);
        if matches!(fault, Fault::ServiceKilledAt(..))
            && let Some(point) = points.next()
        {
            // They are used in turn, so that each is used.
            fault = Fault::killed_at(point, &mut rng);
        }
        if !fault.kind().starts_with(&plan.only) {
            continue;
        }
        // Each fault has its own random numbers, so that the next one does not depend on how far
        // this one came.
        let mut own = StdRng::from_rng(&mut rng);
        if own.random_bool(0.5) {
            // Without this, most faults would strike a service that is still busy with the one
            // before.
            stage.moves_on(MOVES_ON).await;
        }
        let started = Instant::now();
        let before = status(stage).await;
        // Uploads for the fault take their time on a busy machine.
        let striking = tokio::time::timeout(STRIKE_LIMIT, stage.strike(fault, &mut own)).await;
        let striking =
            striking.unwrap_or_else(|_| Err(format!("not done after {STRIKE_LIMIT:?}").into()));
        let befell = striking.map_err(|error| format!("{fault:?} could not be struck: {error}"))?;
        if !befell {
            summary.skipped += 1;
            continue;
        }
        summary.faults += 1;
        let missed = matches!(fault, Fault::ServiceKilledAt(..)) && !stage.reached;
        let kind = fault.kind() + if missed { " not reached" } else { "" };
        *summary.kinds.entry(kind).or_default() += 1;
        if fault == Fault::RolledBack(Server::SpareDatastore) {
            judges.struck.spare_was_put_back(stage.site).await?;
        }
        let line = format!("{:4} seed {} {fault:?}", summary.faults, plan.seed);
        seen.push(line.clone());
        stage.last(fault, &mut own).await;
        let within = in_time(look(stage, &mut judges.struck, summary)).await?;
        let undoing = in_time(stage.undo(fault)).await;
        undoing.map_err(|error| format!("{fault:?} could not be undone: {error}"))?;
        news(stage, before).await;
        stage.answer_hold().await;
        let after = in_time(look(stage, &mut judges.struck, summary)).await?;
        let missed = if missed { " not reached" } else { "" };
        let mut told = format!(
            "{line}{missed}: {within}, then {after}, {:.1?}",
            started.elapsed()
        );
        if summary.faults.is_multiple_of(LEVEL_EVERY) {
            let took = come_level(stage, judges, summary).await?;
            stage.stepped = false;
            told.push_str(&format!(", level after {took:.1?}"));
        }
        if plan.talks {
            println!("{told}");
        }
        *seen.last_mut().expect("a fault") = told;
    }
    come_level(stage, judges, summary).await?;
    in_the_end(stage, judges).await
}

/// Fails if something takes longer than it may on any machine, however busy.
async fn in_time<T>(doing: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(LEVEL_LIMIT, doing).await {
        Ok(done) => done,
        Err(_) => Err(format!("not done after {LEVEL_LIMIT:?}").into()),
    }
}

/// Checks once everything that must hold at any moment.
async fn look(stage: &Stage<'_>, oracle: &mut Oracle, summary: &mut Summary) -> Result<String> {
    summary.looks += 1;
    if !stage.service_lives() {
        return Err("the service ended by itself".into());
    }
    if let Some(harm) = stage.workload.harm().first() {
        return Err(format!("INVARIANT 4: {harm}").into());
    }
    if let Some(service) = stage.awake() {
        for path in ["/health", "/status"] {
            let answer = service.get(path).await;
            answer.map_err(|error| format!("INVARIANT 5: {path} has no answer: {error}"))?;
        }
    }
    let stand = oracle.check(stage.site).await?;
    oracle::is_fenced(stage.site, &stage.weather).await?;
    Ok(match stand {
        None => "not seen".into(),
        Some(stand) => format!(
            "state {} ({} behind, {:.1?}{}{})",
            stand.moment,
            stand.behind,
            stand.late,
            if stand.schema_behind { ", schema" } else { "" },
            if stand.artifacts_seen {
                ""
            } else {
                ", artifacts not seen"
            }
        ),
    })
}

async fn status(stage: &Stage<'_>) -> Option<Value> {
    stage.awake()?.status().await.ok()
}

/// Waits until the service reports something new, or for a short time.
async fn news(stage: &Stage<'_>, before: Option<Value>) {
    let deadline = Instant::now() + NEWS;
    let of = |status: &Value| (status["recovery_point"].clone(), status["state"].clone());
    let before = before.as_ref().map(of);
    while Instant::now() < deadline {
        if let Some(now) = status(stage).await
            && before.as_ref() != Some(&of(&now))
            && !now["recovery_point"].is_null()
        {
            return;
        }
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
}

/// Waits, with the workload at rest, until both spares are at the primary's position, and their
/// services report it.
async fn come_level(
    stage: &Stage<'_>,
    judges: &mut Judges,
    summary: &mut Summary,
) -> Result<Duration> {
    stage.workload.rest().await;
    stage.history.settle().await?;
    let (began, rested) = (Instant::now(), chrono::Utc::now());
    let struck = stage.awake().ok_or("its service does not run")?;
    let other = stage.other.as_ref().ok_or("its service does not run")?;
    let pairs = [(struck, &mut judges.struck), (other, &mut judges.other)];
    for (service, oracle) in pairs {
        loop {
            summary.looks += 1;
            let Some(behind) = is_behind(stage, service, oracle, rested).await? else {
                break;
            };
            if began.elapsed() > LEVEL_LIMIT {
                let said = service.status().await.unwrap_or_default();
                return Err(format!(
                    "{} not level after {LEVEL_LIMIT:?}: {behind}; it says {said:#}",
                    service.site.spare.bucket
                )
                .into());
            }
            stage.answer_hold().await;
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
    }
    let took = began.elapsed();
    summary.worst_level = summary.worst_level.max(took);
    nothing_is_held(stage).await?;
    stage.workload.resume();
    Ok(took)
}

/// Returns the reason why this spare does not count as level yet.
async fn is_behind(
    stage: &Stage<'_>,
    service: &Service<'_>,
    oracle: &mut Oracle,
    rested: chrono::DateTime<chrono::Utc>,
) -> Result<Option<String>> {
    let said = service.status().await.ok();
    let claims = said.is_some_and(|status| claims_level(&status, rested));
    match oracle.is_level(service.site).await {
        // Its confirmations use a clock that was stepped.
        Err(error) if claims && !stage.stepped => {
            Err(format!("INVARIANT 5: it says that nothing waits: {error}").into())
        }
        Err(error) if error.to_string().contains("INVARIANT") => Err(error),
        Err(error) => Ok(Some(error.to_string())),
        Ok(()) => Ok(match service.status().await {
            Ok(status) if status["state"] == "following" && status["hold"].is_null() => None,
            Ok(status) => Some(format!("it says {status}")),
            Err(_) => Some("it says nothing".into()),
        }),
    }
}

/// Checks that a primary that is followed, and at rest, has nothing of ours but the reader of our
/// slot.
async fn nothing_is_held(stage: &Stage<'_>) -> Result<()> {
    let primary = &stage.site.primary.pg;
    let began = Instant::now();
    loop {
        let held = Inventory::of(primary).await?;
        if held.holds_nothing_of(2) {
            return Ok(());
        }
        if began.elapsed() > HELD_LIMIT {
            return Err(format!("INVARIANT 4: ours on a primary at rest: {held:?}").into());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Returns whether the service reports that nothing waits, as of a time after the last change.
fn claims_level(status: &Value, since: chrono::DateTime<chrono::Utc>) -> bool {
    let confirmed = status["lag"]["confirmed"].as_str();
    let confirmed = confirmed.and_then(|time| chrono::DateTime::parse_from_rfc3339(time).ok());
    status["state"] == "following"
        && status["hold"].is_null()
        && status["lag"]["seconds"].is_number()
        && confirmed.is_some_and(|time| time > since)
}

/// Checks the end state, when no fault is active and nothing changes any more.
async fn in_the_end(stage: &mut Stage<'_>, judges: &mut Judges) -> Result<()> {
    stage.workload.stop().await;
    stage.history.settle().await?;
    ends_well(stage, stage.site, &mut judges.struck).await?;
    ends_well(stage, stage.other_site, &mut judges.other).await?;
    if let Some(harm) = stage.workload.harm().first() {
        return Err(format!("INVARIANT 4: {harm}").into());
    }
    let struck = stage.service.take().expect("it was started");
    for service in [struck, stage.take_other()] {
        for path in ["/health", "/status", "/metrics"] {
            let answer = service.get(path).await;
            answer.map_err(|error| format!("{path}: {error}"))?;
        }
        service.running.signal(Signal::TERM);
        let site = service.site;
        service.running.wait(Duration::from_secs(30)).await?;
        let verified = site.warm_spare(&["verify", "--deep"]).await;
        if verified.code != Some(0) {
            return Err(format!("in the end verify --deep: {verified}").into());
        }
    }
    Ok(())
}

/// Checks that the spare is level, and lists exactly the primary's unavailable artifacts.
async fn ends_well(stage: &Stage<'_>, site: &Site, oracle: &mut Oracle) -> Result<()> {
    let began = Instant::now();
    loop {
        let told = match oracle.is_level(site).await {
            Ok(()) => {
                let lacking = oracle::really_lacking(&site.primary).await?;
                let view = oracle::view(&site.spare).await?.ok_or("no database")?;
                // Artifacts that the primary has lost since then may still be here: then the oracle
                // has seen it.
                if view.unavailable.is_subset(&lacking) {
                    return Ok(());
                }
                let listed = view.unavailable;
                format!("listed as unavailable: {listed:?}; the primary really lacks {lacking:?}")
            }
            Err(error) if error.to_string().contains("INVARIANT") => return Err(error),
            Err(error) => error.to_string(),
        };
        if began.elapsed() > LEVEL_LIMIT {
            return Err(format!("in the end: {told}").into());
        }
        stage.answer_hold().await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
