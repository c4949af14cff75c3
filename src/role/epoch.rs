//! Decides which of two clusters is the primary, only from the records of both.

use crate::cluster::{EPOCH_STEP_MAX, Promotion, Record};
use crate::domain::Role;

/// A primary, as its own record describes it.
#[derive(Debug, Clone)]
pub struct Ours<'a> {
    pub record: &'a Record,
    pub system_id: &'a str,
    /// Promotion of the recorded epoch; None: the cluster was made the primary by hand, or
    /// declared.
    pub promotion: Option<&'a Promotion>,
}

/// The peer, as it was seen.
#[derive(Debug, Clone, Default)]
pub struct PeerFacts {
    pub system_id: String,
    /// True: its database is read-only by default.
    pub fenced: bool,
    /// None: the peer has no database warm_spare.
    pub record: Option<Record>,
}

/// The relation of a primary to its peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stand {
    /// The peer is the spare of this cluster.
    Followed,
    /// The peer is neither the spare of this cluster nor a primary, with the reason why no spare
    /// could take over.
    Alone(String),
    /// Clients may still write to the old primary.
    FencePeer,
    /// The old primary is fenced, but does not follow yet.
    PeerFenced,
    /// The peer is the newer primary of the same line: this cluster gives way.
    FenceSelf { epoch: i64, by: String },
    /// It cannot be decided which primary is the newer one, with the known facts.
    TwoPrimaries(String),
    /// The peer is not of the same line: it is neither obeyed nor touched.
    Stranger(String),
    /// Clients may write to the server that was followed, and it has the record of another cluster:
    /// it is not touched.
    PeerChanged(String),
    /// The spare knows a later time of this very cluster: the local state was set back.
    WentBack(String),
}

pub fn decide(ours: &Ours<'_>, theirs: &PeerFacts) -> Stand {
    let record = theirs.record.clone().unwrap_or_default();
    let known = ours
        .promotion
        .is_some_and(|promotion| is_recorded(promotion, theirs));
    let kin = known
        || ours
            .record
            .is_kin(ours.system_id, &record, &theirs.system_id);
    let epoch = ours.record.epoch;
    match record.role {
        Some(Role::Spare) if record.copied_from.as_deref() == Some(ours.system_id) => {
            match forgotten(ours, &record) {
                Some(text) => Stand::WentBack(text),
                None => Stand::Followed,
            }
        }
        Some(Role::Spare) => {
            Stand::Alone("the peer is a spare, but has copied nothing from this cluster yet".into())
        }
        Some(Role::Primary) if !kin => Stand::Stranger(stranger(ours, theirs, &record)),
        Some(Role::Primary) if record.epoch > epoch.saturating_add(EPOCH_STEP_MAX) => {
            Stand::TwoPrimaries(format!(
                "the peer reports that it is the primary of epoch {}, more than {EPOCH_STEP_MAX} above the local epoch {epoch}: this is not believed",
                record.epoch
            ))
        }
        // This cluster does not give way to a primary that is read-only itself.
        Some(Role::Primary) if record.epoch > epoch && theirs.fenced => {
            Stand::TwoPrimaries(format!(
                "the peer is the primary of the higher epoch {}, and read-only",
                record.epoch
            ))
        }
        Some(Role::Primary) if record.epoch > epoch => Stand::FenceSelf {
            epoch: record.epoch,
            by: record.cluster_id,
        },
        _ => beside_no_newer(ours, theirs, &record, known),
    }
}

/// Decides for a peer that is no newer primary.
fn beside_no_newer(ours: &Ours<'_>, theirs: &PeerFacts, record: &Record, known: bool) -> Stand {
    let epoch = ours.record.epoch;
    if let Some(fence) = &record.fence {
        let by_another = fence.by_cluster != ours.record.cluster_id;
        if fence.epoch >= epoch && by_another && ours.promotion.is_some() {
            return Stand::TwoPrimaries(format!(
                "cluster {} has fenced the old primary under epoch {}, but this cluster is the primary of epoch {epoch}",
                fence.by_cluster, fence.epoch
            ));
        }
        // This cluster has set the fence, or the peer gave way by itself. A record counts only
        // together with its setting.
        if fence.epoch >= epoch && theirs.fenced {
            return Stand::PeerFenced;
        }
    }
    let followed = ours
        .promotion
        .is_some_and(|promotion| promotion.system_id == theirs.system_id);
    match record.role {
        Some(Role::Primary) if record.epoch == epoch => {
            Stand::TwoPrimaries(format!("both clusters are the primary of epoch {epoch}"))
        }
        _ if known => Stand::FencePeer,
        _ if followed => Stand::PeerChanged(format!(
            "the server that was followed (system id {}) now has the record of cluster {}",
            theirs.system_id, record.cluster_id
        )),
        Some(Role::Primary) => Stand::TwoPrimaries(format!(
            "the peer is a primary too, of the lower epoch {}, and is not the server that was followed here: it gives way when its own warm-spare sees this cluster",
            record.epoch
        )),
        _ => Stand::Alone("the peer has no role on record".into()),
    }
}

/// Returns the later history of this cluster that the spare has on record; None: there is none.
fn forgotten(ours: &Ours<'_>, record: &Record) -> Option<String> {
    let epoch = ours.record.epoch;
    if record.epoch > epoch {
        return Some(format!(
            "the spare followed this cluster (system id {}) under epoch {}, but this cluster has epoch {epoch} on record: the state of this cluster was set back to an older copy",
            ours.system_id, record.epoch
        ));
    }
    let (our_head, their_head) = (ours.record.lineage.head()?, record.lineage.head()?);
    let another =
        record.epoch == epoch && our_head.epoch == their_head.epoch && our_head.id != their_head.id;
    another.then(|| {
        format!(
            "the spare followed this cluster by promotion {} of epoch {epoch}, but this cluster has promotion {} of that epoch on record: the state of this cluster was set back, and it was promoted once more",
            their_head.id, our_head.id
        )
    })
}

fn stranger(ours: &Ours<'_>, theirs: &PeerFacts, record: &Record) -> String {
    format!(
        "the peer is the primary of epoch {} of another line (cluster {}, system id {}); this is cluster {}, system id {}: neither has followed the other, and they share no promotion",
        record.epoch, record.cluster_id, theirs.system_id, ours.record.cluster_id, ours.system_id
    )
}

/// Returns whether the peer is the server that was recorded while following. Only that server is
/// ever fenced. A server that has lost our record is still that server; a record without a role was
/// left there by our own fence.
pub(super) fn is_recorded(promotion: &Promotion, theirs: &PeerFacts) -> bool {
    let same_cluster = theirs.record.as_ref().is_none_or(|record| {
        record.role.is_none()
            || promotion.peer_cluster.is_empty()
            || promotion.peer_cluster == record.cluster_id
    });
    promotion.system_id == theirs.system_id && same_cluster
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{FenceRecord, Lineage};
    use crate::domain::PromotionKind;

    fn promotion() -> Promotion {
        Promotion {
            epoch: 2,
            id: String::new(),
            kind: PromotionKind::Failover,
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

    fn ours() -> Record {
        Record {
            cluster_id: "us".into(),
            role: Some(Role::Primary),
            epoch: 2,
            lineage: Lineage::of_promotions(&[(1, "root-old"), (2, "x")]),
            followed: vec!["old".into()],
            ..Record::default()
        }
    }

    fn peer(system_id: &str, role: Option<Role>, epoch: i64) -> PeerFacts {
        PeerFacts {
            system_id: system_id.into(),
            fenced: false,
            record: Some(Record {
                cluster_id: "aaaaaaaa".into(),
                role,
                epoch,
                ..Record::default()
            }),
        }
    }

    fn decided(ours: &Record, promotion: Option<&Promotion>, theirs: &PeerFacts) -> Stand {
        let ours = Ours {
            record: ours,
            system_id: "new",
            promotion,
        };
        decide(&ours, theirs)
    }

    #[track_caller]
    fn expect(theirs: &PeerFacts, stand: impl Fn(&Stand) -> bool) {
        let found = decided(&ours(), Some(&promotion()), theirs);
        assert!(stand(&found), "{found:?}");
    }

    fn of_line(mut theirs: PeerFacts, promotions: &[(i64, &str)]) -> PeerFacts {
        theirs.record.as_mut().expect("a record").lineage = Lineage::of_promotions(promotions);
        theirs
    }

    #[test]
    fn the_server_that_was_followed_is_fenced_also_without_a_record() {
        let stock = PeerFacts {
            system_id: "old".into(),
            ..PeerFacts::default()
        };
        expect(&stock, |s| *s == Stand::FencePeer);
        expect(&peer("old", None, 0), |s| *s == Stand::FencePeer);
        expect(&peer("old", Some(Role::Primary), 1), |s| {
            *s == Stand::FencePeer
        });
        // Its cluster id was recorded, but it has lost its record since: restored from an older
        // backup, or dropped.
        let mut promotion = promotion();
        promotion.peer_cluster = "bbbbbbbb".into();
        let found = decided(&ours(), Some(&promotion), &stock);
        assert_eq!(found, Stand::FencePeer);
        let found = decided(&ours(), Some(&promotion), &peer("old", None, 0));
        assert_eq!(found, Stand::FencePeer);
    }

    #[test]
    fn equal_epochs_are_nobodys_to_decide() {
        for server in ["old", "third"] {
            let theirs = of_line(peer(server, Some(Role::Primary), 2), &[(1, "root-old")]);
            expect(&theirs, |s| matches!(s, Stand::TwoPrimaries(_)));
        }
    }

    #[test]
    fn another_server_is_never_fenced() {
        let stock = PeerFacts {
            system_id: "third".into(),
            ..PeerFacts::default()
        };
        expect(&stock, |s| matches!(s, Stand::Alone(_)));
        let kin = of_line(peer("third", Some(Role::Primary), 1), &[(1, "root-old")]);
        expect(&kin, |s| matches!(s, Stand::TwoPrimaries(_)));
        // The same server with the record of another cluster.
        let mut promotion = promotion();
        promotion.peer_cluster = "bbbbbbbb".into();
        let found = decided(
            &ours(),
            Some(&promotion),
            &peer("old", Some(Role::Primary), 1),
        );
        assert!(matches!(found, Stand::PeerChanged(_)), "{found:?}");
    }

    #[test]
    fn the_lower_epoch_gives_way_within_one_line() {
        expect(&peer("old", Some(Role::Primary), 3), |s| {
            matches!(s, Stand::FenceSelf { epoch: 3, .. })
        });
        // Promoted over this server, or over a server of the same line.
        let mut over_us = peer("third", Some(Role::Primary), 3);
        over_us.record.as_mut().expect("a record").followed = vec!["new".into()];
        expect(&over_us, |s| matches!(s, Stand::FenceSelf { epoch: 3, .. }));
        let kin = of_line(peer("third", Some(Role::Primary), 3), &[(2, "x"), (3, "y")]);
        expect(&kin, |s| matches!(s, Stand::FenceSelf { epoch: 3, .. }));
    }

    #[test]
    fn a_stranger_is_neither_obeyed_nor_fenced() {
        for epoch in [1, 2, 3, i64::MAX] {
            expect(&peer("third", Some(Role::Primary), epoch), |s| {
                matches!(s, Stand::Stranger(_))
            });
            let staging = of_line(
                peer("third", Some(Role::Primary), epoch),
                &[(1, "root-staging")],
            );
            expect(&staging, |s| matches!(s, Stand::Stranger(_)));
        }
    }

    #[test]
    fn an_epoch_out_of_all_bounds_is_not_obeyed() {
        expect(&peer("old", Some(Role::Primary), 2 + EPOCH_STEP_MAX), |s| {
            matches!(s, Stand::FenceSelf { .. })
        });
        for epoch in [3 + EPOCH_STEP_MAX, i64::MAX] {
            expect(&peer("old", Some(Role::Primary), epoch), |s| {
                matches!(s, Stand::TwoPrimaries(_))
            });
        }
    }

    #[test]
    fn nobody_gives_way_to_one_that_cannot_be_written_to() {
        let mut theirs = peer("old", Some(Role::Primary), 3);
        theirs.fenced = true;
        expect(&theirs, |s| matches!(s, Stand::TwoPrimaries(_)));
    }

    fn fence(epoch: i64, by_cluster: &str) -> Option<FenceRecord> {
        Some(FenceRecord {
            lifted: false,
            epoch,
            by_cluster: by_cluster.into(),
            since: chrono::DateTime::UNIX_EPOCH,
            settled: true,
        })
    }

    #[test]
    fn a_fence_counts_only_with_its_setting_and_its_epoch() {
        let mut theirs = peer("old", Some(Role::Primary), 1);
        theirs.record.as_mut().expect("a record").fence = fence(2, "us");
        expect(&theirs, |s| *s == Stand::FencePeer);
        theirs.fenced = true;
        expect(&theirs, |s| *s == Stand::PeerFenced);
        theirs.record.as_mut().expect("a record").fence = None;
        expect(&theirs, |s| *s == Stand::FencePeer);
    }

    #[test]
    fn a_fence_by_another_cluster_of_our_epoch_is_another_primary() {
        let mut theirs = peer("old", Some(Role::Primary), 1);
        theirs.fenced = true;
        for (epoch, two) in [(1, false), (2, true), (3, true)] {
            theirs.record.as_mut().expect("a record").fence = fence(epoch, "them");
            expect(&theirs, |s| matches!(s, Stand::TwoPrimaries(_)) == two);
        }
    }

    #[test]
    fn a_spare_follows_only_with_a_copy_of_ours() {
        let mut theirs = peer("old", Some(Role::Spare), 2);
        expect(&theirs, |s| matches!(s, Stand::Alone(_)));
        theirs.record.as_mut().expect("a record").copied_from = Some("new".into());
        expect(&theirs, |s| *s == Stand::Followed);
    }

    #[test]
    fn a_spare_that_knows_more_of_us_proves_that_we_were_set_back() {
        let mut later = peer("old", Some(Role::Spare), 3);
        later.record.as_mut().expect("a record").copied_from = Some("new".into());
        expect(&later, |s| matches!(s, Stand::WentBack(_)));
        let mut other = of_line(
            peer("old", Some(Role::Spare), 2),
            &[(1, "root-old"), (2, "z")],
        );
        other.record.as_mut().expect("a record").copied_from = Some("new".into());
        expect(&other, |s| matches!(s, Stand::WentBack(_)));
        let mut same = of_line(
            peer("old", Some(Role::Spare), 2),
            &[(1, "root-old"), (2, "x")],
        );
        same.record.as_mut().expect("a record").copied_from = Some("new".into());
        expect(&same, |s| *s == Stand::Followed);
    }
}
