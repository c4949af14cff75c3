//! Who works: role, working lock, and for how long. A tenure ends when its lock, its role or its servers change.

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

/// Between two tries to take the lock, and between two looks at a role that was never told.
const STANDBY_LOOK: Duration = Duration::from_secs(3);
/// Looks at which the holder of the lock has done nothing, before it is told of, and before its session is ended. It does
/// something every 3 s; a look takes 3 s, and so does the wait for the next one.
const LOOKS_TILL_TOLD: u32 = 2;
const LOOKS_TILL_ENDED: u32 = 4;
/// Between two looks at what the bucket remembers of our epochs.
const WITNESS_LOOK: Duration = Duration::from_secs(60);

/// The right to work on this cluster, as long as the session in `state` lives.
pub struct Tenure {
    pub config: Arc<Config>,
    /// Where files may be laid down.
    pub data: Arc<Path>,
    pub state: cluster::State,
    pub lock: Lock,
}

enum Begun {
    Working(Box<Tenure>, Kind),
    /// Nothing may be done now; what that is called stands in the state.
    Idle,
}

/// What there is to be done on a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It is a spare, or becomes one by its first copy.
    Spare,
    /// It is a primary, or was one.
    Primary,
}

/// Works by the configuration in force; begins anew when it names another role or other servers.
pub async fn work(desk: &Desk, mut configs: Configs, data: &Arc<Path>) -> Infallible {
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
        // Whatever held us may be over with other servers; what is not will show again.
        desk.release(|hold| hold.reason != HoldReason::Config);
        log::info!("configuration: another role or other servers; beginning with them");
    }
}

/// What only the holder of the lock sees.
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

/// What a spare knows of its primary, and a primary has no use for.
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

/// Waits for a configuration by which the tenure's own connections, or its kind, would be other ones.
async fn other_ends(desk: &Desk, configs: &mut Configs, config: &Config) {
    loop {
        next(configs).await;
        let recorded = desk.read(|state| state.role);
        let same = configs.borrow_and_update().as_ref().is_some_and(|new| {
            // What is on record goes on as it is until it is converged on another role; whoever is at work sees to that.
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
        // What is on record outlasts changes of the configuration that end nothing here.
        let config = configs.borrow().clone().unwrap_or_else(|| config.clone());
        let error = match begin(desk, &config, data, was_primary, &mut watch).await {
            Ok(Begun::Idle) => {
                complaint.over(desk.now());
                tokio::time::sleep(STANDBY_LOOK).await;
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

/// What the local bucket remembers of our epochs. A bucket that is away is asked again.
async fn keep_witness(desk: &Desk, tenure: &Tenure) -> Infallible {
    let mut told = false;
    loop {
        let show = |epoch| desk.update(|state| witness::remember(state, epoch));
        if let Err(error) = witness::bring_up_to_date(show, &tenure.state, &tenure.data).await {
            log::debug!("{error}");
        }
        match witness::bring_up_to_date_in_bucket(&tenure.config, &tenure.state).await {
            Ok(epoch) => desk.update(|state| witness::remember(state, epoch)),
            Err(error) if told => log::debug!("{error}"),
            Err(error) => {
                told = true;
                log::warn!("{error}; the epoch is not remembered in the bucket");
            }
        }
        let known = desk.read(|state| state.epoch);
        let other = desk.wait_for(|state| state.epoch != known);
        // A new epoch is written down at once.
        let _ = tokio::time::timeout(WITNESS_LOOK, other).await;
    }
}

async fn serve(desk: &Desk, tenure: &Tenure, configs: &Configs, kind: Kind) -> End {
    sight::look_again(desk, &tenure.config).await;
    desk.update(|state| {
        state.active = true;
        state.work = match kind {
            Kind::Spare => Work::Following,
            // Known when it has looked.
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

/// What is to be done, by the wanted role and what is on record; None: nothing, for nobody ever said what this cluster is.
fn kind(wanted: WantedRole, recorded: Option<Role>, once_primary: bool) -> Option<Kind> {
    match (wanted, recorded) {
        (_, Some(Role::Spare)) => Some(Kind::Spare),
        (_, Some(_)) | (WantedRole::Primary, None) => Some(Kind::Primary),
        (_, None) if once_primary => Some(Kind::Primary),
        (WantedRole::Spare, None) => Some(Kind::Spare),
        (WantedRole::Keep, None) => None,
    }
}

/// Reads what is on record, and takes the lock if there is something to be done.
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
            "this cluster was never told its role, so nothing is done",
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
        // The directory may have gone back with the database. Before an old consent is taken for a new one, the bucket
        // is asked too.
        match witness::bring_up_to_date_in_bucket(config, &state).await {
            Ok(epoch) => desk.update(|state| witness::remember(state, epoch)),
            Err(error) => log::warn!("{error}; whether the bucket remembers an epoch is not known"),
        }
    }
    // While the lock was waited for, whoever held it may have changed the role.
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
        state.holder_is_silent = silent >= LOOKS_TILL_TOLD;
    });
    let Some(holder) = holder.filter(|_| silent >= LOOKS_TILL_ENDED) else {
        return Ok(None);
    };
    log::warn!(
        "local: the warm-spare at work ({who}) gives no sign of life; its session is ended, and this one takes over"
    );
    state.end_holder(&holder).await?;
    match state.lock().await {
        Ok(lock) => Ok(Some(lock)),
        // Another one that waited was faster, or the session takes its time to end.
        Err(StateError::Locked { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What the state database and the visible one say, for those who ask us.
pub async fn recall(
    desk: &Desk,
    config: &Config,
    database: &cluster::State,
) -> Result<(), PassError> {
    let cluster = database.cluster().await?;
    let fence = database.fence_record().await?;
    let spare = cluster.role == Some(Role::Spare);
    let point = match database.copied_point().await? {
        // What a primary was once copied from is not where it stands.
        Some(copied) if spare => Some(stands_at(config, copied).await?),
        _ => None,
    };
    let confirmation = database.confirmation().await?;
    let generations = database.generations().await?;
    let bytes = database.generations_bytes().await?;
    let verified = database.last_verification().await?;
    let drill = database.last_drill().await?;
    let (version, tls) = database.server().await?;
    let lacking = match &point {
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
        if let Some(lacking) = lacking {
            let count =
                |reason: &str| lacking.iter().filter(|(_, why)| why == reason).count() as u64;
            let of = |reason: &str| {
                let first = lacking.iter().find(|(_, why)| why == reason);
                first.map(|(key, _)| (count(reason), key.clone()))
            };
            state.unreadable = of(UNREADABLE);
            state.unstorable = of(UNSTORABLE);
            let known = state.artifacts.take().unwrap_or_default();
            state.artifacts = Some(Artifacts {
                missing: count("missing"),
                damaged: count("damaged"),
                examples: lacking.iter().take(5).cloned().collect(),
                ..known
            });
        }
    });
    desk.settle_events(database).await;
    Ok(())
}
