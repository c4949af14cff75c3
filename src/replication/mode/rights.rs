//! The rights of our user on a server that copying and promoting need.

use crate::cluster::{STATE_DATABASE, Session};
use crate::replication::error::PassError;

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

pub async fn rights(session: &Session, database: &str) -> Result<Rights, PassError> {
    let sql = "SELECT rolsuper, rolcreatedb, pg_has_role(current_user, 'pg_signal_backend', 'MEMBER'), \
                 pg_has_role(current_user, 'pg_read_all_stats', 'MEMBER'), \
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

impl Rights {
    /// Returns the missing rights. `creates`: a database is to be created.
    pub fn lacking(&self, database: &str, creates: bool) -> Vec<String> {
        let mut lacking = Vec::new();
        if self.superuser {
            return lacking;
        }
        if creates && !self.create {
            lacking.push("may not create databases".to_string());
        }
        if creates && self.tablespace == Some(false) {
            lacking.push(format!(
                "may not create anything in the tablespace of database {database}"
            ));
        }
        if !self.signal {
            lacking.push("may not end other sessions (pg_signal_backend)".into());
        }
        if self.owner == Some(false) {
            lacking.push(format!("does not own database {database}"));
        }
        lacking
    }

    /// Returns the missing rights that a fence needs in addition, if other clients may be
    /// connected.
    pub fn lacking_to_fence(&self) -> Vec<String> {
        let mut lacking = Vec::new();
        if self.superuser {
            return lacking;
        }
        if !self.stats {
            lacking.push("may not see when others' sessions began (pg_read_all_stats)".to_string());
        }
        if self.owns_state == Some(false) {
            lacking.push(format!("does not own database {STATE_DATABASE}"));
        }
        lacking
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lacking_is_named_one_by_one() {
        let mut rights = Rights {
            superuser: false,
            create: false,
            signal: false,
            stats: false,
            owner: Some(false),
            owns_state: Some(false),
            tablespace: Some(false),
        };
        assert_eq!(rights.lacking("builder", true).len(), 4);
        assert_eq!(rights.lacking("builder", false).len(), 2);
        rights.owner = None;
        rights.signal = true;
        assert!(rights.lacking("builder", false).is_empty());
        assert_eq!(rights.lacking_to_fence().len(), 2);
        rights.owns_state = None;
        assert_eq!(rights.lacking_to_fence().len(), 1);
        rights.superuser = true;
        assert!(rights.lacking_to_fence().is_empty());
        assert!(rights.lacking("builder", true).is_empty());
    }
}
