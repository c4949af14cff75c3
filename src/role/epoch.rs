//! Two clusters, one primary: who of them is it? Decided from what both have on record alone.

use crate::cluster::{Promotion, Record};

/// A primary, as it has itself on record.
#[derive(Debug, Clone)]
pub struct Ours<'a> {
    pub epoch: i64,
    pub system_id: &'a str,
    pub promotion: Option<&'a Promotion>,
}

/// Its peer, as it was seen.
#[derive(Debug, Clone, Default)]
pub struct Theirs {
    pub system_id: String,
    /// Its database is read-only by default.
    pub fenced: bool,
    pub record: Option<Record>,
}

/// How a primary stands beside its peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stand {
    /// It is our spare.
    Followed,
    /// It is not, and is no primary either; why nobody could take over.
    Alone(String),
    /// The old primary may still be written to.
    FencePeer,
    /// The old primary is fenced, and does not follow yet.
    PeerFenced,
    /// It is the newer primary: this one gives way.
    FenceSelf { epoch: i64, by: String },
    /// Nobody can tell who is the newer one; what is known.
    TwoPrimaries(String),
}

pub fn decide(ours: &Ours<'_>, theirs: &Theirs) -> Stand {
    let record = theirs.record.clone().unwrap_or_default();
    let known = ours
        .promotion
        .is_some_and(|promotion| is_recorded(promotion, theirs, &record));
    match record.role.as_deref() {
        Some("spare") if record.copied_from.as_deref() == Some(ours.system_id) => Stand::Followed,
        Some("spare") => {
            Stand::Alone("the peer is a spare, but has copied nothing from here yet".into())
        }
        // One that is read-only itself is nobody to give way to.
        Some("primary") if record.epoch > ours.epoch && theirs.fenced => {
            Stand::TwoPrimaries(format!(
                "the peer is the primary of the higher epoch {}, and read-only",
                record.epoch
            ))
        }
        Some("primary") if record.epoch > ours.epoch => Stand::FenceSelf {
            epoch: record.epoch,
            by: record.cluster_id,
        },
        // Another spare's, or its own choice: it is read-only, whoever is asked.
        _ if theirs.fenced && record.fence.is_some_and(|fence| fence.epoch >= ours.epoch) => {
            Stand::PeerFenced
        }
        _ if known => Stand::FencePeer,
        Some("primary") if record.epoch == ours.epoch => Stand::TwoPrimaries(format!(
            "both clusters are the primary of epoch {}",
            ours.epoch
        )),
        Some("primary") => Stand::TwoPrimaries(format!(
            "the peer is a primary too, of the lower epoch {}, and is not the server that was followed here: it gives way when its own warm-spare sees this one",
            record.epoch
        )),
        _ => Stand::Alone("the peer has no role on record".into()),
    }
}

/// Only the server that was recorded while following is ever fenced.
pub fn is_recorded(promotion: &Promotion, theirs: &Theirs, record: &Record) -> bool {
    promotion.system_id == theirs.system_id
        && (promotion.peer_cluster.is_empty() || promotion.peer_cluster == record.cluster_id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::FenceRecord;

    fn promotion() -> Promotion {
        Promotion {
            epoch: 2,
            kind: "failover".into(),
            time: chrono::DateTime::UNIX_EPOCH,
            lsn: "0/1".into(),
            commit_time: None,
            system_id: "old".into(),
            timeline: 1,
            peer_cluster: String::new(),
            slot: String::new(),
            publication: String::new(),
            peer_fenced: false,
            settled: false,
        }
    }

    fn peer(system_id: &str, role: Option<&str>, epoch: i64) -> Theirs {
        Theirs {
            system_id: system_id.into(),
            fenced: false,
            record: Some(Record {
                cluster_id: "aaaaaaaa".into(),
                role: role.map(String::from),
                epoch,
                ..Record::default()
            }),
        }
    }

    #[track_caller]
    fn expect(theirs: &Theirs, stand: impl Fn(&Stand) -> bool) {
        let promotion = promotion();
        let ours = Ours {
            epoch: 2,
            system_id: "new",
            promotion: Some(&promotion),
        };
        let found = decide(&ours, theirs);
        assert!(stand(&found), "{found:?}");
    }

    #[test]
    fn the_server_that_was_followed_is_fenced_whatever_it_says_of_itself() {
        let stock = Theirs {
            system_id: "old".into(),
            ..Theirs::default()
        };
        expect(&stock, |s| *s == Stand::FencePeer);
        expect(&peer("old", None, 0), |s| *s == Stand::FencePeer);
        expect(&peer("old", Some("primary"), 1), |s| *s == Stand::FencePeer);
        // Declared with the same number meanwhile: it is still the one whose place was taken.
        expect(&peer("old", Some("primary"), 2), |s| *s == Stand::FencePeer);
    }

    #[test]
    fn another_server_is_never_fenced() {
        let stock = Theirs {
            system_id: "third".into(),
            ..Theirs::default()
        };
        expect(&stock, |s| matches!(s, Stand::Alone(_)));
        expect(&peer("third", Some("primary"), 1), |s| {
            matches!(s, Stand::TwoPrimaries(_))
        });
        expect(&peer("third", Some("primary"), 2), |s| {
            matches!(s, Stand::TwoPrimaries(_))
        });
        // Restored under the same system id, by another cluster's hand.
        let mut promotion = promotion();
        promotion.peer_cluster = "bbbbbbbb".into();
        let ours = Ours {
            epoch: 2,
            system_id: "new",
            promotion: Some(&promotion),
        };
        let found = decide(&ours, &peer("old", Some("primary"), 1));
        assert!(matches!(found, Stand::TwoPrimaries(_)), "{found:?}");
    }

    #[test]
    fn the_lower_epoch_gives_way() {
        expect(&peer("old", Some("primary"), 3), |s| {
            matches!(s, Stand::FenceSelf { epoch: 3, .. })
        });
        expect(&peer("third", Some("primary"), 3), |s| {
            matches!(s, Stand::FenceSelf { epoch: 3, .. })
        });
    }

    #[test]
    fn nobody_gives_way_to_one_that_cannot_be_written_to() {
        let mut theirs = peer("old", Some("primary"), 3);
        theirs.fenced = true;
        expect(&theirs, |s| matches!(s, Stand::TwoPrimaries(_)));
    }

    #[test]
    fn a_fence_counts_only_with_its_setting_and_its_epoch() {
        let mut theirs = peer("old", Some("primary"), 1);
        let record = theirs.record.as_mut().expect("a record");
        record.fence = Some(FenceRecord {
            lifted: false,
            epoch: 2,
            by_cluster: "us".into(),
            since: chrono::DateTime::UNIX_EPOCH,
            settled: true,
        });
        expect(&theirs, |s| *s == Stand::FencePeer);
        theirs.fenced = true;
        expect(&theirs, |s| *s == Stand::PeerFenced);
        theirs.record.as_mut().expect("a record").fence = None;
        expect(&theirs, |s| *s == Stand::FencePeer);
    }

    #[test]
    fn a_spare_follows_only_with_a_copy_of_ours() {
        let mut theirs = peer("old", Some("spare"), 2);
        expect(&theirs, |s| matches!(s, Stand::Alone(_)));
        theirs.record.as_mut().expect("a record").copied_from = Some("new".into());
        expect(&theirs, |s| *s == Stand::Followed);
    }
}
