//! What a cluster is, and how it becomes another.
//!
//! Declared by configuration, converged on in steps that are journalled, and reversible until the new epoch is committed.

mod divergence;
mod drill;

pub use divergence::{
    DivergedPackage, Divergence, Fetched, TableChanges, fetch, file_name, packages, record,
    recorded, tables,
};
pub(crate) use drill::http_get;
pub use drill::{Drill, DrillStep, Rehearsal, drill, remove_drill_leftovers};
