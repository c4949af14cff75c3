//! Reads a server's rows in the requested form, or not at all.
//!
//! The peer's answers are data. A column of another type, an impossible NULL, or rows without end
//! are an error that names the peer, and never end our process.

use super::datastore_error;
use super::session::Session;
use crate::cluster::error_text;
use crate::cluster::postgres::datastore_error::{DatastoreError, DatastoreFault};
use crate::domain::Side;
use futures_util::TryStreamExt;
use std::pin::pin;
use std::sync::Arc;
use tokio_postgres::RowStream;
use tokio_postgres::types::{FromSql, ToSql, Type};

/// Maximum bytes of all rows that answer one statement; larger data is copied, row by row.
const ANSWER_MAX: usize = 256 << 20;

/// Origin of a row, for errors.
#[derive(Debug)]
pub(in crate::cluster) struct Origin {
    pub side: Side,
    pub address: String,
    pub doing: String,
}

impl Origin {
    pub(crate) fn malformed(&self, text: String) -> DatastoreError {
        DatastoreError {
            side: self.side,
            address: self.address.clone(),
            doing: self.doing.clone(),
            fault: DatastoreFault::Malformed,
            text: datastore_error::printable(&text),
            sql_state: None,
        }
    }
}

/// One row.
#[derive(Debug)]
pub struct Row {
    row: tokio_postgres::Row,
    origin: Arc<Origin>,
}

impl Row {
    /// Returns the value of a column, from 0.
    pub fn get<'a, T: FromSql<'a>>(&'a self, column: usize) -> Result<T, DatastoreError> {
        self.row.try_get(column).map_err(|error| {
            let text = error_text::chain(&error);
            self.origin
                .malformed(format!("the answer has not the requested form: {text}"))
        })
    }
}

impl Session {
    /// Returns the rows that answer a statement.
    pub async fn rows(
        &self,
        doing: &str,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, DatastoreError> {
        let params = params.iter().map(|param| *param as &dyn ToSql);
        let asked = Box::pin(self.client().query_raw(sql, params));
        self.collected(doing, asked).await
    }

    /// Does the same in one round trip, for a statement whose parameters all are texts: otherwise
    /// the server is asked for their types first.
    pub async fn rows_for(
        &self,
        doing: &str,
        sql: &str,
        texts: &[&str],
    ) -> Result<Vec<Row>, DatastoreError> {
        let params = texts.iter().map(|text| (*text, Type::TEXT));
        let asked = Box::pin(self.client().query_typed_raw(sql, params));
        self.collected(doing, asked).await
    }

    /// Does the same for parameters of these types.
    pub(in crate::cluster) async fn rows_typed(
        &self,
        doing: &str,
        sql: &str,
        params: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Vec<Row>, DatastoreError> {
        let params = params.iter().map(|(param, kind)| (*param, kind.clone()));
        let asked = Box::pin(self.client().query_typed_raw(sql, params));
        self.collected(doing, asked).await
    }

    async fn collected(
        &self,
        doing: &str,
        asked: impl Future<Output = Result<RowStream, tokio_postgres::Error>>,
    ) -> Result<Vec<Row>, DatastoreError> {
        let origin = Arc::new(self.origin(doing));
        let mut bytes = 0;
        let answer = self.within(doing, async {
            let mut sent = pin!(asked.await?);
            let mut rows = Vec::new();
            while let Some(row) = sent.try_next().await? {
                bytes += row.raw_size_bytes();
                if bytes > ANSWER_MAX {
                    self.mark_altered();
                    return Ok(Err(origin.malformed(format!(
                        "the answer is larger than {ANSWER_MAX} bytes"
                    ))));
                }
                let origin = origin.clone();
                rows.push(Row { row, origin });
            }
            Ok(Ok(rows))
        });
        answer.await?
    }

    /// Returns the one row that answers a statement.
    pub async fn row(
        &self,
        doing: &str,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, DatastoreError> {
        let mut rows = self.rows(doing, sql, params).await?;
        match (rows.pop(), rows.len()) {
            (Some(row), 0) => Ok(row),
            (_, more) => Err(self.origin(doing).malformed(format!(
                "one row was expected, but {} came",
                if more > 0 { "several" } else { "none" }
            ))),
        }
    }
}
