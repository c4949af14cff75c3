//! Errors of a datastore: what failed, on which side, and what an operator can do.

use super::channel::{CLEARTEXT_REFUSED, MALFORMED, NO_PROCESS};
use crate::cluster::error_text;
use crate::config::Datastore;
use crate::domain::Side;
use tokio_postgres::error::SqlState;

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
            address: to.address(),
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

pub(in crate::cluster) fn classify(error: &tokio_postgres::Error) -> (DatastoreFault, String) {
    let text = error_text::chain(error);
    let Some(db) = error.as_db_error() else {
        if let Some(fault) = refused_by_us(&text) {
            return (fault, text);
        }
        if let Some(person) = error_text::explain(&text) {
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
