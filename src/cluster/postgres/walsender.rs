//! A session in the replication protocol: slots with an exported snapshot, and the stream of a
//! slot. No SQL client supports it; the messages themselves are encoded by the library on which our
//! SQL client is built.

use super::cancelling::{CANCELLED, Cancelling, Unanswered};
use super::channel::{self, Heard, Watched};
use super::datastore::{self, DatastoreError, DatastoreFault};
use super::session::CARRY_BYTES;
use super::{login, tls};
use crate::cluster::{Session, Snapshot, quote_ident, quote_literal};
use crate::config::{Datastore, SslMode};
use crate::domain::{Lsn, Side};
use bytes::{Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::{backend, frontend};
use rustls::pki_types::ServerName;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_postgres::error::SqlState;
use tokio_rustls::TlsConnector;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum time to wait for a slot that is in use: it is released a moment after its reader has
/// gone.
const SLOT_BUSY_TIMEOUT: Duration = Duration::from_secs(5);
const SLOT_BUSY_PAUSE: Duration = Duration::from_millis(50);
/// Time after which a reader of our slot that ends by itself is gone.
const READER_EXIT_TIME: Duration = Duration::from_secs(1);
const READ_BYTES: usize = 64 * 1024;
/// Messages shorter than this are copied out of the buffer, so that it can be used again.
const COPIED_MESSAGE_BYTES: usize = 4096;
const COPY_BOTH: u8 = b'W';

pub(in crate::cluster) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Rows of a simple query, as text.
pub type TextRows = Vec<Vec<Option<String>>>;

/// A session in the replication protocol, on the peer or, with [`WalSession::open_local`], on the
/// local server. It makes and drops slots; it writes no rows.
pub struct WalSession {
    wire: Wire,
    told: Told,
}

/// The beginning of this session's errors.
#[derive(Clone)]
struct Told {
    side: Side,
    address: String,
}

impl Told {
    fn error(&self, doing: &str, trouble: Trouble) -> DatastoreError {
        let (fault, text, sql_state) = match trouble {
            Trouble::Wire(error) => {
                let text = error.to_string();
                match (datastore::refused_by_us(&text), tls::explain(&text)) {
                    (Some(fault), _) => (fault, text, None),
                    (None, Some(person)) => (DatastoreFault::Tls, person, None),
                    (None, None) => (DatastoreFault::Unreachable, text, None),
                }
            }
            Trouble::Refused { state, text } => {
                (datastore::fault_of(&state, &text), text, Some(state))
            }
            Trouble::Authentication(text) => (DatastoreFault::Authentication, text, None),
            Trouble::Tls(text) => (DatastoreFault::Tls, text, None),
        };
        DatastoreError {
            side: self.side,
            address: self.address.clone(),
            doing: doing.to_string(),
            fault,
            text: datastore::printable(&text),
            sql_state,
        }
    }

    fn silent(&self, doing: &str, seconds: u64) -> DatastoreError {
        let text = format!("no answer for {seconds} s");
        self.error(
            doing,
            Trouble::Wire(io::Error::new(io::ErrorKind::TimedOut, text)),
        )
    }
}

pub(in crate::cluster) enum Trouble {
    Wire(io::Error),
    /// The server's own words.
    Refused {
        state: SqlState,
        text: String,
    },
    Authentication(String),
    Tls(String),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Trouble::Wire(error)
    }
}

/// A new slot, and its snapshot.
#[derive(Debug, Clone)]
pub struct NewSlot {
    /// The snapshot sees every transaction that committed before this position, the slot sends
    /// every later one.
    pub consistent_point: Lsn,
    pub snapshot: Snapshot,
}

impl WalSession {
    pub async fn open(to: &Datastore) -> Result<WalSession, DatastoreError> {
        WalSession::open_on(Side::Peer, to).await
    }

    /// Opens a session on the local server, whose slot holds the changes that its successor does
    /// not have.
    pub async fn open_local(to: &Datastore) -> Result<WalSession, DatastoreError> {
        WalSession::open_on(Side::Local, to).await
    }

    async fn open_on(side: Side, to: &Datastore) -> Result<WalSession, DatastoreError> {
        let told = Told {
            side,
            address: datastore::address(to),
        };
        let doing = format!(
            "connecting to database {} as {} for replication",
            to.database, to.user
        );
        let opening = Wire::open(side, to);
        let wire = match tokio::time::timeout(CONNECT_TIMEOUT, opening).await {
            Ok(opened) => opened.map_err(|trouble| told.error(&doing, trouble))?,
            Err(_) => return Err(told.silent(&doing, CONNECT_TIMEOUT.as_secs())),
        };
        let mut session = WalSession { wire, told };
        // As in every session of ours, limits that an older server does not know cannot be named in
        // the start-up options.
        let sql = "SELECT set_config(name, '0', false) FROM pg_catalog.pg_settings \
                   WHERE name IN ('idle_session_timeout', 'transaction_timeout')";
        session.query("preparing the session", sql).await?;
        session.query("preparing the session", CARRY_BYTES).await?;
        Ok(session)
    }

    /// Sends a simple query, or a command of the replication protocol.
    pub async fn query(&mut self, doing: &str, sql: &str) -> Result<TextRows, DatastoreError> {
        self.query_within(doing, sql, REPLY_TIMEOUT).await
    }

    pub async fn query_within(
        &mut self,
        doing: &str,
        sql: &str,
        patience: Duration,
    ) -> Result<TextRows, DatastoreError> {
        let unanswered = Unanswered::of(&self.wire.cancelling);
        let answer = tokio::time::timeout(patience, self.wire.query(sql)).await;
        let cancelling = unanswered.answered();
        match answer {
            Ok(Ok(rows)) => Ok(rows),
            Ok(Err(trouble)) => {
                if matches!(trouble, Trouble::Wire(_)) {
                    cancelling.cancel().await;
                }
                Err(self.told.error(doing, trouble))
            }
            Err(_) => {
                cancelling.cancel().await;
                // A cancelled command has ended when the server reports it.
                let _ = tokio::time::timeout(CANCELLED, self.wire.rest()).await;
                Err(self.told.silent(doing, patience.as_secs()))
            }
        }
    }

    /// Returns the position at which the server's history left timeline `left` on its way to the
    /// timeline `now`; None: it was never on that timeline.
    pub async fn left_timeline(
        &mut self,
        left: i32,
        now: i32,
    ) -> Result<Option<Lsn>, DatastoreError> {
        let sql = format!("TIMELINE_HISTORY {now}");
        let rows = self.query("reading the timeline's history", &sql).await?;
        let content = rows.first().and_then(|row| row.get(1)?.clone());
        let content = content.unwrap_or_default();
        // Lines of `TIMELINE LSN reason`.
        let mut lines = content.lines().map(str::split_whitespace);
        let line = lines.find_map(|mut words| {
            let of = words.next()?.parse::<i32>().ok()?;
            (of == left).then(|| words.next())?
        });
        Ok(line.and_then(|lsn| lsn.parse().ok()))
    }

    /// Makes a slot that ends with this session. The snapshot is valid until the session's next
    /// command. The server first waits for every open writing transaction, so the wait has a limit.
    pub async fn temporary_slot(
        &mut self,
        name: &str,
        patience: Duration,
    ) -> Result<NewSlot, DatastoreError> {
        let doing = "making a temporary slot";
        let sql = format!(
            "CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL pgoutput EXPORT_SNAPSHOT",
            quote_ident(name)
        );
        let rows = self.query_within(doing, &sql, patience).await?;
        let text = |column: usize| rows.first()?.get(column)?.clone();
        let (Some(point), Some(snapshot)) = (text(1).and_then(|t| t.parse().ok()), text(2)) else {
            let error = io::Error::new(io::ErrorKind::InvalidData, "an answer without a snapshot");
            return Err(self.told.error(doing, Trouble::Wire(error)));
        };
        Ok(NewSlot {
            consistent_point: point,
            snapshot: Snapshot::named(snapshot),
        })
    }

    /// Ends the session that reads our slot. We hold the working lock: that reader has lost the
    /// lock, or its connection, and its server may not know.
    pub async fn end_reader(&mut self, slot: &str) -> Result<(), DatastoreError> {
        let sql = format!(
            "SELECT pg_catalog.pg_terminate_backend(active_pid) FROM pg_catalog.pg_replication_slots \
             WHERE slot_name = {} AND active_pid IS NOT NULL",
            quote_literal(slot)
        );
        self.query("ending the former reader of our slot", &sql)
            .await?;
        Ok(())
    }

    /// Begins the stream of a slot.
    pub async fn start(
        mut self,
        slot: &str,
        publication: &str,
        from: Lsn,
    ) -> Result<WalStream, DatastoreError> {
        let doing = format!("starting the stream of slot {slot}");
        let sql = format!(
            "START_REPLICATION SLOT {} LOGICAL {from} (proto_version '1', publication_names {}, messages 'true')",
            quote_ident(slot),
            quote_literal(&quote_ident(publication)),
        );
        let begun = Instant::now();
        let mut is_reader_ended = false;
        loop {
            match tokio::time::timeout(REPLY_TIMEOUT, self.wire.start(&sql)).await {
                Ok(Ok(())) => {
                    return Ok(WalStream {
                        wire: self.wire,
                        told: self.told,
                    });
                }
                // The former reader has just ended, and the server will notice it soon.
                Ok(Err(Trouble::Refused { state, .. }))
                    if state == SqlState::OBJECT_IN_USE && begun.elapsed() < SLOT_BUSY_TIMEOUT =>
                {
                    tokio::time::timeout(CANCELLED, self.wire.rest())
                        .await
                        .map_err(|_| self.told.silent(&doing, CANCELLED.as_secs()))?
                        .map_err(|trouble| self.told.error(&doing, trouble))?;
                    if !is_reader_ended && begun.elapsed() > READER_EXIT_TIME {
                        is_reader_ended = true;
                        self.end_reader(slot).await?;
                    }
                    tokio::time::sleep(SLOT_BUSY_PAUSE).await;
                }
                Ok(Err(trouble)) => return Err(self.told.error(&doing, trouble)),
                Err(_) => return Err(self.told.silent(&doing, REPLY_TIMEOUT.as_secs())),
            }
        }
    }
}

/// A running stream: it receives messages, and sends answers.
pub struct WalStream {
    wire: Wire,
    told: Told,
}

/// One message of the stream.
pub enum Arrived {
    /// A message of the output plugin; `end` is the position up to which the server had read then.
    Data { bytes: Bytes, end: Lsn },
    /// Everything before `end` was sent. `reply`: the server wants an answer now.
    Keepalive { end: Lsn, reply: bool },
}

impl WalStream {
    /// Waits for the next message. It may be dropped and called again at any time.
    pub async fn next(&mut self) -> Result<Arrived, DatastoreError> {
        let arrived = self.wire.arrived().await;
        // Time that a message has waited here is not silence of the server.
        self.wire.heard.again();
        arrived.map_err(|trouble| self.told.error("reading the stream", trouble))
    }

    /// Returns the next message, if it has arrived already.
    pub fn ready(&mut self) -> Result<Option<Arrived>, DatastoreError> {
        let ready = self.wire.take_arrived();
        ready.map_err(|trouble| self.told.error("reading the stream", trouble))
    }

    /// Sends a status update. A `flush` of 0 means none: then a server that shuts down waits only
    /// for `write`.
    pub async fn answer(
        &mut self,
        write: Lsn,
        flush: Lsn,
        ask: bool,
    ) -> Result<(), DatastoreError> {
        let mut body = BytesMut::with_capacity(39);
        body.extend_from_slice(b"d\0\0\0\x26r");
        for position in [write, flush, flush] {
            body.extend_from_slice(&position.0.to_be_bytes());
        }
        body.extend_from_slice(&microseconds_since_2000().to_be_bytes());
        body.extend_from_slice(&[u8::from(ask)]);
        match tokio::time::timeout(REPLY_TIMEOUT, self.wire.send(&body)).await {
            Ok(sent) => sent.map_err(|error| {
                self.told
                    .error("answering the stream", Trouble::Wire(error))
            }),
            Err(_) => Err(self
                .told
                .silent("answering the stream", REPLY_TIMEOUT.as_secs())),
        }
    }

    /// Fails if no byte has come for this long, and the server does not report that it is at work
    /// for us. It sends nothing while it reads a large transaction without changes for us, and if
    /// it had to begin again, it would take as long.
    pub async fn judge_silence(&mut self, limit: Duration) -> Result<(), DatastoreError> {
        if self.wire.heard.elapsed() <= limit {
            return Ok(());
        }
        let process = self.wire.cancelling.process;
        let to = self.wire.cancelling.to.clone();
        match is_at_work(self.told.side, &to, process).await {
            Ok(true) => {
                log::info!(
                    "{} datastore {}: no message on the stream for {} s; server process {process} is still decoding for it, so it is waited for",
                    self.told.side,
                    self.told.address,
                    limit.as_secs()
                );
                self.wire.heard.again();
                Ok(())
            }
            Ok(false) => Err(self.told.silent("reading the stream", limit.as_secs())),
            Err(error) => {
                log::debug!("{error}");
                Err(self.told.silent("reading the stream", limit.as_secs()))
            }
        }
    }
}

/// Returns whether the server process at the other end of a stream is at work. The server ends a
/// process whose client is gone, unless wal_sender_timeout is 0. A process that only waits, for
/// more log or for room in the connection, would have answered us.
async fn is_at_work(side: Side, to: &Datastore, process: i32) -> Result<bool, DatastoreError> {
    let session = Session::open(side, to, &to.database, true).await?;
    let sql = "SELECT EXISTS (SELECT 1 FROM pg_stat_activity WHERE pid = $1 AND backend_type = 'walsender' \
                 AND lower(coalesce(wait_event, '')) NOT IN ('walsendermain', 'walsenderwaitforwal', 'walsenderwritedata'))";
    let doing = "asking for the stream's server process";
    session.row(doing, sql, &[&process]).await?.get(0)
}

fn microseconds_since_2000() -> i64 {
    const Y2000: i64 = 946_684_800_000_000;
    chrono::Utc::now().timestamp_micros() - Y2000
}

struct Wire {
    io: Box<dyn Io>,
    buffer: BytesMut,
    /// Time at which bytes came last. A message may take minutes to arrive.
    heard: Heard,
    cancelling: Cancelling,
}

impl Wire {
    async fn open(side: Side, to: &Datastore) -> Result<Wire, Trouble> {
        let (io, heard) = connect(side, to).await?;
        let mut wire = Wire {
            io,
            buffer: BytesMut::with_capacity(READ_BYTES),
            heard,
            cancelling: Cancelling {
                side,
                to: Arc::new(to.clone()),
                process: 0,
                secret: 0,
            },
        };
        let options = format!(
            "{} -c search_path={} -c default_transaction_read_only=off{}",
            datastore::SESSION_OPTIONS,
            datastore::search_path(&to.database),
            // A server without room for an ordinary session may have room for this one.
            login::silence(side, to, &to.database)
                .await
                .unwrap_or_default()
        );
        let parameters = [
            ("user", to.user.as_str()),
            ("database", to.database.as_str()),
            ("replication", "database"),
            ("application_name", "warm-spare"),
            ("client_encoding", "UTF8"),
            ("options", options.as_str()),
        ];
        let mut out = BytesMut::new();
        frontend::startup_message(parameters, &mut out)?;
        wire.send(&out).await?;
        wire.authenticate(side, to).await?;
        loop {
            match wire.message().await? {
                backend::Message::ReadyForQuery(_) => return Ok(wire),
                backend::Message::ErrorResponse(body) => return Err(refused(&body)),
                backend::Message::BackendKeyData(body) => {
                    wire.cancelling.process = body.process_id();
                    wire.cancelling.secret = body.secret_key();
                }
                _ => {}
            }
        }
    }

    async fn authenticate(&mut self, side: Side, to: &Datastore) -> Result<(), Trouble> {
        let password = || -> Result<Vec<u8>, Trouble> {
            let Some(source) = &to.password else {
                let text = "the server asks for a password and none is configured";
                return Err(Trouble::Authentication(text.into()));
            };
            let secret = source
                .read(&format!("{side}.datastore.password"))
                .map_err(|e| Trouble::Authentication(e.to_string()))?;
            Ok(secret.expose().as_bytes().to_vec())
        };
        let mut scram: Option<sasl::ScramSha256> = None;
        let bad = |what: &str| Trouble::Authentication(format!("the server {what}"));
        loop {
            let mut out = BytesMut::new();
            match self.message().await? {
                backend::Message::AuthenticationOk => return Ok(()),
                backend::Message::AuthenticationCleartextPassword => {
                    frontend::password_message(&password()?, &mut out)?;
                }
                backend::Message::AuthenticationMd5Password(body) => {
                    let hash = md5_hash(to.user.as_bytes(), &password()?, body.salt());
                    frontend::password_message(hash.as_bytes(), &mut out)?;
                }
                backend::Message::AuthenticationSasl(body) => {
                    let plain = body
                        .mechanisms()
                        .any(|mechanism| Ok(mechanism == sasl::SCRAM_SHA_256))?;
                    if !plain {
                        return Err(bad("offers no SCRAM-SHA-256"));
                    }
                    let begun =
                        sasl::ScramSha256::new(&password()?, sasl::ChannelBinding::unsupported());
                    frontend::sasl_initial_response(
                        sasl::SCRAM_SHA_256,
                        begun.message(),
                        &mut out,
                    )?;
                    scram = Some(begun);
                }
                backend::Message::AuthenticationSaslContinue(body) => {
                    let begun = scram
                        .as_mut()
                        .ok_or_else(|| bad("continues a SCRAM exchange that was not begun"))?;
                    begun.update(body.data())?;
                    frontend::sasl_response(begun.message(), &mut out)?;
                }
                backend::Message::AuthenticationSaslFinal(body) => {
                    let begun = scram
                        .as_mut()
                        .ok_or_else(|| bad("ends a SCRAM exchange that was not begun"))?;
                    begun.finish(body.data())?;
                }
                backend::Message::ErrorResponse(body) => return Err(refused(&body)),
                backend::Message::NoticeResponse(_) => {}
                _ => return Err(bad("asks for a way to authenticate that is not supported")),
            }
            self.send(&out).await?;
        }
    }

    async fn query(&mut self, sql: &str) -> Result<TextRows, Trouble> {
        let mut out = BytesMut::new();
        frontend::query(sql, &mut out)?;
        self.send(&out).await?;
        self.rest().await
    }

    /// Reads the rest of an answer.
    async fn rest(&mut self) -> Result<TextRows, Trouble> {
        let (mut rows, mut failed) = (Vec::new(), None);
        loop {
            match self.message().await? {
                backend::Message::DataRow(body) => rows.push(text_row(&body)?),
                backend::Message::ErrorResponse(body) => failed = Some(refused(&body)),
                backend::Message::ReadyForQuery(_) => break,
                _ => {}
            }
        }
        failed.map_or(Ok(rows), Err)
    }

    async fn start(&mut self, sql: &str) -> Result<(), Trouble> {
        let mut out = BytesMut::new();
        frontend::query(sql, &mut out)?;
        self.send(&out).await?;
        loop {
            // The one message that the library does not know.
            if self.buffer.first() == Some(&COPY_BOTH) && self.whole()? {
                let length = self.length();
                drop(self.buffer.split_to(length));
                return Ok(());
            }
            if self.buffer.first() == Some(&COPY_BOTH) || self.buffer.is_empty() {
                self.read().await?;
                continue;
            }
            match self.message().await? {
                backend::Message::ErrorResponse(body) => return Err(refused(&body)),
                backend::Message::ReadyForQuery(_) => {
                    let error = io::Error::new(io::ErrorKind::InvalidData, "no stream was begun");
                    return Err(error.into());
                }
                _ => {}
            }
        }
    }

    async fn arrived(&mut self) -> Result<Arrived, Trouble> {
        loop {
            if let Some(arrived) = self.take_arrived()? {
                return Ok(arrived);
            }
            self.read().await?;
        }
    }

    fn take_arrived(&mut self) -> Result<Option<Arrived>, Trouble> {
        let odd = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_string());
        loop {
            let body = match backend::Message::parse(&mut self.buffer)? {
                None => return Ok(None),
                Some(backend::Message::CopyData(body)) => body.into_bytes(),
                Some(backend::Message::ErrorResponse(body)) => return Err(refused(&body)),
                Some(backend::Message::CopyDone) => {
                    return Err(odd("the server ended the stream").into());
                }
                Some(_) => continue,
            };
            let position = |at: usize| {
                let bytes = body.get(at..at + 8)?;
                Some(Lsn(u64::from_be_bytes(bytes.try_into().ok()?)))
            };
            return match body.first() {
                Some(b'w') if body.len() >= 25 => Ok(Some(Arrived::Data {
                    end: position(9).unwrap_or_default(),
                    bytes: match body.len() {
                        // A slice of the buffer would keep the whole buffer in memory.
                        ..COPIED_MESSAGE_BYTES => Bytes::copy_from_slice(&body[25..]),
                        _ => body.slice(25..),
                    },
                })),
                Some(b'k') if body.len() >= 18 => Ok(Some(Arrived::Keepalive {
                    end: position(1).unwrap_or_default(),
                    reply: body[17] == 1,
                })),
                _ => Err(odd("the stream has a message of an unknown kind").into()),
            };
        }
    }

    async fn message(&mut self) -> Result<backend::Message, Trouble> {
        loop {
            if let Some(message) = backend::Message::parse(&mut self.buffer)? {
                return Ok(message);
            }
            self.read().await?;
        }
    }

    /// Only adds to the buffer, so that it may be dropped at any time.
    async fn read(&mut self) -> Result<(), io::Error> {
        self.buffer.reserve(READ_BYTES);
        if self.io.read_buf(&mut self.buffer).await? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the server closed the connection",
            ));
        }
        Ok(())
    }

    fn length(&self) -> usize {
        let bytes = self.buffer.get(1..5).and_then(|b| b.try_into().ok());
        bytes.map_or(usize::MAX, |bytes| u32::from_be_bytes(bytes) as usize + 1)
    }

    fn whole(&self) -> Result<bool, io::Error> {
        Ok(self.buffer.len() >= 5 && self.buffer.len() >= self.length())
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), io::Error> {
        self.io.write_all(bytes).await?;
        self.io.flush().await
    }
}

fn text_row(body: &backend::DataRowBody) -> Result<Vec<Option<String>>, io::Error> {
    body.ranges()
        .map(|range| {
            Ok(range.map(|range| String::from_utf8_lossy(&body.buffer()[range]).into_owned()))
        })
        .collect()
}

fn refused(body: &backend::ErrorResponseBody) -> Trouble {
    let (mut state, mut text, mut detail) = (String::new(), String::new(), None);
    let mut fields = body.fields();
    while let Ok(Some(field)) = fields.next() {
        let value = String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            b'C' => state = value,
            b'M' => text = value,
            b'D' => detail = Some(value),
            _ => {}
        }
    }
    if let Some(detail) = detail {
        text = format!("{text} ({detail})");
    }
    Trouble::Refused {
        state: SqlState::from_code(&state),
        text,
    }
}

pub(in crate::cluster) async fn connect(
    side: Side,
    to: &Datastore,
) -> Result<(Box<dyn Io>, Heard), Trouble> {
    let (mut tcp, loopback) = channel::connect(to).await?;
    if to.ssl_mode == SslMode::Disable {
        return Ok(watched(tcp, loopback));
    }
    let mut out = BytesMut::new();
    frontend::ssl_request(&mut out);
    tcp.write_all(&out).await?;
    let answer = tcp.read_u8().await?;
    if answer == b'E' {
        return Err(Trouble::Wire(io::Error::other(channel::NO_PROCESS)));
    }
    let accepted = answer == b'S';
    if !accepted && to.ssl_mode == SslMode::Prefer {
        return Ok(watched(tcp, loopback));
    }
    if !accepted {
        return Err(Trouble::Tls("server does not support TLS".into()));
    }
    let mut config = tls::client_config(side, to).map_err(|error| Trouble::Tls(error.text))?;
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    let name = ServerName::try_from(to.host.clone()).map_err(|e| Trouble::Tls(e.to_string()))?;
    let stream = TlsConnector::from(Arc::new(config))
        .connect(name, tcp)
        .await?;
    let private = loopback || channel::is_verified(to);
    Ok(watched(stream, private))
}

fn watched(io: impl Io + 'static, private: bool) -> (Box<dyn Io>, Heard) {
    let watched = Watched::new(io, private);
    let heard = watched.heard();
    (Box::new(watched), heard)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream whose server is the other end of the pipe.
    fn stream() -> (WalStream, tokio::io::DuplexStream) {
        let (ours, theirs) = tokio::io::duplex(4 * READ_BYTES);
        let to = Datastore {
            host: "localhost".into(),
            port: 5432,
            user: "hab".into(),
            database: "builder".into(),
            password: None,
            ssl_mode: SslMode::Disable,
            ssl_root_cert: None,
            ssl_cert: None,
            ssl_key: None,
            source: "configuration",
        };
        let told = Told {
            side: Side::Peer,
            address: datastore::address(&to),
        };
        let wire = Wire {
            io: Box::new(ours),
            buffer: BytesMut::with_capacity(READ_BYTES),
            heard: Heard::now(),
            cancelling: Cancelling {
                side: Side::Peer,
                to: Arc::new(to),
                process: 0,
                secret: 0,
            },
        };
        (WalStream { wire, told }, theirs)
    }

    fn message(length: usize) -> Vec<u8> {
        let mut message = vec![b'd'];
        message.extend((4 + 25 + length as u32).to_be_bytes());
        message.push(b'w');
        message.extend([0; 24]);
        message.extend(vec![b'x'; length]);
        message
    }

    /// Returns the bytes that messages of this length keep in memory, for each byte of theirs; each
    /// message was read by itself.
    async fn kept(length: usize, number: usize) -> f64 {
        let (mut stream, mut server) = stream();
        let mut frames = Vec::new();
        for _ in 0..number {
            let sent = server.write_all(&message(length)).await;
            sent.expect("the pipe takes it");
            match stream.next().await {
                Ok(Arrived::Data { bytes, .. }) => frames.push(bytes),
                _ => panic!("no data"),
            }
        }
        drop(stream);
        let held = |frame: Bytes| {
            assert_eq!(frame.len(), length);
            // Nobody else holds the message: its capacity is the memory that it keeps.
            frame.try_into_mut().expect("its only holder").capacity()
        };
        let held: usize = frames.into_iter().map(held).sum();
        held as f64 / (length * number) as f64
    }

    /// Messages may wait for days at the gate, and the spool counts only their own bytes.
    #[tokio::test]
    async fn messages_that_come_one_by_one_keep_little_more_than_their_bytes() {
        for length in [60, 1000, COPIED_MESSAGE_BYTES - 26] {
            let kept = kept(length, 500).await;
            assert!(kept < 1.1, "{kept} bytes for each of {length}");
        }
    }
}
