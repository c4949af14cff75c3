//! Decides whether this spare may follow the primary that it sees, and be overwritten by it. A
//! history that goes back is never followed without approval.
//!
//! A spare that has a recovery point holds history. Before anything of the peer is written here,
//! the peer must prove that its own history continues from that point. If the proof fails, the
//! spare holds and names both positions, and an operator decides.

use super::error::ReplicationError;
use crate::cluster::{
    DatastoreError, EPOCH_STEP_MAX, Lineage, LocalCluster, PeerCluster, Record, RecoveryPoint,
    StateDb,
};
use crate::config::{Config, Fuse};
use crate::domain::{ErrorCode, Lsn, Role};

/// The primary of a copy, as it describes itself.
#[derive(Debug, Clone)]
pub struct PrimaryLine {
    pub lineage: Lineage,
    pub epoch: i64,
    /// The id with which an operator has approved it, although its history does not continue ours.
    pub approved: Option<String>,
}

impl PrimaryLine {
    pub fn of(record: Option<&Record>, system_id: &str, approved: Option<String>) -> PrimaryLine {
        let primary = record.filter(|record| record.role == Some(Role::Primary));
        let lineage = match primary {
            Some(record) if !record.lineage.is_empty() => record.lineage.clone(),
            _ => Lineage::root(system_id),
        };
        PrimaryLine {
            lineage,
            epoch: primary.map_or(1, |record| record.epoch.max(1)),
            approved,
        }
    }
}

/// The known facts about this spare.
#[derive(Debug, Clone, Default)]
pub struct Here {
    pub record: Record,
    /// None: nothing was copied yet.
    pub point: Option<RecoveryPoint>,
}

impl Here {
    /// Reads the facts. Nothing is known about a cluster whose role was never declared.
    pub async fn read(config: &Config, state: &StateDb) -> Result<Here, ReplicationError> {
        let record = state.own_record().await?;
        if record.role != Some(Role::Spare) {
            return Ok(Here::default());
        }
        let point = match state.recovery_point().await? {
            Some(copied) => Some(LocalCluster::of(config).point(copied).await?),
            None => None,
        };
        Ok(Here { record, point })
    }
}

/// The server that is to be followed.
#[derive(Debug, Clone)]
pub struct There<'a> {
    pub record: Option<&'a Record>,
    pub system_id: &'a str,
    pub timeline: i32,
    /// End of its log; None: not asked.
    pub wal: Option<Lsn>,
    /// Its transactions, as a snapshot in text form, `xmin:xmax:…`; empty: not asked.
    pub transactions: String,
    /// Position at which the server's present timeline left the recovery point's timeline; None:
    /// not known.
    pub left_at: Option<Lsn>,
}

/// A reason against following, which an operator may overrule for exactly this case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doubt {
    pub rule: ErrorCode,
    pub text: String,
    /// The case that an operator's approval covers, as text that does not change while the case
    /// does not.
    pub case: String,
}

impl Doubt {
    pub fn set_back(point: &RecoveryPoint, text: String) -> Doubt {
        Doubt {
            rule: ErrorCode::SetBack,
            text,
            case: format!("{} {} {}", point.system_id, point.timeline, point.lsn),
        }
    }

    /// Returns the id with which an operator approves exactly this case.
    pub fn id(&self) -> String {
        let case = format!("{} {}", self.rule, self.case);
        let hash = blake2b_simd::Params::new()
            .hash_length(4)
            .hash(case.as_bytes());
        hash.to_hex().to_string()
    }

    fn next_step(&self, id: &str, fuse: &Fuse) -> String {
        if self.rule == ErrorCode::PrimaryLives {
            // A promotion without artifacts may have its own approval.
            let id = fuse.with(id);
            return format!(
                "correct the cause that the text names, or stop Builder there; it is tried again by itself. To promote this cluster beside a primary that can be written to, set fuse.approve = \"{id}\""
            );
        }
        let first = match self.rule {
            ErrorCode::SetBack | ErrorCode::OlderPrimary | ErrorCode::OtherLine => {
                "if the spare has what the primary lost, promote the spare (docs/takeover.md)"
            }
            ErrorCode::EndsExchanged => "if local and peer are exchanged, exchange them",
            _ => "if peer.datastore names the wrong server, correct it",
        };
        format!(
            "{first}; if the peer is right, let it be copied over this cluster with fuse.approve = \"{id}\": the replaced database is kept and pinned"
        )
    }

    /// Returns the approved id, if the operator has approved the case: then the peer is followed
    /// all the same, and the replaced database is pinned.
    pub fn ask(&self, config: &Config) -> Result<String, ReplicationError> {
        let id = self.id();
        if config.fuse.approves(&id) {
            log::warn!(
                "{}: let through by fuse.approve = {id:?}: {}",
                self.rule,
                self.text
            );
            return Ok(id);
        }
        Err(ReplicationError::Refused {
            rule: self.rule,
            text: format!("{}. Nothing was changed", self.text),
            next_step: self.next_step(&id, &config.fuse),
        })
    }
}

/// Returns the position at which the primary left the timeline of the recovery point; None: the
/// primary is on that timeline, or does not say.
pub(super) async fn left_at(
    config: &Config,
    point: Option<&RecoveryPoint>,
    timeline: i32,
) -> Result<Option<Lsn>, ReplicationError> {
    let Some(before) = point
        .map(|point| point.timeline)
        .filter(|before| timeline > *before)
    else {
        return Ok(None);
    };
    let asked = async {
        let mut session = PeerCluster::of(config).replication().await?;
        session.left_timeline(before, timeline).await
    };
    match asked.await {
        Ok(left) => Ok(left),
        // A transient error is no doubt; the question is asked again.
        Err(error) if error.is_transient() => Err(DatastoreError::into(error)),
        Err(error) => {
            log::warn!(
                "{error}; the position at which the primary left timeline {before} is not known"
            );
            Ok(None)
        }
    }
}

/// Returns the first doubt; the most serious kinds come first.
pub fn doubt(here: &Here, there: &There<'_>) -> Option<Doubt> {
    let epochs = there.record.and_then(|record| of_epochs(here, record));
    epochs.or_else(|| of_server(here, there))
}

fn of_epochs(here: &Here, record: &Record) -> Option<Doubt> {
    let ours = &here.record;
    let whom = format!("cluster {} of epoch {}", record.cluster_id, record.epoch);
    let case = format!(
        "{} {} {} {}",
        ours.epoch,
        head(&ours.lineage),
        record.epoch,
        head(&record.lineage)
    );
    let doubt = |rule, text| Some(Doubt { rule, text, case });
    if record.epoch > ours.epoch.max(1).saturating_add(EPOCH_STEP_MAX) {
        return doubt(
            ErrorCode::EpochOutOfRange,
            format!(
                "the peer says that it is {whom}, more than {EPOCH_STEP_MAX} above ours ({}): it is not believed",
                ours.epoch
            ),
        );
    }
    if record.role == Some(Role::Spare) {
        return doubt(
            ErrorCode::PeerIsSpare,
            format!("the peer is {whom}, a spare itself: only a primary is followed"),
        );
    }
    // A peer without a role: a Builder's server without `warm-spare`, or one with only the record
    // that our fence has left there.
    record.role.as_ref()?;
    if record.epoch < ours.epoch {
        return doubt(
            ErrorCode::OlderPrimary,
            format!(
                "the peer is {whom}, and this spare has followed epoch {}: it is an older primary, or its state was set back",
                ours.epoch
            ),
        );
    }
    if !record.lineage.is_empty() && !record.lineage.goes_on_from(&ours.lineage) {
        let known = head(&ours.lineage);
        return doubt(
            ErrorCode::OtherLine,
            format!(
                "the peer is {whom}, and its line of descent does not have promotion {known}, which this spare has followed"
            ),
        );
    }
    None
}

fn head(lineage: &Lineage) -> &str {
    lineage.head().map_or("none", |head| head.id.as_str())
}

/// Returns the server that this spare's lineage names, if nothing was copied from it yet.
fn expected_server(here: &Here) -> Option<&str> {
    if let Some(point) = &here.point {
        return Some(&point.system_id);
    }
    // A promotion by hand is in no lineage.
    let head = here.record.lineage.head();
    let head = head.filter(|head| head.epoch == here.record.epoch)?;
    Some(&head.system_id)
}

fn of_server(here: &Here, there: &There<'_>) -> Option<Doubt> {
    let expected = expected_server(here)?;
    if there.system_id != expected {
        // A newer promotion of our lineage, on another server.
        let proved = there.record.is_some_and(|record| {
            record.epoch > here.record.epoch
                && !here.record.lineage.is_empty()
                && record.lineage.goes_on_from(&here.record.lineage)
        });
        let point = here
            .point
            .as_ref()
            .map_or("none", |point| point.lsn.as_str());
        return (!proved).then(|| Doubt {
            rule: ErrorCode::OtherServer,
            text: format!(
                "the peer is another server than the one that was followed (system id {} instead of {expected})",
                there.system_id
            ),
            case: format!("{expected} {point} {}", there.system_id),
        });
    }
    let point = here.point.as_ref()?;
    let set_back = |text: String| Some(Doubt::set_back(point, text));
    let ours: Lsn = point.lsn.parse().ok()?;
    if there.timeline < point.timeline {
        return set_back(format!(
            "the primary is on timeline {}, and this spare has followed timeline {}: the primary was set back to an older copy",
            there.timeline, point.timeline
        ));
    }
    if there.timeline > point.timeline {
        return match there.left_at {
            Some(left) if left >= ours => None,
            Some(left) => set_back(format!(
                "the primary left timeline {} at {left}, and the spare has followed it to {ours}: the transactions in between are not on the primary any more",
                point.timeline
            )),
            None => set_back(format!(
                "the primary is on timeline {} instead of {}, and it is not known where it left that timeline: the spare may have transactions that the primary does not have",
                there.timeline, point.timeline
            )),
        };
    }
    if let Some(wal) = there.wal.filter(|wal| *wal < ours) {
        return set_back(format!(
            "the primary is at {wal}, before the spare ({ours}): the primary was set back to an older copy"
        ));
    }
    // All transactions before `xmin` had ended at that time. Numbers above it may be used again
    // after a crash.
    let number = |snapshot: &str, place: usize| snapshot.split(':').nth(place)?.parse::<u64>().ok();
    match (
        number(&there.transactions, 1),
        number(&point.transactions, 0),
    ) {
        (Some(next), Some(ended)) if next < ended => set_back(format!(
            "the primary's next transaction is number {next}, but the spare knows that all transactions before {ended} had ended: the primary was set back to an older copy"
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point() -> RecoveryPoint {
        RecoveryPoint {
            lsn: "0/200".into(),
            commit_time: chrono::DateTime::UNIX_EPOCH,
            system_id: "7".into(),
            timeline: 2,
            transactions: "90:100:".into(),
            ..RecoveryPoint::sample()
        }
    }

    fn record(role: Option<Role>, epoch: i64, promotions: &[(i64, &str)]) -> Record {
        Record {
            cluster_id: "aaaaaaaa".into(),
            role,
            epoch,
            lineage: Lineage::of_promotions(promotions),
            ..Record::default()
        }
    }

    const LINE: &[(i64, &str)] = &[(1, "root-7"), (3, "x")];

    fn here() -> Here {
        Here {
            record: record(Some(Role::Spare), 3, LINE),
            point: Some(point()),
        }
    }

    fn there(record: Option<&Record>) -> There<'_> {
        There {
            record,
            system_id: "7",
            timeline: 2,
            wal: Some(Lsn(0x200)),
            transactions: "100:100:".into(),
            left_at: None,
        }
    }

    #[track_caller]
    fn rule(there: &There<'_>) -> &'static str {
        doubt(&here(), there).map_or("", |doubt| doubt.rule.into())
    }

    #[test]
    fn the_server_that_was_followed_is_followed() {
        assert_eq!(rule(&there(None)), "");
        assert_eq!(
            rule(&there(Some(&record(Some(Role::Primary), 3, LINE)))),
            ""
        );
        assert_eq!(rule(&there(Some(&record(None, 0, &[])))), "");
        let next = record(Some(Role::Primary), 4, &[(1, "root-7"), (3, "x"), (4, "y")]);
        assert_eq!(rule(&there(Some(&next))), "");
    }

    #[test]
    fn no_older_primary_and_no_spare_is_followed() {
        let older = record(Some(Role::Primary), 2, &[(1, "root-7"), (2, "w")]);
        assert_eq!(rule(&there(Some(&older))), "older_primary");
        let spare = record(Some(Role::Spare), 3, LINE);
        assert_eq!(rule(&there(Some(&spare))), "peer_is_spare");
        let fork = record(Some(Role::Primary), 4, &[(1, "root-7"), (4, "z")]);
        assert_eq!(rule(&there(Some(&fork))), "other_line");
        let twin = record(Some(Role::Primary), 3, &[(1, "root-7"), (3, "z")]);
        assert_eq!(rule(&there(Some(&twin))), "other_line");
        let far = record(Some(Role::Primary), i64::MAX, LINE);
        assert_eq!(rule(&there(Some(&far))), "epoch_out_of_range");
    }

    #[test]
    fn another_server_must_prove_that_it_goes_on_from_here() {
        let mut other = there(None);
        other.system_id = "8";
        assert_eq!(rule(&other), "other_server");
        let same_epoch = record(Some(Role::Primary), 3, LINE);
        other.record = Some(&same_epoch);
        assert_eq!(rule(&other), "other_server");
        let next = record(Some(Role::Primary), 4, &[(1, "root-7"), (3, "x"), (4, "y")]);
        other.record = Some(&next);
        assert_eq!(rule(&other), "");
    }

    #[test]
    fn a_primary_that_was_set_back_is_not_followed() {
        let mut back = there(None);
        back.wal = Some(Lsn(0x1ff));
        assert_eq!(rule(&back), "set_back");
        let mut back = there(None);
        back.transactions = "80:89:".into();
        assert_eq!(rule(&back), "set_back");
        let mut back = there(None);
        back.timeline = 1;
        assert_eq!(rule(&back), "set_back");
    }

    #[test]
    fn a_new_timeline_must_have_begun_behind_the_spare() {
        let mut promoted = there(None);
        promoted.timeline = 3;
        for (left, expected) in [
            (None, "set_back"),
            (Some(0x1ff), "set_back"),
            (Some(0x200), ""),
        ] {
            promoted.left_at = left.map(Lsn);
            assert_eq!(rule(&promoted), expected, "{left:?}");
        }
    }

    #[test]
    fn an_approval_covers_one_case() {
        let first = Doubt::set_back(&point(), "at 0/1".into());
        let again = Doubt::set_back(&point(), "at 0/2".into());
        assert_eq!(first.id(), again.id());
        let later = RecoveryPoint {
            lsn: "0/300".into(),
            ..point()
        };
        assert_ne!(first.id(), Doubt::set_back(&later, String::new()).id());
    }
}
