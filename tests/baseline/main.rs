//! A full copy by `sync`: rows at one snapshot, artifacts behind the gate, refusals, and kills.

mod artifacts;
mod copy;
mod faults;
mod gate_store;
mod kill9;
mod probe;
mod refusals;
mod verify;
