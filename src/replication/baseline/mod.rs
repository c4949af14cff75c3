//! The full copy at one snapshot of the primary: checks, rows, artifacts behind the gate, and the
//! switch.

pub(super) mod catch_up;
pub(super) mod checks;
pub(super) mod clone;
pub(super) mod content_hash;
pub(super) mod continuation;
pub(super) mod copy;
pub(super) mod disk;
pub(super) mod ends;
pub(super) mod gate;
pub(super) mod generations;
pub(super) mod incoming;
pub(super) mod interrupted;
pub(super) mod lock_watchdog;
pub(super) mod run;
pub(super) mod sequences;
pub(super) mod switch;
pub(super) mod tables;
pub(super) mod visible;
