//! Words for the changes that only an old primary has.

use strum::{Display, EnumString, IntoStaticStr, VariantArray};

/// Names the state of a changed package on both sides now. *Here* is the old primary.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Display, EnumString, IntoStaticStr, VariantArray,
)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum DivergedClass {
    /// The new primary does not have the package.
    OnlyHere,
    /// The new primary has the package with other bytes.
    OtherBytes,
    /// The old primary has deleted the package.
    GoneHere,
    /// Both sides have the same bytes.
    Same,
}

impl DivergedClass {
    /// Returns whether these bytes of the package are nowhere but on the old primary.
    pub fn is_lost_elsewhere(self) -> bool {
        matches!(self, DivergedClass::OnlyHere | DivergedClass::OtherBytes)
    }
}
