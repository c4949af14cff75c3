//! The words of the field as types: plain values, no I/O.

mod lsn;
mod role;
mod side;

pub use lsn::{Lsn, NoLsn};
pub use role::{PromotionKind, Role, Step, Transition, TransitionKind};
pub use side::Side;
