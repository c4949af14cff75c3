//! Sessions: all questions to the local datastore, and the few questions to the peer.

use super::datastore;
use super::rows::Origin;
use crate::cluster::Throttle;
use crate::cluster::postgres::datastore_error::{DatastoreError, DatastoreFault};
use crate::config::Datastore;
use crate::domain::Side;
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use std::ops::Deref;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, CopyInSink, Row};

/// Maximum time without bytes from a server that must answer a control statement, or send the next
/// row of a copy.
const REPLY_TIMEOUT: Duration = Duration::from_secs(120);

pub(in crate::cluster) const CARRY_BYTES: &str = "SELECT pg_catalog.set_config('client_encoding', 'SQL_ASCII', false) \
     WHERE pg_catalog.current_setting('server_encoding') = 'SQL_ASCII'";

type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

/// The part of a session that both sides allow: reading only.
pub struct Session {
    client: Arc<Client>,
    wire: datastore::Wire,
    side: Side,
    address: String,
    to: Datastore,
}

impl Session {
    pub(in crate::cluster) async fn open(
        side: Side,
        to: &Datastore,
        database: &str,
        read_only: bool,
    ) -> Result<Self, DatastoreError> {
        let (client, wire) = datastore::connect(side, to, database, read_only).await?;
        Ok(Session {
            client: Arc::new(client),
            wire,
            side,
            address: datastore::address(to),
            to: to.clone(),
        })
    }

    fn error(&self, doing: &str, error: &tokio_postgres::Error) -> DatastoreError {
        DatastoreError::of(self.side, &self.address, doing, error)
    }

    fn silent(&self, doing: &str) -> DatastoreError {
        self.give_up();
        DatastoreError {
            side: self.side,
            address: self.address.clone(),
            doing: doing.to_string(),
            fault: DatastoreFault::Unreachable,
            text: format!("no answer for {} s", REPLY_TIMEOUT.as_secs()),
            sql_state: None,
        }
    }

    pub fn side(&self) -> Side {
        self.side
    }

    /// Returns the origin of an answer, for errors.
    pub(in crate::cluster) fn origin(&self, doing: &str) -> Origin {
        Origin {
            side: self.side,
            address: self.address.clone(),
            doing: doing.to_string(),
        }
    }

    /// Waits for the end of the session, by any cause. The owner of a session that is kept for
    /// long waits for this, and opens another one.
    pub fn ended(&self) -> impl Future<Output = DatastoreError> + Send + 'static {
        let error = DatastoreError {
            side: self.side,
            address: self.address.clone(),
            doing: "keeping a session".into(),
            fault: DatastoreFault::Unreachable,
            text: "it was ended by the server or an operator, or did not answer".into(),
            sql_state: None,
        };
        let closed = self.wire.closed();
        async move {
            closed.await;
            error
        }
    }

    /// Cancels the unanswered statement on the server, and closes the connection. The session
    /// cannot be used after it.
    fn give_up(&self) {
        datastore::cancel(self.side, &self.to, self.client.cancel_token());
        self.wire.close();
    }

    pub(in crate::cluster) fn client(&self) -> &Client {
        &self.client
    }

    /// Returns the client for a task beside the session's owner; the task must not keep the session
    /// alive.
    pub(in crate::cluster) fn shared_client(&self) -> &Arc<Client> {
        &self.client
    }

    pub(in crate::cluster) async fn within<T>(
        &self,
        doing: &str,
        call: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, DatastoreError> {
        match self.patiently(call).await {
            Some(result) => result.map_err(|e| self.error(doing, &e)),
            None => Err(self.silent(doing)),
        }
    }

    /// Waits for the call while bytes come. None: no byte has come from the server for too long.
    async fn patiently<T>(&self, call: impl Future<Output = T>) -> Option<T> {
        let mut call = pin!(call);
        let begun = Instant::now();
        loop {
            let silence = begun.elapsed().min(self.wire.heard.elapsed());
            let left = REPLY_TIMEOUT
                .checked_sub(silence)
                .filter(|left| !left.is_zero())?;
            if let Ok(done) = tokio::time::timeout(left, &mut call).await {
                return Some(done);
            }
        }
    }

    /// Waits without a limit: a statement that takes long for a good reason must not be sent again.
    /// A server that is gone closes the connection, or does not answer the system's keepalives.
    pub(in crate::cluster) async fn unlimited<T>(
        &self,
        doing: &str,
        call: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, DatastoreError> {
        call.await.map_err(|e| self.error(doing, &e))
    }

    pub(in crate::cluster) async fn batch(
        &self,
        doing: &str,
        sql: &str,
    ) -> Result<(), DatastoreError> {
        self.within(doing, self.client.batch_execute(sql)).await
    }

    /// From now on text is sent and received as the server's bytes if the database has the encoding
    /// `SQL_ASCII`: it does not define their meaning, and they need not be UTF-8. A server of any
    /// other encoding converts.
    pub async fn carry_bytes(&self) -> Result<(), DatastoreError> {
        self.batch("preparing the session", CARRY_BYTES).await
    }

    pub async fn copy_out(&self, doing: &str, sql: &str) -> Result<CopyRows<'_>, DatastoreError> {
        let stream = self.within(doing, self.client.copy_out(sql)).await?;
        Ok(CopyRows {
            inner: Box::pin(stream),
            session: self,
            doing: doing.to_string(),
        })
    }
}

/// The rows of a COPY OUT, one line of text each: the server sends every row as its own message.
pub struct CopyRows<'a> {
    inner: Pin<Box<dyn Stream<Item = Result<Bytes, tokio_postgres::Error>> + Send>>,
    session: &'a Session,
    doing: String,
}

impl CopyRows<'_> {
    pub async fn next(&mut self) -> Result<Option<Bytes>, DatastoreError> {
        match self.session.patiently(self.inner.next()).await {
            Some(None) => Ok(None),
            Some(Some(row)) => row
                .map(Some)
                .map_err(|e| self.session.error(&self.doing, &e)),
            None => Err(self.session.silent(&self.doing)),
        }
    }
}

/// A session on the peer: it only reads, in transactions that are read-only for the server too.
pub struct PeerSession(Session);

impl Deref for PeerSession {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.0
    }
}

impl PeerSession {
    pub async fn open(to: &Datastore) -> Result<Self, DatastoreError> {
        PeerSession::open_in(to, &to.database).await
    }

    /// Opens a session in another database of the peer's server.
    pub(in crate::cluster) async fn open_in(
        to: &Datastore,
        database: &str,
    ) -> Result<Self, DatastoreError> {
        Ok(PeerSession(
            Session::open(Side::Peer, to, database, true).await?,
        ))
    }

    /// Starts a transaction that sees one instant of the primary, and lets other sessions see the
    /// same.
    pub async fn export_snapshot(&self) -> Result<Snapshot, DatastoreError> {
        let begin = "BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY";
        self.0.batch("starting the snapshot", begin).await?;
        let row = self
            .row(
                "exporting the snapshot",
                "SELECT pg_catalog.pg_export_snapshot()",
                &[],
            )
            .await?;
        Ok(Snapshot(row.get(0)?))
    }

    /// Starts a transaction that sees the exported snapshot.
    pub async fn adopt(&self, snapshot: &Snapshot) -> Result<(), DatastoreError> {
        let sql = format!(
            "BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}",
            quote_literal(&snapshot.0)
        );
        self.0
            .batch("adopting the snapshot", &sql)
            .await
            .map_err(|mut error| {
                // The session that exported it has ended: this is not a wrong statement, but a lost
                // connection.
                if error.sql_state == Some(SqlState::INVALID_PARAMETER_VALUE) {
                    error.fault = DatastoreFault::Unreachable;
                }
                error
            })
    }

    /// Ends the transaction, and with it every lock that it held.
    pub async fn end(&self) -> Result<(), DatastoreError> {
        self.0
            .batch("ending the snapshot's transaction", "COMMIT")
            .await
    }
}

/// The name of an exported snapshot.
#[derive(Debug, Clone)]
pub struct Snapshot(String);

impl Snapshot {
    pub(in crate::cluster) fn named(name: String) -> Self {
        Snapshot(name)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A session on the local server.
pub struct LocalSession(Session);

impl Deref for LocalSession {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.0
    }
}

impl LocalSession {
    pub async fn open(to: &Datastore, database: &str) -> Result<Self, DatastoreError> {
        LocalSession::open_on(Side::Local, to, database).await
    }

    /// Opens a session for one of the two modules that may write on the peer: preparation and
    /// fence.
    pub(in crate::cluster) async fn open_on(
        side: Side,
        to: &Datastore,
        database: &str,
    ) -> Result<Self, DatastoreError> {
        Ok(LocalSession(
            Session::open(side, to, database, false).await?,
        ))
    }

    /// Returns rows of the local server, which is trusted; a wrong type in them is a fault of the
    /// program.
    pub async fn query(
        &self,
        doing: &str,
        sql: &str,
        params: Params<'_>,
    ) -> Result<Vec<Row>, DatastoreError> {
        self.0.within(doing, self.0.client.query(sql, params)).await
    }

    pub async fn query_one(
        &self,
        doing: &str,
        sql: &str,
        params: Params<'_>,
    ) -> Result<Row, DatastoreError> {
        self.0
            .within(doing, self.0.client.query_one(sql, params))
            .await
    }

    pub async fn execute(
        &self,
        doing: &str,
        sql: &str,
        params: Params<'_>,
    ) -> Result<u64, DatastoreError> {
        self.0
            .within(doing, self.0.client.execute(sql, params))
            .await
    }

    pub async fn batch(&self, doing: &str, sql: &str) -> Result<(), DatastoreError> {
        self.0.batch(doing, sql).await
    }

    /// Runs a statement without a time limit, because its time depends on the size of the data.
    pub async fn long(&self, doing: &str, sql: &str) -> Result<(), DatastoreError> {
        let running = self.0.client.batch_execute(sql);
        self.0.unlimited(doing, running).await
    }

    pub async fn copy_in(&self, doing: &str, sql: &str) -> Result<CopyIn<'_>, DatastoreError> {
        let sink = self.0.within(doing, self.0.client.copy_in(sql)).await?;
        Ok(CopyIn {
            sink: Box::pin(sink),
            session: &self.0,
            doing: doing.to_string(),
        })
    }
}

/// The receiving end of a COPY. If it is dropped without [`CopyIn::finish`], the copy fails on the
/// server and leaves no row.
pub struct CopyIn<'a> {
    sink: Pin<Box<CopyInSink<Bytes>>>,
    session: &'a Session,
    doing: String,
}

impl CopyIn<'_> {
    pub async fn send(&mut self, data: Bytes) -> Result<(), DatastoreError> {
        use futures_util::SinkExt;
        match tokio::time::timeout(REPLY_TIMEOUT, self.sink.feed(data)).await {
            Ok(result) => result.map_err(|e| self.session.error(&self.doing, &e)),
            Err(_) => Err(self.session.silent(&self.doing)),
        }
    }

    /// Ends the copy. Returns the number of rows that the server stored.
    pub async fn finish(mut self) -> Result<u64, DatastoreError> {
        match tokio::time::timeout(REPLY_TIMEOUT, self.sink.as_mut().finish()).await {
            Ok(result) => result.map_err(|e| self.session.error(&self.doing, &e)),
            Err(_) => Err(self.session.silent(&self.doing)),
        }
    }
}

/// Copies rows from the peer into a local table; `see` is called with each row. Returns the number
/// of rows stored.
pub(crate) async fn pipe(
    mut from: CopyRows<'_>,
    mut to: CopyIn<'_>,
    throttle: &Throttle,
    mut see: impl FnMut(&[u8]),
) -> Result<u64, DatastoreError> {
    while let Some(row) = from.next().await? {
        throttle.take(row.len()).await;
        see(&row);
        to.send(row).await?;
    }
    to.finish().await
}

pub fn quote_ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Quotes names and values from a catalog; parameters are better wherever the statement accepts
/// them.
pub fn quote_literal(value: &str) -> String {
    let doubled = value.replace('\'', "''");
    if doubled.contains('\\') {
        format!("E'{}'", doubled.replace('\\', "\\\\"))
    } else {
        format!("'{doubled}'")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_cannot_break_out_of_their_quotes() {
        assert_eq!(quote_ident(r#"a"b"#), r#""a""b""#);
        assert_eq!(quote_literal("it's"), "'it''s'");
        assert_eq!(quote_literal(r"\'"), r"E'\\'''");
    }
}
