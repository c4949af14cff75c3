//! Sessions: all questions to the local datastore, and the few questions to the peer.

use super::datastore;
use super::kept::WayBack;
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
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, CopyInSink, Row};

/// Maximum time without bytes from a server that must answer a control statement, or send the next
/// row of a copy.
const REPLY_TIMEOUT: Duration = Duration::from_secs(120);

pub(in crate::cluster) const CARRY_BYTES: &str = "SELECT pg_catalog.set_config('client_encoding', 'SQL_ASCII', false) \
     WHERE pg_catalog.current_setting('server_encoding') = 'SQL_ASCII'";

/// Begins a read-only transaction in which every statement sees the same instant.
pub(super) const BEGIN_SNAPSHOT: &str =
    "BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY";

type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

/// The part of a session that both sides allow: reading only.
pub struct Session {
    client: Arc<Client>,
    wire: datastore::Wire,
    side: Side,
    address: String,
    to: Datastore,
    /// The calls whose answers nobody has received. A caller that stopped waiting leaves one.
    unanswered: AtomicUsize,
    /// True: a statement may have changed the session's settings, its transaction or its locks, or
    /// the rest of an answer is still on its way.
    altered: AtomicBool,
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
            address: to.address(),
            to: to.clone(),
            unanswered: AtomicUsize::new(0),
            altered: AtomicBool::new(false),
        })
    }

    /// Notes that this session must not be handed to another user: an answer was left unread, or a
    /// setting or a lock may be left in it.
    pub(in crate::cluster) fn mark_altered(&self) {
        self.altered.store(true, Ordering::Release);
    }

    /// Returns whether another user may go on with this session as with a new one: it is open,
    /// nothing runs in it, and only questions were asked in it.
    pub(in crate::cluster) fn is_as_opened(&self) -> bool {
        self.wire.is_open()
            && self.unanswered.load(Ordering::Acquire) == 0
            && !self.altered.load(Ordering::Acquire)
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

    /// Returns the server to which the session leads.
    pub(in crate::cluster) fn leads_to(&self) -> &Datastore {
        &self.to
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
        self.unanswered.fetch_add(1, Ordering::AcqRel);
        let result = self
            .patiently(call)
            .await
            .ok_or_else(|| self.silent(doing))?;
        self.unanswered.fetch_sub(1, Ordering::AcqRel);
        result.map_err(|e| self.error(doing, &e))
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
        self.mark_altered();
        self.within(doing, self.client.batch_execute(sql)).await
    }

    /// From now on text is sent and received as the server's bytes if the database has the encoding
    /// `SQL_ASCII`: it does not define their meaning, and they need not be UTF-8. A server of any
    /// other encoding converts.
    pub async fn carry_bytes(&self) -> Result<(), DatastoreError> {
        self.batch("preparing the session", CARRY_BYTES).await
    }

    pub async fn copy_out(&self, doing: &str, sql: &str) -> Result<CopyRows<'_>, DatastoreError> {
        self.mark_altered();
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
pub struct ReadSession {
    /// None: only while it is dropped.
    session: Option<Session>,
    way_back: Option<WayBack>,
}

impl Deref for ReadSession {
    type Target = Session;

    fn deref(&self) -> &Session {
        self.session.as_ref().expect("it is not dropped yet")
    }
}

impl Drop for ReadSession {
    fn drop(&mut self) {
        if let (Some(session), Some(way_back)) = (self.session.take(), self.way_back.take()) {
            way_back.give(session);
        }
    }
}

impl ReadSession {
    pub(in crate::cluster) async fn open(to: &Datastore) -> Result<Self, DatastoreError> {
        Ok(ReadSession {
            session: Some(ReadSession::session(to, &to.database).await?),
            way_back: None,
        })
    }

    pub(super) async fn session(to: &Datastore, database: &str) -> Result<Session, DatastoreError> {
        Session::open(Side::Peer, to, database, true).await
    }

    pub(super) fn kept_by(session: Session, way_back: WayBack) -> Self {
        ReadSession {
            session: Some(session),
            way_back: Some(way_back),
        }
    }

    /// Starts a transaction that sees the exported snapshot.
    pub async fn adopt(&self, snapshot: &Snapshot) -> Result<(), DatastoreError> {
        let sql = format!(
            "{BEGIN_SNAPSHOT}; SET TRANSACTION SNAPSHOT {}",
            quote_literal(&snapshot.0)
        );
        self.batch("adopting the snapshot", &sql)
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
        self.batch("ending the snapshot's transaction", "COMMIT")
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
pub struct WriteSession(Session);

impl Deref for WriteSession {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.0
    }
}

impl WriteSession {
    pub(in crate::cluster) async fn open(
        to: &Datastore,
        database: &str,
    ) -> Result<Self, DatastoreError> {
        // A session may meet the switch or a fence while it opens. The switch renames the database
        // that the server has found by its name, and another one has that name then. A fence ends
        // the sessions from before it, and a new one is not from before it.
        match WriteSession::open_on(Side::Local, to, database).await {
            Err(error)
                if matches!(
                    error.fault,
                    DatastoreFault::NoDatabase | DatastoreFault::Cancelled
                ) =>
            {
                WriteSession::open_on(Side::Local, to, database).await
            }
            opened => opened,
        }
    }

    /// Opens a session for one of the two modules that may write on the peer: preparation and
    /// fence.
    pub(in crate::cluster) async fn open_on(
        side: Side,
        to: &Datastore,
        database: &str,
    ) -> Result<Self, DatastoreError> {
        Ok(WriteSession(
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

    pub async fn begin(&self, doing: &str) -> Result<(), DatastoreError> {
        self.batch(doing, "BEGIN").await
    }

    pub async fn commit(&self, doing: &str) -> Result<(), DatastoreError> {
        self.batch(doing, "COMMIT").await
    }

    pub async fn roll_back(&self, doing: &str) -> Result<(), DatastoreError> {
        self.batch(doing, "ROLLBACK").await
    }

    /// Waits until the server has ended the session's statements, if one was given up.
    pub async fn wait_until_idle(&self, doing: &str) -> Result<(), DatastoreError> {
        self.batch(doing, "SELECT 1").await
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
