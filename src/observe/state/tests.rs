//! Unit tests of `state.rs`.

use super::*;

fn at(seconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_900_000_000 + seconds, 0).expect("a time")
}

fn copied_at(seconds: i64) -> State {
    let mut state = State::new(at(0));
    state.point = Some(CopiedPoint {
        lsn: "0/1".into(),
        commit_time: at(seconds),
        system_id: "1".into(),
        timeline: 1,
        transactions: "1:1:".into(),
        server_started: "then".into(),
        sequences: String::new(),
        schema: String::new(),
        slot: String::new(),
        peer_cluster: String::new(),
    });
    state
}

#[test]
fn lag_counts_from_the_last_time_that_nothing_waited() {
    let mut state = copied_at(100);
    assert_eq!(state.lag(at(130)).expect("a lag").seconds, 30.0);
    state.confirmation = Some(Confirmation {
        time: at(120),
        clock_offset_seconds: 0.0,
    });
    state.waiting = Some(false);
    let lag = state.lag(at(130)).expect("a lag");
    assert_eq!((lag.seconds, lag.bytes), (10.0, Some(0)));
    // The primary is gone: the lag keeps growing, and its bytes are unknown.
    state.waiting = None;
    let lag = state.lag(at(4000)).expect("a lag");
    assert_eq!((lag.seconds, lag.bytes), (3880.0, None));
}

#[test]
fn lag_is_counted_by_the_primarys_clock() {
    let mut state = copied_at(100);
    // The primary's clock is an hour ahead: at local second 130 it shows 3730.
    state.confirmation = Some(Confirmation {
        time: at(3700),
        clock_offset_seconds: 3600.0,
    });
    assert_eq!(state.lag(at(130)).expect("a lag").seconds, 30.0);
}

#[test]
fn nothing_copied_has_no_lag() {
    assert!(State::new(at(0)).lag(at(10)).is_none());
}
