//! Artifacts: which ones are wanted, how one is copied and verified, and for how long one is kept.

pub(super) mod attached;
pub(super) mod carrier;
pub(super) mod courier;
mod hashed;
pub(super) mod inventory;
pub(super) mod missing;
pub(super) mod place;
pub(super) mod presence;
pub(super) mod proof;
mod provider;
pub(super) mod recording;
pub(super) mod replacements;
pub(super) mod retention;
pub(super) mod retry;
pub(super) mod round;
pub(super) mod sample;
mod shared;
pub(super) mod unproven;
