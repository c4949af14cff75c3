//! What must hold at every moment of a tenure, whatever is being done: the lock, the role, the fence. And what of the
//! stores is looked at besides.

use super::Desk;
use super::complaint::{Complaint, Pace};
use super::tenure::Tenure;
use crate::cluster::{
    self, BuilderKeys, DatastoreError, DatastoreFault, PeerSession, StateError, Store, StoreError,
    enforce_fence, is_fenced, prove_fence,
};
use crate::config::{Config, S3};
use crate::domain::{ErrorCode, EventKind, Role, Side};
use crate::observe::{Preflight, State};
use crate::replication::{PassError, has_database, sample};
use crate::role::{Purpose, preflight, remove_drill_leftovers, unplanned, worst};
use std::convert::Infallible;
use std::time::Duration;

const FENCE_LOOK: Duration = Duration::from_secs(5);
/// The proof takes a connection of its own; the setting is looked at every time.
const LOOKS_PER_PROOF: u32 = 12;
/// A local server that does not answer for so long holds nobody else's lock either.
const PATIENCE: Duration = Duration::from_secs(15);
const STORE_LOOK: Duration = Duration::from_secs(10);
const FOOTPRINT_LOOK: Duration = Duration::from_secs(10);
const LOOKS_PER_MINUTE: u32 = 6;
/// An emptied bucket is to be known within a minute, the time of the look included.
const LOOKS_PER_SAMPLE: u32 = 2;
const SAMPLE_PATIENCE: Duration = Duration::from_secs(20);
const STORE_PATIENCE: Duration = Duration::from_secs(10);
const PREFLIGHT_LOOK: Duration = Duration::from_secs(300);
const TIDY: Duration = Duration::from_secs(60);
const SETTLED: Duration = Duration::from_secs(15);

/// Why a tenure ended.
pub enum End {
    RoleChanged,
    /// It was to be copied over for the first time, and was the primary before its peer: it comes back.
    WasPrimary,
    Failed(PassError),
}

/// Looks until the tenure must end.
pub async fn keep(desk: &Desk, tenure: &Tenure) -> End {
    tokio::select! {
        end = keep_fence(desk, tenure) => end,
        never = keep_seeing(desk, &tenure.config) => match never {},
        never = keep_checking(desk, &tenure.config) => match never {},
        never = keep_counting(desk, &tenure.config) => match never {},
        never = keep_tidy(tenure) => match never {},
    }
}

/// Whether a promotion would work is known before it is needed.
async fn keep_checking(desk: &Desk, config: &Config) -> Infallible {
    loop {
        desk.wait_for(|state| state.point.is_some() && state.baseline.is_none())
            .await;
        // A copy that has just ended is about to be followed.
        tokio::time::sleep(SETTLED).await;
        let checks = Box::pin(preflight(config, Purpose::Planned, STORE_PATIENCE)).await;
        let keys = config.builder_keys_dir.as_deref().map(BuilderKeys::read);
        let now = desk.now();
        desk.update(|state| {
            state.builder_keys = keys.and_then(Result::ok).map(|keys| keys.revisions());
            state.preflight = Some(Preflight {
                time: now,
                planned: worst(&checks),
                unplanned: unplanned(&checks),
                checks,
            });
        });
        tokio::time::sleep(PREFLIGHT_LOOK).await;
    }
}

/// What of ours is on the primary, whatever is being done.
async fn keep_counting(desk: &Desk, config: &Config) -> Infallible {
    loop {
        let id = desk.read(|state| {
            let spare = state.role == Some(Role::Spare) || state.baseline.is_some();
            state.cluster_id.clone().filter(|_| spare)
        });
        let footprint = match id {
            Some(id) => cluster::footprint(&config.peer.datastore, &id).await,
            None => {
                tokio::time::sleep(FOOTPRINT_LOOK).await;
                continue;
            }
        };
        let now = desk.now();
        desk.update(|state| match footprint {
            Ok(found) => state.see_footprint(Some(found), now),
            // Who works with the primary says that it does not answer.
            Err(_) => state.see_footprint(None, now),
        });
        tokio::time::sleep(FOOTPRINT_LOOK).await;
    }
}

/// Of a drill that was killed; one that is under way is left.
pub async fn keep_tidy(tenure: &Tenure) -> Infallible {
    loop {
        if let Err(error) = remove_drill_leftovers(&tenure.state).await {
            log::debug!("{error}");
        }
        tokio::time::sleep(TIDY).await;
    }
}

async fn keep_fence(desk: &Desk, tenure: &Tenure) -> End {
    let mut role = desk.read(|state| state.role);
    let mut complaint = Complaint::new("local: the fence holds");
    for look in 0.. {
        let proving = look % LOOKS_PER_PROOF == 0;
        match tokio::time::timeout(PATIENCE, look_once(desk, tenure, proving)).await {
            Err(_) => return End::Failed(silent(tenure).into()),
            Ok(Err(error)) => return End::Failed(error),
            Ok(Ok(found)) if is_another(role, found.role) => {
                // Our own handover, which is at its last steps and says so itself.
                if desk.read(|state| state.transition.is_none()) {
                    return End::RoleChanged;
                }
            }
            Ok(Ok(found)) => {
                // A duty may have found it silent, and be over before we were.
                desk.see_datastore(Side::Local, None);
                role = found.role;
                match found.open {
                    Some(text) => {
                        complaint.failed(desk.now(), ErrorCode::Fence, &text, Pace::Operator);
                    }
                    None => complaint.over(desk.now()),
                }
            }
        }
        tokio::time::sleep(FENCE_LOOK).await;
    }
    unreachable!("the loop has no end but its returns")
}

/// The first copy records the role itself; nobody else's record leaves us at work.
fn is_another(old: Option<Role>, new: Option<Role>) -> bool {
    old != new && !(old.is_none() && new == Some(Role::Spare))
}

fn silent(tenure: &Tenure) -> DatastoreError {
    let to = &tenure.config.local.datastore;
    DatastoreError {
        side: Side::Local,
        address: format!("{}:{}", to.host, to.port),
        doing: "looking for the fence".into(),
        fault: DatastoreFault::Unreachable,
        text: format!("no answer for {} s", PATIENCE.as_secs()),
        sql_state: None,
    }
}

struct Found {
    role: Option<Role>,
    /// Why the fence does not hold.
    open: Option<String>,
}

async fn look_once(desk: &Desk, tenure: &Tenure, proving: bool) -> Result<Found, PassError> {
    let local = &tenure.config.local.datastore;
    tenure.state.still_ours(tenure.lock).await?;
    let cluster = tenure.state.cluster().await?;
    let role = cluster.role;
    desk.settle_events(&tenure.state).await;
    let spare = role == Some(Role::Spare);
    let session = tenure.state.session();
    if !spare || !has_database(session, &local.database).await? {
        desk.update(|state| state.local.fenced = None);
        return Ok(Found { role, open: None });
    }
    let before = desk.read(|state| state.local.fenced);
    let stood = is_fenced(session, &local.database).await?;
    if !stood {
        desk.update(|state| state.local.fenced = Some(false));
        // Unless it is the primary by now, at this very moment.
        if let Err(error) = tenure.state.fence_if_spare(&local.database).await {
            return refused(role, error);
        }
        if !is_fenced(session, &local.database).await? {
            return Ok(Found { role, open: None });
        }
    }
    let fenced = if !stood || cluster.fence_begun {
        let raised = tenure.state.finish_fence(local, &local.database).await;
        if raised.is_ok() {
            let text = format!(
                "the fence on {} had been lifted; it was set again",
                local.database
            );
            log::warn!("local: {text}");
            desk.note(EventKind::Fence, &text);
        }
        raised
    } else {
        match before {
            Some(true) if !proving => Ok(()),
            // Sessions from before the setting may still be there, and may still write.
            Some(false) => enforce_fence(session, local, &local.database).await,
            _ => prove_fence(session, local, &local.database).await,
        }
    };
    let open = match fenced {
        Ok(()) => None,
        // The proof has a connection of its own, which a pass ends when it makes another database the visible one; and
        // if the server is gone, the next look finds it.
        Err(cluster::FenceError::Datastore(error)) if error.is_transient() => {
            log::debug!("{error}");
            return Ok(Found { role, open: None });
        }
        Err(open) => Some(open.to_string()),
    };
    desk.update(|state| state.local.fenced = Some(open.is_none()));
    Ok(Found { role, open })
}

/// What the server refuses stays so until somebody acts, and is shown; what it does not answer ends the tenure.
fn refused(role: Option<Role>, error: StateError) -> Result<Found, PassError> {
    match error {
        StateError::Datastore(error) if !error.is_transient() => Ok(Found {
            role,
            open: Some(error.to_string()),
        }),
        error => Err(error.into()),
    }
}

/// Our own bucket always; the peer's two stores only while a pass may not notice for a while that one is gone. Between
/// passes they are asked when it is looked for changes.
pub async fn keep_seeing(desk: &Desk, config: &Config) -> Infallible {
    for look in 0_u32.. {
        desk.see_store(Side::Local, ask_store(Side::Local, &config.local.s3).await);
        if look % LOOKS_PER_SAMPLE == 0 {
            look_for_artifacts(desk, config).await;
        }
        let followed = desk.read(|state| state.mode.as_ref().is_some_and(|mode| mode.stream));
        if followed && look % LOOKS_PER_MINUTE == 0 {
            // Nobody else asks it while nothing is uploaded.
            desk.see_store(Side::Peer, ask_store(Side::Peer, &config.peer.s3).await);
        }
        if desk.read(|state| state.baseline.is_some()) {
            let (store, datastore) = tokio::join!(
                ask_store(Side::Peer, &config.peer.s3),
                PeerSession::open(&config.peer.datastore),
            );
            desk.see_store(Side::Peer, store);
            desk.see_datastore(Side::Peer, datastore.err().map(|error| error.to_string()));
        }
        tokio::time::sleep(STORE_LOOK).await;
    }
    unreachable!("the loop has no end")
}

/// A spare's bucket has what its rows name, as far as a sample tells. What could not be found out leaves what is known: a
/// bucket that does not answer is told by itself.
async fn look_for_artifacts(desk: &Desk, config: &Config) {
    let copied = |state: &State| state.role == Some(Role::Spare) && state.point.is_some();
    if !desk.read(copied) {
        desk.update(|state| state.sampled = None);
        return;
    }
    let found = tokio::time::timeout(SAMPLE_PATIENCE, sample(config, STORE_PATIENCE)).await;
    let sampled = match found {
        Ok(Ok(sampled)) => sampled,
        Ok(Err(error)) => return log::debug!("{error}"),
        Err(_) => {
            return log::debug!("local: a sample of the artifacts was not looked for in time");
        }
    };
    let before = desk.read(|state| state.sampled.as_ref().is_some_and(|s| !s.absent.is_empty()));
    if let Some(found) = &sampled
        && let Some(key) = found.absent.first()
        && !before
    {
        let text = format!(
            "{} of {} artifacts that were looked for are not in the local bucket, for example {key}",
            found.absent.len(),
            found.looked_for
        );
        log::warn!("local: {text}");
        desk.note(EventKind::Artifacts, &text);
    }
    desk.update(|state| state.sampled = sampled);
}

/// What is wrong with a store. A client is made each time: keys and certificates may have been changed.
pub async fn ask_store(side: Side, to: &S3) -> Option<String> {
    check_store(side, to)
        .await
        .err()
        .map(|error| error.to_string())
}

async fn check_store(side: Side, to: &S3) -> Result<(), StoreError> {
    let store = Store::open(side, to)?.with_limits(STORE_PATIENCE, 1);
    store.check_bucket().await
}
