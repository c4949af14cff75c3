//! `preflight`: 0 a promotion would work, 1 it would be refused, 3 the checks could not run.

use super::{exit, show};
use crate::cluster::{LocalCluster, PeerCluster};
use crate::config::Config;
use crate::domain::{PreflightCheck, Verdict};
use crate::observe::Check;
use crate::role::{Purpose, preflight, worst};
use clap::ValueEnum;
use serde_json::json;
use std::time::Duration;
use strum::VariantArray;

/// Time limit for the answers of the peer. An operator waits for the result, and a peer that takes
/// longer cannot be drained either.
const PEER_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, ValueEnum)]
pub enum For {
    /// A handover with the help of the primary.
    Planned,
    /// The primary is gone.
    Unplanned,
}

impl From<For> for Purpose {
    fn from(wanted: For) -> Self {
        match wanted {
            For::Planned => Purpose::Planned,
            For::Unplanned => Purpose::Unplanned,
        }
    }
}

pub(super) async fn run(config: &Config, purpose: Purpose, as_json: bool) -> u8 {
    let checks = preflight(config, &PeerCluster::of(config), purpose, PEER_TIMEOUT).await;
    let result = worst(&checks);
    if result == Verdict::Refuse {
        // If the local datastore is down, every check reports only that, and the question stays
        // open.
        let asked = LocalCluster::of(config).maintenance().await;
        if let Err(error) = asked {
            return show::failure(&error.into(), as_json);
        }
    }
    if as_json {
        show::json(&document(purpose, &checks));
    } else {
        print(purpose, &checks);
    }
    match result {
        Verdict::Refuse => exit::NO,
        Verdict::Ok | Verdict::Warn => exit::DONE,
    }
}

fn print(purpose: Purpose, checks: &[Check]) {
    let width = PreflightCheck::VARIANTS
        .iter()
        .map(|check| check.into_str().len())
        .max()
        .unwrap_or(0);
    for check in checks {
        let (result, name) = (check.result.into_str(), check.name);
        say!("{result:<6}  {name:<width$}  {}", check.reason);
        if !check.next_step.is_empty() {
            say!("{:<6}  {:<width$}  → {}", "", "", check.next_step);
        }
    }
    say!("{}", summary(purpose, checks));
}

/// Returns the last line, such as `planned: refuse (1 refusal, 2 warnings)`.
fn summary(purpose: Purpose, checks: &[Check]) -> String {
    let count = |wanted: Verdict, noun: &str| {
        let number = checks.iter().filter(|check| check.result == wanted).count();
        (number > 0).then(|| show::count(number as u64, noun))
    };
    let counts = [
        count(Verdict::Refuse, "refusal"),
        count(Verdict::Warn, "warning"),
    ];
    let counts: Vec<String> = counts.into_iter().flatten().collect();
    let result = worst(checks).into_str();
    match counts.is_empty() {
        true => format!("{}: {result}", purpose.as_str()),
        false => format!("{}: {result} ({})", purpose.as_str(), counts.join(", ")),
    }
}

fn document(purpose: Purpose, checks: &[Check]) -> serde_json::Value {
    json!({
        "format": 1,
        "for": purpose.as_str(),
        "result": worst(checks).into_str(),
        "checks": checks.iter().map(|check| json!({
            "name": check.name.into_str(),
            "result": check.result.into_str(),
            "reason": check.reason,
            "next_step": check.next_step,
        })).collect::<Vec<_>>(),
    })
}
