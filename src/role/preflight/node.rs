//! Checks that only a node of the spare's site can make: it has Builder's keys and the Supervisor. A process that pushes runs at the primary's site, so it reads the results
//! that a node of the spare's site has recorded.

use super::facts::Facts;
use super::{here, keys, ok, supervisor, warn};
use crate::cluster::{LocalCluster, Node};
use crate::config::{Config, Direction};
use crate::domain::{PreflightCheck, Verdict};
use crate::observe::Check;
use crate::replication::ReplicationError;
use serde::{Deserialize, Serialize};

/// A result in the record of a node.
#[derive(Serialize, Deserialize)]
struct Told {
    name: String,
    result: String,
    reason: String,
    next_step: String,
}

/// Makes these checks on this node.
pub async fn checks_of_this_node(config: &Config) -> Vec<Check> {
    let (sealed, seen) = tokio::join!(Box::pin(sealed(config)), supervisor::look());
    vec![
        keys::builder_keys(config, sealed.as_deref()),
        ok(PreflightCheck::Supervisor, seen),
    ]
}

async fn sealed(config: &Config) -> Result<Vec<here::Sealed>, ReplicationError> {
    let session = LocalCluster::of(config).builder().await?;
    here::sealed(&session).await
}

/// Writes results in the form of the record.
pub fn checks_to_text(checks: &[Check]) -> String {
    let told = checks.iter().map(|check| Told {
        name: check.name.to_string(),
        result: check.result.to_string(),
        reason: check.reason.clone(),
        next_step: check.next_step.clone(),
    });
    serde_json::to_string(&told.collect::<Vec<_>>()).unwrap_or_default()
}

/// Reads a result. None: the node has not recorded it, or another version of the program has
/// written it in another form.
fn check_of(text: &str, name: PreflightCheck) -> Option<Check> {
    let told: Vec<Told> = serde_json::from_str(text).ok()?;
    let found = told.into_iter().find(|told| told.name == name.into_str())?;
    Some(Check {
        result: found.result.parse::<Verdict>().ok()?,
        next_step: found.next_step,
        ..ok(name, found.reason)
    })
}

/// Returns the nodes that wait at the spare's site, if this process is not at that site itself.
pub(super) async fn standbys(config: &Config) -> Vec<Node> {
    if config.replication.direction == Direction::Pull {
        return Vec::new();
    }
    LocalCluster::of(config).living_standbys().await
}

pub(super) fn builder_keys(facts: &Facts) -> Check {
    of(facts, PreflightCheck::BuilderKeys, || {
        keys::builder_keys(facts.config, facts.sealed())
    })
}

pub(super) fn supervisor(facts: &Facts) -> Check {
    of(facts, PreflightCheck::Supervisor, || {
        ok(PreflightCheck::Supervisor, facts.supervisor.clone())
    })
}

/// Returns our own result, or the recorded one if this process is not at the spare's site.
fn of(facts: &Facts, name: PreflightCheck, own: impl FnOnce() -> Check) -> Check {
    if facts.config.replication.direction == Direction::Pull {
        return own();
    }
    let told = facts.standbys.iter();
    let told = told.filter_map(|node| Some((node, check_of(&node.told.checks, name)?)));
    // A node without Builder can only warn that it cannot tell.
    let weight = |check: &Check| match check.result {
        Verdict::Refuse => 2,
        Verdict::Ok => 1,
        Verdict::Warn => 0,
    };
    match told.max_by_key(|(_, check)| weight(check)) {
        Some((node, check)) => Check {
            reason: format!("{} (told by {})", check.reason, node.place()),
            ..check
        },
        None => warn(
            name,
            "not known: only a node of the spare's site can check this, and none has told it in the last 30 s",
            START_ONE,
        ),
    }
}

const START_ONE: &str = "start warm-spare at the spare's site too, with the same configuration but replication.direction = \"pull\"";

pub(super) fn standby_lives(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Standby;
    match (facts.standbys.first(), facts.config.replication.direction) {
        (_, Direction::Pull) => ok(NAME, "this node is at the spare's site"),
        (Some(node), Direction::Push) => ok(
            NAME,
            format!(
                "{} waits at the spare's site and can take over",
                node.place()
            ),
        ),
        (None, Direction::Push) => warn(
            NAME,
            "no node of the spare's site has told anything in the last 30 s: if this site is lost, nobody there takes over",
            START_ONE,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recorded_result_is_read_again() {
        let checks = [
            ok(PreflightCheck::Supervisor, "it runs"),
            super::super::refuse(PreflightCheck::BuilderKeys, "no key", "copy it"),
        ];
        let text = checks_to_text(&checks);
        for check in checks {
            assert_eq!(check_of(&text, check.name), Some(check));
        }
        assert_eq!(check_of(&text, PreflightCheck::BuilderApi), None);
        for strange in ["", "[]", "{}", r#"[{"name":"supervisor"}]"#] {
            assert_eq!(check_of(strange, PreflightCheck::Supervisor), None);
        }
        let newer = text.replace("\"ok\"", "\"splendid\"");
        assert_eq!(check_of(&newer, PreflightCheck::Supervisor), None);
    }
}
