//! A table of the spare as the target of the stream's changes: the same columns, and the statements
//! that change its rows.

use super::changes::Kind;
use super::pgoutput::{Column, Identity, Relation};
use crate::cluster::{DatastoreError, WriteSession, quote_ident};
use std::collections::HashMap;

/// The first object id that is a database's own; smaller ones are the same on every server.
const FIRST_OWN: u32 = 16_384;

#[derive(Debug)]
pub(super) struct Target {
    /// `public.origins`, for people.
    pub name: String,
    quoted: String,
    /// The table without the tables that inherit from it: each of them has its own changes.
    only: String,
    pub columns: Vec<TargetColumn>,
    pub identity: Identity,
    /// Numbers of the columns that identify a row.
    pub keys: Vec<usize>,
    /// If its rows are packages: the numbers of the columns ident, target and checksum.
    pub package: Option<[usize; 3]>,
}

#[derive(Debug)]
pub(super) struct TargetColumn {
    quoted: String,
    type_name: String,
    has_equality: bool,
    /// True: the server generates the value, and accepts none in an update.
    always: bool,
}

/// Types that the stream has named, because they are a database's own.
pub(super) type Types = HashMap<u32, (String, String)>;

const COLUMNS: &str = "
SELECT a.attname::text, format_type(a.atttypid, a.atttypmod), a.atttypid, a.atttypmod,
       b.typname::text, n.nspname::text, a.attidentity = 'a',
       b.typtype = 'e' OR EXISTS (SELECT 1 FROM pg_operator o
         WHERE o.oprname = '=' AND o.oprleft = b.oid AND o.oprright = b.oid)
FROM pg_attribute a
JOIN LATERAL (
    WITH RECURSIVE below AS (
        SELECT oid, typbasetype FROM pg_type WHERE oid = a.atttypid
        UNION ALL SELECT t.oid, t.typbasetype FROM below JOIN pg_type t ON t.oid = below.typbasetype)
    SELECT oid FROM below WHERE typbasetype = 0) base ON true
JOIN pg_type b ON b.oid = base.oid
JOIN pg_namespace n ON n.oid = b.typnamespace
WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
ORDER BY a.attnum";

impl Target {
    /// Finds the spare's table. Err: the reason why it is not the table that the primary describes.
    pub(super) async fn find(
        session: &WriteSession,
        relation: &Relation,
        types: &Types,
    ) -> Result<Result<Target, String>, DatastoreError> {
        let quoted = format!(
            "{}.{}",
            quote_ident(&relation.schema),
            quote_ident(&relation.name)
        );
        let name = format!("{}.{}", relation.schema, relation.name);
        let doing = "reading a table's columns";
        let rows = session.rows_for(doing, COLUMNS, &[&quoted]).await?;
        let theirs: Vec<&str> = relation.columns.iter().map(|c| c.name.as_str()).collect();
        let ours: Result<Vec<String>, _> = rows.iter().map(|row| row.get(0)).collect();
        let ours = ours?;
        if ours != theirs {
            return Ok(Err(format!(
                "table {name} has the columns ({}) on the primary and ({}) here",
                theirs.join(", "),
                ours.join(", ")
            )));
        }
        let mut columns = Vec::with_capacity(rows.len());
        for (row, column) in rows.iter().zip(&relation.columns) {
            let type_name: String = row.get(1)?;
            let own = (row.get(5)?, row.get(4)?);
            if !same_type(column, (row.get(2)?, row.get(3)?), &own, types) {
                return Ok(Err(format!(
                    "column {} of table {name} has another type on the primary than here ({type_name})",
                    column.name
                )));
            }
            columns.push(TargetColumn {
                quoted: quote_ident(&column.name),
                type_name,
                has_equality: row.get(7)?,
                always: row.get(6)?,
            });
        }
        let at = |wanted: &str| theirs.iter().position(|column| *column == wanted);
        let package = (name == "public.origin_packages")
            .then(|| Some([at("ident")?, at("target")?, at("checksum")?]))
            .flatten();
        let flagged = relation.columns.iter().enumerate();
        let keys = flagged.filter(|(_, c)| c.key).map(|(n, _)| n).collect();
        Ok(Ok(Target {
            name,
            only: format!("ONLY {quoted}"),
            quoted,
            columns,
            identity: relation.identity,
            keys,
            package,
        }))
    }

    /// Returns the statement that inserts any number of rows at once: one array of texts for each
    /// column.
    pub(super) fn insert(&self) -> String {
        if self.columns.is_empty() {
            return format!("INSERT INTO {} DEFAULT VALUES", self.quoted);
        }
        let listed = |each: &dyn Fn(usize, &TargetColumn) -> String| {
            let columns = self.columns.iter().enumerate();
            let texts: Vec<String> = columns.map(|(n, column)| each(n, column)).collect();
            texts.join(", ")
        };
        format!(
            "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM unnest({}) AS u ({})",
            self.quoted,
            listed(&|_, column| column.quoted.clone()),
            listed(&|n, column| format!("u.c{n}::{}", column.type_name)),
            listed(&|n, _| format!("${}::text[]", n + 1)),
            listed(&|n, _| format!("c{n}")),
        )
    }

    /// Returns whether an update may set the column: the server does not generate its value.
    pub(super) fn settable(&self, column: usize) -> bool {
        !self.columns[column].always
    }

    /// Returns the statement of an update. `set` are the columns to be set, by the first
    /// parameters; the row is found by the following parameters.
    pub(super) fn update(&self, set: &[usize], found: &Found) -> String {
        let assignments: Vec<String> = set
            .iter()
            .enumerate()
            .map(|(n, column)| {
                let column = &self.columns[*column];
                format!("{} = ${}::{}", column.quoted, n + 1, column.type_name)
            })
            .collect();
        let condition = self.condition(found, set.len());
        let table = &self.only;
        let sql = format!(
            "UPDATE {table} SET {} WHERE {condition}",
            assignments.join(", ")
        );
        match self.package {
            None => sql,
            Some(named) => {
                let [ident, target, checksum] = named.map(|column| &self.columns[column].quoted);
                format!(
                    "WITH was AS MATERIALIZED (SELECT {ident} AS i, {target} AS t, {checksum} AS c FROM {table} WHERE {condition}) \
                     {sql} RETURNING {ident}, {target}, {checksum}, (SELECT i FROM was), (SELECT t FROM was), (SELECT c FROM was)"
                )
            }
        }
    }

    /// Returns the statement that changes any number of rows at once, each found by all its values:
    /// one array of texts for each column, then one for each column that is set. Of equal rows, as
    /// many are changed as there are changes. A row's text distinguishes NULL from an empty text,
    /// and 1.0 from 1.00.
    pub(super) fn of_rows(&self, kind: Kind, set: &[usize]) -> String {
        let columns = || self.columns.iter().enumerate();
        let joined = |texts: Vec<String>| texts.join(", ");
        let arrays = (1..=self.columns.len() + set.len()).map(|n| format!("${n}::text[]"));
        let mut names: Vec<String> = columns().map(|(n, _)| format!("c{n}")).collect();
        names.extend(set.iter().map(|column| format!("s{column}")));
        let theirs = columns().map(|(n, column)| format!("c{n}::{}::text", column.type_name));
        let ours = columns().map(|(_, column)| format!("{}::text", column.quoted));
        let (arrays, names) = (joined(arrays.collect()), joined(names));
        let (theirs, ours) = (joined(theirs.collect()), joined(ours.collect()));
        let table = &self.only;
        let found = format!(
            "WITH wanted AS MATERIALIZED (SELECT *, row_number() OVER (PARTITION BY row_text ORDER BY number) AS twin \
               FROM (SELECT *, ROW({theirs})::text AS row_text FROM unnest({arrays}) WITH ORDINALITY AS u ({names}, number)) w), \
             found AS MATERIALIZED (SELECT place, row_text, row_number() OVER (PARTITION BY row_text) AS twin \
               FROM (SELECT ctid AS place, ROW({ours})::text AS row_text FROM {table}) f \
               WHERE row_text IN (SELECT row_text FROM wanted)) "
        );
        let from = "found JOIN wanted USING (row_text, twin) WHERE this.ctid = found.place";
        if kind == Kind::Delete {
            return format!("{found} DELETE FROM {table} AS this USING {from}");
        }
        let assignments = set.iter().map(|column| {
            let target = &self.columns[*column];
            format!("{} = wanted.s{column}::{}", target.quoted, target.type_name)
        });
        let assignments = joined(assignments.collect());
        format!("{found} UPDATE {table} AS this SET {assignments} FROM {from}")
    }

    pub(super) fn delete(&self, found: &Found) -> String {
        let sql = format!(
            "DELETE FROM {} WHERE {}",
            self.only,
            self.condition(found, 0)
        );
        match self.package {
            None => sql,
            Some(named) => {
                let names = named.map(|column| self.columns[column].quoted.as_str());
                format!("{sql} RETURNING {}", names.join(", "))
            }
        }
    }

    /// Returns the statement that reads the table's packages, before all of them are removed.
    pub(super) fn packages(&self) -> Option<String> {
        let names = self
            .package?
            .map(|column| self.columns[column].quoted.as_str());
        Some(format!("SELECT {} FROM {}", names.join(", "), self.only))
    }

    pub(super) fn only(&self) -> &str {
        &self.only
    }

    fn condition(&self, found: &Found, before: usize) -> String {
        let mut parameter = before;
        let mut equal = |column: usize| {
            parameter += 1;
            let column = &self.columns[column];
            let (name, kind) = (&column.quoted, &column.type_name);
            // A column's own collation may treat different texts as equal.
            let same_text =
                format!("{name}::text COLLATE \"C\" = ${parameter}::{kind}::text COLLATE \"C\"");
            // Equal is not the same: 1.0 and 1.00 are equal, as numbers. But by text alone no index
            // could be used.
            match (found, column.has_equality) {
                (Found::ByKey, _) => format!("{name} = ${parameter}::{kind}"),
                (Found::ByRow { .. }, true) => {
                    format!("({name} = ${parameter}::{kind} AND {same_text})")
                }
                (Found::ByRow { .. }, false) => same_text,
            }
        };
        match found {
            Found::ByKey => {
                let equals: Vec<String> = self.keys.iter().map(|column| equal(*column)).collect();
                equals.join(" AND ")
            }
            // One of several equal rows: exactly one row is removed for each removed row.
            Found::ByRow { nulls } => {
                let terms: Vec<String> = (0..self.columns.len())
                    .map(|column| match nulls[column] {
                        true => format!("{} IS NULL", self.columns[column].quoted),
                        false => equal(column),
                    })
                    .collect();
                let all = match terms.is_empty() {
                    true => "true".to_string(),
                    false => terms.join(" AND "),
                };
                format!(
                    "ctid = (SELECT ctid FROM {} WHERE {all} LIMIT 1)",
                    self.only
                )
            }
        }
    }
}

/// The way in which a row is found.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Found {
    ByKey,
    /// By all its values, because its table has no key. `nulls` says which of them are NULL.
    ByRow {
        nulls: Vec<bool>,
    },
}

fn same_type(column: &Column, ours: (u32, i32), own: &(String, String), types: &Types) -> bool {
    let (oid, modifier) = ours;
    if column.modifier != modifier {
        return false;
    }
    match types.get(&column.type_oid) {
        _ if column.type_oid < FIRST_OWN => column.type_oid == oid,
        // The stream names a domain by its base type.
        Some((schema, name)) => {
            let schema = if schema.is_empty() {
                "pg_catalog"
            } else {
                schema
            };
            (schema, name.as_str()) == (own.0.as_str(), own.1.as_str())
        }
        None => false,
    }
}
