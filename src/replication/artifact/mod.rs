//! Artifacts: which ones are wanted, how one is copied and verified, and for how long one is kept.

pub(super) mod carrier;
pub(super) mod courier;
pub(super) mod inventory;
pub(super) mod missing;
pub(super) mod place;
mod provider;
pub(super) mod replacements;
pub(super) mod retention;
pub(super) mod retry;
pub(super) mod round;
pub(super) mod sample;
