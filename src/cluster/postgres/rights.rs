//! The rights of our user on a server that copying and promoting need.

use super::provider::Provider;
use super::session::{Session, WriteSession};
use crate::cluster::postgres::datastore_error::{DatastoreError, DatastoreFault};
use crate::cluster::state_db::DATABASE as STATE_DATABASE;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rights {
    pub superuser: bool,
    pub create: bool,
    pub signal: bool,
    /// True: it may see when other users' sessions began.
    pub stats: bool,
    /// True: it may alter Builder's database; None: there is no such database.
    pub owner: Option<bool>,
    /// True: it may make tables in our own database; None: there is no such database yet.
    pub owns_state: Option<bool>,
    /// True: it may create a database in the tablespace of Builder's; None: Builder's database has
    /// no tablespace of its own.
    pub tablespace: Option<bool>,
}

pub async fn rights(session: &Session, database: &str) -> Result<Rights, DatastoreError> {
    let sql = "SELECT rolsuper, rolcreatedb, pg_has_role(current_user, 'pg_signal_backend', 'USAGE'), \
                 pg_has_role(current_user, 'pg_read_all_stats', 'USAGE'), \
                 (SELECT pg_has_role(current_user, datdba, 'MEMBER') FROM pg_database WHERE datname = $1), \
                 (SELECT pg_has_role(current_user, datdba, 'MEMBER') FROM pg_database WHERE datname = $2), \
                 (SELECT has_tablespace_privilege(t.oid, 'CREATE') FROM pg_database d JOIN pg_tablespace t ON t.oid = d.dattablespace \
                  WHERE d.datname = $1 AND t.spcname <> 'pg_default') \
               FROM pg_roles WHERE rolname = current_user";
    let row = session
        .row("reading our privileges", sql, &[&database, &STATE_DATABASE])
        .await?;
    Ok(Rights {
        superuser: row.get(0)?,
        create: row.get(1)?,
        signal: row.get(2)?,
        stats: row.get(3)?,
        owner: row.get(4)?,
        owns_state: row.get(5)?,
        tablespace: row.get(6)?,
    })
}

/// Tells whether our user may disable triggers and cascades by `session_replication_role`.
/// They have done their work on the primary, and must not repeat it here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MayApply {
    Yes,
    /// With the provider of the server, if it is a known one's.
    No(Option<Provider>),
}

/// Tries whether our user may set `session_replication_role`. The catalog does not show it for a
/// provider's role, to which the provider's own code gives the right.
pub async fn may_apply(local: &WriteSession) -> Result<MayApply, DatastoreError> {
    let doing = "trying whether we may apply changes";
    let sql = "BEGIN; SET LOCAL session_replication_role = replica; ROLLBACK";
    match local.batch(doing, sql).await {
        Ok(()) => Ok(MayApply::Yes),
        Err(error) if error.fault == DatastoreFault::Privilege => {
            local.roll_back(doing).await?;
            Ok(MayApply::No(local.provider().await?))
        }
        Err(error) => Err(error),
    }
}

impl Rights {
    /// Returns the missing rights. `creates`: a database is to be created.
    pub fn missing(&self, database: &str, creates: bool) -> Vec<String> {
        let mut missing = Vec::new();
        if self.superuser {
            return missing;
        }
        if creates && !self.create {
            missing.push("may not create databases".to_string());
        }
        if creates && self.tablespace == Some(false) {
            missing.push(format!(
                "may not create anything in the tablespace of database {database}"
            ));
        }
        if !self.signal {
            missing.push("may not end other sessions (pg_signal_backend)".into());
        }
        if self.owner == Some(false) {
            missing.push(format!("does not own database {database}"));
        }
        missing
    }

    /// Returns the missing rights that a fence needs in addition, if other clients may be
    /// connected.
    pub fn missing_to_fence(&self) -> Vec<String> {
        let mut missing = Vec::new();
        if self.superuser {
            return missing;
        }
        if !self.stats {
            missing.push("may not see when others' sessions began (pg_read_all_stats)".to_string());
        }
        if self.owns_state == Some(false) {
            missing.push(format!("does not own database {STATE_DATABASE}"));
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_rights_are_named_one_by_one() {
        let mut rights = Rights {
            superuser: false,
            create: false,
            signal: false,
            stats: false,
            owner: Some(false),
            owns_state: Some(false),
            tablespace: Some(false),
        };
        assert_eq!(rights.missing("builder", true).len(), 4);
        assert_eq!(rights.missing("builder", false).len(), 2);
        rights.owner = None;
        rights.signal = true;
        assert!(rights.missing("builder", false).is_empty());
        assert_eq!(rights.missing_to_fence().len(), 2);
        rights.owns_state = None;
        assert_eq!(rights.missing_to_fence().len(), 1);
        rights.superuser = true;
        assert!(rights.missing_to_fence().is_empty());
        assert!(rights.missing("builder", true).is_empty());
    }
}
