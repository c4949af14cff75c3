//! Health is freshness: green only when what should be so was seen lately. One function decides.

use super::meter::Meter;
use super::state::{HoldReason, State, Work};
use chrono::{DateTime, TimeDelta, Utc};
use std::fmt;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Ok,
    Warning,
    Critical,
    Unknown,
}

impl Level {
    /// The exit code of the health hook.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// As the Supervisor's gateway answers.
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
    /// A word for programs; `docs/monitor.md` explains each.
    pub code: &'static str,
    pub text: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    pub level: Level,
    /// The worst first.
    pub reasons: Vec<Reason>,
}

impl Health {
    /// One line that a person understands: how bad, what state, how fresh, and the worst reason.
    pub fn line(&self, state: &State, now: DateTime<Utc>) -> String {
        let fresh = match state.lag(now) {
            Some(lag) => format!(", complete {} ago", super::text::span(lag.seconds)),
            None => String::new(),
        };
        let mut line = format!("{}: {}{fresh}", self.level, state.name().as_str());
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

/// Every code that a reason may bear, besides those of a hold.
pub const CODES: [&str; 15] = [
    "starting",
    "standby",
    "first_baseline",
    "baseline_stalled",
    "lag",
    "config_refused",
    "missing_on_primary",
    "damaged_on_primary",
    "local_store_unreachable",
    "peer_store_unreachable",
    "not_fenced",
    "verify_differences",
    "verify_failed",
    "http",
    "primary",
];

pub fn health(state: &State, meter: &Meter, now: DateTime<Utc>) -> Health {
    let mut found = Findings(Vec::new());
    of_configuration(state, &mut found);
    of_hold(state, now, &mut found);
    match state.work {
        Work::Standby => {}
        Work::Starting if state.hold.is_none() && state.point.is_none() => found.add(
            Level::Unknown,
            "starting",
            "nothing is known yet".to_string(),
        ),
        Work::Primary => found.add(
            Level::Warning,
            "primary",
            "this cluster is the primary; whether a spare follows it is not known here".into(),
        ),
        _ => of_the_spare(state, meter, now, &mut found),
    }
    of_stores(state, &mut found);
    found.judge(state.settings.quiet_until.is_some_and(|until| now < until))
}

struct Findings(Vec<Reason>);

impl Findings {
    fn add(&mut self, level: Level, code: &'static str, text: String) {
        self.0.push(Reason { level, code, text });
    }

    fn judge(mut self, quiet: bool) -> Health {
        // Unknown is no worse than what is known to be bad.
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

fn of_configuration(state: &State, found: &mut Findings) {
    if let Some(error) = &state.config.error
        && !holds(state, HoldReason::Config)
    {
        found.add(
            Level::Warning,
            "config_refused",
            format!("the last good configuration is in force: {error}"),
        );
    }
    if let Some(error) = &state.http_error {
        found.add(Level::Warning, "http", error.clone());
    }
}

fn holds(state: &State, reason: HoldReason) -> bool {
    state
        .hold
        .as_ref()
        .is_some_and(|hold| hold.reason == reason)
}

fn of_hold(state: &State, now: DateTime<Utc>, found: &mut Findings) {
    let Some(hold) = &state.hold else { return };
    let level = match hold.reason {
        HoldReason::RoleUnset | HoldReason::Paused => Level::Warning,
        // With a recovery point, lag says when it becomes critical; without one, the time that the hold stands.
        _ if hold.passing && (state.point.is_some() || now - hold.since <= state.settings.rpo) => {
            Level::Warning
        }
        _ => Level::Critical,
    };
    found.add(level, hold.reason.as_str(), hold.detail.clone());
}

fn of_the_spare(state: &State, meter: &Meter, now: DateTime<Utc>, found: &mut Findings) {
    match state.lag(now) {
        Some(lag) => of_lag(state, lag.seconds, found),
        None if state.baseline.is_some() => first_baseline(state, meter, now, found),
        None => {}
    }
    if state.local.fenced == Some(false) {
        let text = "the local database is not read-only for others".to_string();
        found.add(Level::Critical, "not_fenced", text);
    }
    if let Some(artifacts) = &state.artifacts {
        let counted = [
            (artifacts.missing, "missing_on_primary", "missing"),
            (artifacts.damaged, "damaged_on_primary", "damaged"),
        ];
        for (number, code, word) in counted {
            if number > 0 {
                let named = artifacts.examples.iter().find(|(_, reason)| reason == word);
                let example =
                    named.map_or(String::new(), |(key, _)| format!(", for example {key}"));
                let text = format!("artifacts {word} on the primary: {number}{example}");
                found.add(Level::Warning, code, text);
            }
        }
    }
    of_verification(state, found);
}

fn of_lag(state: &State, seconds: f64, found: &mut Findings) {
    let settings = &state.settings;
    // Up to one interval is by design: nobody has asked since.
    let warn = settings
        .lag_warn
        .checked_add(&settings.interval)
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
    found.add(level, "lag", text);
}

fn first_baseline(state: &State, meter: &Meter, now: DateTime<Utc>, found: &mut Findings) {
    let quiet_for = now - meter.moved();
    if quiet_for <= state.settings.rpo {
        let text = format!("the first copy is under way: {}", meter.describe());
        found.add(Level::Warning, "first_baseline", text);
    } else {
        let text = format!(
            "the first copy has not moved for {}: {}",
            super::text::span(quiet_for.num_seconds() as f64),
            meter.describe()
        );
        found.add(Level::Critical, "baseline_stalled", text);
    }
}

fn of_verification(state: &State, found: &mut Findings) {
    if let Some(verified) = &state.verified
        && verified.record.differences > 0
        // A later baseline has replaced what was compared.
        && state.point.as_ref().is_some_and(|point| point.lsn == verified.record.lsn)
    {
        let example = verified
            .examples
            .first()
            .map_or(String::new(), |text| format!(": {text}"));
        let text = format!(
            "differences found by verification: {}{example}",
            verified.record.differences
        );
        found.add(Level::Critical, "verify_differences", text);
    }
    if let Some(error) = &state.verification_error {
        found.add(Level::Warning, "verify_failed", error.clone());
    }
}

/// A datastore that does not answer is a hold; a bucket may be away while nothing needs it.
fn of_stores(state: &State, found: &mut Findings) {
    let stores = [
        (&state.local.s3, "local_store_unreachable"),
        (&state.peer.s3, "peer_store_unreachable"),
    ];
    for (reach, code) in stores {
        if let Some(error) = reach.as_ref().and_then(|reach| reach.error.as_ref()) {
            found.add(Level::Warning, code, error.clone());
        }
    }
}
