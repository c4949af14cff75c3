//! Copies sequences, because the stream does not carry them. They are read on the primary as
//! numbers, and set here by parameters.
//!
//! No text that the primary sends is ever run as a statement.

use super::tables::changed_in_form;
use crate::cluster::{DatastoreError, LocalSession, Row, Session, StateError, quote_ident};
use crate::config::Config;
use crate::domain::ErrorCode;
use crate::replication::error::PassError;

/// A sequence by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceName {
    pub schema: String,
    pub name: String,
}

impl SequenceName {
    pub fn quoted(&self) -> String {
        format!("{}.{}", quote_ident(&self.schema), quote_ident(&self.name))
    }
}

/// The state of a sequence on the primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    pub name: SequenceName,
    pub last_value: i64,
    pub is_called: bool,
}

const NAMES: &str = "
SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'S' AND n.nspname NOT IN ('information_schema', 'warm_spare') AND n.nspname !~ '^pg_'
  AND c.relpersistence <> 't' ORDER BY 1, 2";

/// Returns the sequences that the session's snapshot sees.
pub(crate) async fn sequence_names(session: &Session) -> Result<Vec<SequenceName>, PassError> {
    let rows = session.rows("reading the sequences", NAMES, &[]).await?;
    let name = |row: &Row| {
        Ok(SequenceName {
            schema: row.get(0)?,
            name: row.get(1)?,
        })
    };
    rows.iter().map(name).collect()
}

/// Returns their values. They move outside of transactions: ahead of the rows, never behind.
pub(crate) async fn read_sequences(
    of: &Session,
    names: Vec<SequenceName>,
) -> Result<Vec<Sequence>, PassError> {
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let select = |(place, name): (usize, &SequenceName)| {
        let name = name.quoted();
        format!("SELECT {place}::int8, last_value, is_called FROM {name}")
    };
    let selects: Vec<String> = names.iter().enumerate().map(select).collect();
    let sql = format!("{} ORDER BY 1", selects.join(" UNION ALL "));
    let rows = of
        .rows("reading the sequences", &sql, &[])
        .await
        .map_err(|error| changed_in_form(error.into(), "its sequences"))?;
    let sequence = |(name, row): (SequenceName, &Row)| {
        Ok(Sequence {
            name,
            last_value: row.get(1)?,
            is_called: row.get(2)?,
        })
    };
    names.into_iter().zip(&rows).map(sequence).collect()
}

/// Returns all names and values as one number.
pub(crate) fn digest(sequences: &[Sequence]) -> String {
    let mut hash = blake2b_simd::Params::new().hash_length(16).to_state();
    for sequence in sequences {
        let name = sequence.name.quoted();
        let line = format!("{name} {} {}\n", sequence.last_value, sequence.is_called);
        hash.update(line.as_bytes());
    }
    hash.finalize().to_hex().to_string()
}

/// Sets sequences. A sequence that does not exist here, or a value outside its bounds here, is left
/// out: the form of the tables shows the difference.
const SET: &str = "
SELECT pg_catalog.setval(c.oid::regclass, v.last, v.called)
FROM mine CROSS JOIN unnest($1::text[], $2::text[], $3::int8[], $4::bool[]) v(schema, name, last, called)
JOIN pg_catalog.pg_namespace n ON n.nspname = v.schema
JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = v.name AND c.relkind = 'S'
JOIN pg_catalog.pg_sequence s ON s.seqrelid = c.oid
WHERE n.nspname NOT IN ('information_schema', 'warm_spare') AND n.nspname !~ '^pg_'
  AND v.last BETWEEN s.seqmin AND s.seqmax";

/// Sets them in a database that nobody sees yet.
pub(crate) async fn set_in_copy(
    inside: &LocalSession,
    values: &[Sequence],
) -> Result<(), PassError> {
    let set = set(inside, values, "SELECT 1 WHERE $5::int8 = 0", 0).await?;
    all_of(values, set)
}

/// Sets them in a local database, as the process whose token is in its recovery point. Returns how
/// many were set. A process that was paused, and was replaced in the meantime, finds another token.
pub(crate) async fn set_as_holder(
    inside: &LocalSession,
    values: &[Sequence],
    token: i64,
) -> Result<u64, PassError> {
    // The lock on the row makes the next holder wait until the values are set.
    let mine = "SELECT 1 FROM warm_spare.recovery_point WHERE token = $5::int8 FOR UPDATE";
    let set = set(inside, values, mine, token).await?;
    if set == 0 && !values.is_empty() {
        let sql = "SELECT EXISTS (SELECT 1 FROM warm_spare.recovery_point WHERE token = $1)";
        let doing = "checking our token";
        if !inside.row(doing, sql, &[&token]).await?.get::<bool>(0)? {
            return Err(StateError::Superseded.into());
        }
    }
    Ok(set)
}

/// Does the same as `set_as_holder`, and fails unless all of them are set.
pub async fn set_all_as_holder(
    inside: &LocalSession,
    values: &[Sequence],
    token: i64,
) -> Result<(), PassError> {
    let set = set_as_holder(inside, values, token).await?;
    all_of(values, set)
}

async fn set(
    inside: &LocalSession,
    values: &[Sequence],
    mine: &str,
    token: i64,
) -> Result<u64, DatastoreError> {
    if values.is_empty() {
        return Ok(0);
    }
    let schemas: Vec<&str> = values.iter().map(|v| v.name.schema.as_str()).collect();
    let names: Vec<&str> = values.iter().map(|v| v.name.name.as_str()).collect();
    let last: Vec<i64> = values.iter().map(|v| v.last_value).collect();
    let called: Vec<bool> = values.iter().map(|v| v.is_called).collect();
    let sql = format!("WITH mine AS MATERIALIZED ({mine}) {SET}");
    let set = inside
        .rows(
            "setting the sequences",
            &sql,
            &[&schemas, &names, &last, &called, &token],
        )
        .await?;
    Ok(set.len() as u64)
}

fn all_of(values: &[Sequence], set: u64) -> Result<(), PassError> {
    if set == values.len() as u64 {
        return Ok(());
    }
    Err(PassError::Unfit {
        check: ErrorCode::Sequences,
        text: format!(
            "local: {set} of the primary's {} sequences could be set; the others do not exist here, or have other bounds",
            values.len()
        ),
        next_step: "compare both sides' sequences with \\ds in psql".into(),
    })
}

/// Number of values by which sequences are moved past their last known one: a failover does not
/// know how far they went.
const AHEAD_VALUES: i64 = 1024;

/// Moves every sequence of the local database past all values that the primary may have given out
/// unseen.
pub async fn next_sequences(config: &Config) -> Result<(), PassError> {
    let local = &config.local.datastore;
    let inside = LocalSession::open(local, &local.database).await?;
    Ok(advance_sequences(&inside).await?)
}

/// Does the same in the database of a session.
pub async fn advance_sequences(inside: &LocalSession) -> Result<(), DatastoreError> {
    // The type is numeric, because a sequence may be near the end of its range.
    let sql = "SELECT setval(format('%I.%I', schemaname, sequencename)::regclass, \
                 greatest(min_value, least(coalesce(last_value, start_value)::numeric + $1::int8::numeric * increment_by, max_value))::int8) \
               FROM pg_sequences WHERE schemaname NOT IN ('information_schema', 'warm_spare') AND schemaname !~ '^pg_'";
    inside
        .rows("moving the sequences ahead", sql, &[&AHEAD_VALUES])
        .await?;
    Ok(())
}
