//! The health of a shared bucket: its lease, and a Builder on the spare that could write into it.

use super::{Findings, Level};
use crate::domain::{HealthCode, Role};
use crate::observe::state::ServiceState;

pub(super) fn of_the_lease(state: &ServiceState, found: &mut Findings) {
    let lease = &state.lease;
    let trouble = lease.trouble.as_deref();
    match (lease.permitted, trouble) {
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
