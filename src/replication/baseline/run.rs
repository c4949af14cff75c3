//! Runs once: the checks, the artifacts, and a baseline if the primary has changed.

use super::checks::{self, Facts};
use super::continuation::Continuation;
use super::copy::{Baseline, Copied};
use super::gate::{SyncContext, record_unavailable};
use super::lock_watchdog::with_lock_watchdog;
use super::{continuation, incoming};
use crate::cluster::preparation::Names;
use crate::cluster::{
    BuilderDb, LocalCluster, Lock, PeerCluster, RecoveryPoint, SpareDb, StateDb, Throttle,
    prove_fence,
};
use crate::config::Config;
use crate::domain::{ErrorCode, EventKind, MissingReason};
use crate::observe::{Clock, Phase, Progress};
use crate::replication::artifact::carrier::Carrier;
use crate::replication::artifact::inventory::{Inventory, InventoryError};
use crate::replication::artifact::presence::{Presence, presence};
use crate::replication::artifact::round::Round;
use crate::replication::baseline::ends::Ends;
use crate::replication::baseline::incoming::Incoming;
use crate::replication::baseline::interrupted::{Held, Recovery, existing_id, may_work};
use crate::replication::baseline::visible::Visible;
use crate::replication::change_probe;
use crate::replication::descent::{Doubt, Here};
use crate::replication::error::ReplicationError;
use crate::replication::fuse::Shrinkage;
use crate::replication::mode::select;
use crate::replication::mode::select::Chosen;
use crate::replication::stream::{self, Follow, Gap};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Number of missing artifacts below which the snapshot is taken; the rest is copied while the
/// snapshot is open.
const FEW_ARTIFACTS: u64 = 50;
/// Maximum number of rounds before the snapshot: a primary whose uploads are faster than our copies
/// is not waited for without end.
const MAX_ROUNDS: usize = 5;

#[derive(Clone, Default)]
pub struct Options {
    /// True: make a new baseline even if nothing has changed.
    pub baseline: bool,
    /// The working lock, if the caller holds and keeps it; otherwise the run takes it for itself.
    pub lock: Option<Lock>,
    /// The throttle, if the caller may change it in the meantime; otherwise the configured limit.
    pub throttle: Option<Throttle>,
    /// Directory for the part of the stream that does not fit into memory; None: among the
    /// temporary files.
    pub spool: Option<Arc<Path>>,
    /// True: the peer is read-only because of us, and this is the last run before its spare is
    /// promoted.
    pub fenced_by_us: bool,
}

#[derive(Debug)]
pub struct Report {
    pub outcome: Outcome,
    /// Artifacts of this run, including the baseline's.
    pub artifacts: Round,
    pub packages: u64,
    /// Keys of artifacts that are unavailable, as recorded now.
    pub unavailable: Vec<(String, MissingReason)>,
    pub undone: usize,
    pub fence_reset: bool,
    pub chosen: Chosen,
}

#[derive(Debug)]
pub enum Outcome {
    Copied(Box<Copied>),
    /// No row was read: the primary has committed nothing since.
    Unchanged(RecoveryPoint),
    /// The stream brought everything that the primary had committed when it was asked.
    Followed(RecoveryPoint),
}

/// Brings the spare to the primary's present state, once.
pub async fn sync(
    config: &Config,
    options: Options,
    progress: &Progress,
) -> Result<Report, ReplicationError> {
    match Box::pin(sync_with_a_primary(config, options, progress)).await {
        Err(error) => Err(change_probe::told_of_standby(config, error).await),
        done => done,
    }
}

async fn sync_with_a_primary(
    config: &Config,
    options: Options,
    progress: &Progress,
) -> Result<Report, ReplicationError> {
    progress.begin(Phase::Checks, 0);
    let recorded = may_work(config).await?;
    let mut held = None;
    if recorded {
        // Leftovers of an interrupted run, and the fence, are repaired by us, whether the primary
        // answers or not.
        held = Some(Held::take(config, options.lock, recorded).await?);
    }
    let ends = Ends::open(config).await?;
    // Before the checks only a name is made of it; its database is created after them.
    let cluster_id = match &held {
        Some(held) => held.state.cluster().await?.id,
        None => existing_id(config).await?.unwrap_or_default(),
    };
    let here = match &held {
        Some(held) => Here::read(config, &held.state).await?,
        None => Here::default(),
    };
    let mut facts = checks::check(config, &ends, &cluster_id, options.fenced_by_us, &here).await?;
    if !recorded && facts.was_primary {
        return Err(ReplicationError::Refused {
            rule: ErrorCode::WasPrimary,
            text: "the peer was promoted over this very cluster: the changes that only this cluster has must be recorded before it is overwritten".into(),
            next_step: "let the service do it: load it here with role = \"spare\"".into(),
        });
    }
    let Held {
        state,
        lock,
        mended,
    } = match held {
        Some(held) => held,
        None => Held::take(config, options.lock, recorded).await?,
    };
    if let Some(id) = &facts.line.approved {
        approve(&state, id, config).await?;
    }
    if cluster_id.is_empty() {
        let id = state.cluster().await?.id;
        facts.chosen = select::decide(config, &id, &ends.local, &ends.peer).await?;
    }
    let configured = || Throttle::new(config.replication.bandwidth_limit);
    let throttle = options.throttle.clone().unwrap_or_else(configured);
    let carrier = Carrier::open(config, &throttle)?;
    // From here on no transaction of ours stays open on the primary longer than its one statement,
    // or its part of the copy.
    drop((ends.local, ends.peer));
    state
        .session()
        .drop_database(&incoming::incoming_name(config))
        .await?;
    let inventory = Inventory::new(state.session()).await?;
    let presence = presence_for(config, &state, &facts).await?;
    let work = SyncContext {
        config,
        state: &state,
        lock,
        carrier: &carrier,
        inventory: &inventory,
        progress,
        presence,
    };
    let pass = Pass {
        work: &work,
        facts: &facts,
        mended,
        spool: options
            .spool
            .clone()
            .unwrap_or_else(|| Arc::from(std::env::temp_dir())),
    };
    let report = Box::pin(pass.run(options, !recorded)).await?;
    state.artifacts_proved().await?;
    Ok(report)
}

/// Finds out for which rows the presence of their artifacts is enough.
async fn presence_for(
    config: &Config,
    state: &StateDb,
    facts: &Facts,
) -> Result<Presence, ReplicationError> {
    let visible = Visible::open(config, facts).await?;
    let has_copy = visible.session_of_ours().is_some() && state.recovery_point().await?.is_some();
    let place = state.artifact_place().await?;
    let is_known = place.is_some_and(|(_, proved)| proved);
    Ok(presence(config.artifacts.mode, has_copy, is_known))
}

/// Records that the next copy may replace the data that an operator has given up.
pub async fn approve(state: &StateDb, id: &str, config: &Config) -> Result<(), ReplicationError> {
    if state.cluster().await?.approved != id {
        state.approve_next_copy(id).await?;
        let text =
            format!("a copy over newer or other rows was let through by fuse.approve = {id:?}");
        state
            .event(EventKind::Approved, &text, &config.change)
            .await?;
    }
    Ok(())
}

struct Pass<'a> {
    work: &'a SyncContext<'a>,
    facts: &'a Facts,
    mended: Recovery,
    spool: Arc<Path>,
}

impl Pass<'_> {
    async fn run(&self, options: Options, first: bool) -> Result<Report, ReplicationError> {
        let (config, inventory) = (self.work.config, self.work.inventory);
        self.leave_no_slot().await;
        let visible = Visible::open(config, self.facts).await?;
        let visible_rows = match &visible.rows {
            Some(session) => inventory.load_visible(session).await?.rows,
            None => 0,
        };
        if first && visible_rows > 0 {
            self.ends_not_exchanged().await?;
        }
        if !options.baseline
            && let Some(point) = self.followed(&visible).await?
        {
            // The stream does not bring these again: artifacts that were lost here, and artifacts
            // that were unavailable.
            inventory.load_present(self.work.carrier.local()).await?;
            if let Some(session) = visible.session_of_ours() {
                inventory.load_visible(session).await?;
            }
            let round = self.mend(&visible).await?;
            return self.report(Outcome::Followed(point), round).await;
        }
        inventory.load_present(self.work.carrier.local()).await?;
        if !options.baseline
            && let Some(point) = self.unchanged(&visible).await?
        {
            let round = self.mend(&visible).await?;
            return self.report(Outcome::Unchanged(point), round).await;
        }
        let continuation = self.goes_on_from(&visible).await?;
        // Before hours of copying it is checked that the spare can have such a database at all.
        let incoming = Incoming::create(self.work, self.facts).await?;
        let known_unavailable = visible.known().await?;
        let mut round = match self.artifacts_first(&known_unavailable).await {
            Ok(round) => round,
            Err(error) => {
                incoming.give_up(self.work).await;
                return Err(error);
            }
        };
        drop(visible);
        let copied = Baseline {
            work: self.work,
            facts: self.facts,
            visible_rows,
            known_unavailable,
            continuation,
            kept: AtomicBool::new(false),
            spool: self.spool.clone(),
        }
        .run(incoming)
        .await?;
        let local = &config.local.datastore;
        prove_fence(self.work.state.session(), local, &local.database).await?;
        round.copied += copied.artifacts.copied;
        round.copied_bytes += copied.artifacts.copied_bytes;
        round.verified += copied.artifacts.verified;
        self.report(Outcome::Copied(Box::new(copied)), round).await
    }

    /// Drops our slot where full copies are made, because it would only hold log.
    async fn leave_no_slot(&self) {
        let Ok(cluster) = self.work.state.cluster().await else {
            return;
        };
        let slot = Names::of_cluster(&cluster.id).slot;
        let (peer, holder) = (
            PeerCluster::of(self.work.config),
            (self.work.state, self.work.lock),
        );
        if self.facts.chosen.stream.is_none()
            && self
                .facts
                .chosen
                .ours
                .iter()
                .any(|ours| ours.contains(&slot) && ours.contains("slot"))
            && let Err(error) = stream::drop_our_slot(&peer, holder, &cluster.id, &slot).await
        {
            log::warn!("{error}; slot {slot} is left");
        }
    }

    /// Loads the rows that the primary has now. Reading holds a lock like any other read, so it
    /// gives way like any other.
    async fn load_wanted(&self) -> Result<(), ReplicationError> {
        let peer = PeerCluster::of(self.work.config);
        with_lock_watchdog(peer.clone(), async {
            let session = peer.builder().await?;
            self.work.inventory.load_wanted_from(&session).await?;
            Ok(())
        })
        .await
    }

    /// Refuses a first baseline over a cluster that has packages that its peer does not have: then
    /// the ends may be exchanged.
    async fn ends_not_exchanged(&self) -> Result<(), ReplicationError> {
        self.load_wanted().await?;
        let missing = self.work.inventory.vanishing().await?;
        let Some(first) = missing.first() else {
            return Ok(());
        };
        let exchanged = Doubt {
            rule: ErrorCode::EndsExchanged,
            text: format!(
                "the local database holds {} packages that the peer does not have (for example {first}); this would be the first copy over it",
                missing.len(),
            ),
            case: format!("{} {} {}", self.facts.system_id, missing.len(), first),
        };
        let id = exchanged.ask(self.work.config)?;
        approve(self.work.state, &id, self.work.config).await
    }

    /// Checks, before anything of the primary is written, that nothing there contradicts a common
    /// history.
    async fn goes_on_from(&self, visible: &Visible) -> Result<Continuation, ReplicationError> {
        let (work, config) = (self.work, self.work.config);
        let (Some(session), Some(copied)) = (
            visible.session_of_ours(),
            work.state.recovery_point().await?,
        ) else {
            return Ok(Continuation::default());
        };
        let point = LocalCluster::of(config).point(copied).await?;
        let found = SpareDb::of(session).lsn().await?;
        // The database of a returning old primary, or one that an operator has given up, is pinned.
        let given_up =
            self.facts.line.approved.is_some() || work.state.cluster().await?.coming_back;
        let of_this_server = point.system_id == self.facts.system_id;
        if given_up || !of_this_server || !point.is_of(found.as_ref()) {
            return Ok(Continuation::default());
        }
        match continuation::look(config, session, &point).await? {
            Ok(continuation) => Ok(continuation),
            Err(doubt) => {
                approve(work.state, &doubt.ask(config)?, config).await?;
                Ok(Continuation::default())
            }
        }
    }

    /// Follows the stream. Some: the stream continued from the spare's position, and went up to the
    /// primary's present one.
    async fn followed(&self, visible: &Visible) -> Result<Option<RecoveryPoint>, ReplicationError> {
        let (work, config) = (self.work, self.work.config);
        let recorded = work.state.recovery_point().await?;
        let (Some(names), Some(recorded), Some(_)) = (
            self.facts.chosen.stream.clone(),
            recorded.filter(|point| point.is_followed()),
            visible.session_of_ours(),
        ) else {
            return Ok(None);
        };
        let clock = Clock::real();
        let seen = stream::query(&PeerCluster::of(config), &names, &clock).await?;
        let follow = Follow {
            until: Some(seen.wal),
            ..Follow::new(work.to_follow(&self.spool), names, recorded)
        };
        match stream::follow(&follow).await {
            Ok(end) => Ok(Some(RecoveryPoint {
                lsn: end.point.lsn.to_string(),
                commit_time: end.point.commit_time,
                ..follow.recorded
            })),
            Err(gap) => match gap.failure() {
                Ok(error) => Err(error),
                Err(gap) => {
                    if let Gap::WentBack(doubt) = &gap {
                        approve(work.state, &doubt.ask(config)?, config).await?;
                    }
                    log::warn!("{gap}; a new baseline is made");
                    Ok(None)
                }
            },
        }
    }

    /// Returns the point if nothing has changed: the primary has committed nothing since the
    /// recovery point, and the visible database is the recorded one.
    async fn unchanged(
        &self,
        visible: &Visible,
    ) -> Result<Option<RecoveryPoint>, ReplicationError> {
        let (Some(point), Some(session)) = (
            self.work.state.recovery_point().await?,
            visible.session_of_ours(),
        ) else {
            return Ok(None);
        };
        // Its stream has just reported that it cannot continue: only a copy makes one that can.
        if point.is_followed() {
            return Ok(None);
        }
        if SpareDb::of(session).lsn().await?.as_ref() != Some(&point.lsn) {
            return Ok(None);
        }
        let peer = PeerCluster::of(self.work.config).builder().await?;
        let changed = change_probe::probe_at(&peer, Some(&point), &Clock::real())
            .await?
            .changed;
        Ok(changed.is_none().then_some(point))
    }

    /// Repairs artifacts where nothing is new: artifacts that vanished here, and artifacts that
    /// were unavailable.
    async fn mend(&self, visible: &Visible) -> Result<Round, ReplicationError> {
        let Some(session) = visible.session_of_ours() else {
            return Ok(Round::default());
        };
        self.work.inventory.load_wanted_from(session).await?;
        let known = visible.known().await?;
        let gated = self.work.gate(&known, Phase::Artifacts).await?;
        let change = Shrinkage {
            artifacts: gated.newly,
            artifacts_before: self.work.inventory.wanted().await?,
            ..Shrinkage::default()
        };
        self.work.judge(change, session).await?;
        let round = gated.round;
        let still: Vec<&str> = round
            .unavailable()
            .map(|(item, _)| item.key.as_str())
            .collect();
        SpareDb::of(session)
            .keep_unavailable(&still, MissingReason::Unsound)
            .await?;
        record_unavailable(session, &round).await?;
        Ok(round)
    }

    /// Copies artifacts before the snapshot, until few are missing: a first copy of terabytes must
    /// not hold a snapshot for days.
    async fn artifacts_first(
        &self,
        known: &HashSet<(String, String)>,
    ) -> Result<Round, ReplicationError> {
        let (work, mut all) = (self.work, Round::default());
        for number in 0..MAX_ROUNDS {
            self.load_wanted().await?;
            let settled: Vec<String> = all
                .unavailable()
                .map(|(item, _)| item.key.clone())
                .chain(all.staged.iter().map(|swap| swap.key.clone()))
                .collect();
            let todo = work.plan(&settled, known).await?;
            if number > 0 && todo <= FEW_ARTIFACTS {
                break;
            }
            let step = work.progress.begin(Phase::Artifacts, todo);
            let round = work.round(&step, &settled).await?;
            work.believe_refusals(&round).await?;
            if number == 0 && !round.missing.is_empty() {
                work.confirm_bucket(&round).await?;
            }
            all.absorb(round);
        }
        Ok(all)
    }

    async fn report(&self, outcome: Outcome, artifacts: Round) -> Result<Report, ReplicationError> {
        let session = LocalCluster::of(self.work.config).builder().await?;
        Ok(Report {
            outcome,
            artifacts,
            packages: BuilderDb::of(&session).count_packages().await?,
            unavailable: SpareDb::of(&session).unavailable_reasons().await?,
            undone: self.mended.undone,
            fence_reset: self.mended.fence_reset,
            chosen: self.facts.chosen.clone(),
        })
    }
}

impl From<InventoryError> for ReplicationError {
    fn from(error: InventoryError) -> Self {
        match error {
            InventoryError::Datastore(e) => e.into(),
            InventoryError::Store(e) => e.into(),
        }
    }
}
