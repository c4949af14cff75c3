//! Checks of the copy that would be promoted: its point, its age, its gaps, and the way it is made.

use super::facts::Facts;
use super::here::Remembered;
use super::{ok, refuse, unknown, warn};
use crate::cluster::RecoveryPoint;
use crate::config::ArtifactsMode;
use crate::config::Mode;
use crate::domain::{PreflightCheck, Role, Verdict};
use crate::observe::{Check, Lag, ServiceState, span};
use bytesize::ByteSize;
use chrono::{DateTime, TimeDelta, Utc};

/// Age of the last verification above which the check warns. The default schedule verifies every
/// day, so two missed ones are noticed.
const VERIFIED_WITHIN: TimeDelta = TimeDelta::days(2);
/// Seconds of read-only time above which the check warns, because people notice that uploads fail.
const NOTICED_SECONDS: f64 = 60.0;
/// Bytes of database that a copy transfers in a second: a careful guess.
const COPY_RATE: f64 = 50e6;

pub(super) fn recovery_point(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::RecoveryPoint;
    let remembered = match &facts.remembered {
        Ok(remembered) => remembered.as_ref(),
        Err(error) => return unknown(NAME, error),
    };
    if let Some(state) = remembered.filter(|s| s.cluster.role == Some(Role::Primary)) {
        let epoch = state.cluster.epoch;
        let text = format!("this cluster is the primary already, since epoch {epoch}");
        return refuse(NAME, text, "ask its spare instead");
    }
    let Some(point) = facts.point() else {
        let text = "nothing has been copied to this cluster yet";
        return refuse(
            NAME,
            text,
            "let the service make its first copy, or run `warm-spare sync`",
        );
    };
    let found = match &facts.server {
        Ok(server) => server.stands.as_ref(),
        Err(error) => return unknown(NAME, error),
    };
    if !point.is_of(found) {
        let database = &facts.config.local.datastore.database;
        let text = format!("database {database} is not the database that was copied here");
        return refuse(
            NAME,
            text,
            "let the service copy again, or run `warm-spare sync`",
        );
    }
    ok(
        NAME,
        format!("{} of {}", point.lsn, time(point.commit_time)),
    )
}

/// Returns the lag, as the status shows it.
fn lag_of(facts: &Facts, state: &Remembered, point: &RecoveryPoint) -> Option<Lag> {
    let mut shown = ServiceState::new(facts.now);
    shown.spare.point = Some(point.clone());
    shown.spare.confirmation = state.confirmation;
    shown.lag(facts.now)
}

fn current_lag(facts: &Facts) -> Option<Lag> {
    let state = facts.remembered.as_ref().ok()?.as_ref()?;
    lag_of(facts, state, state.point.as_ref()?)
}

pub(super) fn lag(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Lag;
    let Some(lag) = current_lag(facts) else {
        return refuse(NAME, "not known: there is no recovery point", "");
    };
    let (warning, limit) = (
        facts.config.replication.lag_warn.as_secs_f64(),
        facts.config.replication.rpo.as_secs_f64(),
    );
    let text = format!(
        "{}, complete as of {}",
        span(lag.seconds),
        time(lag.complete_at)
    );
    let step = "let the service follow, and find out why it is behind: `warm-spare status`";
    if lag.seconds > limit {
        return refuse(NAME, format!("{text}: over rpo ({})", span(limit)), step);
    }
    if lag.seconds > warning {
        return warn(
            NAME,
            format!("{text}: over lag_warn ({})", span(warning)),
            step,
        );
    }
    ok(NAME, text)
}

pub(super) fn artifacts(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Artifacts;
    let remembered = match &facts.remembered {
        Ok(state) => state.as_ref(),
        Err(error) => return unknown(NAME, error),
    };
    let (looked_for, absent) = match &facts.sampled {
        Ok(Some(sampled)) => (sampled.looked_for, sampled.absent.as_slice()),
        Ok(None) => (0, [].as_slice()),
        // The check of the bucket refuses, and gives the reason.
        Err(_) if facts.bucket.is_err() => {
            return warn(NAME, "not checked: the local bucket does not answer", "");
        }
        Err(error) => {
            let check = unknown(NAME, error);
            return consented(facts, remembered, check);
        }
    };
    if let Some(key) = absent.first() {
        let text = format!(
            "{} of {looked_for} checked artifacts are not in the local bucket, although local rows name them, such as {key}",
            absent.len()
        );
        let step = "find out what removed them; while the primary exists, they are copied again after a verification (verify.schedule)";
        return consented(facts, remembered, refuse(NAME, text, step));
    }
    if remembered.is_some_and(|state| state.unproved) {
        let text = "the local bucket, or artifacts.mode, is another one than before, and no pass has proved the artifacts there yet";
        let step = "wait until the service has made that pass: `warm-spare status`";
        // A lost primary cannot be waited for.
        return match facts.is_planned() {
            true => refuse(NAME, text, step),
            false => warn(NAME, text, step),
        };
    }
    let unproven = remembered.map_or(0, |state| state.unproven);
    with_unproven(unproven, recorded(facts, remembered, looked_for))
}

/// Judges the artifacts that are recorded as unavailable.
fn recorded(facts: &Facts, remembered: Option<&Remembered>, looked_for: usize) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Artifacts;
    let missing = remembered.and_then(|state| state.missing.as_ref());
    match missing.map(|missing| (missing.len(), missing.first())) {
        None => warn(
            NAME,
            "not known: the visible database is not a copy that warm-spare made",
            "",
        ),
        Some((_, None)) => ok(
            NAME,
            format!(
                "none is recorded as missing, and all {looked_for} checked artifacts are in the local bucket"
            ),
        ),
        Some((number, Some((key, reason))))
            if facts.config.artifacts.mode != ArtifactsMode::Replicate =>
        {
            warn(
                NAME,
                format!("{number} are not here, such as {key} ({reason})"),
                "not_replicated: let the provider replicate them, or set artifacts.fill = true; others: upload these packages again on the primary",
            )
        }
        Some((number, Some((key, reason)))) => warn(
            NAME,
            format!("{number} are missing or damaged on the primary, such as {key} ({reason})"),
            "upload these packages again on the primary",
        ),
    }
}

/// Adds a warning about artifacts that were not hashed yet. It never refuses: they are there.
fn with_unproven(unproven: u64, check: Check) -> Check {
    if unproven == 0 {
        return check;
    }
    let text =
        format!("{unproven} artifacts are in the shared bucket, and were not read and hashed yet");
    let step =
        "wait until the service has read them, or run `warm-spare verify --deep`, which reads all";
    match check.result {
        Verdict::Ok => warn(check.name, text, step),
        _ => Check {
            reason: format!("{}; {text}", check.reason),
            ..check
        },
    }
}

/// Applies the operator's consent. A promotion without artifacts that rows name needs it, by force
/// too; it holds for one epoch.
fn consented(facts: &Facts, remembered: Option<&Remembered>, refused: Check) -> Check {
    let epoch = remembered.map_or(1, |state| state.cluster.epoch.max(1)) + 1;
    let id = format!("artifacts-{epoch}");
    if facts.config.fuse.approves(&id) {
        let text = format!("{}; let through by fuse.approve", refused.reason);
        return warn(refused.name, text, refused.next_step);
    }
    let step = format!(
        "{}; to promote anyway, set fuse.approve = \"{}\"",
        refused.next_step,
        facts.config.fuse.with(&id)
    );
    refuse(refused.name, refused.reason, step)
}

pub(super) fn verification(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Verification;
    let state = match &facts.remembered {
        Ok(state) => state.as_ref(),
        Err(error) => return unknown(NAME, error),
    };
    let step = "set verify.schedule, so that the service verifies; `warm-spare verify` verifies now, but keeps no record";
    let Some(found) = state.and_then(|state| state.verification.as_ref()) else {
        return warn(NAME, "the spare was never verified", step);
    };
    let when = time(found.time);
    if found.differences > 0 {
        let text = format!("{} differences were found at {when}", found.differences);
        return refuse(NAME, text, "run `warm-spare verify`, which lists them");
    }
    let age = facts.now - found.time;
    if age > VERIFIED_WITHIN {
        let text = format!("the last was {} ago", span(age.as_seconds_f64()));
        return warn(NAME, text, step);
    }
    ok(NAME, format!("no differences at {when}"))
}

/// Estimates how long nobody can write while a planned handover drains.
pub(super) fn read_only_time(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::ReadOnlyTime;
    let (Some(lag), Ok(server)) = (current_lag(facts), &facts.server) else {
        return warn(NAME, "not known: there is no recovery point", "");
    };
    let (seconds, how) = if facts.streams() {
        (
            lag.seconds + 1.0,
            "the waiting changes, and a second".to_string(),
        )
    } else {
        let size = ByteSize(server.bytes);
        let how = format!(
            "a last copy of {size} at {}/s, an estimate",
            ByteSize(COPY_RATE as u64)
        );
        (1.0 + server.bytes as f64 / COPY_RATE, how)
    };
    let text = format!("about {} ({how})", span(seconds));
    let limit = facts.config.takeover.read_only_limit.as_secs_f64();
    if !facts.streams() && seconds > limit {
        return warn(
            NAME,
            format!(
                "{text}: over takeover.read_only_limit ({}), at which the handover is given up",
                span(limit)
            ),
            "raise takeover.read_only_limit, or use the stream: `warm-spare prepare`",
        );
    }
    if seconds > NOTICED_SECONDS {
        return warn(
            NAME,
            text,
            "announce the handover; the stream makes this time short: `warm-spare prepare`",
        );
    }
    ok(NAME, text)
}

pub(super) fn mode(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Mode;
    let Some(point) = facts.point() else {
        return warn(NAME, "not known: nothing was copied yet", "");
    };
    if facts.streams() {
        return ok(NAME, format!("stream, by slot {}", point.slot()));
    }
    let peer_facts = facts.there.as_ref().ok();
    let why = match peer_facts.and_then(|there| there.server.why_snapshots.as_deref()) {
        Some(why) => why,
        None if facts.config.replication.mode == Mode::Snapshot => "replication.mode is snapshot",
        None => "no slot continues from the last copy",
    };
    ok(NAME, format!("snapshot: {why}"))
}

fn time(time: DateTime<Utc>) -> String {
    time.format("%Y-%m-%dT%H:%M:%SZ").to_string()
}
