//! Metrics in the OpenMetrics text format. Gauges are read from the state on request; a gauge
//! without a known value is absent. Counters live as long as the process.

use super::health::{awaited, health};
use super::meter::Meter;
use super::state::{ArchiveFacts, Reachability, ServiceState};
use super::view::ServiceView;
use crate::config::WantedRole;
use crate::domain::StateName;
use prometheus_client::encoding::text;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::sync::atomic::AtomicU64;
use strum::VariantArray;

type Labels = Vec<(&'static str, String)>;
type Reals = Family<Labels, Gauge<f64, AtomicU64>>;

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

impl ServiceView {
    /// Returns the page of metrics.
    pub fn metrics(&self) -> Result<String, std::fmt::Error> {
        let state = self.state();
        let mut page = Page(Registry::with_prefix("warm_spare"));
        service(&mut page, &state, self);
        freshness(&mut page, &state, self);
        sides(&mut page, &state);
        upkeep(&mut page, &state, self.meter());
        archives(&mut page, &state);
        self.counters().register(&mut page.0);
        let mut text = String::new();
        text::encode(&mut text, &page.0)?;
        Ok(text)
    }
}

fn service(page: &mut Page, state: &ServiceState, view: &ServiceView) {
    let now = view.now();
    page.gauge(
        "build_info",
        "Always 1; the label is the program's version",
        [(one("version", env!("CARGO_PKG_VERSION")), 1.0)],
    );
    page.plain(
        "active",
        "1: this process holds the working lock",
        Some(flag(state.lock.active)),
    );
    let level = health(state, view.meter(), now).level;
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
    let known = state.cluster.role.is_some()
        || state.settings.wanted != WantedRole::Keep
        || state.cluster.id.is_some();
    let role = state.cluster.role.map_or("none", Into::into);
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
        state.cluster.epoch.map(|epoch| epoch as f64),
    );
    page.plain(
        "config_valid",
        "0: the rendered configuration was refused",
        Some(flag(state.config.error.is_none())),
    );
}

fn freshness(page: &mut Page, state: &ServiceState, view: &ServiceView) {
    let lag = state.lag(view.now());
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
        state
            .spare
            .point
            .as_ref()
            .map(|point| seconds(point.commit_time)),
    );
    page.plain(
        "confirmed_timestamp_seconds",
        "Time at which the spare was last known to be complete, by the primary's clock",
        lag.map(|lag| seconds(lag.complete_at)),
    );
    page.plain(
        "gate_waiting_transactions",
        "Transactions that have arrived completely and wait, usually for their artifacts",
        state.spare.gate_waiting.map(|number| number as f64),
    );
    page.plain(
        "peer_wal_held_bytes",
        "Write-ahead log that the primary keeps for our slot",
        state.on_primary.held.as_ref().map(|held| held.bytes as f64),
    );
    page.plain(
        "peer_wal_unconfirmed_bytes",
        "Part of this log that our slot has not confirmed",
        state
            .on_primary
            .held
            .as_ref()
            .map(|held| held.unconfirmed as f64),
    );
    if let Some(found) = &state.on_primary.footprint {
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
            .checks
            .compared
            .map(|time| time.timestamp_millis() as f64 / 1e3),
    );
    let (done, total) = view.meter().progress();
    page.plain(
        "baseline_progress_ratio",
        "Progress of the current phase of the running copy, 0 to 1",
        (state.spare.baseline.is_some() && total > 0)
            .then(|| (done as f64 / total as f64).min(1.0)),
    );
}

fn sides(page: &mut Page, state: &ServiceState) {
    let sides = [("local", &state.local), ("peer", &state.peer)];
    let mut reachable = Vec::new();
    let mut fenced = Vec::new();
    for (side, seen) in sides {
        let mut add = |store: &str, reach: &Option<Reachability>| {
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

fn upkeep(page: &mut Page, state: &ServiceState, meter: &Meter) {
    if let Some(found) = &state.spare.artifacts {
        let awaited = awaited(state, meter).map_or(0, |(number, ..)| number as u64);
        let counts = [
            ("missing_on_primary", Some(found.missing)),
            ("damaged_on_primary", Some(found.damaged)),
            (
                "unreadable_on_primary",
                Some(
                    state
                        .spare
                        .unreadable
                        .as_ref()
                        .map_or(0, |(number, _)| *number),
                ),
            ),
            (
                "unstorable",
                Some(
                    state
                        .spare
                        .unstorable
                        .as_ref()
                        .map_or(0, |(number, _)| *number),
                ),
            ),
            (
                "not_replicated",
                Some(
                    state
                        .spare
                        .not_replicated
                        .as_ref()
                        .map_or(0, |(number, _)| *number),
                ),
            ),
            ("unproven", Some(state.spare.unproven.left)),
            ("awaited", Some(awaited)),
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
    let verified = state
        .checks
        .verified
        .as_ref()
        .map(|verified| &verified.record);
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
    let drill = state.checks.drill.as_ref();
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
        state.generations.bytes.map(|bytes| bytes as f64),
    );
}

fn archives(page: &mut Page, state: &ServiceState) {
    let seconds = |time: chrono::DateTime<chrono::Utc>| time.timestamp_millis() as f64 / 1e3;
    let all = |of: &dyn Fn(&ArchiveFacts) -> Option<f64>| -> Vec<(Labels, f64)> {
        let known = state.archives.iter();
        let known =
            known.filter_map(|archive| Some((one("archive", archive.name.as_str()), of(archive)?)));
        known.collect()
    };
    page.gauge(
        "archive_newest_timestamp_seconds",
        "Time to which the newest generation belongs",
        all(&|archive| Some(seconds(archive.newest.as_ref()?.time))),
    );
    page.gauge(
        "archive_made_timestamp_seconds",
        "Time at which the newest generation was finished",
        all(&|archive| Some(seconds(archive.newest.as_ref()?.made))),
    );
    page.gauge(
        "archive_generations",
        "Generations in the archive",
        all(&|archive| Some(archive.generations? as f64)),
    );
    page.gauge(
        "archive_trouble",
        "1: the last work on the archive failed",
        all(&|archive| Some(flag(archive.trouble.is_some()))),
    );
    page.gauge(
        "archive_verified_timestamp_seconds",
        "Time at which the last verification of the archive ended",
        all(&|archive| Some(seconds(archive.proof.verified?))),
    );
    page.gauge(
        "archive_faults",
        "Files that the last verification found missing or damaged",
        all(&|archive| archive.proof.verified.map(|_| archive.proof.faults as f64)),
    );
    page.gauge(
        "archive_oldest_proof_timestamp_seconds",
        "Time of the oldest proof of all files that a generation names",
        all(&|archive| Some(seconds(archive.proof.oldest?))),
    );
}
