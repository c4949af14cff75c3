//! Sequences. They are read as numbers, and set by parameters: no text that the other side sends is
//! ever run as a statement.

use super::rows::Row;
use super::session::{Session, WriteSession, quote_ident};
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::cluster::spare_db::{HELD_BY_TOKEN_5, HolderError, SpareDb};

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

impl Sequence {
    /// Returns all names and values as one number.
    pub fn digest(sequences: &[Sequence]) -> String {
        let mut hash = blake2b_simd::Params::new().hash_length(16).to_state();
        for sequence in sequences {
            let name = sequence.name.quoted();
            let line = format!("{name} {} {}\n", sequence.last_value, sequence.is_called);
            hash.update(line.as_bytes());
        }
        hash.finalize().to_hex().to_string()
    }
}

const NAMES: &str = "
SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'S' AND n.nspname NOT IN ('information_schema', 'warm_spare') AND n.nspname !~ '^pg_'
  AND c.relpersistence <> 't' ORDER BY 1, 2";

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

impl Session {
    /// Returns the sequences that the session's snapshot sees.
    pub async fn sequence_names(&self) -> Result<Vec<SequenceName>, DatastoreError> {
        let rows = self.rows("reading the sequences", NAMES, &[]).await?;
        let name = |row: &Row| {
            Ok(SequenceName {
                schema: row.get(0)?,
                name: row.get(1)?,
            })
        };
        rows.iter().map(name).collect()
    }

    /// Returns their values. They move outside of transactions: ahead of the rows, never behind.
    pub async fn sequence_values(
        &self,
        names: Vec<SequenceName>,
    ) -> Result<Vec<Sequence>, DatastoreError> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let select = |(place, name): (usize, &SequenceName)| {
            let name = name.quoted();
            format!("SELECT {place}::int8, last_value, is_called FROM {name}")
        };
        let selects: Vec<String> = names.iter().enumerate().map(select).collect();
        let sql = format!("{} ORDER BY 1", selects.join(" UNION ALL "));
        let rows = self.rows("reading the sequences", &sql, &[]).await?;
        let sequence = |(name, row): (SequenceName, &Row)| {
            Ok(Sequence {
                name,
                last_value: row.get(1)?,
                is_called: row.get(2)?,
            })
        };
        names.into_iter().zip(&rows).map(sequence).collect()
    }
}

impl WriteSession {
    /// Sets sequences in a database that nobody sees yet. Returns how many were set.
    pub async fn set_sequences(&self, values: &[Sequence]) -> Result<u64, DatastoreError> {
        self.set(values, "SELECT 1 WHERE $5::int8 = 0", 0).await
    }

    /// Sets sequences in a local database, as the process whose token is in its recovery point.
    /// Returns how many were set. A process that was paused, and was replaced in the meantime,
    /// finds another token.
    pub async fn set_sequences_as_holder(
        &self,
        values: &[Sequence],
        token: i64,
    ) -> Result<u64, HolderError> {
        // The lock on the row makes the next holder wait until the values are set.
        let set = self.set(values, HELD_BY_TOKEN_5, token).await?;
        if set == 0 && !values.is_empty() {
            SpareDb::of(self).still_held(token).await?;
        }
        Ok(set)
    }

    async fn set(
        &self,
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
        let set = self
            .rows(
                "setting the sequences",
                &sql,
                &[&schemas, &names, &last, &called, &token],
            )
            .await?;
        Ok(set.len() as u64)
    }

    /// Moves every sequence ahead by this number of values, within its bounds.
    pub async fn advance_sequences(&self, by: i64) -> Result<(), DatastoreError> {
        // The type is numeric, because a sequence may be near the end of its range.
        let sql = "SELECT setval(format('%I.%I', schemaname, sequencename)::regclass, \
                     greatest(min_value, least(coalesce(last_value, start_value)::numeric + $1::int8::numeric * increment_by, max_value))::int8) \
                   FROM pg_sequences WHERE schemaname NOT IN ('information_schema', 'warm_spare') AND schemaname !~ '^pg_'";
        self.rows("moving the sequences ahead", sql, &[&by]).await?;
        Ok(())
    }
}
