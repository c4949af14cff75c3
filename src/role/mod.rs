//! What a cluster is, and how it becomes another.
//!
//! Declared by configuration, converged on in steps that are journalled, and reversible until the new epoch is committed.

mod divergence;

pub use divergence::{Divergence, DivergedPackage, TableChanges, packages, record, recorded, tables};
