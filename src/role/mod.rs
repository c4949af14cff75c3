//! The role of a cluster, and the changes of the role.
//!
//! The configuration declares the role. The cluster reaches it in steps that are recorded in a
//! journal, and that can be undone until the new epoch is committed.

mod divergence;
mod drill;
mod epoch;
mod failback;
mod handover;
mod preflight;
mod steps;
mod watch;

pub use divergence::{
    DivergedPackage, Divergence, Fetched, TableChanges, fetch, file_name, packages, record,
    recorded, tables,
};
pub use drill::{Drill, DrillStep, Rehearsal, drill, remove_drill_leftovers};
pub use epoch::{Ours, Stand, Theirs, decide};
pub use failback::{come_back, fence_here};
pub use handover::{Handover, Outcome, asked, is_asked_for, may_have_fenced};
pub use preflight::{Purpose, preflight, unplanned, worst};
pub use steps::Told;
pub use watch::{PeerSeen, look_at_peer, settle};
