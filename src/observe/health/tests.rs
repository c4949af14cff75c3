//! Unit tests of `health.rs`.

use super::*;
use crate::cluster::RecoveryPoint;
use crate::domain::Role;
use crate::observe::{
    Artifacts, Baseline, Clock, ConfigState, Counters, Hold, Listener, Phase, Reachability,
};

fn at(seconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_900_000_000 + seconds, 0).expect("a time")
}

fn meter() -> Meter {
    let throttle = crate::cluster::Throttle::default();
    let meter = Meter::new(Clock::simulated(at(0)).0, Counters::default(), throttle);
    Listener::phase(&meter, Phase::Artifacts, 10);
    meter
}

/// Returns a spare that has all changes of its primary at second 0, with the usual limits:
/// interval 1 min, lag_warn 1 min, rpo 5 min.
fn following() -> ServiceState {
    let mut state = ServiceState::new(at(0));
    state.work = Work::Following;
    state.cluster.role = Some(Role::Spare);
    state.spare.point = Some(RecoveryPoint {
        commit_time: at(0),
        ..RecoveryPoint::sample()
    });
    state
}

#[track_caller]
fn expect(state: &ServiceState, seconds: i64, level: Level, codes: &[&str]) {
    let found = health(state, &meter(), at(seconds));
    let named: Vec<&str> = found.reasons.iter().map(|reason| reason.code).collect();
    assert_eq!((found.level, named.as_slice()), (level, codes), "{found:?}");
    assert!(
        found
            .reasons
            .iter()
            .all(|reason| !reason.next_step.is_empty())
    );
}

#[test]
fn health_is_freshness() {
    let state = following();
    expect(&state, 10, Level::Ok, &[]);
    // A lag of one interval is normal, and is added to lag_warn.
    expect(&state, 119, Level::Ok, &[]);
    expect(&state, 121, Level::Warning, &["lag"]);
    expect(&state, 301, Level::Critical, &["lag"]);
}

#[test]
fn a_peer_that_is_away_warns_and_is_critical_past_rpo() {
    let mut state = following();
    state.hold = Some(Hold {
        reason: HoldReason::PeerUnreachable,
        detail: "refused".into(),
        next_step: "look".into(),
        since: at(5),
        passing: true,
    });
    expect(&state, 10, Level::Warning, &["peer_unreachable"]);
    expect(&state, 400, Level::Critical, &["lag", "peer_unreachable"]);
    state.settings.quiet_until = Some(at(500));
    expect(&state, 400, Level::Warning, &["lag", "peer_unreachable"]);
    // Nothing was ever copied: the time of the hold counts.
    state.settings.quiet_until = None;
    state.spare.point = None;
    expect(&state, 10, Level::Warning, &["peer_unreachable"]);
    expect(&state, 400, Level::Critical, &["peer_unreachable"]);
}

#[test]
fn a_first_copy_warns_while_it_moves() {
    let mut state = following();
    state.spare.point = None;
    state.spare.baseline = Some(Baseline { started: at(0) });
    expect(&state, 100, Level::Warning, &["first_baseline"]);
    expect(&state, 1000, Level::Critical, &["baseline_stalled"]);
}

#[test]
fn what_is_not_known_is_not_green() {
    expect(&ServiceState::new(at(0)), 1, Level::Unknown, &["starting"]);
}

#[test]
fn an_unavailable_artifact_warns() {
    let mut state = following();
    state.spare.artifacts = Some(Artifacts {
        missing: 2,
        damaged: 1,
        examples: vec![("a/b.hart".into(), MissingReason::Missing)],
        ..Artifacts::default()
    });
    let codes = ["missing_on_primary", "damaged_on_primary"];
    expect(&state, 10, Level::Warning, &codes);
}

#[test]
fn a_bad_configuration_and_an_open_fence_show() {
    let mut state = following();
    state.config = ConfigState {
        error: Some("role: no".into()),
        since: at(0),
    };
    state.local.fenced = Some(false);
    state.peer.s3 = Some(Reachability {
        error: Some("refused".into()),
        since: at(0),
    });
    let codes = ["not_fenced", "config_refused", "peer_store_unreachable"];
    expect(&state, 10, Level::Critical, &codes);
}

#[test]
fn the_line_is_one() {
    let mut state = following();
    state.config.error = Some("line\nbreak".into());
    let found = health(&state, &meter(), at(10));
    let line = found.line(&state, at(10));
    assert!(
        line.starts_with("WARNING: following, complete 10 s ago; config_refused: "),
        "{line}"
    );
    assert!(!line.contains('\n'));
}
