//! What our user may do on a server, as far as copying and promoting need it.

use super::error::PassError;
use crate::cluster::{STATE_DATABASE, Session};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rights {
    pub superuser: bool,
    pub create: bool,
    pub signal: bool,
    /// Whether it may alter Builder's database; None: there is none.
    pub owner: Option<bool>,
    /// Our own database is there already.
    pub has_state: bool,
}

pub async fn rights(session: &Session, database: &str) -> Result<Rights, PassError> {
    let sql = "SELECT rolsuper, rolcreatedb, pg_has_role(current_user, 'pg_signal_backend', 'MEMBER'), \
                 (SELECT pg_has_role(current_user, datdba, 'MEMBER') FROM pg_database WHERE datname = $1), \
                 EXISTS (SELECT 1 FROM pg_database WHERE datname = $2) \
               FROM pg_roles WHERE rolname = current_user";
    let row = session
        .query_one("reading our privileges", sql, &[&database, &STATE_DATABASE])
        .await?;
    Ok(Rights {
        superuser: row.get(0),
        create: row.get(1),
        signal: row.get(2),
        owner: row.get(3),
        has_state: row.get(4),
    })
}

impl Rights {
    /// `creates`: whether a database is to be made.
    pub fn lacking(&self, database: &str, creates: bool) -> Vec<String> {
        let mut lacking = Vec::new();
        if self.superuser {
            return lacking;
        }
        if creates && !self.create {
            lacking.push("may not create databases".to_string());
        }
        if !self.signal {
            lacking.push("may not end other sessions (pg_signal_backend)".into());
        }
        if self.owner == Some(false) {
            lacking.push(format!("does not own database {database}"));
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
            owner: Some(false),
            has_state: true,
        };
        assert_eq!(rights.lacking("builder", true).len(), 3);
        assert_eq!(rights.lacking("builder", false).len(), 2);
        rights.owner = None;
        rights.signal = true;
        assert!(rights.lacking("builder", false).is_empty());
        rights.superuser = true;
        assert!(rights.lacking("builder", true).is_empty());
    }
}
