//! The session that writes the primary's changes into a local database. Values are in the text form
//! in which the primary sent them, so that every type works, and many statements are sent without
//! waiting for each answer.

use super::session::WriteSession;
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::config::Datastore;
use bytes::{Bytes, BytesMut};
use postgres_protocol as protocol;
use postgres_protocol::types::{ArrayDimension, array_to_sql};
use std::error::Error;
use std::ops::Deref;
use tokio_postgres::types::{Format, IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::{Row, Statement};

/// A value in text form; None: NULL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextValue(pub Option<Bytes>);

impl ToSql for TextValue {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        match &self.0 {
            Some(text) => {
                out.extend_from_slice(text);
                Ok(IsNull::No)
            }
            None => Ok(IsNull::Yes),
        }
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        Format::Text
    }

    to_sql_checked!();
}

/// One column of many rows: an array of texts, as the bytes that the primary sent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TextValues(pub Vec<Option<Bytes>>);

impl ToSql for TextValues {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        let dimension = ArrayDimension {
            len: i32::try_from(self.0.len())?,
            lower_bound: 1,
        };
        let write = |value: &Option<Bytes>, out: &mut BytesMut| match value {
            Some(text) => {
                out.extend_from_slice(text);
                Ok(protocol::IsNull::No)
            }
            None => Ok(protocol::IsNull::Yes),
        };
        array_to_sql(Some(dimension), Type::TEXT.oid(), &self.0, write, out)?;
        Ok(IsNull::No)
    }

    fn accepts(kind: &Type) -> bool {
        *kind == Type::TEXT_ARRAY
    }

    to_sql_checked!();
}

/// A session without triggers and foreign keys: they have done their work on the primary, and would
/// repeat it here. Its statements have no time limit: a statement that was ended for its time would
/// be sent again, and take as long.
pub struct ApplySession(WriteSession);

impl Deref for ApplySession {
    type Target = WriteSession;

    fn deref(&self) -> &WriteSession {
        &self.0
    }
}

impl ApplySession {
    pub(in crate::cluster) async fn open(
        to: &Datastore,
        database: &str,
    ) -> Result<ApplySession, DatastoreError> {
        let session = WriteSession::open(to, database).await?;
        let sql = "SET session_replication_role = replica; SET synchronous_commit = on";
        session.batch("preparing to apply changes", sql).await?;
        session.carry_bytes().await?;
        Ok(ApplySession(session))
    }

    /// From now on the session writes only between `BEGIN READ WRITE` and COMMIT. Statements are
    /// sent behind a BEGIN without waiting for its answer; if it failed, they must fail as well, and
    /// not commit each by itself.
    pub async fn write_only_in_transactions(&self) -> Result<(), DatastoreError> {
        let sql = "SET default_transaction_read_only = on";
        self.0.batch("preparing to apply changes", sql).await
    }

    pub async fn prepare(&self, doing: &str, sql: &str) -> Result<Statement, DatastoreError> {
        self.0.within(doing, self.0.client().prepare(sql)).await
    }

    /// Returns the number of rows that the statement changed.
    pub async fn run(
        &self,
        doing: &str,
        statement: &Statement,
        values: &[&(dyn ToSql + Sync)],
    ) -> Result<u64, DatastoreError> {
        let running = self.0.client().execute(statement, values);
        self.0.unlimited(doing, running).await
    }

    /// Returns the rows that the statement returned.
    pub async fn rows(
        &self,
        doing: &str,
        statement: &Statement,
        values: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, DatastoreError> {
        let running = self.0.client().query(statement, values);
        self.0.unlimited(doing, running).await
    }
}
