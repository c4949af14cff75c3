//! Tenures: the times in which this process holds the working lock for a role. A tenure ends when
//! its lock, its role or its servers change.

use super::complaint::Complaint;
use super::duties::Duties;
use super::guard::{self, End};
use super::primary::Primary;
use super::{Configs, Desk, next, sight, witness};
use crate::cluster::{self, Holder, Lock, StateError, Watch};
use crate::config::{Config, WantedRole};
use crate::domain::HoldReason;
use crate::domain::{Role, Side};
use crate::observe::{Artifacts, Sighting, Standing, State, Verified, Work};
use crate::replication::{PassError, UNREADABLE, UNSTORABLE, stands_at, unavailable_here};
use crate::role::is_asked_for;
use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Interval between two tries to take the lock, and between two looks at a role that was never set.
const STANDBY_INTERVAL: Duration = Duration::from_secs(3);
/// Number of looks without an act of the lock's holder before the holder is reported, and before
/// its session is ended. A holder acts every 3 s; a look takes 3 s, and so does the wait for the
/// next one.
const LOOKS_UNTIL_REPORTED: u32 = 2;
const LOOKS_UNTIL_ENDED: u32 = 4;
/// Interval between two looks at the epoch that the bucket has on record.
const WITNESS_INTERVAL: Duration = Duration::from_secs(60);

/// The right to work on this cluster. It lasts as long as the session in `state`.
pub(super) struct Tenure {
    pub config: Arc<Config>,
    /// Directory for files.
    pub data: Arc<Path>,
    pub state: cluster::State,
    pub lock: Lock,
}

enum Begun {
    Working(Box<Tenure>, Kind),
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
pub(super) async fn work(desk: &Desk, mut configs: Configs, data: &Arc<Path>) -> Infallible {
    loop {
        let config = configs.borrow_and_update().clone();
        let Some(config) = config else {
            next(&mut configs).await;
            continue;
        };
        let mut changes = configs.clone();
        tokio::select! {
            never = tenures(desk, configs.clone(), config.clone(), data) => match never {},
            () = other_ends(desk, &mut changes, &config) => {}
        }
        desk.update(|state| {
            forget_work(state);
            state.work = Work::Starting;
            state.local = Sighting::default();
        });
        // A hold may be over with other servers. If it is not, it will be shown again.
        desk.release(|hold| hold.reason != HoldReason::Config);
        log::info!("configuration: the role or the servers have changed; starting again with them");
    }
}

/// Forgets facts that only the holder of the lock sees.
fn forget_work(state: &mut State) {
    state.active = false;
    state.baseline = None;
    state.verifying = false;
    state.waiting = None;
    state.local.fenced = None;
    state.local.s3 = None;
    state.peer = Sighting::default();
    state.transition = None;
    state.undone = None;
    state.standing = Standing::Unknown;
    state.peer_role = None;
    state.peer_epoch = None;
    state.peer_fenced_by = None;
    state.sampled = None;
}

/// Forgets facts about a primary that only a spare needs.
fn forget_following(state: &mut State) {
    state.mode = None;
    state.gate_waiting = None;
    state.held = None;
    state.ours = None;
    state.orphans = None;
    state.artifacts = None;
    state.unreadable = None;
    state.unstorable = None;
    state.preflight = None;
}

/// Waits for a configuration that changes the connections or the kind of the tenure.
async fn other_ends(desk: &Desk, configs: &mut Configs, config: &Config) {
    loop {
        next(configs).await;
        let recorded = desk.read(|state| state.role);
        let same = configs.borrow_and_update().as_ref().is_some_and(|new| {
            // A recorded role stays until the cluster has another one; the process at work makes
            // that change.
            (recorded.is_some() || new.role == config.role)
                && new.local == config.local
                && new.peer == config.peer
        });
        if !same {
            return;
        }
    }
}

async fn tenures(
    desk: &Desk,
    configs: Configs,
    config: Arc<Config>,
    data: &Arc<Path>,
) -> Infallible {
    let mut complaint = Complaint::new("local: works");
    let mut was_primary = false;
    let mut watch = Watch::default();
    loop {
        // A recorded role outlasts changes of the configuration that do not end this loop.
        let config = configs.borrow().clone().unwrap_or_else(|| config.clone());
        let error = match begin(desk, &config, data, was_primary, &mut watch).await {
            Ok(Begun::Idle) => {
                complaint.over(desk.now());
                tokio::time::sleep(STANDBY_INTERVAL).await;
                continue;
            }
            Ok(Begun::Working(tenure, kind)) => {
                complaint.over(desk.now());
                let end = Box::pin(serve(desk, &tenure, &configs, kind)).await;
                desk.update(forget_work);
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
                    End::Failed(error) => error,
                }
            }
            Err(error) => error,
        };
        let pace = desk.hold_for(&error);
        let wait = complaint.failed(desk.now(), error.code(), &error.to_string(), pace);
        let mut changes = configs.clone();
        changes.mark_unchanged();
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = next(&mut changes) => complaint.begin_anew(),
        }
    }
}

/// Keeps the epoch on record in the data directory and in the local bucket. A bucket that does not
/// answer is tried again.
async fn keep_witness(desk: &Desk, tenure: &Tenure) -> Infallible {
    let mut warned = false;
    loop {
        let show = |epoch| desk.update(|state| witness::remember(state, epoch));
        if let Err(error) = witness::bring_up_to_date(show, &tenure.state, &tenure.data).await {
            log::debug!("{error}");
        }
        match witness::bring_up_to_date_in_bucket(&tenure.config, &tenure.state).await {
            Ok(epoch) => desk.update(|state| witness::remember(state, epoch)),
            Err(error) if warned => log::debug!("{error}"),
            Err(error) => {
                warned = true;
                log::warn!("{error}; the epoch is not recorded in the bucket");
            }
        }
        let known = desk.read(|state| state.epoch);
        let other = desk.wait_for(|state| state.epoch != known);
        // A new epoch is recorded at once.
        let _ = tokio::time::timeout(WITNESS_INTERVAL, other).await;
    }
}

async fn serve(desk: &Desk, tenure: &Tenure, configs: &Configs, kind: Kind) -> End {
    sight::look_again(desk, &tenure.config).await;
    desk.update(|state| {
        state.active = true;
        state.work = match kind {
            Kind::Spare => Work::Following,
            // The look decides.
            Kind::Primary => Work::Starting,
        };
        if kind == Kind::Primary {
            forget_following(state);
        }
    });
    desk.see_datastore(Side::Local, None);
    desk.release(|hold| hold.passing || hold.reason == HoldReason::RoleUnset);
    match kind {
        Kind::Primary => tokio::select! {
            end = Primary::new(desk, tenure, configs.clone()).perform() => end,
            never = keep_witness(desk, tenure) => match never {},
        },
        Kind::Spare => tokio::select! {
            end = guard::keep(desk, tenure) => end,
            never = keep_witness(desk, tenure) => match never {},
            end = Duties::new(desk, tenure, configs.clone()).perform() => end,
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
    desk: &Desk,
    config: &Arc<Config>,
    data: &Arc<Path>,
    was_primary: bool,
    watch: &mut Watch,
) -> Result<Begun, PassError> {
    let local = &config.local.datastore;
    let found = cluster::State::open_existing(local).await?;
    let (role, fenced) = match &found {
        Some(state) => {
            recall(desk, config, state).await?;
            let role = desk.read(|state| state.role);
            (role, state.fence_record().await?.is_some())
        }
        None => (None, false),
    };
    desk.see_datastore(Side::Local, None);
    let Some(kind) = kind(config.role, role, fenced || was_primary) else {
        desk.hold(
            HoldReason::RoleUnset,
            "the role of this cluster was never set, so nothing is done",
            "set role = \"spare\" on the cluster that is to be the copy",
            false,
        );
        return Ok(Begun::Idle);
    };
    let state = match found {
        Some(state) => state,
        None => cluster::State::open(local).await?,
    };
    let lock = match state.lock().await {
        Ok(lock) => lock,
        Err(StateError::Locked { holder }) => match stand_by(desk, &state, holder, watch).await? {
            Some(lock) => lock,
            None => return Ok(Begun::Idle),
        },
        Err(error) => return Err(error.into()),
    };
    desk.update(|state| {
        state.holder = None;
        state.holder_is_silent = false;
    });
    if desk.read(|state| state.work == Work::Standby) {
        log::info!("local: the working lock is free now; this warm-spare works");
    }
    recall(desk, config, &state).await?;
    let show = |epoch| desk.update(|state| witness::remember(state, epoch));
    witness::bring_up_to_date(show, &state, data).await?;
    if is_asked_for(config) && desk.read(|state| state.witnessed_epoch.is_none()) {
        // The directory may have been restored together with the database. So the bucket is asked
        // too, before an old consent counts as a new one.
        match witness::bring_up_to_date_in_bucket(config, &state).await {
            Ok(epoch) => desk.update(|state| witness::remember(state, epoch)),
            Err(error) => {
                log::warn!("{error}; it is not known whether the bucket has an epoch on record")
            }
        }
    }
    // The previous holder of the lock may have changed the role while this process waited.
    let role = desk.read(|state| state.role);
    let fenced = state.fence_record().await?.is_some();
    let kind = self::kind(config.role, role, fenced || was_primary).unwrap_or(kind);
    let tenure = Tenure {
        data: data.clone(),
        config: config.clone(),
        state,
        lock,
    };
    Ok(Begun::Working(Box::new(tenure), kind))
}

/// Waits for the lock, and takes it from a holder that gives no sign of life.
async fn stand_by(
    desk: &Desk,
    state: &cluster::State,
    holder: Option<Box<Holder>>,
    watch: &mut Watch,
) -> Result<Option<Lock>, PassError> {
    let who = holder.as_ref().map(ToString::to_string).unwrap_or_default();
    if desk.read(|state| state.work != Work::Standby) {
        log::info!("local: another warm-spare is at work on this cluster ({who}); standing by");
    }
    desk.release(|hold| hold.reason != HoldReason::Config);
    let silent = watch.see(holder.as_deref().cloned());
    desk.update(|state| {
        state.work = Work::Standby;
        state.holder = holder.as_ref().map(ToString::to_string);
        state.holder_is_silent = silent >= LOOKS_UNTIL_REPORTED;
    });
    let Some(holder) = holder.filter(|_| silent >= LOOKS_UNTIL_ENDED) else {
        return Ok(None);
    };
    log::warn!(
        "local: the warm-spare at work ({who}) gives no sign of life; its session is ended, and this process takes over"
    );
    state.end_holder(&holder).await?;
    match state.lock().await {
        Ok(lock) => Ok(Some(lock)),
        // Another waiting process was faster, or the session has not ended yet.
        Err(StateError::Locked { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Reads the state database and the visible database into the state.
pub(super) async fn recall(
    desk: &Desk,
    config: &Config,
    database: &cluster::State,
) -> Result<(), PassError> {
    let cluster = database.cluster().await?;
    let fence = database.fence_record().await?;
    let spare = cluster.role == Some(Role::Spare);
    let point = match database.copied_point().await? {
        // The copy from which a primary once came is not its position.
        Some(copied) if spare => Some(stands_at(config, copied).await?),
        _ => None,
    };
    let confirmation = database.confirmation().await?;
    let generations = database.generations().await?;
    let bytes = database.generations_bytes().await?;
    let verified = database.last_verification().await?;
    let drill = database.last_drill().await?;
    let (version, tls) = database.server().await?;
    let unavailable = match &point {
        Some(_) => unavailable_here(config).await?,
        None => None,
    };
    desk.update(|state| {
        state.cluster_id = Some(cluster.id);
        state.role = cluster.role;
        state.epoch = Some(cluster.epoch);
        state.role_since = Some(cluster.since);
        state.point = point;
        state.fenced_by = fence.map(|fence| (fence.epoch, fence.by_cluster));
        state.drill = drill;
        state.confirmation = match spare {
            true => confirmation.or(state.confirmation),
            false => None,
        };
        state.generations = Some(generations);
        state.generations_bytes = Some(bytes);
        state.local.version = Some(version);
        state.local.tls = Some(tls);
        if let Some(record) = verified
            && state
                .verified
                .as_ref()
                .is_none_or(|known| known.record.time < record.time)
        {
            state.verified = Some(Verified {
                record,
                examples: Vec::new(),
            });
        }
        if let Some(unavailable) = unavailable {
            let count =
                |reason: &str| unavailable.iter().filter(|(_, why)| why == reason).count() as u64;
            let of = |reason: &str| {
                let first = unavailable.iter().find(|(_, why)| why == reason);
                first.map(|(key, _)| (count(reason), key.clone()))
            };
            state.unreadable = of(UNREADABLE);
            state.unstorable = of(UNSTORABLE);
            let known = state.artifacts.take().unwrap_or_default();
            state.artifacts = Some(Artifacts {
                missing: count("missing"),
                damaged: count("damaged"),
                examples: unavailable.iter().take(5).cloned().collect(),
                ..known
            });
        }
    });
    desk.settle_events(database).await;
    Ok(())
}
