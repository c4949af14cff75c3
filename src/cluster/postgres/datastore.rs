//! Connects to PostgreSQL, and classifies the failures.

use super::channel::{self, Heard, Watched, WatchedTls};
use super::datastore_error::{DatastoreError, DatastoreFault};
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
        crate::cluster::state_db::DATABASE => "public",
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
    let failed = |e: &tokio_postgres::Error| {
        let mut error = DatastoreError::of(side, &to.address(), doing, e);
        // The server accepted this session, and ended it: the next one may live.
        if side == Side::Local && e.is_closed() {
            error.fault = DatastoreFault::Cancelled;
        }
        error
    };
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
            let mut error = DatastoreError::of(side, &to.address(), &doing, &e);
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

    pub(in crate::cluster) fn is_open(&self) -> bool {
        self.open.has_changed().is_ok()
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
