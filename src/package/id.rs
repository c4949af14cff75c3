//! Builder's ids of rows, which are made of time.

use chrono::{DateTime, Utc};

/// Returns the lowest of Builder's ids that can have been made at that time.
pub fn first_id_of(time: DateTime<Utc>) -> i64 {
    (time.timestamp_millis() - IDS_BEGIN).max(0) << ID_BITS
}

/// Milliseconds since 1970 at which Builder's ids begin.
const IDS_BEGIN: i64 = 1_409_266_191_000;
/// Number of the bits of an id below its milliseconds.
const ID_BITS: u32 = 23;

/// Returns the time at which an id was made.
pub fn time_of_id(id: i64) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp_millis((id >> ID_BITS) + IDS_BEGIN)
}
