//! The clone that a drill takes over. It is made in one snapshot, and compared with the content of
//! that snapshot.

use crate::cluster::{LocalCluster, Session, SpareDb, WriteSession};
use crate::config::Config;
use crate::domain::MissingReason;
use crate::replication::{ReplicationError, clone_visible};
use bytesize::ByteSize;
use std::collections::BTreeMap;

/// The content of a database: rows by table, constraints, and constraints that are not validated.
#[derive(Debug, PartialEq, Eq)]
struct Content {
    rows: BTreeMap<String, i64>,
    constraints: (i64, i64),
}

pub(super) struct Clone {
    bytes: u64,
    content: Content,
    /// Artifacts that are missing or damaged on the primary, with the reason.
    unavailable: Vec<(String, MissingReason)>,
}

impl Clone {
    pub(super) async fn make(
        config: &Config,
        state: &WriteSession,
        name: &str,
    ) -> Result<Clone, ReplicationError> {
        let holder = LocalCluster::of(config).builder().await?;
        let snapshot = holder.export_snapshot().await?;
        let unavailable = SpareDb::of(&holder).unavailable_reasons().await?;
        let bytes = clone_visible(config, state, snapshot.as_str(), name).await?;
        Ok(Clone {
            bytes,
            content: content(&holder).await?,
            unavailable,
        })
    }

    pub(super) fn unavailable(&self) -> &[(String, MissingReason)] {
        &self.unavailable
    }

    pub(super) fn describe(&self) -> String {
        format!("the database ({}) was cloned", ByteSize(self.bytes))
    }

    pub(super) async fn compare(
        &self,
        inside: &WriteSession,
    ) -> Result<(bool, String), ReplicationError> {
        let found = content(inside).await?;
        let differing = self.content.differing(&found);
        if !differing.is_empty() {
            return Ok((false, differing.join("; ")));
        }
        let text = format!(
            "{} rows in {} tables and {} constraints are as in the snapshot",
            found.rows.values().sum::<i64>(),
            found.rows.len(),
            found.constraints.0
        );
        Ok((true, text))
    }
}

async fn content(session: &Session) -> Result<Content, ReplicationError> {
    let mut rows = BTreeMap::new();
    for table in session.tables().await? {
        rows.insert(table.full_name(), session.count_rows(&table).await?);
    }
    Ok(Content {
        rows,
        constraints: session.count_constraints().await?,
    })
}

impl Content {
    fn differing(&self, found: &Content) -> Vec<String> {
        let mut lines = Vec::new();
        for (table, rows) in &self.rows {
            match found.rows.get(table) {
                Some(there) if there == rows => {}
                Some(there) => lines.push(format!("{table} has {there} rows of {rows}")),
                None => lines.push(format!("{table} does not exist")),
            }
        }
        let strange = found.rows.keys().filter(|t| !self.rows.contains_key(*t));
        lines.extend(strange.map(|table| format!("{table} should not exist")));
        if self.constraints != found.constraints {
            lines.push(format!(
                "{} constraints, {} of them not validated, where {} and {} should be",
                found.constraints.0, found.constraints.1, self.constraints.0, self.constraints.1
            ));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(rows: &[(&str, i64)], constraints: (i64, i64)) -> Content {
        let rows = rows.iter().map(|(table, rows)| (table.to_string(), *rows));
        Content {
            rows: rows.collect(),
            constraints,
        }
    }

    #[test]
    fn every_difference_is_told() {
        let sent = content(&[("public.a", 1), ("public.b", 2)], (3, 0));
        assert!(sent.differing(&sent).is_empty());
        let found = content(&[("public.a", 2), ("public.c", 0)], (3, 1));
        assert_eq!(
            sent.differing(&found),
            [
                "public.a has 2 rows of 1",
                "public.b does not exist",
                "public.c should not exist",
                "3 constraints, 1 of them not validated, where 3 and 0 should be",
            ]
        );
    }
}
