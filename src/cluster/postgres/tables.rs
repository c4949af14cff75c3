//! Builder's tables as the server's catalog has them, and the statements that copy their rows.

use super::rows::Row;
use super::session::{Session, WriteSession, quote_ident};
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::cluster::preparation::COPIED_TABLES;
use std::collections::BTreeMap;

#[derive(Debug, Clone)]
pub struct Table {
    pub schema: String,
    pub name: String,
    pub columns: Vec<String>,
    /// The file that holds the rows, as the snapshot's catalog names it: a rewrite gives another
    /// file.
    pub file: i64,
    pub oid: u32,
    pub bytes: i64,
    pub pages: i64,
}

impl Table {
    pub fn full_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    pub fn quoted(&self) -> String {
        format!("{}.{}", quote_ident(&self.schema), quote_ident(&self.name))
    }

    fn quoted_columns(&self) -> String {
        let quoted: Vec<String> = self.columns.iter().map(|c| quote_ident(c)).collect();
        quoted.join(", ")
    }

    /// Returns the statement that reads the whole table, in the form in which its rows are hashed.
    pub fn copy_out(&self) -> String {
        format!("COPY {}{} TO STDOUT", self.quoted(), self.column_list())
    }

    /// Returns the statement that stores such rows.
    pub fn copy_in(&self) -> String {
        format!("COPY {}{} FROM STDIN", self.quoted(), self.column_list())
    }

    /// A table may have no column at all, and COPY accepts no empty list.
    fn column_list(&self) -> String {
        if self.columns.is_empty() {
            return String::new();
        }
        format!(" ({})", self.quoted_columns())
    }

    /// Returns the statement that reads some pages of the table, in the same form: from the first
    /// up to, but without, the last. None: to the end.
    pub fn copy_pages_out(&self, from: i64, to: Option<i64>) -> String {
        let end = to
            .map(|to| format!(" AND ctid < '({to},0)'::tid"))
            .unwrap_or_default();
        let (columns, table) = (self.quoted_columns(), self.quoted());
        format!(
            "COPY (SELECT {columns} FROM ONLY {table} WHERE ctid >= '({from},0)'::tid{end}) TO STDOUT"
        )
    }
}

const TABLES: &str = "
SELECT n.nspname::text, c.relname::text, array_remove(array_agg(a.attname::text ORDER BY a.attnum), NULL), c.relfilenode::int8, c.oid,
       coalesce(pg_table_size(c.oid), 0), coalesce(pg_relation_size(c.oid), 0) / current_setting('block_size')::int8
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
WHERE ";

const ORDER: &str = "
GROUP BY n.nspname, c.relname, c.relfilenode, c.oid
ORDER BY 6 DESC, 1, 2";

/// Builder's constraints, and the number of them that are not validated.
const CONSTRAINTS: &str = "
SELECT count(*), count(*) FILTER (WHERE NOT convalidated) FROM pg_constraint k JOIN pg_namespace n ON n.oid = k.connamespace
WHERE n.nspname NOT IN ('information_schema', 'warm_spare') AND n.nspname !~ '^pg_'";

impl Session {
    /// Returns the tables that the session's transaction sees, the largest first.
    pub async fn tables(&self) -> Result<Vec<Table>, DatastoreError> {
        let sql = format!("{TABLES}{COPIED_TABLES}{ORDER}");
        let rows = self.rows("reading the tables", &sql, &[]).await?;
        let table = |row: &Row| {
            Ok(Table {
                schema: row.get(0)?,
                name: row.get(1)?,
                columns: row.get(2)?,
                file: row.get(3)?,
                oid: row.get(4)?,
                bytes: row.get(5)?,
                pages: row.get(6)?,
            })
        };
        rows.iter().map(table).collect()
    }

    /// Returns the present file of each of these tables. None: there is no such table any more.
    pub async fn table_files(
        &self,
        oids: &[u32],
    ) -> Result<BTreeMap<u32, Option<i64>>, DatastoreError> {
        let sql = "SELECT o, pg_relation_filenode(o)::int8 FROM unnest($1::oid[]) o";
        let rows = self
            .rows("looking for rewritten tables", sql, &[&oids])
            .await?;
        rows.iter()
            .map(|row| Ok((row.get(0)?, row.get(1)?)))
            .collect()
    }

    /// Counts the rows of a table, which reads all of it.
    pub async fn count_rows(&self, table: &Table) -> Result<i64, DatastoreError> {
        let sql = format!("SELECT count(*) FROM ONLY {}", table.quoted());
        self.row("counting rows", &sql, &[]).await?.get(0)
    }

    /// Counts Builder's constraints, and those among them that are not validated.
    pub async fn count_constraints(&self) -> Result<(i64, i64), DatastoreError> {
        let row = self.row("counting constraints", CONSTRAINTS, &[]).await?;
        Ok((row.get(0)?, row.get(1)?))
    }
}

impl WriteSession {
    /// Prepares a session that fills tables which nobody sees yet. With `lz4` large values are
    /// compressed in that way.
    pub async fn prepare_to_copy(&self, lz4: bool) -> Result<(), DatastoreError> {
        self.carry_bytes().await?;
        // The rename's own commit makes all rows durable before anybody sees them.
        self.commit_lazily().await?;
        if lz4 {
            let sql = "SET default_toast_compression = 'lz4'";
            self.batch("preparing the session", sql).await?;
        }
        Ok(())
    }

    /// From now on commits do not wait for the disk: the last ones may be lost when the server is
    /// killed.
    pub async fn commit_lazily(&self) -> Result<(), DatastoreError> {
        let sql = "SET synchronous_commit = off";
        self.batch("preparing the session", sql).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read_and_stored_by_its_quoted_columns() {
        let mut table = Table {
            schema: "public".into(),
            name: "small".into(),
            columns: vec!["a".into(), "b c".into()],
            file: 1,
            oid: 1,
            bytes: 10,
            pages: 1,
        };
        let columns = r#"("a", "b c")"#;
        assert_eq!(
            table.copy_out(),
            format!(r#"COPY "public"."small" {columns} TO STDOUT"#)
        );
        assert_eq!(
            table.copy_in(),
            format!(r#"COPY "public"."small" {columns} FROM STDIN"#)
        );
        // COPY accepts no empty list.
        table.columns.clear();
        assert_eq!(table.copy_out(), r#"COPY "public"."small" TO STDOUT"#);
    }
}
