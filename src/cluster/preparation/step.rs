//! One step of a plan: what, why, and its SQL.

/// How a step's statements are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// In a transaction that waits for each lock only for an instant, and again after a pause: it takes a lock that readers
    /// wait behind. All such steps come to their turn before the next kind begins.
    Identity,
    /// Likewise; it takes locks that only changes of form wait behind.
    Publication,
    /// Each statement by itself: no transaction may hold it.
    Alone,
    /// Who uses the slot is ended first.
    Slot,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What is made or removed, in a few words.
    pub what: String,
    pub reason: String,
    pub sql: Vec<String>,
    pub how: How,
    /// Those whose locks it needs.
    pub(super) tables: Vec<u32>,
}

/// Longest wait for one lock: whoever comes after us waits behind us as long.
pub(super) const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '200ms'";

impl Step {
    pub(super) fn new(how: How, what: String, reason: &str, sql: Vec<String>) -> Self {
        Step {
            what,
            reason: reason.to_string(),
            sql,
            how,
            tables: Vec::new(),
        }
    }

    pub(super) fn locks(mut self, tables: Vec<u32>) -> Self {
        self.tables = tables;
        self
    }

    pub(super) fn transaction(&self) -> String {
        format!("BEGIN; {LOCK_TIMEOUT}; {}; COMMIT", self.sql.join("; "))
    }

    /// For psql, with the reason in front.
    pub fn script(&self) -> String {
        let mut lines = vec![format!("-- {}: {}", self.what, self.reason)];
        let statements = self.sql.iter().map(|sql| format!("{sql};"));
        match self.how {
            How::Identity | How::Publication => {
                lines.push("BEGIN;".into());
                lines.push(format!("{LOCK_TIMEOUT};"));
                lines.extend(statements);
                lines.push("COMMIT;".into());
            }
            How::Alone | How::Slot => lines.extend(statements),
        }
        lines.join("\n") + "\n"
    }
}
