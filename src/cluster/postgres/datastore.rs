//! Connects to PostgreSQL, and classifies the failures.

use super::channel::{self, CLEARTEXT_REFUSED, Heard, MALFORMED, NO_PROCESS, Watched, WatchedTls};
use super::{login, tls};
use crate::config::{Datastore, SslMode};
use crate::domain::Side;
use std::io;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{CancelToken, Client, NoTls, SimpleQueryMessage};
use tokio_postgres_rustls::MakeRustlsConnect;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DatastoreFault {
    /// The server does not answer, the connection was lost, or no answer came in time: tried again.
    Unreachable,
    /// The server answers, but accepts no session now: it has no free connection, starts or stops.
    /// Tried again.
    Refusing,
    /// The answer is from a connection pooler, which does not pass on what our sessions need.
    Pooler,
    /// Wrong user or password, or no pg_hba.conf line.
    Authentication,
    Tls,
    /// The server has no such database.
    NoDatabase,
    Privilege,
    DiskFull,
    /// Somebody cancelled the statement or ended the session.
    Cancelled,
    /// The statement itself was refused.
    Statement,
    /// The answer is not one of a PostgreSQL server, or has not the requested form.
    Malformed,
}

/// A failed connection or statement: which side, what was being done, and the server's own words.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{side} datastore {address}: {doing}: {text}")]
pub struct DatastoreError {
    pub side: Side,
    pub address: String,
    pub doing: String,
    pub fault: DatastoreFault,
    pub text: String,
    pub sql_state: Option<SqlState>,
}

impl DatastoreError {
    pub(in crate::cluster) fn new(
        side: Side,
        to: &Datastore,
        fault: DatastoreFault,
        doing: &str,
        text: String,
    ) -> Self {
        DatastoreError {
            side,
            address: address(to),
            doing: doing.to_string(),
            fault,
            text: printable(&text),
            sql_state: None,
        }
    }

    pub(in crate::cluster) fn of(
        side: Side,
        address: &str,
        doing: &str,
        error: &tokio_postgres::Error,
    ) -> Self {
        let (fault, text) = classify(error);
        DatastoreError {
            side,
            address: address.to_string(),
            doing: doing.to_string(),
            fault,
            text: printable(&text),
            sql_state: error.code().cloned(),
        }
    }

    pub fn is_transient(&self) -> bool {
        matches!(
            self.fault,
            DatastoreFault::Unreachable | DatastoreFault::Refusing | DatastoreFault::Cancelled
        )
    }

    pub fn next_step(&self) -> String {
        let side = self.side;
        match self.fault {
            DatastoreFault::Unreachable => format!(
                "check that the server runs and that {side}.datastore.host and {side}.datastore.port are right"
            ),
            DatastoreFault::Refusing if self.text.contains("max_wal_senders") => format!(
                "end readers of the {side} datastore's log that nobody needs (pg_stat_replication), or raise max_wal_senders there"
            ),
            DatastoreFault::Refusing if self.text.contains(NO_PROCESS) => {
                format!(
                    "give the machine of the {side} datastore more memory or processes; the server's log says which"
                )
            }
            DatastoreFault::Refusing if self.is_for_want_of_room() => format!(
                "end sessions in the {side} datastore that nobody needs (pg_stat_activity), or raise the limit that the text names: max_connections, or CONNECTION LIMIT of the role or the database"
            ),
            DatastoreFault::Refusing => {
                format!(
                    "wait until the {side} datastore has started; its log says what it is doing"
                )
            }
            DatastoreFault::Pooler => format!(
                "let {side}.datastore.host and {side}.datastore.port name the PostgreSQL server itself: our sessions need settings, locks and snapshots of their own"
            ),
            DatastoreFault::Authentication => format!(
                "check {side}.datastore.user and {side}.datastore.password (or password_file), and the server's pg_hba.conf"
            ),
            DatastoreFault::Tls => {
                format!("check {side}.datastore.ssl_mode and {side}.datastore.ssl_root_cert")
            }
            DatastoreFault::NoDatabase => format!("check {side}.datastore.database"),
            DatastoreFault::Privilege => {
                format!("use a {side}.datastore.user that may do this; Builder's own user hab may")
            }
            DatastoreFault::DiskFull => format!("make room on the {side} datastore's disk"),
            DatastoreFault::Cancelled if self.text.contains("replication slots are in use") => {
                format!(
                    "drop a slot of the {side} datastore that nobody needs (pg_replication_slots), or raise max_replication_slots there"
                )
            }
            DatastoreFault::Cancelled => "run it again".into(),
            DatastoreFault::Statement => format!("read the {side} datastore's log"),
            DatastoreFault::Malformed => format!(
                "check that {side}.datastore.host and {side}.datastore.port lead to a PostgreSQL server that you trust (docs/security.md)"
            ),
        }
    }
}

/// Maximum number of characters of a server's own words that are shown.
const TEXT_MAX: usize = 2000;

/// Returns the server's own words in a form that cannot start a new line in a log, and cannot move
/// the cursor of a terminal.
pub(in crate::cluster) fn printable(text: &str) -> String {
    let shown = text.chars().take(TEXT_MAX);
    shown
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

pub(in crate::cluster) fn address(to: &Datastore) -> String {
    format!("{}:{}", to.host, to.port)
}

/// The limits that every server knows since version 9.6. They are lifted when a session starts, so
/// that they do not apply even to its first statement.
macro_rules! no_limits {
    () => {
        "-c statement_timeout=0 -c lock_timeout=0 -c idle_in_transaction_session_timeout=0"
    };
}

/// Start-up options of every session of ours, except those that look at a server as a client does.
/// Server, database and role may have other settings: for the text of values, for the meaning of
/// SQL, for our role, and for `synchronous_commit`, with which a promotion would be reported before
/// it is on disk. Without keepalives, a server keeps the session of a lost machine, with its locks,
/// for two hours.
pub(in crate::cluster) const SESSION_OPTIONS: &str = concat!(
    "-c DateStyle=ISO -c IntervalStyle=postgres -c TimeZone=UTC -c extra_float_digits=3 -c bytea_output=hex ",
    "-c array_nulls=on -c xmloption=content -c standard_conforming_strings=on ",
    "-c default_transaction_isolation=read\\ committed -c default_transaction_deferrable=off ",
    "-c role=none -c synchronous_commit=on ",
    "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3 ",
    no_limits!()
);

/// Start-up options that show whether our options arrived. Servers, databases and roles rarely have
/// all of these values by themselves.
const PROBE_SETTINGS: [(&str, &str); 3] = [
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("synchronous_commit", "on"),
];

/// Returns the schemas in which our session looks for names without a schema. Another user's
/// function must not be called instead of the server's own: `pg_catalog` comes first in every path
/// that does not name it. Our own tables are in `public` of our own database, where only we create.
pub(in crate::cluster) fn search_path(database: &str) -> &'static str {
    match database {
        crate::cluster::state_db::state::DATABASE => "public",
        _ => "pg_catalog",
    }
}

/// Opens a session. `read_only`: the server makes its transactions read-only; false lifts our own
/// fence for this session.
pub(in crate::cluster) async fn connect(
    side: Side,
    to: &Datastore,
    database: &str,
    read_only: bool,
) -> Result<(Client, Wire), DatastoreError> {
    let path = if read_only {
        "pg_catalog"
    } else {
        search_path(database)
    };
    let read_only = if read_only { "on" } else { "off" };
    let silence = login::silence(side, to, database).await?;
    let options = format!(
        "{SESSION_OPTIONS} -c row_security=off -c search_path={path} -c default_transaction_read_only={read_only}{silence}"
    );
    let (client, wire) = open(side, to, database, options)
        .await
        .inspect_err(|error| login::mind(error, to))?;
    let doing = "preparing the session";
    let failed = |e: &tokio_postgres::Error| DatastoreError::of(side, &address(to), doing, e);
    let first = lift_time_outs(&client).await.map_err(|e| failed(&e))?;
    let own = [
        ("search_path", path),
        ("default_transaction_read_only", read_only),
    ];
    let expected: Vec<_> = PROBE_SETTINGS.into_iter().chain(own).collect();
    match no_session(&client, &first, &expected).await {
        Ok(None) => Ok((client, wire)),
        Ok(Some(seen)) => Err(DatastoreError::new(
            side,
            to,
            DatastoreFault::Pooler,
            doing,
            seen,
        )),
        Err(e) => Err(failed(&e)),
    }
}

/// Opens a session as any client would, with the database's and the role's own settings, but
/// without their time limits. No login event trigger fires: it would count each of our checks as a
/// person's login.
pub(in crate::cluster) async fn connect_plainly(
    side: Side,
    to: &Datastore,
    database: &str,
) -> Result<(Client, Wire), DatastoreError> {
    let silence = login::silence(side, to, database).await?;
    let options = format!("{}{silence}", no_limits!());
    open(side, to, database, options).await
}

/// Does the same in a database that has no login event trigger.
pub(in crate::cluster) async fn connect_to_ask(
    side: Side,
    to: &Datastore,
    database: &str,
) -> Result<(Client, Wire), DatastoreError> {
    open(side, to, database, no_limits!().to_string()).await
}

async fn open(
    side: Side,
    to: &Datastore,
    database: &str,
    options: String,
) -> Result<(Client, Wire), DatastoreError> {
    let mut config = tokio_postgres::Config::new();
    config
        .user(&to.user)
        .dbname(database)
        .application_name("warm-spare")
        .options(options)
        .ssl_mode(match to.ssl_mode {
            SslMode::Disable => tokio_postgres::config::SslMode::Disable,
            SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
            _ => tokio_postgres::config::SslMode::Require,
        });
    if let Some(source) = &to.password {
        let password = source
            .read(&format!("{side}.datastore.password"))
            .map_err(|e| {
                DatastoreError::new(
                    side,
                    to,
                    DatastoreFault::Authentication,
                    "reading the password",
                    e.to_string(),
                )
            })?;
        config.password(password.expose());
    }
    let opening = async {
        let (tcp, loopback) = timeout(CONNECT_TIMEOUT, channel::connect(to))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(Opening::Tcp)?;
        if to.ssl_mode == SslMode::Disable {
            let tcp = Watched::new(tcp, loopback).with_known_types_only(side == Side::Peer);
            let heard = tcp.heard();
            let (client, connection) = config.connect_raw(tcp, NoTls).await?;
            return Ok((client, drive(side, connection, heard)));
        }
        let tls = WatchedTls {
            inner: tls_of::<Watched<TcpStream>>(side, to)?,
            private: loopback || channel::is_verified(to),
            known_types_only: side == Side::Peer,
        };
        let tcp = Watched::before_tls(tcp, loopback).with_known_types_only(side == Side::Peer);
        let heard = tcp.heard();
        let (client, connection) = config.connect_raw(tcp, tls).await?;
        Ok((client, drive(side, connection, heard)))
    };
    let doing = connecting(to, database);
    // The library's own limit covers only the TCP connection, and not a server that accepts and
    // never answers.
    match timeout(2 * CONNECT_TIMEOUT, opening).await {
        Ok(Ok(opened)) => Ok(opened),
        Ok(Err(Opening::Failed(e))) => {
            let mut error = DatastoreError::of(side, &address(to), &doing, &e);
            // A server has its own code for each reason to refuse a session. PgBouncer uses the
            // first code for all of them, and the proxy of RDS the second for start-up options.
            let of_a_pooler = [
                SqlState::PROTOCOL_VIOLATION,
                SqlState::FEATURE_NOT_SUPPORTED,
            ];
            if error
                .sql_state
                .as_ref()
                .is_some_and(|state| of_a_pooler.contains(state))
            {
                error.fault = DatastoreFault::Pooler;
            }
            Err(error)
        }
        Ok(Err(Opening::Prepared(e))) => Err(e),
        Ok(Err(Opening::Tcp(e))) => Err(DatastoreError::new(
            side,
            to,
            DatastoreFault::Unreachable,
            &doing,
            e.to_string(),
        )),
        Err(_) => Err(DatastoreError::new(
            side,
            to,
            DatastoreFault::Unreachable,
            &doing,
            "the server accepted the connection and did not answer".into(),
        )),
    }
}

pub(in crate::cluster) fn connecting(to: &Datastore, database: &str) -> String {
    format!("connecting to database {database} as {}", to.user)
}

fn tls_of<S>(
    side: Side,
    to: &Datastore,
) -> Result<<MakeRustlsConnect as MakeTlsConnect<S>>::TlsConnect, Opening>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let config = tls::client_config(side, to).map_err(Opening::Prepared)?;
    MakeTlsConnect::<S>::make_tls_connect(&mut MakeRustlsConnect::new(config), &to.host)
        .map_err(|error| Opening::Tcp(io::Error::other(error)))
}

enum Opening {
    Tcp(io::Error),
    Failed(tokio_postgres::Error),
    Prepared(DatastoreError),
}

impl From<tokio_postgres::Error> for Opening {
    fn from(error: tokio_postgres::Error) -> Self {
        Opening::Failed(error)
    }
}

/// The task of a connection. If it is dropped, it closes the socket at once, whatever is still
/// being sent: otherwise the library would read a running COPY to its end first, and hold its locks
/// as long.
pub(in crate::cluster) struct Wire {
    task: tokio::task::AbortHandle,
    /// Closed with the connection.
    open: watch::Receiver<()>,
    pub(in crate::cluster) heard: Heard,
}

impl Wire {
    pub(in crate::cluster) fn close(&self) {
        self.task.abort();
    }

    /// Waits until the connection has ended. Either side may end it.
    pub(in crate::cluster) fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut open = self.open.clone();
        async move { while open.changed().await.is_ok() {} }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.close();
    }
}

/// Asks the server to cancel the statement of a session that nobody waits for any more.
pub(in crate::cluster) fn cancel(side: Side, to: &Datastore, token: CancelToken) {
    let to = to.clone();
    tokio::spawn(async move {
        let cancelling = async {
            let (tcp, _) = channel::connect(&to).await.map_err(Opening::Tcp)?;
            let cancelled = match to.ssl_mode {
                SslMode::Disable => token.cancel_query_raw(tcp, NoTls).await,
                _ => {
                    let tls = tls_of::<TcpStream>(side, &to)?;
                    token.cancel_query_raw(tcp, tls).await
                }
            };
            cancelled.map_err(Opening::Failed)
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, cancelling).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => {
                log::debug!("{side} datastore: a statement could not be cancelled");
            }
        }
    });
}

fn drive<S, T>(side: Side, connection: tokio_postgres::Connection<S, T>, heard: Heard) -> Wire
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (held, open) = watch::channel(());
    let task = tokio::spawn(async move {
        let _held = held;
        // Its error is also returned by the client's calls.
        if let Err(error) = connection.await {
            log::debug!("{side} datastore: a connection ended: {error}");
        }
    });
    Wire {
        task: task.abort_handle(),
        open,
        heard,
    }
}

/// Lifts the limits that only newer servers know: an unknown one in the start-up options would be
/// refused. A server that checks for its client ends the statement of an abandoned session,
/// wherever that waits.
///
/// Returns the server process of the session.
async fn lift_time_outs(client: &Client) -> Result<String, tokio_postgres::Error> {
    let said = client
        .simple_query(
            "SELECT set_config(name, CASE name WHEN 'client_connection_check_interval' THEN '2s' ELSE '0' END, false) \
             FROM pg_catalog.pg_settings WHERE name IN \
             ('idle_session_timeout', 'transaction_timeout', 'client_connection_check_interval'); \
             SELECT pg_catalog.pg_backend_pid()::text",
        )
        .await?;
    Ok(last_row(&said).into_iter().next().unwrap_or_default())
}

/// Returns the reason why this is not a session of one server process with the settings that it was
/// opened with; None: it is one. A pooler may drop start-up options silently, and may give each
/// transaction to another process.
async fn no_session(
    client: &Client,
    first: &str,
    expected: &[(&str, &str)],
) -> Result<Option<String>, tokio_postgres::Error> {
    let settings = expected
        .iter()
        .map(|(name, _)| format!("pg_catalog.current_setting('{name}')"));
    let columns = std::iter::once("pg_catalog.pg_backend_pid()::text".to_string()).chain(settings);
    let sql = format!("SELECT {}", columns.collect::<Vec<_>>().join(", "));
    let mut said = last_row(&client.simple_query(&sql).await?).into_iter();
    let second = said.next().unwrap_or_default();
    if second != first {
        return Ok(Some(format!(
            "server process {first} carried out one statement, and {second} the next: a connection pooler is in between"
        )));
    }
    let wrong = expected
        .iter()
        .zip(said)
        .find(|((_, value), found)| value != found);
    Ok(wrong.map(|((name, value), found)| {
        format!(
            "the session was opened with {name} = {value}, and has {found}: a connection pooler is in between, and drops start-up options"
        )
    }))
}

/// Returns the values of the last row as text, NULL as an empty text.
pub(in crate::cluster) fn last_row(said: &[SimpleQueryMessage]) -> Vec<String> {
    let row = said.iter().rev().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    row.map_or_else(Vec::new, |row| {
        let text = |column| row.try_get(column).ok().flatten().unwrap_or_default();
        (0..row.len())
            .map(|column| text(column).to_string())
            .collect()
    })
}

fn classify(error: &tokio_postgres::Error) -> (DatastoreFault, String) {
    let text = crate::cluster::s3::store_error::chain(error);
    let Some(db) = error.as_db_error() else {
        if let Some(fault) = refused_by_us(&text) {
            return (fault, text);
        }
        if let Some(person) = tls::explain(&text) {
            return (DatastoreFault::Tls, person);
        }
        if text.contains("server does not support TLS") {
            return (DatastoreFault::Tls, text);
        }
        if text.contains("password missing") {
            return (
                DatastoreFault::Authentication,
                "the server asks for a password and none is configured".into(),
            );
        }
        return (DatastoreFault::Unreachable, text);
    };
    let message = match db.detail() {
        Some(detail) => format!("{} ({detail})", db.message()),
        None => db.message().to_string(),
    };
    // The row of a COPY, and nothing of its content.
    let message = match db.where_() {
        Some(place) if *db.code() == SqlState::CHARACTER_NOT_IN_REPERTOIRE => {
            format!("{message} ({place})")
        }
        _ => message,
    };
    (fault_of(db.code(), db.message()), message)
}

/// Returns the fault. A server accepts every start-up parameter of ours; a pooler names the one
/// that it does not know.
pub(in crate::cluster) fn fault_of(state: &SqlState, message: &str) -> DatastoreFault {
    if *state == SqlState::PROTOCOL_VIOLATION && message.contains("startup parameter") {
        return DatastoreFault::Pooler;
    }
    fault_of_state(state)
}

/// Returns the fault of an answer that the channel refused.
pub(in crate::cluster) fn refused_by_us(text: &str) -> Option<DatastoreFault> {
    if text.contains(CLEARTEXT_REFUSED) {
        return Some(DatastoreFault::Authentication);
    }
    if text.contains(NO_PROCESS) {
        return Some(DatastoreFault::Refusing);
    }
    text.contains(MALFORMED)
        .then_some(DatastoreFault::Malformed)
}

fn fault_of_state(state: &SqlState) -> DatastoreFault {
    let code = state.code();
    match state {
        s if *s == SqlState::INVALID_CATALOG_NAME => DatastoreFault::NoDatabase,
        s if *s == SqlState::INSUFFICIENT_PRIVILEGE => DatastoreFault::Privilege,
        s if *s == SqlState::DISK_FULL => DatastoreFault::DiskFull,
        s if *s == SqlState::QUERY_CANCELED || *s == SqlState::ADMIN_SHUTDOWN => {
            DatastoreFault::Cancelled
        }
        // A deadlock, a lock, memory, a slot whose reader is not quite gone: the next try may
        // succeed.
        _ if ["40", "53"].iter().any(|class| code.starts_with(class))
            && *state != SqlState::TOO_MANY_CONNECTIONS
            || matches!(code, "55006" | "55P03") =>
        {
            DatastoreFault::Cancelled
        }
        s if *s == SqlState::TOO_MANY_CONNECTIONS || *s == SqlState::CANNOT_CONNECT_NOW => {
            DatastoreFault::Refusing
        }
        _ if code.starts_with("28") => DatastoreFault::Authentication,
        _ if code.starts_with("08") || code.starts_with("57P0") => DatastoreFault::Unreachable,
        _ => DatastoreFault::Statement,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_refuses_us_is_told_apart() {
        let fault = |code: &str, message| fault_of(&SqlState::from_code(code), message);
        let pooler = fault("08P01", "unsupported startup parameter: options");
        assert_eq!(pooler, DatastoreFault::Pooler);
        for (code, message, expected) in [
            (
                "08P01",
                "invalid message format",
                DatastoreFault::Unreachable,
            ),
            (
                "53300",
                "sorry, too many clients already",
                DatastoreFault::Refusing,
            ),
            (
                "57P03",
                "the database system is starting up",
                DatastoreFault::Refusing,
            ),
            ("57P01", "terminating connection", DatastoreFault::Cancelled),
            (
                "28P01",
                "password authentication failed",
                DatastoreFault::Authentication,
            ),
        ] {
            assert_eq!(fault(code, message), expected, "{code} {message}");
        }
    }
}
