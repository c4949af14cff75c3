//! The step *attach*: a takeover waits until the shared file system has come to this site.
//!
//! Exclusive attachment is the fence of this arrangement. The step proves that the local store has
//! that very file system, in its newest state, and that the peer's server uses it no more: two
//! servers on one file system damage it.

use crate::cluster::{LocalCluster, SeenLease, StateDb, StoreError};
use crate::config::Config;
use crate::domain::ErrorCode;
use crate::replication::{ReplicationError, absent_from};
use crate::role::port::accepts_connections;
use http::Uri;
use std::time::Duration;
use tokio::time::Instant;

/// Interval between two looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// Time limit for the peer's store to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time limit for an answer of the local store, and number of tries: it may be about to start.
const PATIENCE: Duration = Duration::from_secs(5);
const TRIES: usize = 1;

/// Waits for the file system, up to `takeover.attach_timeout`. `show` gets the reason to wait and
/// the operator's next step.
pub(in crate::role) async fn attach(
    config: &Config,
    state: &StateDb,
    show: &(dyn Fn(&str, &str) + Send + Sync),
) -> Result<(), ReplicationError> {
    let limit = config.takeover.attach_timeout;
    let deadline = Instant::now() + limit;
    let mut shown = String::new();
    loop {
        let (why, next_step) = match waits_for(config, state).await? {
            None => return Ok(()),
            Some(waits) => waits,
        };
        if why != shown {
            log::warn!(
                "local: the takeover waits for the shared file system: {why}; next step: {next_step}"
            );
            show(&why, &next_step);
            shown.clone_from(&why);
        }
        if Instant::now() >= deadline {
            return Err(ReplicationError::Refused {
                rule: ErrorCode::NotAttached,
                text: format!(
                    "not promoted: the shared file system did not come within takeover.attach_timeout = {}: {why}",
                    humantime::format_duration(limit)
                ),
                next_step,
            });
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Returns why the file system does not count as attached, and the next step. None: it does.
async fn waits_for(
    config: &Config,
    state: &StateDb,
) -> Result<Option<(String, String)>, ReplicationError> {
    let waits = |why: String, step: &str| Ok(Some((why, step.to_string())));
    let peer = &config.peer.s3.endpoint;
    if answers(peer).await {
        return waits(
            format!("the peer's store at {peer} still accepts connections"),
            "stop MinIO at the other site and unmount the file system there",
        );
    }
    let local = LocalCluster::of(config);
    let store = local.store_at_this_site()?.with_limits(PATIENCE, TRIES);
    let lease_store = local.lease_store()?;
    const MOUNT: &str = "mount the file system here, and start MinIO on it";
    let of_store = |error: StoreError| Ok(Some((error.to_string(), MOUNT.to_string())));
    if let Err(error) = store.check_bucket().await {
        return of_store(error);
    }
    if let (Some(seen), Some(lease_store)) = (state.lease_record().await?, lease_store) {
        let found = match lease_store.read().await {
            Ok(SeenLease::Found(lease, _)) => Some((lease.series, lease.number)),
            Ok(SeenLease::Absent | SeenLease::Garbage(..)) => None,
            Err(error) => return of_store(error),
        };
        let is_it = found
            .as_ref()
            .is_some_and(|(series, number)| *series == seen.series && *number >= seen.number);
        if !is_it {
            let found = found.map_or_else(
                || "no lease".to_string(),
                |(_, number)| format!("write {number} of a lease"),
            );
            return waits(
                format!(
                    "the local store has {found}, and the last lease at the peer's store was write {}: this is another file system, or an old copy",
                    seen.number
                ),
                "mount the very file system of the other site, and start MinIO on it",
            );
        }
    }
    match absent_from(config, &store).await {
        Ok(None) => Ok(None),
        Ok(Some(absent)) => waits(
            format!("the local store does not have the artifacts: {absent}"),
            "mount the very file system of the other site, and start MinIO on it",
        ),
        Err(ReplicationError::Store(error)) => of_store(error),
        Err(error) => Err(error),
    }
}

/// Returns whether a server accepts connections at the endpoint.
async fn answers(endpoint: &str) -> bool {
    let Some((host, port)) = address(endpoint) else {
        return false;
    };
    accepts_connections((host.as_str(), port), CONNECT_TIMEOUT).await
}

fn address(endpoint: &str) -> Option<(String, u16)> {
    let uri: Uri = endpoint.parse().ok()?;
    let usual = match uri.scheme_str() {
        Some("https") => 443,
        _ => 80,
    };
    let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
    Some((host.to_string(), uri.port_u16().unwrap_or(usual)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_names_a_host_and_a_port() {
        let of = |endpoint: &str| address(endpoint);
        assert_eq!(of("http://minio:9000"), Some(("minio".into(), 9000)));
        assert_eq!(of("https://s3.example"), Some(("s3.example".into(), 443)));
        assert_eq!(of("http://[::1]:9000/"), Some(("::1".into(), 9000)));
    }
}
