//! Asks the primary one cheap question while the spare follows, at most every ten seconds: has the
//! form of its tables changed, is our slot in order, and up to which position has it written?

use super::fence::setting::fenced;
use super::peer::PeerCluster;
use super::postgres::datastore_error::DatastoreError;
use super::postgres::sequences::Sequence;
use super::postgres::server_state::{Server, ServerState, server_state};
use super::postgres::timeline::timeline;
use super::preparation::Names;
use crate::domain::Lsn;
use chrono::{DateTime, Utc};
use std::collections::BTreeMap;

/// The primary's status, as one question shows it.
#[derive(Debug, Clone)]
pub struct PrimaryStatus {
    /// Time by the primary's clock, before it collected the answer.
    pub time: DateTime<Utc>,
    /// Seconds by which its clock is ahead of ours.
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
    pub slot: Option<SlotStatus>,
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
pub struct SlotStatus {
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

/// The primary's status could not be read.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    #[error(transparent)]
    Datastore(#[from] DatastoreError),
    /// A sequence may have been dropped since the names were read.
    #[error(transparent)]
    Sequences(DatastoreError),
}

/// The further columns, after those of [`ServerState`].
const QUESTION: &str = concat!(
    "SELECT ",
    server_state!(),
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
       to_jsonb(s) ->> 'invalidation_reason'
FROM (SELECT 1) one LEFT JOIN pg_replication_slots s ON s.slot_name = $1"
);

impl PeerCluster<'_> {
    /// Asks the primary for its status. `now` reads our own clock. None: it is a standby.
    pub async fn status(
        &self,
        names: &Names,
        now: impl Fn() -> DateTime<Utc>,
    ) -> Result<Option<PrimaryStatus>, StatusError> {
        let session = self.builder().await?;
        let doing = "asking the primary for its status";
        let asked = now();
        let row = session
            .row(doing, QUESTION, &[&names.slot, &names.publication])
            .await?;
        let answered = now();
        let state = ServerState::of(&row)?;
        let (Some(timeline), Some(wal)) = (state.timeline, state.wal) else {
            return Ok(None);
        };
        const FIRST: usize = ServerState::COLUMNS;
        let slot = match row.get::<Option<String>>(FIRST)? {
            None => None,
            Some(plugin) => Some(SlotStatus {
                plugin,
                database: row.get::<Option<String>>(FIRST + 1)?.unwrap_or_default(),
                confirmed: row
                    .get::<Option<String>>(FIRST + 2)?
                    .and_then(|lsn| lsn.parse().ok()),
                wal_status: row.get::<Option<String>>(FIRST + 3)?.unwrap_or_default(),
                lost_for: row.get(FIRST + 11)?,
                held_bytes: bytes(row.get(FIRST + 4)?),
                unconfirmed_bytes: bytes(row.get(FIRST + 8)?),
                active: row.get::<Option<bool>>(FIRST + 5)?.unwrap_or_default(),
            }),
        };
        let files: String = row.get(FIRST + 10)?;
        let files = serde_json::from_str(&files).map_err(|error| {
            let text = format!("{files} is not a list of its tables' files: {error}");
            session.origin(doing).malformed(text)
        })?;
        let sequences = session.sequence_names().await?;
        Ok(Some(PrimaryStatus {
            time: state.time,
            clock_offset_seconds: state.clock_offset_seconds(asked, answered),
            wal,
            system_id: state.system_id,
            timeline,
            server_started: state.started,
            transactions: state.transactions,
            schema: session.fingerprint(&names.publication).await?,
            files,
            unpublished: row.get(FIRST + 7)?,
            slot,
            wal_bound: row.get::<Option<i64>>(FIRST + 6)?.map(i64::unsigned_abs),
            oldest_writer: row.get(FIRST + 9)?,
            server: state.server,
            fenced: state.fenced,
            sequences: session
                .sequence_values(sequences)
                .await
                .map_err(StatusError::Sequences)?,
        }))
    }
}

fn bytes(number: Option<i64>) -> u64 {
    number.unwrap_or_default().max(0).unsigned_abs()
}
