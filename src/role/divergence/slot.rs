//! Decides whether the slot by which the successor followed still holds everything since its
//! promotion.

use crate::cluster::{LocalCluster, LocalSlot, Promotion};
use crate::config::Config;
use crate::domain::Lsn;
use crate::replication::ReplicationError;
use std::time::Duration;

/// Maximum number of looks at a slot that is in use. The server notices a moment later that a
/// reader has gone.
const MAX_ATTEMPTS: u32 = 50;
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// The facts about the old primary's server on which the slot depends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Server {
    pub system_id: String,
    pub timeline: i32,
    /// Last position that the server has written.
    pub wal: String,
    pub slot: Option<LocalSlot>,
    /// True: the publication exists.
    pub published: bool,
    /// A table of Builder's that is not in the publication.
    pub unpublished: Option<String>,
}

/// The decision: the slot is read from this position, or it is of no use for this reason.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Usable {
    From(Lsn),
    Not(String),
    /// The server was set back to an older copy: its slot and its fence are older than the recovery
    /// point.
    SetBack(String),
}

pub(super) fn usable(server: &Server, promotion: &Promotion) -> Usable {
    let name = &promotion.slot;
    let not = |text: String| Usable::Not(text);
    let Ok(from) = promotion.lsn.parse::<Lsn>() else {
        return not("the new primary was promoted at no recovery point".into());
    };
    if server.system_id != promotion.system_id {
        return not("this is not the server that the new primary followed".into());
    }
    if server.timeline != promotion.timeline {
        return not(format!(
            "this server is on timeline {}, but the new primary followed timeline {}",
            server.timeline, promotion.timeline
        ));
    }
    if server.wal.parse::<Lsn>().is_ok_and(|wal| wal < from) {
        return Usable::SetBack(format!(
            "this server was set back to an older copy: its log ends at {}, but the new primary has followed it to {from}",
            server.wal
        ));
    }
    if name.is_empty() {
        return not("the new primary followed by copies, which need no slot".into());
    }
    let Some(slot) = &server.slot else {
        return not(format!("slot {name} is gone"));
    };
    if slot.plugin.as_deref() != Some("pgoutput") || !slot.ours {
        return not(format!("slot {name} is of another kind or database"));
    }
    if slot.lost {
        return not(format!("the server has removed log that slot {name} needs"));
    }
    if slot.active {
        return not(format!("slot {name} is being read by another session"));
    }
    if slot.confirmed.is_none_or(|confirmed| confirmed > from) {
        return not(format!("slot {name} is past the recovery point {from}"));
    }
    if !server.published {
        return not(format!("publication {} is gone", promotion.publication));
    }
    Usable::From(from)
}

pub(super) async fn ask(
    config: &Config,
    promotion: &Promotion,
) -> Result<Server, ReplicationError> {
    let session = LocalCluster::of(config).builder().await?;
    let mut tries = 0;
    loop {
        let found = session
            .published_slot(&promotion.slot, &promotion.publication)
            .await?;
        tries += 1;
        if tries < MAX_ATTEMPTS && found.slot.as_ref().is_some_and(|slot| slot.active) {
            // The new primary does not follow any more: the reader is a connection that has not
            // noticed it yet.
            session.end_slot_reader(&promotion.slot).await?;
            tokio::time::sleep(RETRY_AFTER).await;
            continue;
        }
        let (Some(timeline), Some(wal)) = (found.state.timeline, found.state.wal) else {
            return Err(ReplicationError::NotMet {
                text: format!(
                    "local datastore {}: it is a physical standby, which writes no log of its own",
                    config.local.datastore.address()
                ),
            });
        };
        return Ok(Server {
            system_id: found.state.system_id,
            timeline,
            wal: wal.to_string(),
            published: found.published,
            unpublished: found.unpublished,
            slot: found.slot,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::PromotionKind;

    fn promotion() -> Promotion {
        Promotion {
            id: String::new(),
            epoch: 2,
            kind: PromotionKind::Failover,
            time: chrono::Utc::now(),
            lsn: "0/200".into(),
            commit_time: None,
            system_id: "7".into(),
            timeline: 1,
            peer_cluster: String::new(),
            slot: "warm_spare_0123abcd".into(),
            publication: "warm_spare_0123abcd".into(),
            peer_fenced: false,
            settled: false,
        }
    }

    fn server() -> Server {
        Server {
            system_id: "7".into(),
            timeline: 1,
            wal: "0/300".into(),
            published: true,
            unpublished: None,
            slot: Some(LocalSlot {
                plugin: Some("pgoutput".into()),
                ours: true,
                confirmed: Some(Lsn(0x200)),
                ..LocalSlot::default()
            }),
        }
    }

    #[test]
    fn a_slot_that_stands_at_the_recovery_point_or_before_it_is_read_from_there() {
        assert_eq!(usable(&server(), &promotion()), Usable::From(Lsn(0x200)));
    }

    #[test]
    fn every_other_slot_says_why_it_is_of_no_use() {
        type Spoil = fn(&mut Server, &mut Promotion);
        let cases: [(Spoil, &str); 8] = [
            (|s, _| s.slot = None, "is gone"),
            (|s, _| s.system_id = "8".into(), "not the server"),
            (|s, _| s.timeline = 2, "timeline 2"),
            (|s, _| s.published = false, "publication"),
            (|_, p| p.slot = String::new(), "by copies"),
            (|_, p| p.lsn = String::new(), "no recovery point"),
            (|_, p| p.lsn = "0/1FF".into(), "past the recovery point"),
            (
                |s, _| s.slot = Some(LocalSlot::default()),
                "another kind or database",
            ),
        ];
        for (spoil, words) in cases {
            let (mut server, mut promotion) = (server(), promotion());
            spoil(&mut server, &mut promotion);
            match usable(&server, &promotion) {
                Usable::Not(reason) => assert!(reason.contains(words), "{reason}"),
                other => panic!("{words}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_log_that_ends_before_the_recovery_point_is_of_an_older_copy() {
        let mut server = server();
        server.wal = "0/1FF".into();
        let found = usable(&server, &promotion());
        assert!(matches!(found, Usable::SetBack(_)), "{found:?}");
    }
}
