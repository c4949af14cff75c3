//! Databases as a whole: creating one with the properties of another one, renaming, dropping.

use super::session::{WriteSession, quote_ident, quote_literal};
use crate::cluster::fence::setting::end_sessions;
use crate::cluster::postgres::datastore_error::{DatastoreError, printable};
use tokio_postgres::error::SqlState;

/// Maximum number of tries. The server itself waits 5 s for sessions to end, each time.
const MAX_TRIES: usize = 12;

/// The properties of the replaced database that are not copied with its rows.
#[derive(Debug, Default)]
pub struct DatabaseProperties {
    pub owner: Option<String>,
    /// Its tablespace; None: the server's default.
    tablespace: Option<String>,
    statements: Vec<String>,
}

impl DatabaseProperties {
    /// Returns the option of `CREATE DATABASE`.
    pub(super) fn tablespace_option(&self) -> String {
        let tablespace = self.tablespace.as_ref();
        tablespace.map_or(String::new(), |name| {
            format!(" TABLESPACE {}", quote_ident(name))
        })
    }
}

/// Settings whose value is a list, and would become one element if it were quoted as a whole.
const LISTS: [&str; 6] = [
    "search_path",
    "temp_tablespaces",
    "session_preload_libraries",
    "shared_preload_libraries",
    "local_preload_libraries",
    "unix_socket_directories",
];

/// Reads owner, tablespace, privileges, settings, connection limit and comment of `from`, as
/// statements for `to`. The fence's own setting is left out, for any role: the incoming database
/// gets its own.
async fn properties(
    local: &WriteSession,
    from: &str,
    to: &str,
) -> Result<DatabaseProperties, DatastoreError> {
    let sql = "SELECT pg_get_userbyid(datdba)::text, datconnlimit, shobj_description(oid, 'pg_database'), datacl IS NOT NULL, oid, \
                 (SELECT spcname::text FROM pg_tablespace t WHERE t.oid = dattablespace AND spcname <> 'pg_default') \
               FROM pg_database WHERE datname = $1";
    let rows = local
        .query("reading the replaced database's properties", sql, &[&from])
        .await?;
    let Some(row) = rows.first() else {
        return Ok(DatabaseProperties::default());
    };
    let (owner, limit, comment, has_acl, oid): (String, i32, Option<String>, bool, u32) =
        (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4));
    let database = quote_ident(to);
    let mut statements = vec![
        format!("ALTER DATABASE {database} OWNER TO {}", quote_ident(&owner)),
        format!("ALTER DATABASE {database} CONNECTION LIMIT {limit}"),
    ];
    if let Some(comment) = comment {
        statements.push(format!(
            "COMMENT ON DATABASE {database} IS {}",
            quote_literal(&comment)
        ));
    }
    if has_acl {
        statements.push(format!("REVOKE ALL ON DATABASE {database} FROM PUBLIC"));
        let sql = "SELECT coalesce(r.rolname::text, ''), a.privilege_type, a.is_grantable \
                   FROM pg_database d, aclexplode(d.datacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee WHERE d.oid = $1";
        for row in local
            .query("reading the replaced database's privileges", sql, &[&oid])
            .await?
        {
            let (grantee, privilege, grantable): (String, String, bool) =
                (row.get(0), row.get(1), row.get(2));
            let grantee = if grantee.is_empty() {
                "PUBLIC".into()
            } else {
                quote_ident(&grantee)
            };
            let option = if grantable { " WITH GRANT OPTION" } else { "" };
            statements.push(format!(
                "GRANT {privilege} ON DATABASE {database} TO {grantee}{option}"
            ));
        }
    }
    let sql = "SELECT coalesce(r.rolname::text, ''), unnest(s.setconfig) FROM pg_db_role_setting s \
               LEFT JOIN pg_roles r ON r.oid = s.setrole WHERE s.setdatabase = $1";
    for row in local
        .query("reading the replaced database's settings", sql, &[&oid])
        .await?
    {
        let (role, setting): (String, String) = (row.get(0), row.get(1));
        let Some((name, value)) = setting.split_once('=') else {
            continue;
        };
        if name == "default_transaction_read_only" {
            continue;
        }
        let value = if LISTS.contains(&name) {
            value.to_string()
        } else {
            quote_literal(value)
        };
        let whom = if role.is_empty() {
            format!("DATABASE {database}")
        } else {
            format!("ROLE {} IN DATABASE {database}", quote_ident(&role))
        };
        statements.push(format!("ALTER {whom} SET {} TO {value}", quote_ident(name)));
    }
    Ok(DatabaseProperties {
        owner: Some(owner),
        tablespace: row.get(5),
        statements,
    })
}

impl WriteSession {
    /// Reads the properties of database `from`, for a database `to`. Database `from` need not
    /// exist.
    pub async fn database_properties(
        &self,
        from: &str,
        to: &str,
    ) -> Result<DatabaseProperties, DatastoreError> {
        properties(self, from, to).await
    }

    /// Gives these properties to the database for which they were read.
    pub async fn give_properties(
        &self,
        properties: &DatabaseProperties,
    ) -> Result<(), DatastoreError> {
        let doing = "giving the new database the old one's properties";
        for statement in &properties.statements {
            self.batch(doing, statement).await?;
        }
        Ok(())
    }

    /// Creates an empty database. `locale` are options of `CREATE DATABASE`; `owner`: None is our
    /// own user.
    pub async fn create_database(
        &self,
        doing: &str,
        name: &str,
        locale: &str,
        owner: Option<&str>,
        properties: &DatabaseProperties,
    ) -> Result<(), DatastoreError> {
        let name = quote_ident(name);
        let mut sql = format!("CREATE DATABASE {name} TEMPLATE template0 {locale}");
        if let Some(owner) = owner {
            sql.push_str(&format!(" OWNER {}", quote_ident(owner)));
        }
        sql.push_str(&properties.tablespace_option());
        self.long(doing, &sql).await
    }

    /// Renames a database. It waits up to 5 s for the sessions on it to end.
    pub async fn rename_database(
        &self,
        doing: &str,
        from: &str,
        to: &str,
    ) -> Result<(), DatastoreError> {
        let (from, to) = (quote_ident(from), quote_ident(to));
        let sql = format!("ALTER DATABASE {from} RENAME TO {to}");
        self.batch(doing, &sql).await
    }

    /// Ends the database's sessions and drops it. The database need not exist.
    pub async fn drop_database(&self, name: &str) -> Result<(), DatastoreError> {
        let sql = drop_statement(name);
        for _ in 0..MAX_TRIES {
            end_sessions(self, name).await?;
            match self.long("dropping a database", &sql).await {
                Err(error) if error.is_in_use() => {}
                other => return other,
            }
        }
        match self.long("dropping a database", &sql).await {
            Err(mut error) if error.is_in_use() => {
                let who = self.sessions_in(&[name]).await?;
                error.text = format!("{}: {who}", error.text);
                Err(error)
            }
            other => other,
        }
    }

    /// Describes the sessions in these databases: at most three of them, the oldest first. Ours
    /// that asks is not among them.
    pub async fn sessions_in(&self, databases: &[&str]) -> Result<String, DatastoreError> {
        let sql = "SELECT format('process %s of %s (%s) in database %s', pid, coalesce(usename, backend_type), application_name, datname) \
                   FROM pg_stat_activity WHERE datname = ANY ($1) AND pid <> pg_backend_pid() ORDER BY backend_start LIMIT 3";
        let doing = "asking who is in the way";
        let rows = self.rows(doing, sql, &[&databases]).await?;
        let who = rows.iter().map(|row| row.get(0));
        let who: Vec<String> = who.collect::<Result<_, _>>()?;
        Ok(match who.is_empty() {
            true => "nobody at this moment".into(),
            false => printable(&who.join(", ")),
        })
    }

    /// Returns the databases whose name begins like this.
    pub async fn databases_named(&self, prefix: &str) -> Result<Vec<String>, DatastoreError> {
        let sql =
            "SELECT datname::text FROM pg_database WHERE starts_with(datname::text, $1) ORDER BY 1";
        let rows = self.rows("looking for databases", sql, &[&prefix]).await?;
        rows.iter().map(|row| row.get(0)).collect()
    }
}

/// Returns the statement that drops a database if it exists.
pub fn drop_statement(name: &str) -> String {
    format!("DROP DATABASE IF EXISTS {}", quote_ident(name))
}

impl DatastoreError {
    /// Returns whether a session on the database could not be ended in time.
    pub fn is_in_use(&self) -> bool {
        self.sql_state == Some(SqlState::OBJECT_IN_USE)
    }
}
