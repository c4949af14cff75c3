//! The words of the field as types: plain values, no I/O.

mod code;
mod diverged;
mod lease;
mod lsn;
mod missing;
mod role;
mod sampled;
mod side;

pub use code::{ErrorCode, EventKind, HealthCode, HoldReason, PreflightCheck, StateName, Verdict};
pub use diverged::DivergedClass;
pub use lease::{Asker, Isolated, Lease, LeaseLine, LeaseState, LeaseTerms};
pub use lsn::{Lsn, NoLsn};
pub use missing::MissingReason;
pub use role::{PromotionKind, Role, Step, Transition, TransitionKind};
pub use sampled::Sampled;
pub use side::Side;
