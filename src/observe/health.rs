//! Health is freshness: it is green only if every good state was seen lately. One function decides.

use super::health_step::next_step;
use super::meter::Meter;
use super::state::{ServiceState, Standing, Work};
use super::view::ServiceView;
use crate::domain::{HealthCode, HoldReason, MissingReason, Role};
use chrono::{DateTime, TimeDelta, Utc};
use std::fmt;

mod archives;
mod lease;
mod pair;
mod provider;

pub(super) use provider::awaited;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Ok,
    Warning,
    Critical,
    Unknown,
}

impl Level {
    pub const ALL: [Level; 4] = [Level::Ok, Level::Warning, Level::Critical, Level::Unknown];

    /// Returns the exit code of the health hook.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// Returns the HTTP status that the Supervisor's gateway gives for this level.
    pub fn http_status(self) -> http::StatusCode {
        match self {
            Level::Ok | Level::Warning => http::StatusCode::OK,
            Level::Critical => http::StatusCode::SERVICE_UNAVAILABLE,
            Level::Unknown => http::StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Ok => "OK",
            Level::Warning => "WARNING",
            Level::Critical => "CRITICAL",
            Level::Unknown => "UNKNOWN",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    pub level: Level,
    /// Code for programs; `docs/troubleshoot.md` explains each code.
    pub code: &'static str,
    pub text: String,
    /// The step that an operator can take.
    pub next_step: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    pub level: Level,
    /// The reasons, the worst first.
    pub reasons: Vec<Reason>,
}

impl Health {
    /// Returns one line for people: level, state, age, and the worst reason.
    pub fn line(&self, state: &ServiceState, now: DateTime<Utc>) -> String {
        let fresh = match state.lag(now) {
            Some(lag) => format!(", complete {} ago", super::text::span(lag.seconds)),
            None => String::new(),
        };
        let mut line = format!("{}: {}{fresh}", self.level, state.name());
        if let Some(worst) = self.reasons.first() {
            line.push_str(&format!("; {}: {}", worst.code, worst.text));
        }
        if self.reasons.len() > 1 {
            line.push_str(&format!(
                " (and {} more: `warm-spare status`)",
                self.reasons.len() - 1
            ));
        }
        line.replace('\n', " ")
    }
}

impl ServiceView {
    pub fn health(&self) -> Health {
        health(&self.borrow(), self.meter(), self.now())
    }
}

pub fn health(state: &ServiceState, meter: &Meter, now: DateTime<Utc>) -> Health {
    let mut found = Findings(Vec::new());
    of_configuration(state, &mut found);
    of_hold(state, now, &mut found);
    match state.work {
        // A standby reads the records of the process at work. If that process only holds the lock,
        // the spare grows old here too.
        Work::Standby if state.cluster.role == Some(Role::Primary) => {
            pair::of_silence(state, &mut found)
        }
        Work::Standby => {
            match state.lag(now) {
                Some(lag) => of_lag(state, lag.seconds, &mut found),
                None => found.add(
                    Level::Warning,
                    HealthCode::FirstBaseline,
                    "nothing was copied yet; the warm-spare that holds the working lock must make the first copy".into(),
                ),
            }
            of_verification(state, &mut found);
            pair::of_silence(state, &mut found);
        }
        // This applies even before the first question to the primary has an answer.
        Work::Fenced | Work::Primary => of_role(state, &mut found),
        _ if state.hold.is_none()
            && state.spare.point.is_none()
            && state.spare.baseline.is_none() =>
        {
            found.add(
                Level::Unknown,
                HealthCode::Starting,
                "nothing is known yet".to_string(),
            )
        }
        _ => {
            of_the_spare(state, meter, now, &mut found);
            if let Some(text) = &state.handover.undone {
                found.add(Level::Warning, HealthCode::HandoverUndone, text.clone());
            }
        }
    }
    of_witness(state, &mut found);
    lease::of_the_lease(state, &mut found);
    pair::of_the_pair(state, &mut found);
    of_stores(state, &mut found);
    archives::of_the_archives(state, now, &mut found);
    found.judge(state.settings.quiet_until.is_some_and(|until| now < until))
}

/// Time that a phase without steps may take (for example the indexes of a large database).
const SILENT_PHASE_LIMIT: TimeDelta = TimeDelta::hours(1);

/// Time for which an object of warm-spare must be left over on the primary before health warns. It
/// is longer than the interval between two questions to the primary.
const LEFT_OVER_LIMIT: TimeDelta = TimeDelta::seconds(15);

struct Findings(Vec<Reason>);

impl Findings {
    fn add(&mut self, level: Level, code: HealthCode, text: String) {
        let next_step = next_step(code).to_string();
        self.0.push(Reason {
            level,
            code: code.into_str(),
            text,
            next_step,
        });
    }

    fn judge(mut self, quiet: bool) -> Health {
        // Unknown is less bad than a known critical fault.
        self.0.sort_by_key(|reason| match reason.level {
            Level::Critical => 0,
            Level::Unknown => 1,
            Level::Warning => 2,
            Level::Ok => 3,
        });
        let worst = self.0.first().map_or(Level::Ok, |reason| reason.level);
        Health {
            level: if quiet {
                worst.min(Level::Warning)
            } else {
                worst
            },
            reasons: self.0,
        }
    }
}

fn of_configuration(state: &ServiceState, found: &mut Findings) {
    if let Some(error) = &state.config.error
        && !holds(state, HoldReason::Config)
        && !holds(state, HoldReason::PeerUnset)
    {
        found.add(
            Level::Warning,
            HealthCode::ConfigRefused,
            format!("the last good configuration is in force: {error}"),
        );
    }
}

fn holds(state: &ServiceState, reason: HoldReason) -> bool {
    state
        .hold
        .as_ref()
        .is_some_and(|hold| hold.reason == reason)
}

/// Adds a reason if PostgreSQL was restored from a time before a promotion of this cluster.
fn of_witness(state: &ServiceState, found: &mut Findings) {
    if let (Some(known), Some(recorded)) = (state.cluster.witnessed_epoch, state.cluster.epoch)
        && known > recorded
    {
        let text = format!(
            "this cluster has recorded epoch {known} outside PostgreSQL, but PostgreSQL has epoch {recorded}: its database was set back to an older copy"
        );
        found.add(Level::Critical, HealthCode::StateWentBack, text);
    }
}

fn of_hold(state: &ServiceState, now: DateTime<Utc>, found: &mut Findings) {
    let Some(hold) = &state.hold else { return };
    let level = match hold.reason {
        HoldReason::RoleUnset | HoldReason::PeerUnset => Level::Warning,
        // With a recovery point, the lag decides when health becomes critical. Without one, a
        // takeover would have nothing to start from.
        HoldReason::Paused
            if state.spare.point.is_some() || now - hold.since <= state.settings.rpo =>
        {
            Level::Warning
        }
        _ if hold.passing
            && (state.spare.point.is_some() || now - hold.since <= state.settings.rpo) =>
        {
            Level::Warning
        }
        _ => Level::Critical,
    };
    found.0.push(Reason {
        level,
        code: hold.reason.into_str(),
        text: hold.detail.clone(),
        next_step: hold.next_step.clone(),
    });
}

fn of_the_spare(state: &ServiceState, meter: &Meter, now: DateTime<Utc>, found: &mut Findings) {
    match state.lag(now) {
        Some(lag) => of_lag(state, lag.seconds, found),
        None if state.spare.baseline.is_some() => first_baseline(state, meter, now, found),
        None => {}
    }
    if state.spare.unknown_database {
        let text = "the local database is not the database that was copied, or it does not exist"
            .to_string();
        found.add(Level::Critical, HealthCode::DatabaseAstray, text);
    }
    if state.local.fenced == Some(false) {
        let text = "the local database is not read-only for others".to_string();
        found.add(Level::Critical, HealthCode::NotFenced, text);
    }
    if let Some(artifacts) = &state.spare.artifacts {
        let counted = [
            (
                artifacts.missing,
                HealthCode::MissingOnPrimary,
                MissingReason::Missing,
            ),
            (
                artifacts.damaged,
                HealthCode::DamagedOnPrimary,
                MissingReason::Damaged,
            ),
        ];
        for (number, code, word) in counted {
            if number > 0 {
                let named = artifacts
                    .examples
                    .iter()
                    .find(|(_, reason)| *reason == word);
                let example =
                    named.map_or(String::new(), |(key, _)| format!(", for example {key}"));
                let text = format!("artifacts {word} on the primary: {number}{example}");
                found.add(Level::Warning, code, text);
            }
        }
    }
    if let Some((number, key)) = &state.spare.unreadable {
        let text = format!(
            "artifacts that the primary's store refuses while it serves others: {number}, for example {key}"
        );
        found.add(Level::Warning, HealthCode::UnreadableOnPrimary, text);
    }
    if let Some((number, key)) = &state.spare.unstorable {
        let text = format!(
            "artifacts under keys that a store cannot hold (usually too long): {number}, for example {key}"
        );
        found.add(Level::Warning, HealthCode::Unstorable, text);
    }
    provider::of_the_provider(state, meter, found);
    lease::of_unproven_artifacts(state, found);
    if let Some(sampled) = &state.spare.sampled
        && let Some(key) = sampled.absent.first()
    {
        let text = format!(
            "artifacts that rows here name are not in the local bucket: {} of {} checked, for example {key}",
            sampled.absent.len(),
            sampled.looked_for
        );
        found.add(Level::Critical, HealthCode::MissingHere, text);
    }
    // Our own handover fences the primary, and reports it.
    if state.peer.fenced == Some(true) && state.handover.transition.is_none() {
        let by = state.peer_record.fenced_by.as_ref();
        let by = by.map_or(", and no record says by whom".into(), |(epoch, cluster)| {
            format!(", by cluster {cluster} under epoch {epoch}")
        });
        let text = format!("the primary's database is read-only for its clients{by}");
        found.add(Level::Critical, HealthCode::PrimaryReadOnly, text);
    }
    of_log(state, found);
    of_footprint(state, now, found);
    of_verification(state, found);
}

/// Adds a reason if an object of warm-spare is left over on the primary. It must be seen twice: one
/// look may come between the end of a copy and the record of that end.
fn of_footprint(state: &ServiceState, now: DateTime<Utc>, found: &mut Findings) {
    let since = state.on_primary.left_over_since;
    if let Some(what) = state.left_over()
        && since.is_some_and(|since| now - since >= LEFT_OVER_LIMIT)
    {
        let text = format!("{what} of warm-spare on the primary, which no running work explains");
        found.add(Level::Warning, HealthCode::LeftOnPrimary, text);
    }
}

/// Adds a reason if the primary keeps log that our slot has confirmed. We cannot free such log.
fn of_log(state: &ServiceState, found: &mut Findings) {
    let Some(held) = &state.on_primary.held else {
        return;
    };
    let limit = state.settings.wal_hold_limit;
    if held.bytes > limit
        && held.unconfirmed <= limit
        && let Some(writer) = &held.oldest_writer
    {
        let text = format!(
            "{writer} keeps {} bytes of the primary's write-ahead log, although our slot has confirmed them",
            held.bytes
        );
        found.add(Level::Warning, HealthCode::OpenTransaction, text);
    }
}

fn of_role(state: &ServiceState, found: &mut Findings) {
    if state.work == Work::Fenced {
        let by = state.cluster.fenced_by.as_ref();
        if by.is_some_and(|(_, by)| state.cluster.id.as_ref() == Some(by)) {
            // The lease says the reason. Nothing is to be done about a role.
            return lease::of_the_own_fence(state, found);
        }
        let by = by.map_or(String::new(), |(epoch, cluster)| {
            format!(" by cluster {cluster} under epoch {epoch}")
        });
        let text = format!("this old primary is fenced{by}: its database is read-only");
        found.add(Level::Critical, HealthCode::Fenced, text);
        if state.local.fenced == Some(false) {
            let text = "the local database is not read-only for others".to_string();
            found.add(Level::Critical, HealthCode::NotFenced, text);
        }
        return;
    }
    if state.local.fenced == Some(true) {
        let text =
            "this cluster is the primary, and its database is read-only by default".to_string();
        found.add(Level::Critical, HealthCode::PrimaryReadOnly, text);
    }
    match &state.handover.standing {
        Standing::Unknown => found.add(
            Level::Unknown,
            HealthCode::Starting,
            "it is not known yet whether a spare follows".into(),
        ),
        Standing::Followed => {}
        Standing::Alone(why) => {
            let text = format!("nobody could take over from this primary: {why}");
            found.add(Level::Warning, HealthCode::NoSpare, text);
        }
        Standing::PeerOpen(why) => {
            let text = format!("the old primary is not known to be fenced: {why}");
            found.add(Level::Warning, HealthCode::OldPrimaryOpen, text);
        }
    }
}

fn of_lag(state: &ServiceState, seconds: f64, found: &mut Findings) {
    let settings = &state.settings;
    // In snapshot mode a lag of one interval is normal, because the primary was not asked since.
    let stream = state.spare.mode.as_ref().is_some_and(|mode| mode.stream);
    let by_design = if stream {
        TimeDelta::zero()
    } else {
        settings.interval
    };
    let warn = settings
        .lag_warn
        .checked_add(&by_design)
        .unwrap_or(TimeDelta::MAX);
    let beyond = |limit: TimeDelta| seconds > limit.num_milliseconds() as f64 / 1e3;
    let level = match () {
        () if beyond(settings.rpo) => Level::Critical,
        () if beyond(warn) => Level::Warning,
        () => return,
    };
    let text = format!(
        "{} behind; replication.rpo is {}",
        super::text::span(seconds),
        super::text::span(settings.rpo.num_seconds() as f64)
    );
    found.add(level, HealthCode::Lag, text);
}

fn first_baseline(state: &ServiceState, meter: &Meter, now: DateTime<Utc>, found: &mut Findings) {
    let quiet_for = now - meter.moved();
    let limit = if meter.tells_steps() {
        state.settings.rpo
    } else {
        state.settings.rpo.max(SILENT_PHASE_LIMIT)
    };
    if quiet_for <= limit {
        let text = format!("the first copy is under way: {}", meter.describe());
        found.add(Level::Warning, HealthCode::FirstBaseline, text);
    } else {
        let text = format!(
            "the first copy has made no progress for {}: {}",
            super::text::span(quiet_for.num_seconds() as f64),
            meter.describe()
        );
        found.add(Level::Critical, HealthCode::BaselineStalled, text);
    }
}

fn of_verification(state: &ServiceState, found: &mut Findings) {
    // The reason stays until another verification finds no difference: a later copy of the rows
    // proves nothing about an artifact.
    if let Some(verified) = &state.checks.verified
        && verified.record.differences > 0
    {
        let example = verified
            .examples
            .first()
            .map_or(String::new(), |text| format!(": {text}"));
        let text = format!(
            "differences found by the verification: {}{example}",
            verified.record.differences
        );
        found.add(Level::Critical, HealthCode::VerifyDifferences, text);
    }
    if let Some(error) = &state.checks.verification_error {
        found.add(Level::Warning, HealthCode::VerifyFailed, error.clone());
    }
}

/// Adds reasons for stores that do not answer without a hold: a bucket that is not needed now, or a
/// datastore that stopped answering during a copy, which still waits for it.
fn of_stores(state: &ServiceState, found: &mut Findings) {
    let held = holds(state, HoldReason::PeerUnreachable);
    let datastore = state.peer.datastore.as_ref().filter(|_| !held).cloned();
    let stores = [
        (&state.local.s3, HealthCode::LocalStoreUnreachable),
        (&state.peer.s3, HealthCode::PeerStoreUnreachable),
        (&datastore, HealthCode::PeerDatastoreUnreachable),
    ];
    for (reach, code) in stores {
        if let Some(error) = reach.as_ref().and_then(|reach| reach.error.as_ref()) {
            found.add(Level::Warning, code, error.clone());
        }
    }
}

#[cfg(test)]
mod tests;
