//! A step of a plan: its object, its reason, and its SQL.

/// The way in which a step's statements are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// In a transaction that waits for each lock only for a moment, and tries again after a pause:
    /// it takes a lock behind which readers wait. All such steps are tried before the next kind
    /// begins.
    Identity,
    /// The same way; it takes locks behind which only schema changes wait.
    Publication,
    /// Each statement by itself, outside of a transaction.
    Alone,
    /// The session that uses the slot is ended first.
    Slot,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The object that is made or removed, in a few words.
    pub what: String,
    pub reason: String,
    pub sql: Vec<String>,
    pub how: How,
    /// Tables whose locks it needs.
    pub(super) tables: Vec<u32>,
}

/// Maximum wait for one lock: sessions that come after us wait behind us for as long.
pub(super) const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '200ms'";

/// Has the server read its configuration files again.
pub(super) const RELOAD: &str = "SELECT pg_reload_conf()";

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

    /// Says for people that it was carried out. `verb`: `Made` or `Removed`.
    pub fn done(&self, verb: &str) -> String {
        match self.is_reload() {
            true => "The primary's server has read its configuration again.".into(),
            false => format!("{verb}: {}.", self.what),
        }
    }

    /// Returns whether it makes and removes nothing, and only has the settings read.
    pub fn is_reload(&self) -> bool {
        self.sql == [RELOAD]
    }

    pub(super) fn transaction(&self) -> String {
        format!("BEGIN; {LOCK_TIMEOUT}; {}; COMMIT", self.sql.join("; "))
    }

    /// Returns a script for psql, with the reason before the statements.
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
