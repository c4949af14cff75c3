//! Which cluster is the primary: preflight, switchover, failover, failback, drills, and divergence.

mod by_hand;
mod clocks;
mod divergence;
mod drill;
mod failover;
mod failover_losses;
mod handover_losses;
mod handover_races;
mod handover_sessions;
mod lineage;
mod living_primary;
mod preflight;
mod reports;
mod set_back;
mod switchover;
mod transitions;
