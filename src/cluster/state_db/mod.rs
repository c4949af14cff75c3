//! Database `warm_spare`, in which a cluster keeps its own state.

pub(super) mod history;
pub(super) mod lineage;
mod migrations;
pub(super) mod roles;
pub(super) mod state;
pub(super) mod upkeep;
pub(super) mod working_lock;
