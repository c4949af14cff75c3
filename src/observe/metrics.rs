//! Metrics in the OpenMetrics text format. Gauges are read from the state on request; a gauge
//! without a known value is absent. Counters live as long as the process.

use super::health::health;
use super::state::{Reach, State};
use super::status::Watched;
use crate::config::WantedRole;
use crate::domain::StateName;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::sync::atomic::AtomicU64;
use strum::VariantArray;

type Labels = Vec<(&'static str, String)>;
type Reals = Family<Labels, Gauge<f64, AtomicU64>>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ErrorLabels {
    pub side: String,
    pub kind: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ResultLabels {
    pub result: String,
}

/// Values that only grow. Clones share their counts.
#[derive(Clone)]
pub struct Counters {
    pub transactions_applied: Counter,
    pub artifacts_copied: Counter,
    pub artifact_bytes_copied: Counter,
    pub gate_wait: Histogram,
    pub baselines: Family<ResultLabels, Counter>,
    pub errors: Family<ErrorLabels, Counter>,
}

impl Default for Counters {
    fn default() -> Self {
        Counters {
            transactions_applied: Counter::default(),
            artifacts_copied: Counter::default(),
            artifact_bytes_copied: Counter::default(),
            gate_wait: Histogram::new([0.01, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0]),
            baselines: Family::default(),
            errors: Family::default(),
        }
    }
}

impl Counters {
    pub fn baseline(&self, result: &str) {
        let labels = ResultLabels {
            result: result.to_string(),
        };
        self.baselines.get_or_create(&labels).inc();
    }

    pub fn error(&self, side: &str, kind: &str) {
        let labels = ErrorLabels {
            side: side.to_string(),
            kind: kind.to_string(),
        };
        self.errors.get_or_create(&labels).inc();
    }

    fn register(&self, registry: &mut Registry) {
        registry.register(
            "transactions_applied",
            "Transactions of the primary applied here one by one; 0 in snapshot mode",
            self.transactions_applied.clone(),
        );
        registry.register(
            "artifacts_copied",
            "Artifacts copied from the primary and checked",
            self.artifacts_copied.clone(),
        );
        registry.register(
            "artifact_bytes_copied",
            "Bytes of the artifacts copied from the primary",
            self.artifact_bytes_copied.clone(),
        );
        registry.register(
            "gate_wait_seconds",
            "Time for which transactions waited for their artifacts; empty in snapshot mode",
            self.gate_wait.clone(),
        );
        registry.register(
            "baselines",
            "Full copies by how they ended: done, failed, given_up",
            self.baselines.clone(),
        );
        registry.register(
            "errors",
            "Failed questions to the primary, passes and verifications, by side and kind",
            self.errors.clone(),
        );
    }
}

/// The page of metrics. A gauge without samples is left out.
struct Page(Registry);

impl Page {
    fn gauge(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = (Labels, f64)>) {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return;
        }
        let family = Reals::default();
        for (labels, value) in samples {
            family.get_or_create(&labels).set(value);
        }
        self.0.register(name, help, family);
    }

    fn plain(&mut self, name: &str, help: &str, value: Option<f64>) {
        if let Some(value) = value {
            let gauge = Gauge::<f64, AtomicU64>::default();
            gauge.set(value);
            self.0.register(name, help, gauge);
        }
    }
}

fn one(name: &'static str, value: impl Into<String>) -> Labels {
    vec![(name, value.into())]
}

fn flag(value: bool) -> f64 {
    f64::from(u8::from(value))
}

pub(super) fn encode(watched: &Watched) -> Result<String, std::fmt::Error> {
    let state = watched.state();
    let mut page = Page(Registry::with_prefix("warm_spare"));
    service(&mut page, &state, watched);
    freshness(&mut page, &state, watched);
    sides(&mut page, &state);
    upkeep(&mut page, &state);
    watched.counters().register(&mut page.0);
    let mut text = String::new();
    text::encode(&mut text, &page.0)?;
    Ok(text)
}

fn service(page: &mut Page, state: &State, watched: &Watched) {
    let now = watched.now();
    page.gauge(
        "build_info",
        "Always 1; the label is the program's version",
        [(one("version", env!("CARGO_PKG_VERSION")), 1.0)],
    );
    page.plain(
        "active",
        "1: this process holds the working lock",
        Some(flag(state.active)),
    );
    let level = health(state, watched.meter(), now).level;
    page.plain(
        "health",
        "0 ok, 1 warning, 2 critical, 3 unknown",
        Some(f64::from(level.code())),
    );
    let current = state.name();
    page.gauge(
        "state",
        "1 for the current state of the service",
        StateName::VARIANTS
            .iter()
            .map(|name| (one("state", name.into_str()), flag(*name == current))),
    );
    let known = state.role.is_some()
        || state.settings.wanted != WantedRole::Keep
        || state.cluster_id.is_some();
    let role = state.role.map_or("none", Into::into);
    page.gauge(
        "role",
        "1 for the role on record",
        known
            .then(|| {
                ["none", "spare", "primary"].map(|name| (one("role", name), flag(name == role)))
            })
            .into_iter()
            .flatten(),
    );
    page.plain(
        "epoch",
        "Grows with every promotion",
        state.epoch.map(|epoch| epoch as f64),
    );
    page.plain(
        "config_valid",
        "0: the rendered configuration was refused",
        Some(flag(state.config.error.is_none())),
    );
}

fn freshness(page: &mut Page, state: &State, watched: &Watched) {
    let lag = state.lag(watched.now());
    let seconds = |time: chrono::DateTime<chrono::Utc>| time.timestamp_millis() as f64 / 1e3;
    page.plain(
        "lag_seconds",
        "Now minus the time at which the spare was last known to be complete",
        lag.map(|lag| lag.seconds),
    );
    page.plain(
        "lag_bytes",
        "Write-ahead log of the primary since the recovery point; 0: nothing waits",
        lag.and_then(|lag| lag.bytes).map(|bytes| bytes as f64),
    );
    page.plain(
        "recovery_point_timestamp_seconds",
        "Commit time of the recovery point by the primary's clock",
        state.point.as_ref().map(|point| seconds(point.commit_time)),
    );
    page.plain(
        "confirmed_timestamp_seconds",
        "Time at which the spare was last known to be complete, by the primary's clock",
        lag.map(|lag| seconds(lag.complete_at)),
    );
    page.plain(
        "gate_waiting_transactions",
        "Transactions that have arrived completely and wait, usually for their artifacts",
        state.gate_waiting.map(|number| number as f64),
    );
    page.plain(
        "peer_wal_held_bytes",
        "Write-ahead log that the primary keeps for our slot",
        state.held.as_ref().map(|held| held.bytes as f64),
    );
    page.plain(
        "peer_wal_unconfirmed_bytes",
        "Part of this log that our slot has not confirmed",
        state.held.as_ref().map(|held| held.unconfirmed as f64),
    );
    if let Some(found) = &state.footprint {
        let counted = [
            ("sessions", found.sessions),
            ("walsenders", found.walsenders),
            ("locks", found.locks),
            ("temporary_slots", found.temporary_slots),
        ];
        page.gauge(
            "peer_footprint",
            "Objects of warm-spare on the primary's server now",
            counted.map(|(what, number)| (one("what", what), number as f64)),
        );
        page.plain(
            "peer_footprint_transaction_seconds",
            "Age of our oldest open transaction on the primary",
            Some(found.transaction_seconds.unwrap_or_default()),
        );
        page.plain(
            "peer_footprint_xmin_age",
            "Number of transactions whose deleted rows the primary cannot vacuum because of our sessions",
            Some(f64::from(found.xmin_age.unwrap_or_default())),
        );
    }
    page.plain(
        "compared_timestamp_seconds",
        "Time since which every table was found equal on both sides, one after the other",
        state
            .compared
            .map(|time| time.timestamp_millis() as f64 / 1e3),
    );
    let (done, total) = watched.meter().progress();
    page.plain(
        "baseline_progress_ratio",
        "Progress of the current phase of the running copy, 0 to 1",
        (state.baseline.is_some() && total > 0).then(|| (done as f64 / total as f64).min(1.0)),
    );
}

fn sides(page: &mut Page, state: &State) {
    let sides = [("local", &state.local), ("peer", &state.peer)];
    let mut reachable = Vec::new();
    let mut fenced = Vec::new();
    for (side, seen) in sides {
        let mut add = |store: &str, reach: &Option<Reach>| {
            if let Some(reach) = reach {
                let labels = vec![("side", side.to_string()), ("store", store.to_string())];
                reachable.push((labels, flag(reach.error.is_none())));
            }
        };
        add("datastore", &seen.datastore);
        add("s3", &seen.s3);
        fenced.extend(seen.fenced.map(|value| (one("side", side), flag(value))));
    }
    page.gauge(
        "reachable",
        "1: the store answered when it was last asked",
        reachable,
    );
    page.gauge(
        "fenced",
        "1: the side's database is read-only for everybody but warm-spare",
        fenced,
    );
}

fn upkeep(page: &mut Page, state: &State) {
    if let Some(found) = &state.artifacts {
        let counts = [
            ("missing_on_primary", Some(found.missing)),
            ("damaged_on_primary", Some(found.damaged)),
            (
                "unreadable_on_primary",
                Some(state.unreadable.as_ref().map_or(0, |(number, _)| *number)),
            ),
            (
                "unstorable",
                Some(state.unstorable.as_ref().map_or(0, |(number, _)| *number)),
            ),
            ("staged", found.staged),
            ("retired", found.retired),
        ];
        let known = counts
            .into_iter()
            .filter_map(|(name, count)| Some((one("state", name), count? as f64)));
        page.gauge(
            "artifacts",
            "Artifacts in these states",
            known.collect::<Vec<_>>(),
        );
    }
    let verified = state.verified.as_ref().map(|verified| &verified.record);
    page.plain(
        "verify_timestamp_seconds",
        "Time at which the last verification ended",
        verified.map(|record| record.time.timestamp_millis() as f64 / 1e3),
    );
    page.plain(
        "verify_differences",
        "Differences that the last verification found",
        verified.map(|record| record.differences as f64),
    );
    let drill = state.drill.as_ref();
    page.plain(
        "drill_timestamp_seconds",
        "Time at which the last drill ended",
        drill.map(|drill| drill.time.timestamp_millis() as f64 / 1e3),
    );
    page.plain(
        "drill_rto_seconds",
        "Time from the start of the takeover in the last drill to the first answer of the command, or to the first write",
        drill.and_then(|drill| drill.answer_seconds.or(drill.write_seconds)),
    );
    page.plain(
        "generations_bytes",
        "Disk space of the replaced databases that are kept",
        state.generations_bytes.map(|bytes| bytes as f64),
    );
}
