//! The health of the artifacts that the provider of the bucket replicates.

use super::{Findings, Level};
use crate::domain::HealthCode;
use crate::observe::meter::Meter;
use crate::observe::state::ServiceState;
use std::time::Duration;

/// Returns the artifacts that the stream or a pass awaits from the provider of the bucket: their
/// number, the key of one, and the time since then.
pub(in crate::observe) fn awaited(
    state: &ServiceState,
    meter: &Meter,
) -> Option<(usize, String, Duration)> {
    let arrivals = &state.spare.arrivals;
    if let Some((key, waits)) = arrivals.oldest() {
        return Some((arrivals.awaited(), key.to_string(), waits));
    }
    let of_pass = meter.awaited().filter(|_| state.spare.baseline.is_some())?;
    Some((of_pass.artifacts, of_pass.example, of_pass.since.elapsed()))
}

/// Looks at the artifacts that the provider of the bucket replicates.
pub(super) fn of_the_provider(state: &ServiceState, meter: &Meter, found: &mut Findings) {
    if let Some((number, key)) = &state.spare.not_replicated {
        let text = format!(
            "artifacts that the provider of the bucket never brings: {number}, for example {key}"
        );
        found.add(Level::Critical, HealthCode::NotReplicated, text);
    }
    let warn = state.settings.lag_warn.to_std().unwrap_or_default();
    if let Some((number, key, waits)) = awaited(state, meter)
        && waits > warn
    {
        let text = format!(
            "the provider of the bucket is {} behind: {number} artifacts are awaited, such as {key}",
            crate::observe::text::span(waits.as_secs_f64()),
        );
        found.add(Level::Warning, HealthCode::ProviderBehind, text);
    }
}
