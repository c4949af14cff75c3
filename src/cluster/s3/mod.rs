//! The artifact store: requests, transfers, errors, and the limits that transfers share.

pub(super) mod lease_store;
pub(super) mod probe;
mod relay;
pub(super) mod store;
pub(super) mod store_error;
pub(super) mod throttle;
