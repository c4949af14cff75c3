//! Brings the primary's rows and artifacts to the spare: at every instant a point that the primary really stood at.

mod artifacts;
mod baseline;
mod both_sides;
mod checks;
mod choice;
mod clone;
mod content;
mod continuation;
mod courier;
mod descent;
mod error;
mod fuse;
mod gate;
mod generations;
mod guard;
mod inventory;
mod look;
mod meeting;
mod mode;
mod names;
mod pass;
mod preparation;
mod quiet;
mod replacements;
mod retention;
mod retry;
mod rights;
mod sample;
mod sequences;
pub mod stream;
mod switch;
mod tables;
mod traces;

pub use artifacts::{RETIRED, Round, STAGED, Unavailable};
pub use baseline::Copied;
pub use both_sides::compare_both;
pub use checks::{Disk, Facts, check, disk, has_database, lacking_extensions, major, two_servers};
pub use choice::{Because, Choice, choose, is_extendable};
pub(crate) use clone::clone_visible;
pub use content::ContentHash;
pub use courier::{Courier, Delivery};
pub use descent::{Doubt, Here, PrimaryLine, There, doubt};
pub use error::{PassError, Policy};
pub use generations::{Kept, drop_kept, kept_generations};
pub(crate) use guard::guarded;
pub use inventory::{Inventory, InventoryError, UNREADABLE, UNSOUND, UNSTORABLE};
pub use look::{Look, Server, look};
pub use mode::{Chosen, decide, may_apply};
pub use pass::{
    Ends, Options, Outcome, Report, approve, end_appliers, existing_id, is_ours, may_work, mend,
    recovery_point, stands_at, sync, unavailable, unavailable_here,
};
pub use preparation::{PATIENCE, Prepare, Release, prepare, release};
pub use quiet::wake;
pub use retention::{Swept, sweep};
pub use retry::retry_unavailable;
pub use rights::{Rights, rights};
pub use sample::{Sampled, not_in_time, sample};
pub use sequences::{Sequence, advance_sequences, next_sequences, set_all_as_holder};
pub(crate) use switch::drop_database;
pub use tables::{Table, first_id_of, newest_id, tables};
pub use traces::{Traces, lift_the_fence, remove_traces, script as traces_script};
