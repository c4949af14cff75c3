//! Checks of a shared bucket: its lease, and Builder's API on the spare.

use super::facts::Facts;
use super::{ok, unknown, warn};
use crate::cluster::LocalCluster;
use crate::config::{ArtifactsMode, Config};
use crate::domain::{ErrorCode, PreflightCheck};
use crate::observe::Check;
use crate::replication::{ReplicationError, one_bucket};
use crate::role::port::accepts_connections;
use std::net::SocketAddr;
use std::time::Duration;

/// Time limit for Builder's API to accept a connection.
const API_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) fn lease(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Lease;
    let artifacts = &facts.config.artifacts;
    match &facts.lease {
        None if artifacts.are_detached() => ok(
            NAME,
            "the file system is attached at the takeover, and its exclusive attachment is the fence",
        ),
        None => ok(NAME, "none is needed: each site has its own bucket"),
        Some(Ok(())) => ok(
            NAME,
            "both sites see one bucket with one lease, and its store honours conditional writes",
        ),
        Some(Err(error)) => unknown(NAME, error),
    }
}

pub(super) fn builder_api(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::BuilderApi;
    match facts.builder_api {
        None if facts.config.artifacts.mode == ArtifactsMode::Shared => ok(
            NAME,
            "builder-api does not answer on this node, so nothing is uploaded here",
        ),
        None => ok(
            NAME,
            "an upload to the fenced spare changes only its own bucket",
        ),
        Some(address) => warn(
            NAME,
            format!(
                "builder-api answers at {address}: an upload there changes the shared bucket before its row is refused"
            ),
            "stop builder-api on the spare until the takeover, or give it a key of the store that only reads",
        ),
    }
}

/// Checks that both sites see one bucket with one lease, and that its store honours conditional
/// writes. None: the bucket is not shared, or is read at the peer until a takeover.
pub(super) async fn look_at_lease(config: &Config) -> Option<Result<(), ReplicationError>> {
    let shared = config.artifacts.mode == ArtifactsMode::Shared;
    if !shared || config.artifacts.are_detached() {
        return None;
    }
    Some(lease_serves(config).await)
}

async fn lease_serves(config: &Config) -> Result<(), ReplicationError> {
    one_bucket(config).await?;
    let Some(store) = LocalCluster::of(config).lease_store()? else {
        return Ok(());
    };
    match store.broken_conditions().await? {
        None => Ok(()),
        Some(broken) => Err(ReplicationError::Precondition {
            check: ErrorCode::UnsupportedStore,
            text: format!("the store of the lease does not honour conditional writes: {broken}"),
            next_step: "set artifacts.lease to a store that does".into(),
        }),
    }
}

/// Returns the address at which Builder's API answers on this node. None: it does not answer, or
/// the bucket is not shared.
pub(super) async fn answering_api(config: &Config) -> Option<SocketAddr> {
    let shared = config.artifacts.mode == ArtifactsMode::Shared;
    let address = config.builder_api.filter(|_| shared)?;
    let answers = accepts_connections(address, API_TIMEOUT).await;
    answers.then_some(address)
}
