//! Connecting to PostgreSQL, and what can go wrong with it.

use super::{Side, tls};
use crate::config::{Datastore, SslMode};
use std::time::Duration;
use tokio::sync::watch;
use tokio_postgres::error::SqlState;
use tokio_postgres::{CancelToken, Client, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DatastoreFault {
    /// Refused, cut, timed out, starting up or shutting down: tried again.
    Unreachable,
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
    pub(super) fn new(
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
            text,
            sql_state: None,
        }
    }

    pub(super) fn of(
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
            text,
            sql_state: error.code().cloned(),
        }
    }

    pub fn is_transient(&self) -> bool {
        matches!(
            self.fault,
            DatastoreFault::Unreachable | DatastoreFault::Cancelled
        )
    }

    pub fn next_step(&self) -> String {
        let side = self.side;
        match self.fault {
            DatastoreFault::Unreachable => format!(
                "check that the server runs and that {side}.datastore.host and {side}.datastore.port are right"
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
            DatastoreFault::Cancelled => "run it again".into(),
            DatastoreFault::Statement => format!("read the {side} datastore's log"),
        }
    }
}

pub(super) fn address(to: &Datastore) -> String {
    format!("{}:{}", to.host, to.port)
}

/// Opens a session. `read_only` is what the server is told its transactions are; it also lifts our own fence for us.
pub(super) async fn connect(
    side: Side,
    to: &Datastore,
    database: &str,
    read_only: bool,
) -> Result<(Client, Wire), DatastoreError> {
    let options = format!(
        "-c DateStyle=ISO -c IntervalStyle=postgres -c TimeZone=UTC -c extra_float_digits=3 \
         -c bytea_output=hex -c row_security=off -c default_transaction_read_only={}",
        if read_only { "on" } else { "off" }
    );
    let (client, wire) = open(side, to, database, Some(options)).await?;
    lift_time_outs(&client)
        .await
        .map_err(|e| DatastoreError::of(side, &address(to), "preparing the session", &e))?;
    Ok((client, wire))
}

/// Opens a session as any client would, with the database's and the role's own settings.
pub(super) async fn connect_plainly(
    side: Side,
    to: &Datastore,
    database: &str,
) -> Result<(Client, Wire), DatastoreError> {
    open(side, to, database, None).await
}

async fn open(
    side: Side,
    to: &Datastore,
    database: &str,
    options: Option<String>,
) -> Result<(Client, Wire), DatastoreError> {
    let mut config = tokio_postgres::Config::new();
    config
        .host(&to.host)
        .port(to.port)
        .user(&to.user)
        .dbname(database)
        .application_name("warm-spare")
        .connect_timeout(CONNECT_TIMEOUT)
        .keepalives_idle(Duration::from_secs(30))
        .ssl_mode(match to.ssl_mode {
            SslMode::Disable => tokio_postgres::config::SslMode::Disable,
            SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
            _ => tokio_postgres::config::SslMode::Require,
        });
    if let Some(options) = options {
        config.options(options);
    }
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
        if to.ssl_mode == SslMode::Disable {
            let (client, connection) = config.connect(NoTls).await?;
            return Ok((client, drive(side, connection)));
        }
        let tls = MakeRustlsConnect::new(tls::client_config(side, to).map_err(Opening::Prepared)?);
        let (client, connection) = config.connect(tls).await?;
        Ok((client, drive(side, connection)))
    };
    let doing = format!("connecting to database {database} as {}", to.user);
    // The library's own limit covers only the TCP connection, not a server that accepts and never answers.
    match tokio::time::timeout(2 * CONNECT_TIMEOUT, opening).await {
        Ok(Ok(opened)) => Ok(opened),
        Ok(Err(Opening::Failed(e))) => Err(DatastoreError::of(side, &address(to), &doing, &e)),
        Ok(Err(Opening::Prepared(e))) => Err(e),
        Err(_) => Err(DatastoreError::new(
            side,
            to,
            DatastoreFault::Unreachable,
            &doing,
            "the server accepted the connection and did not answer".into(),
        )),
    }
}

enum Opening {
    Failed(tokio_postgres::Error),
    Prepared(DatastoreError),
}

impl From<tokio_postgres::Error> for Opening {
    fn from(error: tokio_postgres::Error) -> Self {
        Opening::Failed(error)
    }
}

/// The task that carries a connection. Dropped, it closes the socket at once, whatever is still on its way: left alone,
/// the library would read a running COPY to its end first, and hold its locks as long.
pub(super) struct Wire {
    task: tokio::task::AbortHandle,
    /// Closed with the connection.
    open: watch::Receiver<()>,
}

impl Wire {
    pub(super) fn close(&self) {
        self.task.abort();
    }

    /// Waits for the end of the connection, whoever ends it.
    pub(super) fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut open = self.open.clone();
        async move { while open.changed().await.is_ok() {} }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.close();
    }
}

/// Has the server give up what it is doing for a session that is not waited for any more.
pub(super) fn cancel(side: Side, to: &Datastore, token: CancelToken) {
    let to = to.clone();
    tokio::spawn(async move {
        let cancelling = async {
            match to.ssl_mode {
                SslMode::Disable => token.cancel_query(NoTls).await.map_err(Opening::Failed),
                _ => {
                    let tls = tls::client_config(side, &to).map_err(Opening::Prepared)?;
                    let tls = MakeRustlsConnect::new(tls);
                    token.cancel_query(tls).await.map_err(Opening::Failed)
                }
            }
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, cancelling).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => {
                log::debug!("{side} datastore: a statement could not be cancelled");
            }
        }
    });
}

fn drive<S, T>(side: Side, connection: tokio_postgres::Connection<S, T>) -> Wire
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (held, open) = watch::channel(());
    let task = tokio::spawn(async move {
        let _held = held;
        // Its error reaches the client's calls as well.
        if let Err(error) = connection.await {
            log::debug!("{side} datastore: a connection ended: {error}");
        }
    });
    Wire {
        task: task.abort_handle(),
        open,
    }
}

/// A server-wide idle-in-transaction limit kills an exported snapshot. A server that is told to look for its client ends
/// what an abandoned session was doing, wherever that waits. Only the settings that this server knows are set: naming an
/// unknown one at start-up would be refused.
async fn lift_time_outs(client: &Client) -> Result<(), tokio_postgres::Error> {
    client
        .batch_execute(
            "SELECT set_config(name, CASE name WHEN 'client_connection_check_interval' THEN '2s' ELSE '0' END, false) \
             FROM pg_catalog.pg_settings WHERE name IN \
             ('statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout', \
              'idle_session_timeout', 'transaction_timeout', 'client_connection_check_interval')",
        )
        .await
}

fn classify(error: &tokio_postgres::Error) -> (DatastoreFault, String) {
    let text = super::store_error::chain(error);
    let Some(db) = error.as_db_error() else {
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
    (fault_of_state(db.code()), message)
}

pub(super) fn fault_of_state(state: &SqlState) -> DatastoreFault {
    let code = state.code();
    match state {
        s if *s == SqlState::INVALID_CATALOG_NAME => DatastoreFault::NoDatabase,
        s if *s == SqlState::INSUFFICIENT_PRIVILEGE => DatastoreFault::Privilege,
        s if *s == SqlState::DISK_FULL => DatastoreFault::DiskFull,
        s if *s == SqlState::QUERY_CANCELED || *s == SqlState::ADMIN_SHUTDOWN => {
            DatastoreFault::Cancelled
        }
        // A deadlock, a lock, memory, a slot whose reader has not quite gone: another time it may well do.
        _ if ["40", "53"].iter().any(|class| code.starts_with(class))
            && *state != SqlState::TOO_MANY_CONNECTIONS
            || matches!(code, "55006" | "55P03") =>
        {
            DatastoreFault::Cancelled
        }
        _ if code.starts_with("28") => DatastoreFault::Authentication,
        _ if code.starts_with("08")
            || code.starts_with("57P0")
            || *state == SqlState::TOO_MANY_CONNECTIONS =>
        {
            DatastoreFault::Unreachable
        }
        _ => DatastoreFault::Statement,
    }
}
