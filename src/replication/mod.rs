//! Brings the primary's rows and artifacts to the spare. At every instant the spare is at a point
//! at which the primary really was.

mod artifact;
mod baseline;
mod change_probe;
mod descent;
mod error;
mod fuse;
mod live_compare;
mod mode;
mod names;
pub mod stream;

pub use artifact::attached::absent_from;
pub use artifact::carrier::Carrier;
pub use artifact::courier::{Courier, Delivery};
pub use artifact::inventory::{Inventory, InventoryError};
pub use artifact::place::has_unproved_place;
pub use artifact::proof::prove_once_more;
pub use artifact::retention::{Swept, sweep};
pub use artifact::retry::retry_unavailable;
pub use artifact::round::{RETIRED, Round, STAGED, Unavailable};
pub use artifact::sample::{not_in_time, sample};
pub use artifact::unproven::{Beside, Settled, prove_unproven};
pub(crate) use baseline::checks::locale_options;
pub use baseline::checks::{Facts, check, has_database, one_bucket, two_servers};
pub(crate) use baseline::clone::clone_visible;
pub use baseline::content_hash::ContentHash;
pub use baseline::copy::Copied;
pub(crate) use baseline::copy::scratch;
pub use baseline::disk::disk;
pub use baseline::ends::Ends;
pub use baseline::generations::{Kept, drop_kept, kept_generations};
pub use baseline::interrupted::{existing_id, may_work, mend};
pub(crate) use baseline::lock_watchdog::with_lock_watchdog;
pub use baseline::run::{Options, Outcome, Report, approve, sync};
pub use baseline::sequences::{advance_sequences, next_sequences, set_all_as_holder};
pub use change_probe::{ChangeProbe, probe};
pub use descent::{Doubt, Here, PrimaryLine, There, doubt};
pub use error::{Policy, ReplicationError};
pub use live_compare::compare_both;
pub use mode::choice::{Because, Choice, choose, is_extendable};
pub use mode::local_cleanup::{Traces, lift_the_fence, remove_traces, script as traces_script};
pub use mode::prepare::{PATIENCE, Prepare, Release, prepare, release};
pub use mode::select::{Chosen, decide};
pub(crate) use names::replaced_name;
