//! Who works: role, working lock, and for how long. A tenure ends when its lock, its role or its servers change.

use super::complaint::Complaint;
use super::duties::Duties;
use super::guard::{self, End};
use super::{Configs, Desk, next};
use crate::cluster::{self, Lock, StateError};
use crate::config::{Config, Role};
use crate::observe::{Artifacts, HoldReason, Sighting, State, Verified, Work};
use crate::replication::{PassError, stands_at, unavailable_here};
use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Between two tries to take the lock, and between two looks at a role that was never told.
const STANDBY_LOOK: Duration = Duration::from_secs(3);

/// The right to work on this cluster, as long as the session in `state` lives.
pub struct Tenure {
    pub config: Arc<Config>,
    /// Where files may be laid down.
    pub data: Arc<Path>,
    pub state: cluster::State,
    pub lock: Lock,
}

enum Begun {
    Working(Box<Tenure>),
    /// Nothing may be done now; what that is called stands in the state.
    Idle,
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
}

/// Waits for a configuration by which the tenure's own connections would be other ones.
async fn other_ends(desk: &Desk, configs: &mut Configs, config: &Config) {
    loop {
        next(configs).await;
        let spare = desk.read(|state| state.role.as_deref() == Some("spare"));
        // To keep what is on record is no change: every later change of anything else drops the role again.
        let role = |config: &Config| match config.role {
            Role::Keep if spare => Role::Spare,
            role => role,
        };
        let same = configs.borrow_and_update().as_ref().is_some_and(|new| {
            role(new) == role(config) && new.local == config.local && new.peer == config.peer
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
    loop {
        let error = match begin(desk, &config, data).await {
            Ok(Begun::Idle) => {
                complaint.over(desk.now());
                tokio::time::sleep(STANDBY_LOOK).await;
                continue;
            }
            Ok(Begun::Working(tenure)) => {
                complaint.over(desk.now());
                let end = Box::pin(serve(desk, &tenure, &configs)).await;
                desk.update(forget_work);
                match end {
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

async fn serve(desk: &Desk, tenure: &Tenure, configs: &Configs) -> End {
    desk.update(|state| {
        state.active = true;
        state.work = Work::Following;
    });
    desk.see_datastore(cluster::Side::Local, None);
    desk.release(|hold| hold.passing || hold.reason == HoldReason::RoleUnset);
    tokio::select! {
        end = guard::keep(desk, tenure) => end,
        error = Duties::new(desk, tenure, configs.clone()).perform() => End::Failed(error),
    }
}

/// Reads what is on record, and takes the lock if there is something to be done.
async fn begin(desk: &Desk, config: &Arc<Config>, data: &Arc<Path>) -> Result<Begun, PassError> {
    let local = &config.local.datastore;
    let found = cluster::State::open_existing(local).await?;
    let role = match &found {
        Some(state) => {
            recall(desk, config, state).await?;
            desk.read(|state| state.role.clone())
        }
        None => None,
    };
    desk.see_datastore(cluster::Side::Local, None);
    match (config.role, role.as_deref()) {
        (Role::Spare, None) | (Role::Spare | Role::Keep, Some("spare")) => {}
        (Role::Keep, None) => {
            desk.hold(
                HoldReason::RoleUnset,
                "this cluster was never told its role, so nothing is done",
                "set role = \"spare\" on the cluster that is to be the copy",
                false,
            );
            return Ok(Begun::Idle);
        }
        (Role::Keep, Some("primary")) => {
            desk.release(|hold| hold.reason != HoldReason::Config);
            desk.update(|state| state.work = Work::Primary);
            return Ok(Begun::Idle);
        }
        (_, recorded) => {
            let detail = format!(
                "this cluster is recorded as {}",
                recorded.unwrap_or("nothing")
            );
            desk.hold(
                HoldReason::Conflict,
                &detail,
                "only a spare is copied to: set role = \"keep\" here",
                false,
            );
            return Ok(Begun::Idle);
        }
    }
    let state = match found {
        Some(state) => state,
        None => cluster::State::open(local).await?,
    };
    let lock = match state.lock().await {
        Ok(lock) => lock,
        Err(StateError::Locked { .. }) => {
            standby(desk);
            return Ok(Begun::Idle);
        }
        Err(error) => return Err(error.into()),
    };
    if desk.read(|state| state.work == Work::Standby) {
        log::info!("local: the working lock is free now; this warm-spare works");
    }
    recall(desk, config, &state).await?;
    Ok(Begun::Working(Box::new(Tenure {
        data: data.clone(),
        config: config.clone(),
        state,
        lock,
    })))
}

fn standby(desk: &Desk) {
    if desk.read(|state| state.work != Work::Standby) {
        log::info!("local: another warm-spare is at work on this cluster; standing by");
    }
    desk.release(|hold| hold.reason != HoldReason::Config);
    desk.update(|state| state.work = Work::Standby);
}

/// What the state database and the visible one say, for those who ask us.
pub async fn recall(
    desk: &Desk,
    config: &Config,
    database: &cluster::State,
) -> Result<(), PassError> {
    let cluster = database.cluster().await?;
    let point = match database.copied_point().await? {
        Some(copied) => Some(stands_at(config, copied).await?),
        None => None,
    };
    let confirmation = database.confirmation().await?;
    let generations = database.generations().await?;
    let bytes = database.generations_bytes().await?;
    let verified = database.last_verification().await?;
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
        state.confirmation = confirmation.or(state.confirmation);
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
