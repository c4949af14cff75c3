//! The reasons why a copy ended early, and the one place that decides what happens then: try again,
//! or wait for an operator.

use super::stream::spool::SpoolError;
use crate::cluster::{
    DatastoreError, DatastoreFault, FenceError, IdentityError, ProgramError, RaiseError,
    StateError, StoreError, StoreFault,
};
use crate::domain::{ErrorCode, Side};

impl From<RaiseError> for PassError {
    fn from(error: RaiseError) -> Self {
        match error {
            RaiseError::State(error) => error.into(),
            RaiseError::Fence(error) => error.into(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum PassError {
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
    Unfit {
        check: ErrorCode,
        text: String,
        next_step: String,
    },
    /// A failure of the gate, which other waiting tasks get as well.
    #[error(transparent)]
    Waited(std::sync::Arc<PassError>),
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

impl PassError {
    pub fn policy(&self) -> Policy {
        let passing = match self {
            PassError::Datastore(e) | PassError::State(StateError::Datastore(e)) => {
                e.is_transient()
            }
            PassError::Fence(FenceError::Datastore(e)) => e.is_transient(),
            PassError::Fence(FenceError::Staying { .. }) => true,
            PassError::Identity(IdentityError::Datastore(e)) => e.is_transient(),
            PassError::Store(e) | PassError::Identity(IdentityError::Store(e)) => e.is_transient(),
            // The programs give their reason only in words, and a server that went away is the
            // common cause.
            PassError::Program(ProgramError::Failed { text, .. }) => {
                is_connection_trouble(text) && !is_full(text)
            }
            PassError::Rewritten { .. }
            | PassError::InTheWay { .. }
            | PassError::Spool(_)
            | PassError::Busy { .. }
            | PassError::NotMet { .. } => true,
            // The standby may be promoted soon.
            PassError::Unfit { check, .. } => *check == ErrorCode::Standby,
            PassError::Waited(error) => return error.policy(),
            _ => false,
        };
        if passing {
            Policy::Retry
        } else {
            Policy::Operator
        }
    }

    /// Returns the error for a peer that follows another server itself, or was not promoted yet.
    pub fn standby() -> PassError {
        PassError::Unfit {
            check: ErrorCode::Standby,
            text: "the peer's PostgreSQL is a physical standby, which cannot be asked all that a copy or a stream needs".into(),
            next_step: "promote it, or let peer.datastore name the server that it follows".into(),
        }
    }

    /// Returns the error of a verb that needs a finished copy.
    pub fn nothing_copied() -> PassError {
        PassError::Unfit {
            check: ErrorCode::NoRecoveryPoint,
            text: "nothing has been copied to this cluster yet".into(),
            next_step: "run `warm-spare sync` first".into(),
        }
    }

    /// Returns the operator's next step.
    pub fn next_step(&self) -> String {
        match self {
            PassError::Datastore(e)
            | PassError::State(StateError::Datastore(e))
            | PassError::Fence(FenceError::Datastore(e))
            | PassError::Identity(IdentityError::Datastore(e)) => e.next_step(),
            PassError::Store(e) | PassError::Identity(IdentityError::Store(e)) => e.next_step(),
            PassError::Refused { next_step, .. } | PassError::Unfit { next_step, .. } => {
                next_step.clone()
            }
            PassError::Program(ProgramError::NoneFits { from, to, .. }) => format!(
                "install PostgreSQL's client programs of a major version from {from} to {to} (Debian: apt install postgresql-client-{to}), or name their directory in WARM_SPARE_PG_CLIENTS"
            ),
            PassError::Program(ProgramError::Failed { text, .. }) if text.contains("EXTENSION") => {
                "create that extension in a database of the spare by hand and see what is missing; one that a server allows in a single database cannot be copied, and belongs in another database of the primary (docs/limits.md)".into()
            }
            PassError::Program(_) => "read the program's message".into(),
            PassError::State(StateError::Locked { .. }) => {
                "let it finish, or stop it: one works at a time".into()
            }
            PassError::State(StateError::Newer { .. }) => "use the newer warm-spare".into(),
            PassError::State(StateError::Superseded) => "nothing: the other process goes on".into(),
            PassError::State(StateError::Overtaken { .. }) => {
                "find out which of the two is the primary now, and set role there and here accordingly".into()
            }
            PassError::Identity(IdentityError::SameServer) => {
                "let peer.datastore name the primary's server and local.datastore the spare's"
                    .into()
            }
            PassError::Identity(IdentityError::SameBucket { .. }) => {
                "let peer.s3 name the primary's bucket and local.s3 the spare's; if they do, and MinIO itself replicates one to the other, exclude .warm-spare/ from that rule".into()
            }
            PassError::Fence(_) => "end the sessions that keep it open, then run it again".into(),
            PassError::Scratch { .. } => "make room, or set TMPDIR to a directory with room".into(),
            PassError::Rewritten { .. } | PassError::InTheWay { .. } | PassError::NotMet { .. } => {
                "run it again when the migration on the primary is over".into()
            }
            PassError::Busy { .. } => {
                "wait until that transaction on the primary ends, or end it".into()
            }
            PassError::Waited(error) => error.next_step(),
            PassError::Spool(_) => {
                "make room in the service's data directory, or raise replication.wal_hold_limit".into()
            }
        }
    }

    pub fn datastore(&self) -> Option<&DatastoreError> {
        match self {
            PassError::Datastore(e)
            | PassError::State(StateError::Datastore(e))
            | PassError::Identity(IdentityError::Datastore(e))
            | PassError::Fence(FenceError::Datastore(e)) => Some(e),
            PassError::Waited(error) => error.datastore(),
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
            PassError::Store(e) | PassError::Identity(IdentityError::Store(e)) => Some(e),
            PassError::Waited(error) => error.store(),
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
            PassError::Program(ProgramError::Failed { program, .. }) if program == "pg_dump" => {
                Some(Side::Peer)
            }
            PassError::State(error) => Some(error.side()),
            PassError::Program(_) | PassError::Scratch { .. } | PassError::Spool(_) => {
                Some(Side::Local)
            }
            PassError::Fence(error) => Some(error.side()),
            PassError::Rewritten { .. }
            | PassError::InTheWay { .. }
            | PassError::Busy { .. }
            | PassError::NotMet { .. } => Some(Side::Peer),
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
            use StoreFault::{Busy, Denied, NoBucket, Tls, Unreachable};
            matches!(error.fault, Unreachable | Busy | Denied | NoBucket | Tls)
        });
        let program = matches!(self, PassError::Program(ProgramError::Failed { text, .. }) if is_connection_trouble(text));
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
            PassError::Refused { rule, .. } => *rule,
            PassError::Unfit { check, .. } => *check,
            PassError::Identity(IdentityError::SameServer) => ErrorCode::SameServer,
            PassError::Identity(IdentityError::SameBucket { .. }) => ErrorCode::SameBucket,
            PassError::State(StateError::Newer { .. }) => ErrorCode::NewerFormat,
            PassError::State(StateError::Locked { .. }) => ErrorCode::Locked,
            PassError::State(StateError::Superseded) => ErrorCode::Superseded,
            PassError::State(StateError::Overtaken { .. }) => ErrorCode::Overtaken,
            PassError::Fence(_) => ErrorCode::Fence,
            PassError::Program(ProgramError::Failed { text, .. }) if is_full(text) => {
                ErrorCode::DiskFull
            }
            PassError::Program(_) => ErrorCode::ClientProgram,
            PassError::Scratch { .. } => ErrorCode::Scratch,
            PassError::Rewritten { .. } => ErrorCode::Rewritten,
            PassError::InTheWay { .. } => ErrorCode::InTheWay,
            PassError::Busy { .. } => ErrorCode::Busy,
            PassError::NotMet { .. } => ErrorCode::NotMet,
            PassError::Waited(error) => error.code(),
            PassError::Spool(_) => ErrorCode::Spool,
            PassError::Datastore(_)
            | PassError::Store(_)
            | PassError::Identity(_)
            | PassError::State(_) => ErrorCode::Unknown,
        }
    }

    /// Returns the exit code. 3: not found out or not finished. 4: refused by a safety rule. 2: of
    /// the configuration.
    pub fn exit_code(&self) -> u8 {
        match self {
            PassError::Refused { .. }
            | PassError::Identity(IdentityError::SameServer | IdentityError::SameBucket { .. })
            | PassError::State(
                StateError::Locked { .. } | StateError::Superseded | StateError::Overtaken { .. },
            ) => 4,
            PassError::State(StateError::Newer { .. }) => 2,
            PassError::Waited(error) => error.exit_code(),
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
