//! Checks that run during a whole leadership, beside every duty: the lock, the role, the fence, and
//! the stores.

use super::StatusWriter;
use super::failure_tracker::{FailureTracker, Pace};
use super::leadership::{End, Leadership};
use crate::cluster::{
    BuilderKeys, DatastoreError, DatastoreFault, FenceCheck, FenceError, FenceReason, KeepError,
    KeptFence, LocalCluster, PeerCluster, StateError, StoreError,
};
use crate::config::Config;
use crate::domain::{ErrorCode, EventKind, Role, Side};
use crate::observe::{Preflight, ServiceState};
use crate::replication::{ReplicationError, sample};
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

/// Runs the checks until the leadership must end.
pub(super) async fn keep(writer: &StatusWriter, leadership: &Leadership) -> End {
    tokio::select! {
        end = keep_fence(writer, leadership) => end,
        never = keep_seeing(writer, &leadership.config) => match never {},
        never = keep_checking(writer, &leadership.config) => match never {},
        never = keep_counting(writer, &leadership.config) => match never {},
        never = keep_tidy(leadership) => match never {},
    }
}

/// Runs the preflight regularly, so that the result is known before a promotion is needed.
async fn keep_checking(writer: &StatusWriter, config: &Config) -> Infallible {
    loop {
        writer
            .wait_for(|state| state.spare.point.is_some() && state.spare.baseline.is_none())
            .await;
        // After a copy the stream is about to start.
        tokio::time::sleep(PAUSE_AFTER_COPY).await;
        let checks = Box::pin(preflight(
            config,
            &PeerCluster::of(config),
            Purpose::Planned,
            STORE_TIMEOUT,
        ))
        .await;
        let keys = config.builder_keys_dir.as_deref().map(BuilderKeys::read);
        let now = writer.now();
        writer.update(|state| {
            state.builder_keys = keys.and_then(Result::ok).map(|keys| keys.revisions());
            state.checks.preflight = Some(Preflight {
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
async fn keep_counting(writer: &StatusWriter, config: &Config) -> Infallible {
    loop {
        let id = writer.read(|state| {
            let spare = state.cluster.role == Some(Role::Spare) || state.spare.baseline.is_some();
            state.cluster.id.clone().filter(|_| spare)
        });
        let footprint = match id {
            Some(id) => PeerCluster::of(config).footprint(&id).await,
            None => {
                tokio::time::sleep(FOOTPRINT_INTERVAL).await;
                continue;
            }
        };
        let now = writer.now();
        writer.update(|state| match footprint {
            Ok(found) => state.see_footprint(Some(found), now),
            // The duty that works with the primary reports that the primary does not answer.
            Err(_) => state.see_footprint(None, now),
        });
        tokio::time::sleep(FOOTPRINT_INTERVAL).await;
    }
}

/// Removes what killed drills have left. A running drill is left alone.
pub(super) async fn keep_tidy(leadership: &Leadership) -> Infallible {
    loop {
        if let Err(error) = remove_drill_leftovers(&leadership.state).await {
            log::debug!("{error}");
        }
        tokio::time::sleep(TIDY_INTERVAL).await;
    }
}

async fn keep_fence(writer: &StatusWriter, leadership: &Leadership) -> End {
    let mut role = writer.read(|state| state.cluster.role);
    let mut failures = FailureTracker::new("local: the fence holds");
    for look in 0.. {
        let proving = look % LOOKS_PER_PROOF == 0;
        match tokio::time::timeout(LOOK_TIMEOUT, look_once(writer, leadership, proving)).await {
            Err(_) => return End::Failed(silent(leadership).into()),
            Ok(Err(error)) => return End::Failed(error),
            Ok(Ok(found)) if is_another(role, found.role) => {
                // This is our own handover, which is at its last steps and reports the change
                // itself.
                if writer.read(|state| state.handover.transition.is_none()) {
                    return End::RoleChanged;
                }
            }
            Ok(Ok(found)) => {
                // A duty may have reported that the server does not answer, and that may be over.
                writer.see_datastore(Side::Local, None);
                role = found.role;
                match found.open {
                    Some(text) => {
                        failures.failed(writer.now(), ErrorCode::Fence, &text, Pace::Operator);
                    }
                    None => failures.over(writer.now()),
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

fn silent(leadership: &Leadership) -> DatastoreError {
    let to = &leadership.config.local.datastore;
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

async fn look_once(
    writer: &StatusWriter,
    leadership: &Leadership,
    proving: bool,
) -> Result<Found, ReplicationError> {
    let local = &leadership.config.local.datastore;
    leadership.state.still_ours(leadership.lock).await?;
    let cluster = leadership.state.cluster().await?;
    let role = cluster.role;
    writer.settle_events(&leadership.state).await;
    if role != Some(Role::Spare) {
        writer.update(|state| state.local.fenced = None);
        return Ok(Found { role, open: None });
    }
    let check = match writer.read(|state| state.local.fenced) {
        Some(true) if !proving => FenceCheck::Setting,
        // Sessions from before the setting may still exist, and may still write.
        Some(false) => FenceCheck::Enforcement,
        _ => FenceCheck::Proof,
    };
    let begun = cluster.fence_begun;
    let kept = leadership
        .state
        .keep_fence(local, FenceReason::Spare { begun }, check, || {
            writer.update(|state| state.local.fenced = Some(false));
        })
        .await;
    let open = match kept {
        Ok(KeptFence::NoDatabase) => {
            writer.update(|state| state.local.fenced = None);
            return Ok(Found { role, open: None });
        }
        Ok(KeptFence::NotSet) => return Ok(Found { role, open: None }),
        Ok(KeptFence::Holds) => None,
        Ok(KeptFence::SetAgain) => {
            let text = KeptFence::set_again(&local.database);
            log::warn!("local: {text}");
            writer.note(EventKind::Fence, &text);
            None
        }
        Err(KeepError::Look(error)) => return Err(error.into()),
        // A refusal of the server stays until somebody acts, so it is shown. A missing answer ends
        // the leadership.
        Err(KeepError::Set(StateError::Datastore(error))) if !error.is_transient() => {
            Some(error.to_string())
        }
        Err(KeepError::Set(error)) => return Err(error.into()),
        // The proof has a connection of its own, which a pass ends when it switches the visible
        // database. If the server is gone, the next look finds out.
        Err(KeepError::Proof {
            error: FenceError::Datastore(error),
            ..
        }) if error.is_transient() => {
            log::debug!("{error}");
            return Ok(Found { role, open: None });
        }
        Err(KeepError::Proof { error, .. }) => Some(error.to_string()),
    };
    writer.update(|state| state.local.fenced = Some(open.is_none()));
    Ok(Found { role, open })
}

/// Checks the local bucket always, and the two stores of the peer only while a pass might not
/// notice for a while that one is gone. Between passes they are checked by the look for changes.
pub(super) async fn keep_seeing(writer: &StatusWriter, config: &Config) -> Infallible {
    for look in 0_u32.. {
        see_local_store(writer, config).await;
        if look % LOOKS_PER_SAMPLE == 0 {
            look_for_artifacts(writer, config).await;
        }
        let followed =
            writer.read(|state| state.spare.mode.as_ref().is_some_and(|mode| mode.stream));
        if followed && look % LOOKS_PER_MINUTE == 0 {
            // No other task asks it while nothing is uploaded.
            writer.see_store(Side::Peer, ask_store(Side::Peer, config).await);
        }
        if writer.read(|state| state.spare.baseline.is_some()) {
            let peer = PeerCluster::of(config);
            let (store, datastore) = tokio::join!(ask_store(Side::Peer, config), peer.connect());
            writer.see_store(Side::Peer, store);
            writer.see_datastore(Side::Peer, datastore.err().map(|error| error.to_string()));
        }
        tokio::time::sleep(STORE_INTERVAL).await;
    }
    unreachable!("the loop has no end")
}

/// Checks, by a sample, that the spare's bucket has the artifacts that its rows name. If the check
/// cannot run, the last result stays; a bucket that does not answer is reported elsewhere.
async fn look_for_artifacts(writer: &StatusWriter, config: &Config) {
    let copied = |state: &ServiceState| {
        state.cluster.role == Some(Role::Spare) && state.spare.point.is_some()
    };
    if !writer.read(copied) {
        writer.update(|state| state.spare.sampled = None);
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
    let before = writer.read(|state| {
        state
            .spare
            .sampled
            .as_ref()
            .is_some_and(|s| !s.absent.is_empty())
    });
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
        writer.note(EventKind::Artifacts, &text);
    }
    writer.update(|state| state.spare.sampled = sampled);
}

/// Looks at the store of this site. On a spare whose file system comes only with the takeover there
/// is none to be seen.
pub(super) async fn see_local_store(writer: &StatusWriter, config: &Config) {
    let is_primary = writer.read(|state| state.cluster.role == Some(Role::Primary));
    if config.artifacts.are_detached() && !is_primary {
        return writer.update(|state| state.local.s3 = None);
    }
    writer.see_store(Side::Local, ask_store(Side::Local, config).await);
}

/// Returns the fault of a store, if there is one. Each call makes a client, because keys and
/// certificates may have been changed.
pub(super) async fn ask_store(side: Side, config: &Config) -> Option<String> {
    check_store(side, config)
        .await
        .err()
        .map(|error| error.to_string())
}

async fn check_store(side: Side, config: &Config) -> Result<(), StoreError> {
    let store = match side {
        Side::Local => LocalCluster::of(config).store_at_this_site()?,
        Side::Peer => PeerCluster::of(config).store()?,
    };
    store.with_limits(STORE_TIMEOUT, 1).check_bucket().await
}
