//! Values that only grow, as long as the process lives.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

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
    pub artifact_arrival: Histogram,
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
            // A provider needs between a moment and some hours.
            artifact_arrival: Histogram::new([
                0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0,
            ]),
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

    pub(super) fn register(&self, registry: &mut Registry) {
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
            "artifact_arrival_seconds",
            "Time for which artifacts were awaited from the provider of the bucket, once their rows had arrived",
            self.artifact_arrival.clone(),
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
