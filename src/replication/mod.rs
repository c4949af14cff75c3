//! Brings the primary's rows and artifacts to the spare: at every instant a point that the primary really stood at.

mod artifacts;
mod baseline;
mod checks;
mod content;
mod courier;
mod error;
mod fuse;
mod gate;
mod guard;
mod inventory;
mod pass;
mod replacements;
mod switch;
mod tables;

pub use artifacts::{Round, Unavailable};
pub use baseline::Copied;
pub use checks::{Facts, check};
pub use content::ContentHash;
pub use courier::{Courier, Delivery};
pub use error::{PassError, Policy};
pub use inventory::{Inventory, InventoryError, UNSOUND};
pub use pass::{Ends, Options, Outcome, Report, may_work, recovery_point, sync, unavailable};
pub use tables::{Table, tables};
