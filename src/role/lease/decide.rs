//! The rules of the lease: what a cluster may do about the lease that it has read.

use crate::cluster::{LeaseRecord, Lineage};
use crate::domain::{Lease, LeaseState};

/// This cluster, as its own records describe it.
#[derive(Debug, Clone)]
pub(super) struct Own<'a> {
    pub cluster: &'a str,
    pub epoch: i64,
    pub lineage: &'a Lineage,
    /// The lease that it saw or wrote last. None: it has never seen one.
    pub seen: Option<&'a LeaseRecord>,
}

/// The next act of an acting primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HolderAct {
    /// Creates the lease, because this pair of clusters has never had one.
    Create,
    Renew,
    /// Lifts the fence that was set for a takeover which was undone, and then renews.
    Lift,
    /// Takes a lease of an older epoch of the same line: this cluster was promoted since.
    Claim,
    /// Fences itself for the cluster that asks, proves the fence, and writes so.
    Answer {
        epoch: i64,
        by: String,
    },
    /// Fences itself for good: another cluster holds the lease under a higher epoch.
    GiveWay {
        epoch: i64,
        by: String,
    },
    /// Waits: the fence stands, and the asking cluster has the next word.
    Wait,
    /// Writes nothing, and has no right to go on by this lease.
    Doubt(String),
}

/// Why a lease is not believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stranger {
    /// The store was set back to an older copy.
    WentBack {
        seen: u64,
        found: u64,
    },
    /// Somebody deleted the lease, and another one was made.
    OtherSeries,
    OtherLine,
}

impl std::fmt::Display for Stranger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Stranger::WentBack { seen, found } => write!(
                f,
                "the lease is write {found} of its series, and this cluster has seen write {seen}: the store was set back to an older copy"
            ),
            Stranger::OtherSeries => f.write_str(
                "the lease is not of the series that this cluster knows: somebody deleted the lease, or the bucket is another one",
            ),
            Stranger::OtherLine => {
                f.write_str("the lease is of another line of promotions: another pair of clusters uses this bucket")
            }
        }
    }
}

/// Returns whether the lease is of this pair of clusters, and no older copy of it.
pub(super) fn belongs(own: &Own<'_>, lease: &Lease) -> Result<(), Stranger> {
    let line = &lease.line;
    let knows = |id: &str| !id.is_empty() && own.lineage.entries().iter().any(|one| one.id == id);
    // A lease of the known series goes on from the last one, whatever promotions were missed here.
    // A cluster that has followed nobody yet knows no promotion.
    let is_known = own.seen.is_some_and(|seen| seen.series == lease.series);
    let is_kin = line.holder == own.cluster || knows(&line.promotion) || knows(&line.parent);
    if !is_known && !is_kin && !own.lineage.is_empty() {
        return Err(Stranger::OtherLine);
    }
    match own.seen {
        Some(seen) if seen.series != lease.series => Err(Stranger::OtherSeries),
        Some(seen) if seen.number > lease.number => Err(Stranger::WentBack {
            seen: seen.number,
            found: lease.number,
        }),
        _ => Ok(()),
    }
}

/// Decides for an acting primary. None: there is no lease.
pub(super) fn holder_act(own: &Own<'_>, lease: Option<&Lease>) -> HolderAct {
    let Some(lease) = lease else {
        return match own.seen {
            None => HolderAct::Create,
            Some(_) => HolderAct::Doubt(
                "the lease is gone: somebody deleted it, or the bucket is another one".into(),
            ),
        };
    };
    if let Err(stranger) = belongs(own, lease) {
        return HolderAct::Doubt(stranger.to_string());
    }
    let line = &lease.line;
    if line.holder != own.cluster {
        return match line.epoch.cmp(&own.epoch) {
            std::cmp::Ordering::Greater => HolderAct::GiveWay {
                epoch: line.epoch,
                by: line.holder.clone(),
            },
            // This cluster was promoted without the lease, while the store was away.
            std::cmp::Ordering::Less => HolderAct::Claim,
            std::cmp::Ordering::Equal => HolderAct::Doubt(format!(
                "cluster {} holds the lease under epoch {}, which is the epoch of this cluster too",
                line.holder, line.epoch
            )),
        };
    }
    if line.epoch > own.epoch {
        return HolderAct::Doubt(format!(
            "this cluster holds the lease under epoch {}, and has only epoch {} on record: its state was set back, or a takeover is under way here",
            line.epoch, own.epoch
        ));
    }
    let fenced_for = own.seen.and_then(|seen| seen.fenced_for);
    match (lease.state, &lease.asked_by) {
        (LeaseState::Held, None) if fenced_for.is_some() => HolderAct::Lift,
        (LeaseState::Held, None) => HolderAct::Renew,
        (LeaseState::Held | LeaseState::Asked, Some(asker)) if asker.epoch > own.epoch => {
            HolderAct::Answer {
                epoch: asker.epoch,
                by: asker.cluster.clone(),
            }
        }
        // Somebody asks for an epoch that is over.
        (LeaseState::Held | LeaseState::Asked, _) => HolderAct::Renew,
        (LeaseState::Fenced, Some(asker)) if asker.epoch <= own.epoch => HolderAct::Renew,
        (LeaseState::Fenced | LeaseState::Free, _) if fenced_for.is_some() => HolderAct::Wait,
        // The answer was written by a process that did not record it: the fence comes first.
        (LeaseState::Fenced | LeaseState::Free, Some(asker)) => HolderAct::Answer {
            epoch: asker.epoch,
            by: asker.cluster.clone(),
        },
        (LeaseState::Fenced | LeaseState::Free, None) => HolderAct::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Asker, Isolated, LeaseLine, LeaseTerms};
    use chrono::DateTime;
    use std::time::Duration;

    fn seen(number: u64) -> LeaseRecord {
        LeaseRecord {
            series: "s".into(),
            number,
            epoch: 1,
            holder: "us".into(),
            nonce: "n".into(),
            fenced_for: None,
            promised: None,
            touched: false,
        }
    }

    fn own<'a>(lineage: &'a Lineage, seen: Option<&'a LeaseRecord>) -> Own<'a> {
        Own {
            cluster: "us",
            epoch: 1,
            lineage,
            seen,
        }
    }

    /// Returns write 5 of its series.
    fn lease(holder: &str, epoch: i64, promotion: &str, parent: &str) -> Lease {
        let line = LeaseLine {
            holder: holder.into(),
            site: String::new(),
            epoch,
            promotion: promotion.into(),
            parent: parent.into(),
        };
        let terms = LeaseTerms {
            ttl: Duration::from_secs(15),
            fence_bound: Duration::from_secs(15),
            isolated: Isolated::GoOn,
        };
        let mut lease = Lease::first(line, terms, "n".into(), DateTime::UNIX_EPOCH);
        (lease.series, lease.number) = ("s".into(), 5);
        lease
    }

    fn asked(mut lease: Lease, state: LeaseState, epoch: i64) -> Lease {
        lease.state = state;
        lease.asked_by = Some(Asker {
            cluster: "them".into(),
            epoch,
        });
        lease
    }

    fn is_doubt(act: &HolderAct, why: &str) -> bool {
        matches!(act, HolderAct::Doubt(text) if text.contains(why))
    }

    #[test]
    fn a_lease_is_created_once() {
        let lineage = Lineage::of_promotions(&[(1, "root")]);
        assert_eq!(holder_act(&own(&lineage, None), None), HolderAct::Create);
        let record = seen(5);
        let act = holder_act(&own(&lineage, Some(&record)), None);
        assert!(is_doubt(&act, "gone"), "{act:?}");
    }

    #[test]
    fn the_holder_renews_until_it_is_asked() {
        let lineage = Lineage::of_promotions(&[(1, "root")]);
        let (record, ours) = (seen(5), lease("us", 1, "root", ""));
        let known = own(&lineage, Some(&record));
        assert_eq!(holder_act(&known, Some(&ours)), HolderAct::Renew);
        let answer = HolderAct::Answer {
            epoch: 2,
            by: "them".into(),
        };
        let asks = asked(ours.clone(), LeaseState::Asked, 2);
        assert_eq!(holder_act(&known, Some(&asks)), answer);
        // It said that it cannot fence, and may be able to by now.
        let cannot = asked(ours.clone(), LeaseState::Held, 2);
        assert_eq!(holder_act(&known, Some(&cannot)), answer);
        let over = asked(ours.clone(), LeaseState::Asked, 1);
        assert_eq!(holder_act(&known, Some(&over)), HolderAct::Renew);
        let record = LeaseRecord {
            fenced_for: Some(2),
            ..seen(5)
        };
        let fenced = own(&lineage, Some(&record));
        let said = asked(ours.clone(), LeaseState::Fenced, 2);
        assert_eq!(holder_act(&fenced, Some(&said)), HolderAct::Wait);
        assert_eq!(holder_act(&known, Some(&said)), answer);
        // This cluster has taken its role back since.
        let later = Own {
            epoch: 3,
            ..fenced.clone()
        };
        assert_eq!(holder_act(&later, Some(&said)), HolderAct::Renew);
        // The takeover was undone: the lease names the holder again, and nobody asks.
        assert_eq!(holder_act(&fenced, Some(&ours)), HolderAct::Lift);
    }

    #[test]
    fn a_higher_epoch_of_the_same_line_is_obeyed() {
        let lineage = Lineage::of_promotions(&[(1, "root")]);
        let record = seen(4);
        let known = own(&lineage, Some(&record));
        let theirs = lease("them", 2, "x", "root");
        let way = HolderAct::GiveWay {
            epoch: 2,
            by: "them".into(),
        };
        assert_eq!(holder_act(&known, Some(&theirs)), way);
        let equal = holder_act(&known, Some(&lease("them", 1, "root", "")));
        assert!(is_doubt(&equal, "epoch of this cluster too"), "{equal:?}");
        // Two promotions were missed here, and the series goes on.
        let later = holder_act(&known, Some(&lease("third", 3, "y", "x")));
        assert!(
            matches!(later, HolderAct::GiveWay { epoch: 3, .. }),
            "{later:?}"
        );
        let never_seen = own(&lineage, None);
        let of_others = holder_act(&never_seen, Some(&lease("them", 2, "x", "another")));
        assert!(is_doubt(&of_others, "another pair"), "{of_others:?}");
    }

    #[test]
    fn a_promotion_without_the_store_claims_the_lease_when_the_store_is_back() {
        let lineage = Lineage::of_promotions(&[(1, "root"), (2, "x")]);
        let record = seen(4);
        let promoted = Own {
            epoch: 2,
            ..own(&lineage, Some(&record))
        };
        let former = lease("them", 1, "root", "");
        assert_eq!(holder_act(&promoted, Some(&former)), HolderAct::Claim);
    }

    #[test]
    fn a_store_that_was_set_back_is_not_written() {
        let lineage = Lineage::of_promotions(&[(1, "root"), (2, "x")]);
        let ours = lease("us", 1, "root", "");
        let record = seen(6);
        let act = holder_act(&own(&lineage, Some(&record)), Some(&ours));
        assert!(is_doubt(&act, "set back"), "{act:?}");
        let record = LeaseRecord {
            series: "t".into(),
            ..seen(4)
        };
        let act = holder_act(&own(&lineage, Some(&record)), Some(&ours));
        assert!(is_doubt(&act, "deleted"), "{act:?}");
    }
}
