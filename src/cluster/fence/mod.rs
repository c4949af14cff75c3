//! The fence: a setting of the database, with the record of its reason, that keeps everybody else
//! from writing.

pub(super) mod fence_record;
pub(super) mod first_write;
pub(super) mod keep;
pub(super) mod peer_fence;
pub(super) mod proof;
pub(super) mod setting;
