//! Database `warm_spare`, in which a cluster keeps its own state.

mod archive_lock;
pub(super) mod artifact_place;
pub(super) mod divergence;
mod drill_lock;
pub(super) mod history;
pub(super) mod kept;
pub(super) mod lease;
pub(super) mod lineage;
mod migrations;
pub(super) mod new_copy;
pub(super) mod nodes;
pub(super) mod roles;
pub(super) mod state;
pub(super) mod unproven;
pub(super) mod upkeep;
pub(super) mod working_lock;

pub const DATABASE: &str = "warm_spare";
