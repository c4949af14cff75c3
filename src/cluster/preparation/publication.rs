//! A publication, and its differences from the tables' needs.

use super::facts::CopiedTable;
use crate::cluster::{DatastoreError, Session};
use std::collections::BTreeSet;

/// Maximum number of names in a sentence; further ones are counted.
const MAX_NAMES: usize = 5;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Publication {
    pub all_tables: bool,
    pub schemas: Vec<String>,
    pub tables: Vec<PublishedTable>,
    /// The kinds of change (insert, update, delete, truncate) that the publication leaves out.
    pub missing: Vec<&'static str>,
    pub via_root: bool,
    pub generated_columns: bool,
    /// True: our user may change it.
    pub owned: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedTable {
    pub schema: String,
    pub name: String,
    pub row_filter: bool,
    pub column_list: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PublicationState {
    Absent,
    /// The publication has all copied tables, whole, and no other.
    Exact,
    /// The publication differs: each difference in words.
    Differs(Vec<String>),
}

impl Publication {
    /// Returns the differences from the tables' needs.
    pub(super) fn differences(&self, wanted: &[CopiedTable]) -> Vec<String> {
        let mut found = Vec::new();
        if self.all_tables {
            found.push("it is FOR ALL TABLES, so that a later table without a key breaks Builder's updates of it".into());
        }
        if !self.schemas.is_empty() {
            let names = listed(&self.schemas);
            found.push(format!("it holds whole schemas ({names}), so that a later table without a key breaks Builder's updates of it"));
        }
        let has: BTreeSet<String> = self.tables.iter().map(PublishedTable::full_name).collect();
        let needs: BTreeSet<String> = wanted.iter().map(CopiedTable::full_name).collect();
        let whole = self.all_tables || !self.schemas.is_empty();
        let missing: Vec<String> = needs.difference(&has).cloned().collect();
        if !whole && !missing.is_empty() {
            found.push(format!("it does not have {}", listed(&missing)));
        }
        let extra: Vec<String> = has.difference(&needs).cloned().collect();
        if !extra.is_empty() {
            found.push(format!("it has {}, which is not copied", listed(&extra)));
        }
        for (flaw, what) in [
            (
                PublishedTable::filters as fn(&PublishedTable) -> bool,
                "a row filter",
            ),
            (PublishedTable::picks, "a column list"),
        ] {
            let tables = self.tables.iter().filter(|table| flaw(table));
            let names: Vec<String> = tables.map(PublishedTable::full_name).collect();
            if !names.is_empty() {
                found.push(format!("it has {what} on {}", listed(&names)));
            }
        }
        if !self.missing.is_empty() {
            found.push(format!("it leaves out {}", self.missing.join(", ")));
        }
        if self.via_root {
            found.push("it publishes partitions by way of their root".into());
        }
        if self.generated_columns {
            found.push("it publishes generated columns".into());
        }
        found
    }
}

impl PublishedTable {
    pub fn full_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    fn filters(&self) -> bool {
        self.row_filter
    }

    fn picks(&self) -> bool {
        self.column_list
    }
}

pub(super) fn listed(names: &[String]) -> String {
    let first: Vec<&str> = names.iter().take(MAX_NAMES).map(String::as_str).collect();
    match names.len().saturating_sub(MAX_NAMES) {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

/// Columns that an older version does not have are returned as JSON's null.
const PUBLICATION: &str = "
SELECT p.puballtables, p.pubinsert, p.pubupdate, p.pubdelete, p.pubtruncate,
       coalesce((to_jsonb(p) ->> 'pubviaroot')::bool, false),
       coalesce(to_jsonb(p) ->> 'pubgencols', 'n') NOT IN ('n', 'false'),
       pg_has_role(p.pubowner, 'USAGE')
FROM pg_publication p WHERE p.pubname = $1";

const PUBLISHED: &str = "
SELECT n.nspname::text, c.relname::text, to_jsonb(r) ->> 'prqual' IS NOT NULL, to_jsonb(r) ->> 'prattrs' IS NOT NULL
FROM pg_publication p
JOIN pg_publication_rel r ON r.prpubid = p.oid
JOIN pg_class c ON c.oid = r.prrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE p.pubname = $1 ORDER BY 1, 2";

const SCHEMAS: &str = "
SELECT n.nspname::text FROM pg_publication p
JOIN pg_publication_namespace s ON s.pnpubid = p.oid
JOIN pg_namespace n ON n.oid = s.pnnspid
WHERE p.pubname = $1 ORDER BY 1";

pub(super) async fn read(
    session: &Session,
    name: &str,
    major: i32,
) -> Result<Option<Publication>, DatastoreError> {
    let doing = "reading the publication";
    let rows = session.rows(doing, PUBLICATION, &[&name]).await?;
    let Some(row) = rows.first() else {
        return Ok(None);
    };
    let operations = ["insert", "update", "delete", "truncate"];
    let mut missing = Vec::new();
    for (column, operation) in (1..5).zip(operations) {
        if !row.get::<bool>(column)? {
            missing.push(operation);
        }
    }
    let schemas = if major >= 15 {
        session.rows(doing, SCHEMAS, &[&name]).await?
    } else {
        Vec::new()
    };
    let tables = session.rows(doing, PUBLISHED, &[&name]).await?;
    Ok(Some(Publication {
        all_tables: row.get(0)?,
        schemas: schemas
            .iter()
            .map(|row| row.get(0))
            .collect::<Result<_, _>>()?,
        tables: tables
            .iter()
            .map(|row| {
                Ok::<_, DatastoreError>(PublishedTable {
                    schema: row.get(0)?,
                    name: row.get(1)?,
                    row_filter: row.get(2)?,
                    column_list: row.get(3)?,
                })
            })
            .collect::<Result<_, _>>()?,
        missing,
        via_root: row.get(5)?,
        generated_columns: row.get(6)?,
        owned: row.get(7)?,
    }))
}
