//! Tries whether our user may replicate. The catalog does not show this: a provider may give the
//! right by membership in a role of its own, and a proxy may refuse the protocol.

use super::per_server::PerServer;
use super::session::Session;
use super::walsender::WalSession;
use crate::cluster::postgres::datastore_error::{DatastoreError, DatastoreFault};
use crate::config::Datastore;
use std::time::{Duration, Instant};
use tokio_postgres::error::SqlState;

/// The server's answer to a connection of the replication protocol.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Replicates {
    Yes,
    /// The right is missing.
    #[default]
    Denied,
    /// The protocol itself is refused, in these words.
    Refused(String),
}

/// The rights that a try has shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tried {
    pub replicates: Replicates,
    /// True: `pg_copy_logical_replication_slot` may be called.
    pub copies_slots: bool,
}

/// Time after which a refused right is tried again. The server writes each refusal into its log.
const REFUSAL_TIME: Duration = Duration::from_secs(600);

/// The findings of this process. A right that was granted is used in between: a refusal is noticed
/// there.
static FOUND: PerServer<Found> = PerServer::new();

#[derive(Clone)]
struct Found {
    tried: Tried,
    /// The catalog's view of the right at that time.
    listed: bool,
    at: Instant,
}

impl Found {
    /// Returns whether it need not be tried again.
    fn holds(&self, listed: bool) -> bool {
        let granted = self.tried.replicates == Replicates::Yes;
        granted || (self.listed == listed && self.at.elapsed() < REFUSAL_TIME)
    }
}

/// Copies a slot that does not exist, which fails after the server has checked our rights. The
/// error is caught on the server, so that its log has no line of it.
const COPY_NO_SLOT: &str = "DO $$ BEGIN \
       PERFORM pg_catalog.pg_copy_logical_replication_slot('warm_spare_no_such_slot', 'warm_spare_no_slot', false); \
     EXCEPTION WHEN OTHERS THEN \
       PERFORM pg_catalog.set_config('warm_spare.refused', SQLSTATE, false); \
     END $$";
const REFUSAL: &str = "SELECT pg_catalog.current_setting('warm_spare.refused', true)";

/// Forgets that a server has granted the right, if it refuses a session of the protocol.
pub(super) fn mind(error: &DatastoreError, to: &Datastore) {
    let granted = |found: Found| found.tried.replicates == Replicates::Yes;
    if error.fault == DatastoreFault::Privilege && FOUND.known(to).is_some_and(granted) {
        FOUND.forget(to);
    }
}

impl Session {
    /// Tries the rights on the peer, to which this session leads, in a connection of its own.
    /// `listed`: the catalog lists the right; a change of that leads to another try.
    pub async fn tried(&self, listed: bool) -> Result<Tried, DatastoreError> {
        let to = self.leads_to();
        if let Some(found) = FOUND.known(to).filter(|found| found.holds(listed)) {
            return Ok(found.tried);
        }
        let (tried, is_lasting) = try_all(to).await?;
        if is_lasting {
            let found = Found {
                tried: tried.clone(),
                listed,
                at: Instant::now(),
            };
            FOUND.remember(to, found);
        }
        Ok(tried)
    }
}

/// Returns the finding, and whether it is worth to be remembered.
async fn try_all(to: &Datastore) -> Result<(Tried, bool), DatastoreError> {
    let doing = "trying the right to replicate";
    let mut session = match WalSession::open(to).await {
        Ok(session) => session,
        Err(error) => return without_session(error),
    };
    if let Err(error) = session.query(doing, "IDENTIFY_SYSTEM").await {
        return without_session(error);
    }
    session.query(doing, COPY_NO_SLOT).await?;
    let answer = session.query(doing, REFUSAL).await?;
    session.close().await;
    let state = answer.first().and_then(|row| row.first()?.as_deref());
    let tried = Tried {
        replicates: Replicates::Yes,
        copies_slots: state.is_none_or(is_allowed),
    };
    Ok((tried, true))
}

/// Returns the finding if no session of the replication protocol is to be had, or the error if
/// another try may have one.
fn without_session(error: DatastoreError) -> Result<(Tried, bool), DatastoreError> {
    let (replicates, is_lasting) = match error.fault {
        DatastoreFault::Privilege => (Replicates::Denied, true),
        DatastoreFault::Statement => (Replicates::Refused(error.text), true),
        // All walsenders are in use: the right itself is there.
        DatastoreFault::Refusing | DatastoreFault::Cancelled => (Replicates::Yes, false),
        _ => return Err(error),
    };
    let tried = Tried {
        replicates,
        copies_slots: true,
    };
    Ok((tried, is_lasting))
}

/// Returns whether the function may be called: it failed for want of the slot, or of `wal_level`.
fn is_allowed(state: &str) -> bool {
    let refusals = [
        SqlState::INSUFFICIENT_PRIVILEGE,
        SqlState::UNDEFINED_FUNCTION,
        SqlState::FEATURE_NOT_SUPPORTED,
    ];
    !refusals.iter().any(|refusal| refusal.code() == state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Side;

    #[test]
    fn a_missing_slot_shows_the_right_to_copy_it() {
        let copied = |state: SqlState| is_allowed(state.code());
        assert!(copied(SqlState::UNDEFINED_OBJECT));
        assert!(copied(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE));
        assert!(!copied(SqlState::INSUFFICIENT_PRIVILEGE));
        assert!(!copied(SqlState::UNDEFINED_FUNCTION));
    }

    #[test]
    fn a_server_that_is_full_has_refused_no_right() {
        let found = |fault| {
            let error = DatastoreError {
                side: Side::Peer,
                address: String::new(),
                doing: String::new(),
                fault,
                text: "no".into(),
                sql_state: None,
            };
            let tried = without_session(error).ok();
            tried.map(|(tried, is_lasting)| (tried.replicates, is_lasting))
        };
        let refused = Replicates::Refused("no".into());
        for (fault, expected) in [
            (DatastoreFault::Privilege, Some((Replicates::Denied, true))),
            (DatastoreFault::Refusing, Some((Replicates::Yes, false))),
            (DatastoreFault::Statement, Some((refused, true))),
            (DatastoreFault::Unreachable, None),
        ] {
            assert_eq!(found(fault), expected, "{fault:?}");
        }
    }

    #[test]
    fn a_refused_right_is_tried_again_when_the_catalog_lists_it() {
        let mut found = Found {
            tried: Tried::default(),
            listed: false,
            at: Instant::now(),
        };
        assert!(found.holds(false) && !found.holds(true));
        found.tried.replicates = Replicates::Yes;
        assert!(found.holds(false) && found.holds(true));
    }
}
