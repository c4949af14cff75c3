//! The mode of replication, stream or snapshots: its choice, its preparation on the primary, and
//! its removal.

pub(super) mod choice;
pub(super) mod local_cleanup;
pub(super) mod prepare;
pub(super) mod select;
