//! Checks that run during a whole tenure, beside every duty: the lock, the role, the fence, and the
//! stores.

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
use crate::replication::sample;
use crate::replication::{PassError, has_database};
use crate::role::{Purpose, preflight, remove_drill_leftovers, unplanned, worst};
use std::convert::Infallible;
use std::time::Duration;

/// Interval between two looks at the lock, the role and the fence.
const FENCE_INTERVAL: Duration = Duration::from_secs(5);
/// Number of looks for each proof of the fence. Every look reads the setting; the proof needs a
/// connection of its own.
const LOOKS_PER_PROOF: u32 = 12;
/// Time limit of a look. A local server that does not answer for this time holds no other lock
/// either.
const LOOK_TIMEOUT: Duration = Duration::from_secs(15);
const STORE_INTERVAL: Duration = Duration::from_secs(10);
const FOOTPRINT_INTERVAL: Duration = Duration::from_secs(10);
const LOOKS_PER_MINUTE: u32 = 6;
/// Number of looks for each sample of artifacts. An emptied bucket must be known within a minute,
/// including the time of the look.
const LOOKS_PER_SAMPLE: u32 = 2;
const SAMPLE_TIMEOUT: Duration = Duration::from_secs(20);
const STORE_TIMEOUT: Duration = Duration::from_secs(10);
const PREFLIGHT_INTERVAL: Duration = Duration::from_secs(300);
const TIDY_INTERVAL: Duration = Duration::from_secs(60);
const PAUSE_AFTER_COPY: Duration = Duration::from_secs(15);

/// The reason why a tenure ended.
pub(super) enum End {
    RoleChanged,
    /// The cluster was about to be copied over for the first time, but it had been the primary
    /// before its peer: it comes back.
    WasPrimary,
    Failed(PassError),
}

/// Runs the checks until the tenure must end.
pub(super) async fn keep(desk: &Desk, tenure: &Tenure) -> End {
    tokio::select! {
        end = keep_fence(desk, tenure) => end,
        never = keep_seeing(desk, &tenure.config) => match never {},
        never = keep_checking(desk, &tenure.config) => match never {},
        never = keep_counting(desk, &tenure.config) => match never {},
        never = keep_tidy(tenure) => match never {},
    }
}

/// Runs the preflight regularly, so that the result is known before a promotion is needed.
async fn keep_checking(desk: &Desk, config: &Config) -> Infallible {
    loop {
        desk.wait_for(|state| state.point.is_some() && state.baseline.is_none())
            .await;
        // After a copy the stream is about to start.
        tokio::time::sleep(PAUSE_AFTER_COPY).await;
        let checks = Box::pin(preflight(config, Purpose::Planned, STORE_TIMEOUT)).await;
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
        tokio::time::sleep(PREFLIGHT_INTERVAL).await;
    }
}

/// Counts our objects on the primary, beside every duty.
async fn keep_counting(desk: &Desk, config: &Config) -> Infallible {
    loop {
        let id = desk.read(|state| {
            let spare = state.role == Some(Role::Spare) || state.baseline.is_some();
            state.cluster_id.clone().filter(|_| spare)
        });
        let footprint = match id {
            Some(id) => cluster::footprint(&config.peer.datastore, &id).await,
            None => {
                tokio::time::sleep(FOOTPRINT_INTERVAL).await;
                continue;
            }
        };
        let now = desk.now();
        desk.update(|state| match footprint {
            Ok(found) => state.see_footprint(Some(found), now),
            // The duty that works with the primary reports that the primary does not answer.
            Err(_) => state.see_footprint(None, now),
        });
        tokio::time::sleep(FOOTPRINT_INTERVAL).await;
    }
}

/// Removes what killed drills have left. A running drill is left alone.
pub(super) async fn keep_tidy(tenure: &Tenure) -> Infallible {
    loop {
        if let Err(error) = remove_drill_leftovers(&tenure.state).await {
            log::debug!("{error}");
        }
        tokio::time::sleep(TIDY_INTERVAL).await;
    }
}

async fn keep_fence(desk: &Desk, tenure: &Tenure) -> End {
    let mut role = desk.read(|state| state.role);
    let mut complaint = Complaint::new("local: the fence holds");
    for look in 0.. {
        let proving = look % LOOKS_PER_PROOF == 0;
        match tokio::time::timeout(LOOK_TIMEOUT, look_once(desk, tenure, proving)).await {
            Err(_) => return End::Failed(silent(tenure).into()),
            Ok(Err(error)) => return End::Failed(error),
            Ok(Ok(found)) if is_another(role, found.role) => {
                // This is our own handover, which is at its last steps and reports the change
                // itself.
                if desk.read(|state| state.transition.is_none()) {
                    return End::RoleChanged;
                }
            }
            Ok(Ok(found)) => {
                // A duty may have reported that the server does not answer, and that may be over.
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
        tokio::time::sleep(FENCE_INTERVAL).await;
    }
    unreachable!("the loop has no end but its returns")
}

/// Returns whether another process has changed the role. The first copy records the role itself.
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
        text: format!("no answer for {} s", LOOK_TIMEOUT.as_secs()),
        sql_state: None,
    }
}

struct Found {
    role: Option<Role>,
    /// The reason why the fence does not hold.
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
    let was_set = is_fenced(session, &local.database).await?;
    if !was_set {
        desk.update(|state| state.local.fenced = Some(false));
        // The cluster may have become the primary at this very moment.
        if let Err(error) = tenure.state.fence_if_spare(&local.database).await {
            return refused(role, error);
        }
        if !is_fenced(session, &local.database).await? {
            return Ok(Found { role, open: None });
        }
    }
    let fenced = if !was_set || cluster.fence_begun {
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
            // Sessions from before the setting may still exist, and may still write.
            Some(false) => enforce_fence(session, local, &local.database).await,
            _ => prove_fence(session, local, &local.database).await,
        }
    };
    let open = match fenced {
        Ok(()) => None,
        // The proof has a connection of its own, which a pass ends when it switches the visible
        // database. If the server is gone, the next look finds out.
        Err(cluster::FenceError::Datastore(error)) if error.is_transient() => {
            log::debug!("{error}");
            return Ok(Found { role, open: None });
        }
        Err(open) => Some(open.to_string()),
    };
    desk.update(|state| state.local.fenced = Some(open.is_none()));
    Ok(Found { role, open })
}

/// A refusal of the server stays until somebody acts, so it is shown. A missing answer ends the
/// tenure.
fn refused(role: Option<Role>, error: StateError) -> Result<Found, PassError> {
    match error {
        StateError::Datastore(error) if !error.is_transient() => Ok(Found {
            role,
            open: Some(error.to_string()),
        }),
        error => Err(error.into()),
    }
}

/// Checks the local bucket always, and the two stores of the peer only while a pass might not
/// notice for a while that one is gone. Between passes they are checked by the look for changes.
pub(super) async fn keep_seeing(desk: &Desk, config: &Config) -> Infallible {
    for look in 0_u32.. {
        desk.see_store(Side::Local, ask_store(Side::Local, &config.local.s3).await);
        if look % LOOKS_PER_SAMPLE == 0 {
            look_for_artifacts(desk, config).await;
        }
        let followed = desk.read(|state| state.mode.as_ref().is_some_and(|mode| mode.stream));
        if followed && look % LOOKS_PER_MINUTE == 0 {
            // No other task asks it while nothing is uploaded.
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
        tokio::time::sleep(STORE_INTERVAL).await;
    }
    unreachable!("the loop has no end")
}

/// Checks, by a sample, that the spare's bucket has the artifacts that its rows name. If the check
/// cannot run, the last result stays; a bucket that does not answer is reported elsewhere.
async fn look_for_artifacts(desk: &Desk, config: &Config) {
    let copied = |state: &State| state.role == Some(Role::Spare) && state.point.is_some();
    if !desk.read(copied) {
        desk.update(|state| state.sampled = None);
        return;
    }
    let found = tokio::time::timeout(SAMPLE_TIMEOUT, sample(config, STORE_TIMEOUT)).await;
    let sampled = match found {
        Ok(Ok(sampled)) => sampled,
        Ok(Err(error)) => return log::debug!("{error}"),
        Err(_) => {
            return log::debug!("local: the check of a sample of artifacts did not end in time");
        }
    };
    let before = desk.read(|state| state.sampled.as_ref().is_some_and(|s| !s.absent.is_empty()));
    if let Some(found) = &sampled
        && let Some(key) = found.absent.first()
        && !before
    {
        let text = format!(
            "{} of {} checked artifacts are not in the local bucket, for example {key}",
            found.absent.len(),
            found.looked_for
        );
        log::warn!("local: {text}");
        desk.note(EventKind::Artifacts, &text);
    }
    desk.update(|state| state.sampled = sampled);
}

/// Returns the fault of a store, if there is one. Each call makes a client, because keys and
/// certificates may have been changed.
pub(super) async fn ask_store(side: Side, to: &S3) -> Option<String> {
    check_store(side, to)
        .await
        .err()
        .map(|error| error.to_string())
}

async fn check_store(side: Side, to: &S3) -> Result<(), StoreError> {
    let store = Store::open(side, to)?.with_limits(STORE_TIMEOUT, 1);
    store.check_bucket().await
}
