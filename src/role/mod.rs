//! The role of a cluster, and the changes of the role.
//!
//! The configuration declares the role. The cluster reaches it in steps that are recorded in a
//! journal, and that can be undone until the new epoch is committed.

mod by_hand;
mod divergence;
mod drill;
mod epoch;
mod failback;
mod fence_view;
mod handover;
mod knock;
mod lease;
mod port;
mod preflight;
mod step_journal;
mod watch;
mod wishes;

pub use by_hand::{ByHand, PromotedByHand, promote_by_hand};
pub use divergence::{Fetched, fetch, file_name, record};
pub use drill::{Drill, DrillStep, Rehearsal, drill, remove_drill_leftovers};
pub use epoch::{Ours, PeerFacts, Stand, decide};
pub use failback::{come_back, fence_here};
pub use fence_view::{FenceView, lift_fence, view_fence};
pub use handover::{Handover, Outcome, may_have_fenced, request_id, wants_promotion};
pub use knock::{KNOCK_TIMEOUT, knock};
pub use lease::{Holder, LeaseTaker, Proof, Taken, Tended, run_fence_command};
pub use port::accepts_connections;
pub use preflight::{Purpose, checks_of_this_node, checks_to_text, preflight, unplanned, worst};
pub use step_journal::OnStep;
pub use watch::{PeerSeen, look_at_peer, settle};
pub use wishes::wishes_differ;
