//! Unit tests of `state.rs`.

use super::*;
use crate::cluster::{Confirmation, RecoveryPoint};

fn at(seconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_900_000_000 + seconds, 0).expect("a time")
}

fn copied_at(seconds: i64) -> ServiceState {
    let mut state = ServiceState::new(at(0));
    state.spare.point = Some(RecoveryPoint {
        commit_time: at(seconds),
        ..RecoveryPoint::sample()
    });
    state
}

#[test]
fn lag_counts_from_the_last_time_that_nothing_waited() {
    let mut state = copied_at(100);
    assert_eq!(state.lag(at(130)).expect("a lag").seconds, 30.0);
    state.spare.confirmation = Some(Confirmation {
        time: at(120),
        clock_offset_seconds: 0.0,
    });
    state.spare.waiting = Some(false);
    let lag = state.lag(at(130)).expect("a lag");
    assert_eq!((lag.seconds, lag.bytes), (10.0, Some(0)));
    // The primary is gone: the lag keeps growing, and its bytes are unknown.
    state.spare.waiting = None;
    let lag = state.lag(at(4000)).expect("a lag");
    assert_eq!((lag.seconds, lag.bytes), (3880.0, None));
}

#[test]
fn lag_is_counted_by_the_primarys_clock() {
    let mut state = copied_at(100);
    // The primary's clock is an hour ahead: at local second 130 it shows 3730.
    state.spare.confirmation = Some(Confirmation {
        time: at(3700),
        clock_offset_seconds: 3600.0,
    });
    assert_eq!(state.lag(at(130)).expect("a lag").seconds, 30.0);
}

#[test]
fn nothing_copied_has_no_lag() {
    assert!(ServiceState::new(at(0)).lag(at(10)).is_none());
}
