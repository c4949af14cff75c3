//! Decides whether the slot by which the successor followed still holds everything since its
//! promotion.

use crate::cluster::preparation::COPIED_TABLES;
use crate::cluster::timeline;
use crate::cluster::{LocalSession, Promotion};
use crate::config::Config;
use crate::domain::Lsn;
use crate::replication::PassError;
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
    pub slot: Option<Slot>,
    /// True: the publication exists.
    pub published: bool,
    /// A table of Builder's that is not in the publication.
    pub unpublished: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Slot {
    pub plugin: Option<String>,
    /// True: the slot belongs to Builder's database.
    pub ours: bool,
    pub lost: bool,
    pub confirmed: Option<Lsn>,
    pub active: bool,
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

const QUESTION: &str = concat!(
    "
SELECT (SELECT system_identifier::text FROM pg_control_system()), ",
    timeline!(),
    ",
       pg_current_wal_lsn()::text, EXISTS (SELECT 1 FROM pg_publication WHERE pubname = $2),
       s.slot_name IS NOT NULL, s.plugin::text, coalesce(s.database = current_database(), false),
       coalesce(to_jsonb(s) ->> 'wal_status' = 'lost', false), s.confirmed_flush_lsn::text, coalesce(s.active, false)
FROM (SELECT 1) one LEFT JOIN pg_replication_slots s ON s.slot_name = $1"
);

const UNPUBLISHED: &str = "
SELECT min(c.oid::regclass::text) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE NOT EXISTS (SELECT 1 FROM pg_publication_tables t
    WHERE t.pubname = $1 AND t.schemaname = n.nspname AND t.tablename = c.relname) AND ";

pub(super) async fn ask(config: &Config, promotion: &Promotion) -> Result<Server, PassError> {
    let local = &config.local.datastore;
    let session = LocalSession::open(local, &local.database).await?;
    let mut tries = 0;
    loop {
        let doing = "looking at the slot";
        let names: [&(dyn crate::cluster::ToSql + Sync); 2] =
            [&promotion.slot, &promotion.publication];
        let row = session.query_one(doing, QUESTION, &names).await?;
        let slot = row.get::<_, bool>(4).then(|| Slot {
            plugin: row.get(5),
            ours: row.get(6),
            lost: row.get(7),
            confirmed: row
                .get::<_, Option<String>>(8)
                .and_then(|lsn| lsn.parse().ok()),
            active: row.get(9),
        });
        tries += 1;
        if tries < MAX_ATTEMPTS && slot.as_ref().is_some_and(|slot| slot.active) {
            // The new primary does not follow any more: the reader is a connection that has not
            // noticed it yet.
            let sql = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1";
            let doing = "ending the slot's reader";
            session.query(doing, sql, &[&promotion.slot]).await?;
            tokio::time::sleep(RETRY_AFTER).await;
            continue;
        }
        return Ok(Server {
            system_id: row.get(0),
            timeline: row.get(1),
            wal: row.get(2),
            published: row.get(3),
            unpublished: unpublished(&session, &promotion.publication).await?,
            slot,
        });
    }
}

async fn unpublished(
    session: &LocalSession,
    publication: &str,
) -> Result<Option<String>, PassError> {
    let sql = format!("{UNPUBLISHED}{COPIED_TABLES}");
    let doing = "looking for tables that are not published";
    let row = session.query_one(doing, &sql, &[&publication]).await?;
    Ok(row.get(0))
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
            slot: Some(Slot {
                plugin: Some("pgoutput".into()),
                ours: true,
                confirmed: Some(Lsn(0x200)),
                ..Slot::default()
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
                |s, _| s.slot = Some(Slot::default()),
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
