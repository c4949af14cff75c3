//! The preflight: the checks that a promotion would meet, which can be run on any day. It only
//! reads, except for a probe object that is written to the local bucket and deleted again. Its cost
//! does not depend on the amount of data.
//!
//! First the facts are gathered, on both sides at once. Then each check judges them, and asks
//! nothing more.

mod copied;
mod external;
mod facts;
mod here;
mod keys;
mod node;
mod servers;
mod shared;
mod standing;
mod supervisor;
mod there;

use crate::cluster::PeerCluster;
use crate::config::Config;
use crate::domain::{PreflightCheck, Verdict};
use crate::observe::Check;
use crate::replication::ReplicationError;
use facts::Facts;
pub use node::{checks_of_this_node, checks_to_text};
pub(super) use standing::CLOCK_WAIT;
use std::time::Duration;
pub(super) use there::ID_SLACK;

/// The kind of promotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A handover with the help of the primary, without a loss.
    Planned,
    /// The primary is gone.
    Unplanned,
}

impl Purpose {
    pub fn as_str(self) -> &'static str {
        match self {
            Purpose::Planned => "planned",
            Purpose::Unplanned => "unplanned",
        }
    }
}

/// The only checks that refuse a promotion when the primary is gone, because nothing else is as bad
/// as no Builder at all.
const WITHOUT_WHICH_NOTHING: [PreflightCheck; 4] = [
    PreflightCheck::RecoveryPoint,
    PreflightCheck::Artifacts,
    PreflightCheck::BuilderKeys,
    PreflightCheck::Bucket,
];

/// Runs all checks. `patience` is the time limit for the peer.
pub async fn preflight(
    config: &Config,
    peer: &PeerCluster<'_>,
    purpose: Purpose,
    patience: Duration,
) -> Vec<Check> {
    let facts = Box::pin(Facts::gather(config, peer, purpose, patience)).await;
    let mut checks = vec![
        copied::recovery_point(&facts),
        copied::lag(&facts),
        copied::artifacts(&facts),
        copied::verification(&facts),
        servers::versions(&facts),
        servers::no_way_back(&facts),
        servers::extensions(&facts),
        servers::clients(&facts),
        servers::disk(&facts),
        servers::privileges(&facts),
        standing::fence(&facts),
        standing::peer_identity(&facts),
        standing::peer_reachable(&facts),
        servers::tls(&config.peer),
        node::builder_keys(&facts),
        servers::bucket(&facts),
        shared::lease(&facts),
        shared::builder_api(&facts),
        standing::wal(&facts),
        standing::clocks(&facts),
        node::supervisor(&facts),
        node::standby_lives(&facts),
        copied::read_only_time(&facts),
        copied::mode(&facts),
    ];
    if purpose == Purpose::Unplanned {
        checks.iter_mut().for_each(soften);
    }
    checks
}

/// Returns the result for an unplanned promotion, from the checks of a planned one.
pub fn unplanned(checks: &[Check]) -> Verdict {
    let mut checks = checks.to_vec();
    checks.iter_mut().for_each(soften);
    worst(&checks)
}

/// Returns the worst result; ok if there is none.
pub fn worst(checks: &[Check]) -> Verdict {
    let results = checks.iter().map(|check| check.result);
    results.max().unwrap_or(Verdict::Ok)
}

fn soften(check: &mut Check) {
    if check.result == Verdict::Refuse && !WITHOUT_WHICH_NOTHING.contains(&check.name) {
        check.result = Verdict::Warn;
    }
}

fn ok(name: PreflightCheck, reason: impl Into<String>) -> Check {
    Check {
        name,
        result: Verdict::Ok,
        reason: reason.into(),
        next_step: String::new(),
        primary_lives: false,
    }
}

fn warn(name: PreflightCheck, reason: impl Into<String>, next_step: impl Into<String>) -> Check {
    Check {
        next_step: next_step.into(),
        result: Verdict::Warn,
        ..ok(name, reason)
    }
}

fn refuse(name: PreflightCheck, reason: impl Into<String>, next_step: impl Into<String>) -> Check {
    Check {
        result: Verdict::Refuse,
        ..warn(name, reason, next_step)
    }
}

/// Makes a refusal for a check that could not run.
fn unknown(name: PreflightCheck, error: &ReplicationError) -> Check {
    Check {
        primary_lives: error.shows_life_of_peer(),
        ..refuse(name, error.to_string(), error.next_step())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use strum::VariantArray;

    #[test]
    fn an_unplanned_promotion_is_refused_for_four_reasons_only() {
        for &name in PreflightCheck::VARIANTS {
            let mut check = refuse(name, "", "");
            soften(&mut check);
            let stays = matches!(
                name,
                PreflightCheck::RecoveryPoint
                    | PreflightCheck::Artifacts
                    | PreflightCheck::BuilderKeys
                    | PreflightCheck::Bucket
            );
            assert_eq!(check.result == Verdict::Refuse, stays, "{name}");
        }
    }

    /// The service runs the checks in a task of its own.
    #[allow(dead_code)]
    fn it_may_be_a_task(config: &Config, peer: &PeerCluster<'_>) -> impl Send {
        preflight(config, peer, Purpose::Planned, Duration::ZERO)
    }

    #[test]
    fn the_worst_counts() {
        assert_eq!(worst(&[]), Verdict::Ok);
        let found = [
            ok(PreflightCheck::Lag, ""),
            refuse(PreflightCheck::Wal, "", ""),
            warn(PreflightCheck::Disk, "", ""),
        ];
        assert_eq!(worst(&found), Verdict::Refuse);
        assert_eq!(worst(&found[..1]), Verdict::Ok);
    }
}
