//! The health of a shared bucket: its lease, artifacts that were not hashed yet, and a Builder on the
//! spare that could write into it.

use super::{Findings, Level};
use crate::domain::{HealthCode, Role};
use crate::observe::state::ServiceState;

/// Reports that this primary has fenced itself.
pub(super) fn of_the_own_fence(state: &ServiceState, found: &mut Findings) {
    let why = state.lease.trouble.as_deref();
    let text = format!(
        "this primary has fenced itself, because it could not renew the lease of the shared bucket: {}",
        why.unwrap_or("it is not granted yet")
    );
    found.add(Level::Critical, HealthCode::LeaseExpired, text);
}

/// Reports the artifacts that a copy has admitted by their presence.
pub(super) fn of_unproven_artifacts(state: &ServiceState, found: &mut Findings) {
    let unproven = &state.spare.unproven;
    if unproven.left > 0 {
        let text = format!(
            "artifacts that are in the shared bucket, and were not read and hashed yet: {}; {} of {} are done",
            unproven.left,
            unproven.of - unproven.left,
            unproven.of,
        );
        found.add(Level::Warning, HealthCode::UnprovenArtifacts, text);
    }
}

pub(super) fn of_the_lease(state: &ServiceState, found: &mut Findings) {
    let lease = &state.lease;
    let trouble = lease.trouble.as_deref();
    let fenced_by = state.cluster.fenced_by.as_ref();
    match (lease.permitted, trouble) {
        // A primary that another cluster has replaced needs no lease. One that has fenced itself
        // says so.
        (Some(false), _) if fenced_by.is_some() => {}
        (Some(false), _) => {
            let why = trouble.unwrap_or("another cluster asks for it, or holds it");
            let text =
                format!("the lease of the shared bucket grants this primary nothing now: {why}");
            found.add(Level::Critical, HealthCode::LeaseExpired, text);
        }
        (_, Some(why)) => {
            found.add(Level::Warning, HealthCode::LeaseInDoubt, why.to_string());
        }
        _ => {}
    }
    if state.cluster.role == Some(Role::Spare)
        && let Some(address) = &lease.builder_api
    {
        let text = format!(
            "builder-api answers at {address} on this spare: an upload there changes the shared bucket before its row is refused"
        );
        found.add(Level::Warning, HealthCode::BuilderApiRuns, text);
    }
}
