//! The archive: generations of the whole Builder in a directory or a bucket.
//!
//! A generation is a dump of Builder's database at one snapshot, and a manifest that names the dump,
//! and lists of the artifacts that its rows name. Artifacts are stored once over all generations. A
//! generation exists when its manifest does, which is written last; no file that a manifest names is
//! written again. `docs/archive-format.md` describes the files: people restore them without this
//! program too.
//!
//! Everything is read from the local cluster. The peer is not asked.

mod cache;
mod catalog;
mod create;
mod error;
mod format;
mod identity;
mod keep;
mod layout;
mod place;
mod proofs;
mod prune;
mod readme;
mod restore;
mod verify;
mod writer;

pub use catalog::Listed;
pub use create::{Made, Making, create};
pub use format::{Absent, Manifest, Pin};
pub use place::Place;
pub use prune::{Judged, Pruned, Pruning, judge, pin, prune};
pub use restore::{Chosen, Restored, Target, Unrestored, choose, restore};
pub use verify::{Extent, Fault, Verified, verify};

use crate::config::ArchivePlan;
use crate::replication::ReplicationError;
use chrono::{DateTime, Utc};
use std::path::Path;

/// Returns the name and version of this program, for the documents of an archive.
fn made_by() -> String {
    format!("warm-spare {}", env!("CARGO_PKG_VERSION"))
}

/// Returns all generations of a place, the newest first.
pub async fn list(place: &Place) -> Result<Vec<Listed>, ReplicationError> {
    catalog::all(place).await
}

/// Returns the name of the newest generation of a place.
pub async fn newest(plan: &ArchivePlan) -> Result<String, ReplicationError> {
    let place = Place::open(plan)?;
    let newest = catalog::names(&place).await?.whole.pop();
    newest.ok_or_else(|| error::no_generation(place.name(), "at all"))
}

/// Returns the time of the last verification that came to its end. None: there was none, or its record
/// is lost.
pub fn last_proof(
    plan: &ArchivePlan,
    data: Option<&Path>,
) -> Result<Option<DateTime<Utc>>, ReplicationError> {
    Ok(proofs::Proofs::of(data, &Place::open(plan)?).verified())
}

/// Returns the manifest of a generation.
pub async fn manifest(place: &Place, name: &str) -> Result<Manifest, ReplicationError> {
    catalog::manifest(place, name).await
}
