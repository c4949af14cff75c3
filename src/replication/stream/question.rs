//! What the primary is asked while it is followed: one cheap question, at most every ten seconds. Has the form of its
//! tables changed, does our slot stand as it should, and how far has it written.

use super::super::error::PassError;
use super::super::look::Server;
use super::super::sequences::{self, Sequence};
use crate::cluster::{CopiedPoint, Lsn, PeerSession, Session, fenced};
use crate::config::Config;
use crate::observe::Clock;
use chrono::{DateTime, Utc};

/// What the primary answered.
#[derive(Debug, Clone)]
pub struct Seen {
    /// By the primary's clock, before it looked.
    pub time: DateTime<Utc>,
    pub clock_offset_seconds: f64,
    /// How far its log was written then.
    pub wal: Lsn,
    pub system_id: String,
    pub timeline: i32,
    pub server_started: String,
    /// The form of its tables, as one number.
    pub schema: String,
    /// A table of its database that the publication lacks.
    pub unpublished: Option<String>,
    pub slot: Option<Slot>,
    /// The most log that the server itself lets a slot hold; None: without bound.
    pub wal_bound: Option<u64>,
    pub server: Server,
    pub fenced: bool,
    pub sequences: Vec<Sequence>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    pub plugin: String,
    pub database: String,
    pub confirmed: Option<Lsn>,
    /// `lost`: the server has thrown away what it would need.
    pub wal_status: String,
    pub held_bytes: u64,
    pub active: bool,
}

const QUESTION: &str = concat!(
    "
SELECT now(), clock_timestamp(), pg_current_wal_lsn()::text,
       (SELECT system_identifier::text FROM pg_control_system()),
       (SELECT timeline_id FROM pg_control_checkpoint()),
       pg_postmaster_start_time()::text,
       current_setting('server_version'),
       coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false),
       ",
    fenced!("current_database()"),
    ",
       s.plugin::text, s.database::text, s.confirmed_flush_lsn::text, to_jsonb(s) ->> 'wal_status',
       pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn)::int8, s.active,
       (SELECT CASE WHEN setting = '-1' THEN NULL ELSE setting::int8 * 1048576 END
        FROM pg_settings WHERE name = 'max_slot_wal_keep_size'),
       (SELECT min(c.oid::regclass::text) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'r' AND c.relpersistence = 'p'
          AND n.nspname NOT IN ('information_schema', 'warm_spare') AND n.nspname !~ '^pg_'
          AND NOT EXISTS (SELECT 1 FROM pg_depend d
            WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
          AND NOT EXISTS (SELECT 1 FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
            WHERE r.prrelid = c.oid AND p.pubname = $2))
FROM (SELECT 1) one LEFT JOIN pg_replication_slots s ON s.slot_name = $1"
);

/// Everything that makes a row mean what it means. Compared with the same server's own answer of before, so what differs
/// from version to version does not matter.
const SCHEMA: &str = "
WITH ours AS (
    SELECT oid, nspname FROM pg_namespace
    WHERE nspname NOT IN ('information_schema', 'warm_spare') AND nspname !~ '^pg_'),
lines AS (
    SELECT concat_ws(' ', 'column', n.nspname, c.relname, c.relkind, c.relpersistence, a.attnum, a.attname,
        format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated,
        pg_get_expr(d.adbin, d.adrelid)) AS line
    FROM ours n JOIN pg_class c ON c.relnamespace = n.oid AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
    LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    UNION ALL SELECT concat_ws(' ', 'constraint', n.nspname, conrelid::regclass, conname, pg_get_constraintdef(k.oid))
    FROM pg_constraint k JOIN ours n ON n.oid = k.connamespace
    UNION ALL SELECT concat_ws(' ', 'index', pg_get_indexdef(i.indexrelid))
    FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN ours n ON n.oid = c.relnamespace WHERE i.indisvalid
    UNION ALL SELECT concat_ws(' ', 'label', n.nspname, t.typname, e.enumsortorder, e.enumlabel)
    FROM pg_enum e JOIN pg_type t ON t.oid = e.enumtypid JOIN ours n ON n.oid = t.typnamespace
    UNION ALL SELECT concat_ws(' ', 'function', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid),
        p.prokind, p.provolatile, p.proisstrict, p.prosecdef, p.prolang, p.prorettype::regtype, md5(p.prosrc))
    FROM pg_proc p JOIN ours n ON n.oid = p.pronamespace
    WHERE NOT EXISTS (SELECT 1 FROM pg_depend d
        WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e')
    UNION ALL SELECT concat_ws(' ', 'trigger', t.tgenabled, pg_get_triggerdef(t.oid))
    FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN ours n ON n.oid = c.relnamespace
    WHERE NOT t.tgisinternal
    UNION ALL SELECT concat_ws(' ', 'view', n.nspname, c.relname, md5(pg_get_viewdef(c.oid)))
    FROM pg_class c JOIN ours n ON n.oid = c.relnamespace WHERE c.relkind IN ('v', 'm')
    UNION ALL SELECT concat_ws(' ', 'sequence', n.nspname, c.relname, s.seqstart, s.seqincrement, s.seqmax, s.seqmin,
        s.seqcache, s.seqcycle)
    FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid JOIN ours n ON n.oid = c.relnamespace
    UNION ALL SELECT concat_ws(' ', 'extension', extname) FROM pg_extension
    UNION ALL SELECT concat_ws(' ', 'schema', nspname) FROM ours
    -- What the publication leaves out is left out without a word. As JSON, for its columns differ from version to version.
    UNION ALL SELECT concat_ws(' ', 'publication', to_jsonb(p)) FROM pg_publication p WHERE p.pubname = $1
    UNION ALL SELECT concat_ws(' ', 'published', to_jsonb(r)) FROM pg_publication_rel r
    JOIN pg_publication p ON p.oid = r.prpubid WHERE p.pubname = $1)
SELECT coalesce(md5(string_agg(line, E'\\n' ORDER BY line)), '') FROM lines";

/// The form of all tables and what is published of them, as the session's transaction sees it.
pub async fn schema(session: &Session, publication: &str) -> Result<String, PassError> {
    let row = session
        .query_one("reading the form of the tables", SCHEMA, &[&publication])
        .await?;
    Ok(row.get(0))
}

/// Asks, on a session that ends with the answer.
pub async fn ask(
    config: &Config,
    slot: &str,
    publication: &str,
    clock: &Clock,
) -> Result<Seen, PassError> {
    let peer = PeerSession::open(&config.peer.datastore).await?;
    let asked = clock.now();
    let row = peer
        .query_one(
            "asking how the primary stands",
            QUESTION,
            &[&slot, &publication],
        )
        .await?;
    let answered = clock.now();
    let between = asked + (answered - asked) / 2;
    let theirs: DateTime<Utc> = row.get(1);
    let lsn = |column: usize| {
        let text: Option<String> = row.get(column);
        text.and_then(|text| text.parse::<Lsn>().ok())
    };
    let slot = row.get::<_, Option<String>>(9).map(|plugin| Slot {
        plugin,
        database: row.get::<_, Option<String>>(10).unwrap_or_default(),
        confirmed: lsn(11),
        wal_status: row.get::<_, Option<String>>(12).unwrap_or_default(),
        held_bytes: row.get::<_, Option<i64>>(13).unwrap_or_default().max(0) as u64,
        active: row.get::<_, Option<bool>>(14).unwrap_or_default(),
    });
    let names = sequences::sequence_names(&peer).await?;
    Ok(Seen {
        time: row.get(0),
        clock_offset_seconds: (theirs - between).num_microseconds().unwrap_or_default() as f64
            / 1e6,
        wal: lsn(2).unwrap_or_default(),
        system_id: row.get(3),
        timeline: row.get(4),
        server_started: row.get(5),
        schema: schema(&peer, publication).await?,
        unpublished: row.get(16),
        slot,
        wal_bound: row.get::<_, Option<i64>>(15).map(i64::unsigned_abs),
        server: Server {
            version: row.get(6),
            tls: row.get(7),
        },
        fenced: row.get(8),
        sequences: sequences::read_sequences(&peer, names).await?,
    })
}

/// Why the stream would not join what is here, where the primary's history goes on from ours. A server asked for a position that its slot is past gives what it has, and
/// says nothing of what it left out.
pub fn joins(
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
            "slot {} is at {confirmed}, past the spare ({point}): it was made anew or moved by hand",
            recorded.slot
        )),
        None => Err(format!("slot {} gives nothing", recorded.slot)),
    }
}

/// What must be so at every moment of following.
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
            "the primary gave slot {} up, for it held more than max_slot_wal_keep_size",
            recorded.slot
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
