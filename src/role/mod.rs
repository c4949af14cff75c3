//! What a cluster is, and how it becomes another.
//!
//! Declared by configuration, converged on in steps that are journalled, and reversible until the new epoch is committed.

mod preflight;

pub use preflight::{CHECKS, Purpose, preflight, worst};
