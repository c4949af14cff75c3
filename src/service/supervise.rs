//! Takes the working lock, works as long as a leadership lasts, and starts again after it.

use super::failure_tracker::FailureTracker;
use super::guard;
use super::leadership::{End, Leadership};
use super::lease_keeper::keep_lease;
use super::load_state::recall;
use super::primary::Primary;
use super::spare_worker::SpareWorker;
use super::standby::Waiting;
use super::{Configs, StatusWriter, next, pair, sight, witness};
use crate::cluster::LocalCluster;
use crate::config::{Config, WantedRole};
use crate::domain::{HoldReason, Role, Side};
use crate::observe::{
    HandoverFacts, LeaseFacts, PairFacts, PeerRecord, ServiceState, SideStatus, Unproven, Work,
};
use crate::replication::ReplicationError;
use crate::role::wants_promotion;
use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Interval between two tries to take the lock, and between two looks at a role that was never set.
const STANDBY_INTERVAL: Duration = Duration::from_secs(3);
/// Interval between two looks at the epoch that the bucket has on record.
const WITNESS_INTERVAL: Duration = Duration::from_secs(60);

enum Begun {
    Working(Box<Leadership>, Kind),
    /// Nothing may be done now. The state shows the reason.
    Idle,
}

/// The kind of work on a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The cluster is a spare, or becomes one by its first copy.
    Spare,
    /// The cluster is a primary, or was one.
    Primary,
}

/// Works with the configuration in force. Starts again when the configuration names another role or
/// other servers.
pub(super) async fn work(
    writer: &StatusWriter,
    mut configs: Configs,
    data: &Arc<Path>,
) -> Infallible {
    loop {
        let config = configs.borrow_and_update().clone();
        let Some(config) = config else {
            next(&mut configs).await;
            continue;
        };
        let mut changes = configs.clone();
        tokio::select! {
            never = tenures(writer, configs.clone(), config.clone(), data) => match never {},
            () = other_ends(writer, &mut changes, &config) => {}
        }
        writer.update(|state| {
            forget_work(state);
            // Another peer was not asked yet.
            state.cluster.peer_asked = false;
            state.work = Work::Starting;
            state.local = SideStatus::default();
        });
        // A hold may be over with other servers. If it is not, it will be shown again.
        writer.release(|hold| hold.reason != HoldReason::Config);
        log::info!("configuration: the role or the servers have changed; starting again with them");
    }
}

/// Forgets facts that only the holder of the lock sees.
fn forget_work(state: &mut ServiceState) {
    state.lock.active = false;
    state.spare.baseline = None;
    state.checks.verifying = false;
    state.spare.waiting = None;
    state.local.fenced = None;
    state.local.s3 = None;
    state.peer = SideStatus::default();
    state.handover = HandoverFacts::default();
    state.peer_record = PeerRecord {
        answered: state.peer_record.answered,
        ..PeerRecord::default()
    };
    state.spare.sampled = None;
    state.lease = LeaseFacts::default();
    state.pair = PairFacts::default();
}

/// Forgets facts about a primary that only a spare needs.
fn forget_following(state: &mut ServiceState) {
    state.spare.mode = None;
    state.spare.gate_waiting = None;
    state.on_primary.held = None;
    state.on_primary.ours = None;
    state.on_primary.orphans = None;
    state.spare.artifacts = None;
    state.spare.unreadable = None;
    state.spare.unstorable = None;
    state.spare.not_replicated = None;
    state.spare.unproven = Unproven::default();
    state.checks.preflight = None;
}

/// Waits for a configuration that changes the connections or the kind of the leadership.
async fn other_ends(writer: &StatusWriter, configs: &mut Configs, config: &Config) {
    loop {
        next(configs).await;
        let recorded = writer.read(|state| state.cluster.role);
        let same = configs.borrow_and_update().as_ref().is_some_and(|new| {
            // A recorded role stays until the cluster has another one; the process at work makes
            // that change.
            (recorded.is_some() || new.role == config.role)
                && new.local == config.local
                && new.peer == config.peer
                && new.replication.direction == config.replication.direction
                && new.artifacts.mode == config.artifacts.mode
                && new.artifacts.own_prefix == config.artifacts.own_prefix
                && new.artifacts.attach_at_takeover == config.artifacts.attach_at_takeover
                && new.artifacts.lease.store == config.artifacts.lease.store
        });
        if !same {
            return;
        }
    }
}

async fn tenures(
    writer: &StatusWriter,
    configs: Configs,
    config: Arc<Config>,
    data: &Arc<Path>,
) -> Infallible {
    let mut failures = FailureTracker::new("local: works");
    let mut was_primary = false;
    let mut waiting = Waiting::default();
    loop {
        // A recorded role outlasts changes of the configuration that do not end this loop.
        let config = configs.borrow().clone().unwrap_or_else(|| config.clone());
        let error = match begin(writer, &config, data, was_primary, &mut waiting).await {
            Ok(Begun::Idle) => {
                failures.over(writer.now());
                let mut changes = configs.clone();
                changes.mark_unchanged();
                tokio::select! {
                    () = tokio::time::sleep(STANDBY_INTERVAL) => {}
                    () = next(&mut changes) => {}
                }
                continue;
            }
            Ok(Begun::Working(leadership, kind)) => {
                failures.over(writer.now());
                let end = Box::pin(serve(writer, &leadership, &configs, kind)).await;
                let held = writer.read(|state| state.hold.clone());
                writer.update(forget_work);
                was_primary = matches!(end, End::WasPrimary);
                match end {
                    End::WasPrimary => {
                        log::info!("local: the peer was promoted over this cluster; it comes back");
                        continue;
                    }
                    End::RoleChanged => {
                        log::info!("local: the role on record was changed");
                        continue;
                    }
                    End::Yielded => {
                        waiting.left_the_lock(held);
                        log::info!(
                            "local: a warm-spare at the primary's site waits for the working lock; this one leaves it to that one, and stands by"
                        );
                        continue;
                    }
                    End::Failed(error) => {
                        // In the meantime the peer may have been promoted.
                        writer.update(|state| state.cluster.peer_asked = false);
                        error
                    }
                }
            }
            Err(error) => {
                waiting.leave_the_queue();
                error
            }
        };
        let pace = writer.hold_for(&error);
        let wait = failures.failed(writer.now(), error.code(), &error.to_string(), pace);
        let mut changes = configs.clone();
        changes.mark_unchanged();
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = next(&mut changes) => failures.begin_anew(),
        }
    }
}

/// Keeps the epoch on record in the data directory and in the local bucket. A bucket that does not
/// answer is tried again.
async fn keep_witness(writer: &StatusWriter, leadership: &Leadership) -> Infallible {
    let mut warned = false;
    loop {
        let show = |epoch| writer.update(|state| witness::remember(state, epoch));
        if let Err(error) =
            witness::bring_up_to_date(show, &leadership.state, &leadership.data).await
        {
            log::debug!("{error}");
        }
        match witness::bring_up_to_date_in_bucket(&leadership.config, &leadership.state).await {
            Ok(epoch) => writer.update(|state| witness::remember(state, epoch)),
            Err(error) if warned => log::debug!("{error}"),
            Err(error) => {
                warned = true;
                log::warn!("{error}; the epoch is not recorded in the bucket");
            }
        }
        let known = writer.read(|state| state.cluster.epoch);
        let other = writer.wait_for(|state| state.cluster.epoch != known);
        // A new epoch is recorded at once.
        let _ = tokio::time::timeout(WITNESS_INTERVAL, other).await;
    }
}

async fn serve(
    writer: &StatusWriter,
    leadership: &Leadership,
    configs: &Configs,
    kind: Kind,
) -> End {
    sight::look_again(writer, &leadership.config).await;
    writer.update(|state| {
        state.lock.active = true;
        state.work = match kind {
            Kind::Spare => Work::Following,
            // The look decides.
            Kind::Primary => Work::Starting,
        };
        if kind == Kind::Primary {
            forget_following(state);
        }
    });
    writer.see_datastore(Side::Local, None);
    writer.release(|hold| hold.passing || hold.reason == HoldReason::RoleUnset);
    match kind {
        Kind::Primary => tokio::select! {
            never = keep_lease(writer, leadership, configs.clone()) => match never {},
            end = Primary::new(writer, leadership, configs.clone()).perform() => end,
            never = keep_witness(writer, leadership) => match never {},
            never = pair::keep_telling(writer, leadership, configs.clone()) => match never {},
            end = pair::until_the_pusher_comes(writer, leadership, configs.clone()) => end,
        },
        Kind::Spare => tokio::select! {
            never = keep_lease(writer, leadership, configs.clone()) => match never {},
            end = guard::keep(writer, leadership) => end,
            never = keep_witness(writer, leadership) => match never {},
            never = pair::keep_telling(writer, leadership, configs.clone()) => match never {},
            end = pair::until_the_pusher_comes(writer, leadership, configs.clone()) => end,
            end = SpareWorker::new(writer, leadership, configs.clone()).perform() => end,
        },
    }
}

/// Returns the kind of work, from the wanted role and the role on record. None: no role was ever
/// set for this cluster, so there is no work.
fn kind(wanted: WantedRole, recorded: Option<Role>, once_primary: bool) -> Option<Kind> {
    match (wanted, recorded) {
        (_, Some(Role::Spare)) => Some(Kind::Spare),
        (_, Some(_)) | (WantedRole::Primary, None) => Some(Kind::Primary),
        (_, None) if once_primary => Some(Kind::Primary),
        (WantedRole::Spare, None) => Some(Kind::Spare),
        (WantedRole::Keep, None) => None,
    }
}

/// Reads the record of the cluster, and takes the lock if there is work.
async fn begin(
    writer: &StatusWriter,
    config: &Arc<Config>,
    data: &Arc<Path>,
    was_primary: bool,
    waiting: &mut Waiting,
) -> Result<Begun, ReplicationError> {
    let found = LocalCluster::of(config).existing_state().await?;
    let (role, fenced) = match &found {
        Some(state) => {
            recall(writer, config, state).await?;
            let role = writer.read(|state| state.cluster.role);
            (role, state.fence_record().await?.is_some())
        }
        None => (None, false),
    };
    writer.see_datastore(Side::Local, None);
    let Some(kind) = kind(config.role, role, fenced || was_primary) else {
        if let Some(state) = &found
            && waiting.accompany(writer, config, state).await?
        {
            return Ok(Begun::Idle);
        }
        writer.hold(
            HoldReason::RoleUnset,
            "the role of this cluster was never set, so nothing is done",
            "set role = \"spare\" on the cluster that is to be the copy",
            false,
        );
        return Ok(Begun::Idle);
    };
    let state = match found {
        Some(state) => state,
        None => LocalCluster::of(config).state().await?,
    };
    let Some((state, lock)) = waiting.take(writer, config, state).await? else {
        return Ok(Begun::Idle);
    };
    writer.update(|state| {
        state.lock.holder = None;
        state.lock.holder_is_silent = false;
    });
    if writer.read(|state| state.work == Work::Standby) {
        log::info!("local: the working lock is free now; this warm-spare works");
    }
    recall(writer, config, &state).await?;
    let show = |epoch| writer.update(|state| witness::remember(state, epoch));
    witness::bring_up_to_date(show, &state, data).await?;
    if wants_promotion(config) && writer.read(|state| state.cluster.witnessed_epoch.is_none()) {
        // The directory may have been restored together with the database. So the bucket is asked
        // too, before an old consent counts as a new one.
        match witness::bring_up_to_date_in_bucket(config, &state).await {
            Ok(epoch) => writer.update(|state| witness::remember(state, epoch)),
            Err(error) => {
                log::warn!("{error}; it is not known whether the bucket has an epoch on record")
            }
        }
    }
    // The previous holder of the lock may have changed the role while this process waited.
    let role = writer.read(|state| state.cluster.role);
    let fenced = state.fence_record().await?.is_some();
    let kind = self::kind(config.role, role, fenced || was_primary).unwrap_or(kind);
    let leadership = Leadership {
        data: data.clone(),
        config: config.clone(),
        state,
        lock,
    };
    Ok(Begun::Working(Box::new(leadership), kind))
}
