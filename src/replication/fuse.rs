//! The fuse: stops a change that would shrink the spare by more than the operator's limit, and
//! asks.

use super::error::ReplicationError;
use crate::cluster::{BuilderDb, SpareDb, StateDb, Vanished, WriteSession};
use crate::config::{Config, Fuse};
use crate::domain::{ErrorCode, EventKind};
use blake2b_simd::Params;

/// The packages and artifacts that would vanish with this change, and those that vanished within
/// the window before it.
#[derive(Debug, Clone, Default)]
pub struct Shrinkage {
    /// Package rows of the visible database that the incoming one does not have (ident and target).
    pub packages: Vec<String>,
    pub packages_before: u64,
    /// Artifacts that would be admitted as missing or damaged for the first time.
    pub artifacts: Vec<String>,
    pub artifacts_before: u64,
    /// Packages and artifacts that vanished in earlier changes within the window, and are still
    /// gone.
    pub earlier_packages: u64,
    pub earlier_artifacts: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    Holds,
    /// Over the limit, and the operator has approved exactly this change.
    Approved {
        id: String,
    },
    Blown {
        id: String,
        text: String,
    },
}

/// Judges a change. `id` is made of the vanishing items, so it is the same at every try while the
/// primary does not change.
pub(super) fn judge(fuse: &Fuse, shrinkage: &Shrinkage) -> Verdict {
    let packages = shrinkage.packages.len() as u64 + shrinkage.earlier_packages;
    let artifacts = shrinkage.artifacts.len() as u64 + shrinkage.earlier_artifacts;
    let before = (
        shrinkage.packages_before + shrinkage.earlier_packages,
        shrinkage.artifacts_before + shrinkage.earlier_artifacts,
    );
    let mut told = Vec::new();
    if exceeds(fuse, packages, before.0) && !shrinkage.packages.is_empty() {
        told.push(format!(
            "{packages} of {} packages would vanish{}",
            before.0,
            earlier(shrinkage.earlier_packages)
        ));
    }
    if exceeds(fuse, artifacts, before.1) && !shrinkage.artifacts.is_empty() {
        told.push(format!(
            "{artifacts} of {} artifacts are missing or damaged on the primary{}",
            before.1,
            earlier(shrinkage.earlier_artifacts)
        ));
    }
    if told.is_empty() {
        return Verdict::Holds;
    }
    let id = change_id(shrinkage);
    if fuse.approves(&id) {
        return Verdict::Approved { id };
    }
    let examples: Vec<&str> = shrinkage
        .packages
        .iter()
        .chain(&shrinkage.artifacts)
        .take(3)
        .map(String::as_str)
        .collect();
    let text = format!(
        "{} within {}, more than fuse.max_percent = {} allows (for example {}). Nothing was changed",
        told.join(" and "),
        humantime::format_duration(fuse.window),
        fuse.max_percent,
        examples.join(", ")
    );
    Verdict::Blown { id, text }
}

/// Admits the change, or stops and asks. True: an operator approved it, so it is not counted for
/// later changes. `inside` is a session on the database as the change leaves it.
pub(super) async fn ask(
    config: &Config,
    state: &StateDb,
    change: Shrinkage,
    inside: &WriteSession,
) -> Result<bool, ReplicationError> {
    ask_again(config, state, change, "", inside).await
}

/// Does the same for a transaction that may have been tried and counted before; `lsn` is its end.
pub(super) async fn ask_again(
    config: &Config,
    state: &StateDb,
    change: Shrinkage,
    lsn: &str,
    inside: &WriteSession,
) -> Result<bool, ReplicationError> {
    match weigh(config, state, change, lsn, inside).await? {
        Verdict::Holds => Ok(false),
        Verdict::Approved { id } => {
            let text = format!("change {id} was let through by fuse.approve");
            log::warn!("fuse: {text}");
            state
                .event(EventKind::FuseApproved, &text, &config.change)
                .await?;
            Ok(true)
        }
        Verdict::Blown { id, text } => {
            state.event(EventKind::Fuse, &text, &config.change).await?;
            Err(ReplicationError::Refused {
                rule: ErrorCode::Fuse,
                text,
                next_step: format!(
                    "if this is right, let exactly this change through with fuse.approve = \"{id}\""
                ),
            })
        }
    }
}

/// Judges a change together with the earlier changes of the window.
async fn weigh(
    config: &Config,
    state: &StateDb,
    change: Shrinkage,
    lsn: &str,
    inside: &WriteSession,
) -> Result<Verdict, ReplicationError> {
    let lately = state.vanished_lately(config.fuse.window, lsn).await?;
    let (packages, artifacts) = gone_now(&lately, &change, inside).await?;
    let shrinkage = Shrinkage {
        earlier_packages: packages + lately.nameless.0,
        earlier_artifacts: artifacts + lately.nameless.1,
        ..change
    };
    Ok(judge(&config.fuse, &shrinkage))
}

/// Returns whether one more artifact of a visible row may be recorded as missing without a question.
/// Then it counts for later changes.
pub(super) async fn admits_missing(
    config: &Config,
    state: &StateDb,
    key: &str,
    inside: &WriteSession,
) -> Result<bool, ReplicationError> {
    let change = Shrinkage {
        artifacts: vec![key.to_string()],
        artifacts_before: BuilderDb::of(inside).count_packages().await?,
        ..Shrinkage::default()
    };
    let counted = change.artifacts.clone();
    let admitted = match weigh(config, state, change, "", inside).await? {
        Verdict::Holds | Verdict::Approved { .. } => true,
        Verdict::Blown { .. } => false,
    };
    if admitted {
        let window = config.fuse.window;
        state.vanished(&[], &counted, "", false, window).await?;
    }
    Ok(admitted)
}

/// Returns those of the recently vanished items that are gone now: packages without a row, and
/// artifacts recorded as unavailable, except the items of the change itself. A package that was
/// uploaded again is no loss; one that vanished again is one.
async fn gone_now(
    lately: &Vanished,
    change: &Shrinkage,
    inside: &WriteSession,
) -> Result<(u64, u64), ReplicationError> {
    if lately.packages.is_empty() && lately.artifacts.is_empty() {
        return Ok((0, 0));
    }
    let spare = SpareDb::of(inside);
    let packages = spare.absent_packages(&lately.packages, &change.packages);
    let artifacts = spare.unavailable_of(&lately.artifacts, &change.artifacts);
    Ok((packages.await?, artifacts.await?))
}

fn earlier(count: u64) -> String {
    match count {
        0 => String::new(),
        count => format!(" ({count} of them did already)"),
    }
}

fn exceeds(fuse: &Fuse, gone: u64, of: u64) -> bool {
    gone >= fuse.min_count.max(1) && gone * 100 > of * u64::from(fuse.max_percent)
}

fn change_id(shrinkage: &Shrinkage) -> String {
    let mut names: Vec<&String> = shrinkage
        .packages
        .iter()
        .chain(&shrinkage.artifacts)
        .collect();
    names.sort();
    let mut state = Params::new().hash_length(6).to_state();
    for name in names {
        state.update(name.as_bytes()).update(b"\n");
    }
    state.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn fuse() -> Fuse {
        Fuse {
            max_percent: 10,
            min_count: 20,
            window: Duration::from_secs(3600),
            approve: String::new(),
        }
    }

    fn gone(packages: usize, of: u64) -> Shrinkage {
        Shrinkage {
            packages: (0..packages).map(|n| format!("o/p{n}/1/1")).collect(),
            packages_before: of,
            ..Shrinkage::default()
        }
    }

    #[test]
    fn few_or_a_small_share_never_blow_it() {
        assert_eq!(judge(&fuse(), &gone(19, 19)), Verdict::Holds);
        assert_eq!(judge(&fuse(), &gone(20, 200)), Verdict::Holds);
        assert_eq!(judge(&fuse(), &Shrinkage::default()), Verdict::Holds);
    }

    #[test]
    fn many_and_a_large_share_blow_it_until_exactly_that_is_approved() {
        let Verdict::Blown { id, text } = judge(&fuse(), &gone(21, 200)) else {
            panic!("21 of 200 is more than 10 %");
        };
        assert!(text.contains("21 of 200 packages"), "{text}");
        let approving = Fuse {
            approve: id.clone(),
            ..fuse()
        };
        assert_eq!(judge(&approving, &gone(21, 200)), Verdict::Approved { id });
        assert!(matches!(
            judge(&approving, &gone(22, 200)),
            Verdict::Blown { .. }
        ));
    }

    #[test]
    fn many_small_changes_within_the_window_count_together() {
        let earlier = Shrinkage {
            earlier_packages: 18,
            ..gone(3, 182)
        };
        assert!(matches!(judge(&fuse(), &earlier), Verdict::Blown { .. }));
        let none_now = Shrinkage {
            earlier_packages: 50,
            ..gone(0, 150)
        };
        assert_eq!(
            judge(&fuse(), &none_now),
            Verdict::Holds,
            "a change that takes nothing is let through"
        );
    }

    #[test]
    fn missing_artifacts_count_as_vanishing() {
        let wrong_bucket = Shrinkage {
            artifacts: (0..30).map(|n| format!("key{n}")).collect(),
            artifacts_before: 30,
            ..Shrinkage::default()
        };
        assert!(matches!(
            judge(&fuse(), &wrong_bucket),
            Verdict::Blown { .. }
        ));
    }
}
