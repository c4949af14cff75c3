//! Asks the primary one cheap question while the spare follows, at most every ten seconds: has the
//! form of its tables changed, is our slot in order, and up to which position has it written?

use super::fingerprint::fingerprint;
use crate::cluster::preparation::why_lost;
use crate::cluster::timeline;
use crate::cluster::{CopiedPoint, DatastoreError, PeerSession, fenced};
use crate::config::Config;
use crate::domain::Lsn;
use crate::observe::Clock;
use crate::replication::baseline::sequences::{self, Sequence};
use crate::replication::change_probe::Server;
use crate::replication::error::PassError;
use chrono::{DateTime, Utc};
use std::collections::BTreeMap;

/// The primary's answer.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Time by the primary's clock, before it collected the answer.
    pub time: DateTime<Utc>,
    pub clock_offset_seconds: f64,
    /// End of its log at that time.
    pub wal: Lsn,
    pub system_id: String,
    pub timeline: i32,
    pub server_started: String,
    /// Its transactions, as a snapshot in text form. Every transaction that had ended by then is in
    /// its log before `wal`.
    pub transactions: String,
    /// The form of its tables, as one number.
    pub schema: String,
    /// The file of each published table. If the file is another one, the rows may have changed
    /// without any message in the stream.
    pub files: BTreeMap<String, i64>,
    /// A table of its database that is not in the publication.
    pub unpublished: Option<String>,
    pub slot: Option<Slot>,
    /// Maximum bytes of log that the server itself lets a slot hold; None: without limit.
    pub wal_bound: Option<u64>,
    /// The oldest transaction that writes. The server keeps its log from there on, whatever a slot
    /// has confirmed.
    pub oldest_writer: Option<String>,
    pub server: Server,
    pub fenced: bool,
    pub sequences: Vec<Sequence>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    pub plugin: String,
    pub database: String,
    pub confirmed: Option<Lsn>,
    /// `lost`: the server has removed log that the slot needs.
    pub wal_status: String,
    /// The reason why it is lost, if the server gives one.
    pub lost_for: Option<String>,
    /// Bytes of log that the server keeps for it.
    pub held_bytes: u64,
    /// Bytes of log that were not confirmed, so that they are kept only for us.
    pub unconfirmed_bytes: u64,
    pub active: bool,
}

const QUESTION: &str = concat!(
    "
SELECT now(), clock_timestamp(), CASE WHEN NOT pg_is_in_recovery() THEN pg_current_wal_lsn()::text END,
       (SELECT system_identifier::text FROM pg_control_system()),
       ",
    timeline!(),
    ",
       pg_postmaster_start_time()::text,
       current_setting('server_version'),
       coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false),
       ",
    fenced!("current_database()"),
    ",
       s.plugin::text, s.database::text, s.confirmed_flush_lsn::text, to_jsonb(s) ->> 'wal_status',
       CASE WHEN NOT pg_is_in_recovery() THEN pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn)::int8 END, s.active,
       (SELECT CASE WHEN setting = '-1' THEN NULL ELSE setting::int8 * 1048576 END
        FROM pg_settings WHERE name = 'max_slot_wal_keep_size'),
       (SELECT min(c.oid::regclass::text) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'r' AND c.relpersistence = 'p'
          AND n.nspname NOT IN ('information_schema', 'warm_spare') AND n.nspname !~ '^pg_'
          AND NOT EXISTS (SELECT 1 FROM pg_depend d
            WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
          AND NOT EXISTS (SELECT 1 FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
            WHERE r.prrelid = c.oid AND p.pubname = $2)),
       CASE WHEN NOT pg_is_in_recovery() THEN pg_wal_lsn_diff(pg_current_wal_lsn(), s.confirmed_flush_lsn)::int8 END,
       (SELECT text FROM (SELECT xact_start, format('a transaction of %s (process %s, application %L, since %s)',
            usename, pid, application_name, xact_start) FROM pg_stat_activity
          WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()
          UNION ALL SELECT prepared, format('prepared transaction %L of %s in database %s, prepared %s',
            gid, owner, database, prepared) FROM pg_prepared_xacts) writers (since, text) ORDER BY since LIMIT 1),
       (SELECT coalesce(jsonb_object_agg(n.nspname || '.' || c.relname, pg_relation_filenode(c.oid)::int8), '{}')::text
        FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
        JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = $2),
       txid_current_snapshot()::text, to_jsonb(s) ->> 'invalidation_reason'
FROM (SELECT 1) one LEFT JOIN pg_replication_slots s ON s.slot_name = $1"
);

/// Asks the primary, in a session that ends with the answer.
pub async fn ask(
    config: &Config,
    slot: &str,
    publication: &str,
    clock: &Clock,
) -> Result<Seen, PassError> {
    let peer = PeerSession::open(&config.peer.datastore).await?;
    let asked = clock.now();
    let row = peer
        .row(
            "asking the primary for its status",
            QUESTION,
            &[&slot, &publication],
        )
        .await?;
    let answered = clock.now();
    let Some(timeline) = row.get::<Option<i32>>(4)? else {
        return Err(PassError::standby());
    };
    let between = asked + (answered - asked) / 2;
    let theirs: DateTime<Utc> = row.get(1)?;
    let lsn = |column: usize| -> Result<Option<Lsn>, DatastoreError> {
        let text: Option<String> = row.get(column)?;
        Ok(text.and_then(|text| text.parse().ok()))
    };
    let slot = match row.get::<Option<String>>(9)? {
        None => None,
        Some(plugin) => Some(Slot {
            plugin,
            database: row.get::<Option<String>>(10)?.unwrap_or_default(),
            confirmed: lsn(11)?,
            wal_status: row.get::<Option<String>>(12)?.unwrap_or_default(),
            lost_for: row.get(21)?,
            held_bytes: row.get::<Option<i64>>(13)?.unwrap_or_default().max(0) as u64,
            unconfirmed_bytes: row.get::<Option<i64>>(17)?.unwrap_or_default().max(0) as u64,
            active: row.get::<Option<bool>>(14)?.unwrap_or_default(),
        }),
    };
    let files: String = row.get(19)?;
    let names = sequences::sequence_names(&peer).await?;
    Ok(Seen {
        time: row.get(0)?,
        clock_offset_seconds: (theirs - between).num_microseconds().unwrap_or_default() as f64
            / 1e6,
        wal: lsn(2)?.unwrap_or_default(),
        system_id: row.get(3)?,
        timeline,
        server_started: row.get(5)?,
        transactions: row.get(20)?,
        schema: fingerprint(&peer, publication).await?,
        files: serde_json::from_str(&files).map_err(|error| unread(&files, &error))?,
        unpublished: row.get(16)?,
        slot,
        wal_bound: row.get::<Option<i64>>(15)?.map(i64::unsigned_abs),
        oldest_writer: row.get(18)?,
        server: Server {
            version: row.get(6)?,
            tls: row.get(7)?,
        },
        fenced: row.get(8)?,
        sequences: sequences::read_sequences(&peer, names).await?,
    })
}

fn unread(files: &str, error: &serde_json::Error) -> PassError {
    PassError::NotMet {
        text: format!("the primary's answer {files} is not a list of its tables' files: {error}"),
    }
}

/// Returns an error if the stream would not continue the spare's history, though the primary's
/// history continues it. A server that is asked for a position before its slot's sends the changes
/// that it has, and does not report the ones that it left out.
pub(super) fn joins(
    seen: &Seen,
    recorded: &CopiedPoint,
    point: Lsn,
    database: &str,
) -> Result<(), String> {
    if seen.timeline != recorded.timeline {
        return Err(format!(
            "the primary is on timeline {} instead of {}",
            seen.timeline, recorded.timeline
        ));
    }
    stands(seen, recorded, database)?;
    let confirmed = seen.slot.as_ref().and_then(|slot| slot.confirmed);
    match confirmed {
        Some(confirmed) if confirmed <= point => Ok(()),
        Some(confirmed) => Err(format!(
            "slot {} is at {confirmed}, past the spare ({point}): it was created again or moved by hand",
            recorded.slot
        )),
        None => Err(format!("slot {} has no position", recorded.slot)),
    }
}

/// Checks the conditions that must be true at every moment of following.
pub fn stands(seen: &Seen, recorded: &CopiedPoint, database: &str) -> Result<(), String> {
    let Some(slot) = &seen.slot else {
        return Err(format!("slot {} is gone", recorded.slot));
    };
    if slot.plugin != "pgoutput" || slot.database != database {
        return Err(format!(
            "slot {} is of plugin {} on database {}",
            recorded.slot, slot.plugin, slot.database
        ));
    }
    if slot.wal_status == "lost" {
        return Err(format!(
            "the primary invalidated slot {}: {}",
            recorded.slot,
            why_lost(slot.lost_for.as_deref())
        ));
    }
    if let Some(table) = &seen.unpublished {
        return Err(format!("table {table} is not in the publication"));
    }
    if seen.schema != recorded.schema {
        return Err("the form of the primary's tables has changed".into());
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Returns an answer of a server that was started at this time, with a slot confirmed up to
    /// this position.
    pub(crate) fn seen_at(started: &str, confirmed: Lsn) -> Seen {
        Seen {
            time: Utc::now(),
            clock_offset_seconds: 0.0,
            wal: Lsn(0x1000),
            system_id: "1".into(),
            timeline: 1,
            server_started: started.into(),
            transactions: String::new(),
            schema: String::new(),
            files: BTreeMap::new(),
            unpublished: None,
            slot: Some(Slot {
                plugin: "pgoutput".into(),
                database: "builder".into(),
                confirmed: Some(confirmed),
                wal_status: "reserved".into(),
                lost_for: None,
                held_bytes: 0,
                unconfirmed_bytes: 0,
                active: false,
            }),
            wal_bound: None,
            oldest_writer: None,
            server: Server {
                version: "15.0".into(),
                tls: false,
            },
            fenced: false,
            sequences: Vec::new(),
        }
    }
}
