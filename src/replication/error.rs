//! The reasons why a copy ended early, and the one place that decides what happens then: try again,
//! or wait for an operator.

use super::stream::spool::SpoolError;
use crate::cluster::{
    DatastoreError, DatastoreFault, FenceError, HolderError, IdentityError, KeepError,
    ProgramError, RaiseError, StateError, StoreError, StoreFault,
};
use crate::domain::{ErrorCode, Side};

impl From<HolderError> for ReplicationError {
    fn from(error: HolderError) -> Self {
        match error {
            HolderError::Datastore(error) => error.into(),
            HolderError::State(error) => error.into(),
        }
    }
}

impl From<KeepError> for ReplicationError {
    fn from(error: KeepError) -> Self {
        match error {
            KeepError::Look(error) => error.into(),
            KeepError::Set(error) => error.into(),
            KeepError::Proof { error, .. } => error.into(),
        }
    }
}

impl From<RaiseError> for ReplicationError {
    fn from(error: RaiseError) -> Self {
        match error {
            RaiseError::State(error) => error.into(),
            RaiseError::Fence(error) => error.into(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ReplicationError {
    #[error(transparent)]
    Datastore(#[from] DatastoreError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Fence(#[from] FenceError),
    #[error("cannot write the temporary file {what}: {source}")]
    Scratch {
        what: String,
        source: std::io::Error,
    },
    /// A safety rule (role, epoch, fuse) refuses; an operator may overrule it.
    #[error("{rule}: {text}")]
    Refused {
        rule: ErrorCode,
        text: String,
        next_step: String,
    },
    /// A precondition of a copy is not met; found before anything was changed.
    #[error("{check}: {text}")]
    Precondition {
        check: ErrorCode,
        text: String,
        next_step: String,
    },
    /// A failure of the gate, which other waiting tasks get as well.
    #[error(transparent)]
    Waited(std::sync::Arc<ReplicationError>),
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The primary changed during the copy in a way from which a snapshot does not protect.
    #[error("the primary's tables changed in form while they were copied: {tables}")]
    Rewritten { tables: String },
    /// Do no harm: a session of Builder's waited for one of our sessions.
    #[error(
        "a session on the primary (process {pid}) waited for our copy for over a second; the copy was given up"
    )]
    InTheWay { pid: i32 },
    /// A slot can begin only when no open transaction has written.
    #[error("peer: {what} within {seconds} s: {waits_for}")]
    Busy {
        what: String,
        seconds: u64,
        waits_for: String,
    },
    /// A database with sessions that we may not end cannot be renamed. Nothing was changed.
    #[error(
        "local: the incoming database could not be made the visible one within {seconds} s: sessions that our user may not end were there: {who}"
    )]
    Unswitched { seconds: u64, who: String },
    /// As a rule, a migration took place while the stream was applied into the incoming database.
    #[error("the stream did not join the copy: {text}")]
    NotMet { text: String },
}

/// The reaction to an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// A transient fault: the same copy may succeed after a while.
    Retry,
    /// A fault that stays until somebody acts.
    Operator,
}

impl ReplicationError {
    /// Returns the error for a condition that is not met before a run.
    pub(super) fn unfit(check: ErrorCode, text: String, next_step: String) -> Self {
        ReplicationError::Precondition {
            check,
            text,
            next_step,
        }
    }

    pub fn policy(&self) -> Policy {
        let passing =
            match self {
                ReplicationError::Datastore(e)
                | ReplicationError::State(StateError::Datastore(e)) => e.is_transient(),
                ReplicationError::Fence(FenceError::Datastore(e)) => e.is_transient(),
                ReplicationError::Fence(FenceError::Staying { .. }) => true,
                ReplicationError::Identity(IdentityError::Datastore(e)) => e.is_transient(),
                ReplicationError::Store(e)
                | ReplicationError::Identity(IdentityError::Store(e)) => e.is_transient(),
                // The programs give their reason only in words, and a server that went away is the
                // common cause.
                ReplicationError::Program(ProgramError::Failed { text, .. }) => {
                    is_connection_trouble(text) && !is_full(text)
                }
                ReplicationError::Rewritten { .. }
                | ReplicationError::InTheWay { .. }
                | ReplicationError::Spool(_)
                | ReplicationError::Busy { .. }
                | ReplicationError::Unswitched { .. }
                | ReplicationError::NotMet { .. } => true,
                // The standby may be promoted soon.
                ReplicationError::Precondition { check, .. } => *check == ErrorCode::Standby,
                ReplicationError::Waited(error) => return error.policy(),
                _ => false,
            };
        if passing {
            Policy::Retry
        } else {
            Policy::Operator
        }
    }

    /// Returns the error for a peer that follows another server itself, or was not promoted yet.
    pub fn standby() -> ReplicationError {
        ReplicationError::Precondition {
            check: ErrorCode::Standby,
            text: "the peer's PostgreSQL is a physical standby, which cannot be asked all that a copy or a stream needs".into(),
            next_step: "promote it, or let peer.datastore name the server that it follows".into(),
        }
    }

    /// Returns the error of a verb that needs a finished copy.
    pub fn nothing_copied() -> ReplicationError {
        ReplicationError::Precondition {
            check: ErrorCode::NoRecoveryPoint,
            text: "nothing has been copied to this cluster yet".into(),
            next_step: "run `warm-spare sync` first".into(),
        }
    }

    /// Returns the operator's next step.
    pub fn next_step(&self) -> String {
        match self {
            ReplicationError::Datastore(e)
            | ReplicationError::State(StateError::Datastore(e))
            | ReplicationError::Fence(FenceError::Datastore(e))
            | ReplicationError::Identity(IdentityError::Datastore(e)) => e.next_step(),
            ReplicationError::Store(e) | ReplicationError::Identity(IdentityError::Store(e)) => e.next_step(),
            ReplicationError::Refused { next_step, .. } | ReplicationError::Precondition { next_step, .. } => {
                next_step.clone()
            }
            ReplicationError::Program(ProgramError::NoneFits { from, to, .. }) => format!(
                "install PostgreSQL's client programs of a major version from {from} to {to} (Debian: apt install postgresql-client-{to}), or name their directory in WARM_SPARE_PG_CLIENTS"
            ),
            ReplicationError::Program(ProgramError::Failed { text, .. }) if text.contains("EXTENSION") => {
                "create that extension in a database of the spare by hand and see what is missing; one that a server allows in a single database cannot be copied, and belongs in another database of the primary (docs/copied.md)".into()
            }
            ReplicationError::Program(_) => "read the program's message".into(),
            ReplicationError::State(StateError::Locked { .. }) => {
                "let it finish, or stop it: one works at a time".into()
            }
            ReplicationError::State(StateError::Newer { .. }) => "use the newer warm-spare".into(),
            ReplicationError::State(StateError::Superseded) => "nothing: the other process goes on".into(),
            ReplicationError::State(StateError::Overtaken { .. }) => {
                "find out which of the two is the primary now, and set role there and here accordingly".into()
            }
            ReplicationError::Identity(IdentityError::SameServer) => {
                "let peer.datastore name the primary's server and local.datastore the spare's"
                    .into()
            }
            ReplicationError::Identity(IdentityError::SameBucket { .. }) => {
                "let peer.s3 name the primary's bucket and local.s3 the spare's; if they do, and a rule or a tool replicates one to the other, exclude .warm-spare/ from it".into()
            }
            ReplicationError::Fence(_) => "end the sessions that keep it open, then run it again".into(),
            ReplicationError::Scratch { .. } => "make room, or set TMPDIR to a directory with room".into(),
            ReplicationError::Rewritten { .. } | ReplicationError::InTheWay { .. } | ReplicationError::NotMet { .. } => {
                "run it again when the migration on the primary is over".into()
            }
            ReplicationError::Busy { .. } => {
                "wait until that transaction on the primary ends, or end it".into()
            }
            ReplicationError::Unswitched { .. } => {
                "end these sessions on the spare, or have their owner end them; the next copy tries again".into()
            }
            ReplicationError::Waited(error) => error.next_step(),
            ReplicationError::Spool(_) => {
                "make room in the service's data directory, or raise replication.wal_hold_limit".into()
            }
        }
    }

    pub fn datastore(&self) -> Option<&DatastoreError> {
        match self {
            ReplicationError::Datastore(e)
            | ReplicationError::State(StateError::Datastore(e))
            | ReplicationError::Identity(IdentityError::Datastore(e))
            | ReplicationError::Fence(FenceError::Datastore(e)) => Some(e),
            ReplicationError::Waited(error) => error.datastore(),
            _ => None,
        }
    }

    /// Returns false if the peer's datastore is known to be gone.
    pub fn shows_life_of_peer(&self) -> bool {
        self.datastore()
            .is_some_and(|error| error.side == Side::Peer && error.shows_life())
    }

    fn store(&self) -> Option<&StoreError> {
        match self {
            ReplicationError::Store(e) | ReplicationError::Identity(IdentityError::Store(e)) => {
                Some(e)
            }
            ReplicationError::Waited(error) => error.store(),
            _ => None,
        }
    }

    /// Returns the side that caused the error, if it is one side.
    pub fn side(&self) -> Option<Side> {
        if let Some(error) = self.datastore() {
            return Some(error.side);
        }
        if let Some(error) = self.store() {
            return Some(error.side);
        }
        match self {
            ReplicationError::Program(ProgramError::Failed { program, .. })
                if program == "pg_dump" =>
            {
                Some(Side::Peer)
            }
            ReplicationError::State(error) => Some(error.side()),
            ReplicationError::Program(_)
            | ReplicationError::Scratch { .. }
            | ReplicationError::Unswitched { .. }
            | ReplicationError::Spool(_) => Some(Side::Local),
            ReplicationError::Fence(error) => Some(error.side()),
            ReplicationError::Rewritten { .. }
            | ReplicationError::InTheWay { .. }
            | ReplicationError::Busy { .. }
            | ReplicationError::NotMet { .. } => Some(Side::Peer),
            _ => None,
        }
    }

    /// Returns whether one side cannot be used at present: it does not answer, or does not let us
    /// in.
    pub fn is_unreachable(&self) -> bool {
        let datastore = self.datastore().is_some_and(|error| {
            use DatastoreFault::{
                Authentication, Cancelled, NoDatabase, Refusing, Tls, Unreachable,
            };
            matches!(
                error.fault,
                Unreachable | Refusing | Cancelled | Authentication | Tls | NoDatabase
            )
        });
        let store = self.store().is_some_and(|error| {
            use StoreFault::{Busy, Denied, NoBucket, ProxyRefused, Tls, Unreachable};
            matches!(
                error.fault,
                Unreachable | Busy | Denied | NoBucket | Tls | ProxyRefused
            )
        });
        let program = matches!(self, ReplicationError::Program(ProgramError::Failed { text, .. }) if is_connection_trouble(text));
        datastore || store || program
    }

    /// Returns whether the error is of an artifact store, and not of a datastore.
    pub fn is_of_a_store(&self) -> bool {
        self.store().is_some()
    }

    /// Returns one word for programs: the refusing rule or check, otherwise the class.
    pub fn code(&self) -> ErrorCode {
        if let Some(error) = self.store() {
            return match error.fault {
                StoreFault::Unsupported => ErrorCode::UnsupportedStore,
                StoreFault::Full => ErrorCode::DiskFull,
                _ => ErrorCode::Store,
            };
        }
        if let Some(error) = self.datastore() {
            return match error.fault {
                DatastoreFault::DiskFull => ErrorCode::DiskFull,
                DatastoreFault::Privilege => ErrorCode::Privilege,
                _ => ErrorCode::Datastore,
            };
        }
        match self {
            ReplicationError::Refused { rule, .. } => *rule,
            ReplicationError::Precondition { check, .. } => *check,
            ReplicationError::Identity(IdentityError::SameServer) => ErrorCode::SameServer,
            ReplicationError::Identity(IdentityError::SameBucket { .. }) => ErrorCode::SameBucket,
            ReplicationError::State(StateError::Newer { .. }) => ErrorCode::NewerFormat,
            ReplicationError::State(StateError::Locked { .. }) => ErrorCode::Locked,
            ReplicationError::State(StateError::Superseded) => ErrorCode::Superseded,
            ReplicationError::State(StateError::Overtaken { .. }) => ErrorCode::Overtaken,
            ReplicationError::Fence(_) => ErrorCode::Fence,
            ReplicationError::Program(ProgramError::Failed { text, .. }) if is_full(text) => {
                ErrorCode::DiskFull
            }
            ReplicationError::Program(_) => ErrorCode::ClientProgram,
            ReplicationError::Scratch { .. } => ErrorCode::Scratch,
            ReplicationError::Rewritten { .. } => ErrorCode::Rewritten,
            ReplicationError::InTheWay { .. } => ErrorCode::InTheWay,
            ReplicationError::Busy { .. } | ReplicationError::Unswitched { .. } => ErrorCode::Busy,
            ReplicationError::NotMet { .. } => ErrorCode::NotMet,
            ReplicationError::Waited(error) => error.code(),
            ReplicationError::Spool(_) => ErrorCode::Spool,
            ReplicationError::Datastore(_)
            | ReplicationError::Store(_)
            | ReplicationError::Identity(_)
            | ReplicationError::State(_) => ErrorCode::Unknown,
        }
    }

    /// Returns the exit code. 3: not found out or not finished. 4: refused by a safety rule. 2: of
    /// the configuration.
    pub fn exit_code(&self) -> u8 {
        match self {
            ReplicationError::Refused { .. }
            | ReplicationError::Identity(
                IdentityError::SameServer | IdentityError::SameBucket { .. },
            )
            | ReplicationError::State(
                StateError::Locked { .. } | StateError::Superseded | StateError::Overtaken { .. },
            ) => 4,
            ReplicationError::State(StateError::Newer { .. }) => 2,
            ReplicationError::Waited(error) => error.exit_code(),
            _ => 3,
        }
    }
}

/// Returns whether a program passes on the server's own words for a full disk.
fn is_full(text: &str) -> bool {
    ["No space left on device", "could not write init file"]
        .iter()
        .any(|sign| text.contains(sign))
}

fn is_connection_trouble(text: &str) -> bool {
    let signs = [
        "connection to server",
        "could not connect to server",
        "terminating connection",
        "server closed the connection",
        "the database system is",
        "SSL connection has been closed",
        // pg_dump's own wait for a lock ends with this text, whichever limit it used.
        "canceling statement due to lock timeout",
        "canceling statement due to statement timeout",
        // The snapshot's session ended with the server.
        "invalid snapshot identifier",
    ];
    let final_words = ["authentication failed", "no pg_hba.conf entry"];
    signs.iter().any(|sign| text.contains(sign)) && !final_words.iter().any(|w| text.contains(w))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::StateError;

    /// A planned handover is undone for the first, and goes on later for the second.
    #[test]
    fn a_refused_statement_is_no_failure_of_the_state() {
        let refused = || DatastoreError {
            side: Side::Local,
            address: "127.0.0.1:5432".into(),
            doing: "setting the sequences".into(),
            fault: DatastoreFault::Statement,
            text: "permission denied".into(),
            sql_state: None,
        };
        let statement = ReplicationError::from(HolderError::from(refused()));
        assert!(
            matches!(statement, ReplicationError::Datastore(_)),
            "{statement:?}"
        );
        let state = HolderError::from(StateError::from(refused()));
        let state = ReplicationError::from(state);
        assert!(matches!(state, ReplicationError::State(_)), "{state:?}");
    }
}
