//! A session in the replication protocol: slots with an exported snapshot, and the stream of a
//! slot. No SQL client supports it; the messages themselves are encoded by the library on which our
//! SQL client is built.

use super::cancelling::{CANCELLED, Unanswered};
use super::datastore_error;
use super::session::CARRY_BYTES;
use super::tried;
use crate::cluster::error_text;
use crate::cluster::postgres::datastore_error::{DatastoreError, DatastoreFault};
use crate::cluster::{Session, Snapshot, quote_ident, quote_literal};
use crate::config::Datastore;
use crate::domain::{Lsn, Side};
use bytes::{Bytes, BytesMut};
use postgres_protocol::message::frontend;
use std::io;
use std::time::{Duration, Instant};
use tokio_postgres::error::SqlState;
use wire::{Trouble, Wire};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum time to wait for a slot that is in use: it is released a moment after its reader has
/// gone.
const SLOT_BUSY_TIMEOUT: Duration = Duration::from_secs(5);
const SLOT_BUSY_PAUSE: Duration = Duration::from_millis(50);
/// Time after which a reader of our slot that ends by itself is gone.
const READER_EXIT_TIME: Duration = Duration::from_secs(1);

/// Rows of a simple query, as text.
pub type TextRows = Vec<Vec<Option<String>>>;

/// A session in the replication protocol, on the peer or, with `WalSession::open_local`, on the
/// local server. It makes and drops slots; it writes no rows.
pub struct WalSession {
    wire: Wire,
    origin: ErrorOrigin,
}

/// The beginning of this session's errors.
#[derive(Clone)]
struct ErrorOrigin {
    side: Side,
    address: String,
}

impl ErrorOrigin {
    fn error(&self, doing: &str, trouble: Trouble) -> DatastoreError {
        let (fault, text, sql_state) = match trouble {
            Trouble::Wire(error) => {
                let text = error.to_string();
                match (
                    datastore_error::refused_by_us(&text),
                    error_text::explain(&text),
                ) {
                    (Some(fault), _) => (fault, text, None),
                    (None, Some(person)) => (DatastoreFault::Tls, person, None),
                    (None, None) => (DatastoreFault::Unreachable, text, None),
                }
            }
            Trouble::Refused { state, text } => {
                (datastore_error::fault_of(&state, &text), text, Some(state))
            }
            Trouble::Authentication(text) => (DatastoreFault::Authentication, text, None),
            Trouble::Tls(text) => (DatastoreFault::Tls, text, None),
        };
        DatastoreError {
            side: self.side,
            address: self.address.clone(),
            doing: doing.to_string(),
            fault,
            text: datastore_error::printable(&text),
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

/// A new slot, and its snapshot.
#[derive(Debug, Clone)]
pub struct NewSlot {
    /// The snapshot sees every transaction that committed before this position, the slot sends
    /// every later one.
    pub consistent_point: Lsn,
    pub snapshot: Snapshot,
}

impl WalSession {
    pub(in crate::cluster) async fn open(to: &Datastore) -> Result<WalSession, DatastoreError> {
        WalSession::open_on(Side::Peer, to).await
    }

    /// Opens a session on the local server, whose slot holds the changes that its successor does
    /// not have.
    pub(in crate::cluster) async fn open_local(
        to: &Datastore,
    ) -> Result<WalSession, DatastoreError> {
        WalSession::open_on(Side::Local, to).await
    }

    async fn open_on(side: Side, to: &Datastore) -> Result<WalSession, DatastoreError> {
        let origin = ErrorOrigin {
            side,
            address: to.address(),
        };
        let doing = format!(
            "connecting to database {} as {} for replication",
            to.database, to.user
        );
        let opening = Wire::open(side, to);
        let wire = match tokio::time::timeout(CONNECT_TIMEOUT, opening).await {
            Ok(opened) => opened.map_err(|trouble| {
                let error = origin.error(&doing, trouble);
                tried::mind(&error, to);
                error
            })?,
            Err(_) => return Err(origin.silent(&doing, CONNECT_TIMEOUT.as_secs())),
        };
        let mut session = WalSession { wire, origin };
        // As in every session of ours, limits that an older server does not know cannot be named in
        // the start-up options.
        let sql = "SELECT set_config(name, '0', false) FROM pg_catalog.pg_settings \
                   WHERE name IN ('idle_session_timeout', 'transaction_timeout')";
        session.query("preparing the session", sql).await?;
        session.query("preparing the session", CARRY_BYTES).await?;
        Ok(session)
    }

    /// Ends the session in the way that leaves no line in the server's log.
    pub(super) async fn close(mut self) {
        let mut out = BytesMut::new();
        frontend::terminate(&mut out);
        let _ = tokio::time::timeout(CANCELLED, self.wire.send(&out)).await;
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
                Err(self.origin.error(doing, trouble))
            }
            Err(_) => {
                cancelling.cancel().await;
                // A cancelled command has ended when the server reports it.
                let _ = tokio::time::timeout(CANCELLED, self.wire.rest()).await;
                Err(self.origin.silent(doing, patience.as_secs()))
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
        self.new_slot(name, "TEMPORARY", patience).await
    }

    /// Makes a slot that stays, in the place of an earlier one of that name; its snapshot is as
    /// short-lived.
    pub async fn lasting_slot(
        &mut self,
        name: &str,
        patience: Duration,
    ) -> Result<NewSlot, DatastoreError> {
        self.drop_former_slot(name).await?;
        self.new_slot(name, "", patience).await
    }

    async fn new_slot(
        &mut self,
        name: &str,
        kind: &str,
        patience: Duration,
    ) -> Result<NewSlot, DatastoreError> {
        let doing = "making a slot";
        let sql = format!(
            "CREATE_REPLICATION_SLOT {} {kind} LOGICAL pgoutput EXPORT_SNAPSHOT",
            quote_ident(name)
        );
        let rows = self.query_within(doing, &sql, patience).await?;
        let text = |column: usize| rows.first()?.get(column)?.clone();
        let (Some(point), Some(snapshot)) = (text(1).and_then(|t| t.parse().ok()), text(2)) else {
            let error = io::Error::new(io::ErrorKind::InvalidData, "an answer without a snapshot");
            return Err(self.origin.error(doing, Trouble::Wire(error)));
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
                        origin: self.origin,
                    });
                }
                // The former reader has just ended, and the server will notice it soon.
                Ok(Err(Trouble::Refused { state, .. }))
                    if state == SqlState::OBJECT_IN_USE && begun.elapsed() < SLOT_BUSY_TIMEOUT =>
                {
                    tokio::time::timeout(CANCELLED, self.wire.rest())
                        .await
                        .map_err(|_| self.origin.silent(&doing, CANCELLED.as_secs()))?
                        .map_err(|trouble| self.origin.error(&doing, trouble))?;
                    if !is_reader_ended && begun.elapsed() > READER_EXIT_TIME {
                        is_reader_ended = true;
                        self.end_reader(slot).await?;
                    }
                    tokio::time::sleep(SLOT_BUSY_PAUSE).await;
                }
                Ok(Err(trouble)) => return Err(self.origin.error(&doing, trouble)),
                Err(_) => return Err(self.origin.silent(&doing, REPLY_TIMEOUT.as_secs())),
            }
        }
    }
}

/// A running stream: it receives messages, and sends answers.
pub struct WalStream {
    wire: Wire,
    origin: ErrorOrigin,
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
        arrived.map_err(|trouble| self.origin.error("reading the stream", trouble))
    }

    /// Returns the next message, if it has arrived already.
    pub fn ready(&mut self) -> Result<Option<Arrived>, DatastoreError> {
        let ready = self.wire.take_arrived();
        ready.map_err(|trouble| self.origin.error("reading the stream", trouble))
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
                self.origin
                    .error("answering the stream", Trouble::Wire(error))
            }),
            Err(_) => Err(self
                .origin
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
        match is_at_work(self.origin.side, &to, process).await {
            Ok(true) => {
                log::info!(
                    "{} datastore {}: no message on the stream for {} s; server process {process} is still decoding for it, so it is waited for",
                    self.origin.side,
                    self.origin.address,
                    limit.as_secs()
                );
                self.wire.heard.again();
                Ok(())
            }
            Ok(false) => Err(self.origin.silent("reading the stream", limit.as_secs())),
            Err(error) => {
                log::debug!("{error}");
                Err(self.origin.silent("reading the stream", limit.as_secs()))
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

#[cfg(test)]
mod tests;
pub(in crate::cluster) mod wire;
