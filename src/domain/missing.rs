//! The reasons why a row has no artifact here.

use strum::{Display, EnumString, IntoStaticStr, VariantArray};

/// Names the reason why a row was admitted without its artifact.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Display, EnumString, IntoStaticStr, VariantArray,
)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum MissingReason {
    /// The primary's store has no such object.
    Missing,
    /// The object's bytes have another hash than the row says.
    Damaged,
    /// The primary's store serves other objects and refuses this one.
    Unreadable,
    /// The provider of the bucket never brings the object.
    NotReplicated,
    /// The primary's store, or the local one, can hold no object under such a key.
    Unstorable,
    /// The row names no possible artifact. It is recorded by its package instead of a key.
    Unsound,
}
