//! Facts by which one server may be unable to hold another one's database.

use super::provider::{SUPERUSERS, is_providers_own};
use super::session::Session;
use crate::cluster::postgres::datastore_error::DatastoreError;

impl Session {
    /// Returns the extensions of the session's database for which the other server has no files.
    pub async fn extensions_missing_on(
        &self,
        other: &Session,
    ) -> Result<Vec<String>, DatastoreError> {
        let used = "SELECT extname::text FROM pg_extension ORDER BY 1";
        let known = "SELECT name FROM pg_available_extensions";
        self.missing_on(other, "extensions", used, known).await
    }

    /// Returns the extensions of the session's database, but for the language that every database
    /// has.
    pub async fn extensions(&self) -> Result<Vec<String>, DatastoreError> {
        let sql = "SELECT extname::text FROM pg_extension WHERE extname <> 'plpgsql' ORDER BY 1";
        let rows = self.rows("reading the extensions", sql, &[]).await?;
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// Returns the roles that objects of the session's database name, and that the other server
    /// does not have.
    pub async fn roles_missing_on(&self, other: &Session) -> Result<Vec<String>, DatastoreError> {
        let used = "SELECT pg_get_userbyid(role)::text FROM pg_policy CROSS JOIN unnest(polroles) role WHERE role <> 0 \
                    UNION SELECT usename::text FROM pg_user_mappings WHERE umuser <> 0 ORDER BY 1";
        let known = "SELECT rolname::text FROM pg_roles";
        self.missing_on(other, "roles", used, known).await
    }

    /// Returns the items that this server uses and the other one does not know.
    async fn missing_on(
        &self,
        other: &Session,
        what: &str,
        used: &str,
        known: &str,
    ) -> Result<Vec<String>, DatastoreError> {
        let used = self.rows(&format!("reading the {what}"), used, &[]).await?;
        let used: Result<Vec<String>, _> = used.iter().map(|row| row.get(0)).collect();
        let sql = format!("SELECT w FROM unnest($1::text[]) w WHERE w NOT IN ({known}) ORDER BY 1");
        let doing = format!("looking for the {what}");
        let missing = other.rows(&doing, &sql, &[&used?]).await?;
        missing.iter().map(|row| row.get(0)).collect()
    }

    /// Returns Builder's tables and sequences that the session's user may not read.
    pub async fn unreadable_tables(&self) -> Result<Vec<String>, DatastoreError> {
        let sql = "SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                   WHERE c.relkind IN ('r', 'S') AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_' \
                     AND n.nspname <> 'warm_spare' \
                     AND NOT (has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')) \
                   ORDER BY 1";
        let rows = self.rows("reading the privileges", sql, &[]).await?;
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// Counts the objects that are not copied: large objects, and tables of other kinds than
    /// ordinary ones.
    pub async fn uncopied_objects(&self) -> Result<(i64, i64), DatastoreError> {
        let sql = "SELECT (SELECT count(*) FROM pg_largeobject_metadata), \
                     (SELECT count(*) FROM pg_class WHERE relkind IN ('p', 'f', 'm') AND relnamespace <> 'information_schema'::regnamespace)";
        let doing = "looking for objects that are not copied";
        let row = self.row(doing, sql, &[]).await?;
        Ok((row.get(0)?, row.get(1)?))
    }

    /// Returns whether the server compresses large values with lz4.
    pub async fn has_lz4(&self) -> Result<bool, DatastoreError> {
        let sql = "SELECT EXISTS (SELECT 1 FROM pg_settings WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals))";
        self.row("asking for lz4", sql, &[]).await?.get(0)
    }

    /// Returns the server's data directory, and the place of a database's tablespace: empty for the
    /// server's own tablespaces, and relative for one within the directory. Only a superuser can
    /// see the directory.
    pub async fn directories(
        &self,
        database: &str,
    ) -> Result<(Option<String>, Option<String>), DatastoreError> {
        let sql = "SELECT current_setting('data_directory', true), \
                     (SELECT pg_tablespace_location(dattablespace) FROM pg_database WHERE datname = $1)";
        let doing = "asking for the data directory";
        let row = self.row(doing, sql, &[&database]).await?;
        Ok((row.get(0)?, row.get(1)?))
    }

    /// Counts the prepared transactions and the sessions of superusers in a database: a fence ends
    /// neither. A provider's own sessions are not counted: the fence waives them.
    pub async fn unfenced_in(&self, database: &str) -> Result<(i64, i64), DatastoreError> {
        let sql = concat!(
            "SELECT (SELECT count(*) FROM pg_prepared_xacts WHERE database = $1), \
               (SELECT count(*) FROM pg_stat_activity a JOIN pg_roles s ON s.oid = a.usesysid \
                 WHERE a.datname = $1 AND s.rolsuper AND a.backend_type = 'client backend' AND NOT ",
            is_providers_own!("$2"),
            ")"
        );
        let doing = "looking for what a fence does not hold";
        let row = self
            .row(doing, sql, &[&database, &SUPERUSERS.as_slice()])
            .await?;
        Ok((row.get(0)?, row.get(1)?))
    }
}
