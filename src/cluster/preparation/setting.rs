//! The two settings of the primary's server on which the stream depends.

use crate::cluster::{DatastoreError, Session};
use std::collections::BTreeMap;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The value in force.
    pub value: String,
    /// The source in `pg_settings`: `default`, `configuration file`, `command line` …
    pub source: String,
    /// The file, if we may see it.
    pub file: Option<String>,
    pub pending_restart: bool,
    pub in_auto_conf: AutoConf,
}

/// The setting in `postgresql.auto.conf`, the one file that every start of the server reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AutoConf {
    /// We may not read the file.
    Unknown,
    Absent,
    Holds(String),
}

/// Reads `wal_level` and `max_slot_wal_keep_size`. `files`: we may read the server's files.
pub(super) async fn settings(
    session: &Session,
    files: bool,
) -> Result<(Setting, Setting), DatastoreError> {
    let doing = "reading the settings";
    // An entry that waits for a restart has an error there: that it was not applied.
    let written = if files {
        let sql = "SELECT DISTINCT ON (name) name, setting FROM pg_file_settings \
                   WHERE sourcefile ~ '[/\\\\]postgresql\\.auto\\.conf$' ORDER BY name, seqno DESC";
        let rows = session.rows(doing, sql, &[]).await?;
        let pairs = rows
            .iter()
            .map(|row| Ok::<_, DatastoreError>((row.get(0)?, row.get(1)?)));
        Some(pairs.collect::<Result<BTreeMap<String, Option<String>>, _>>()?)
    } else {
        None
    };
    let sql =
        "SELECT setting, source, sourcefile, pending_restart FROM pg_settings WHERE name = $1";
    let mut found = Vec::new();
    for name in ["wal_level", "max_slot_wal_keep_size"] {
        let rows = session.rows(doing, sql, &[&name]).await?;
        // A server before 13 has no such limit at all.
        found.push(match rows.first() {
            None => Setting::unknown("-1"),
            Some(row) => Setting {
                value: row.get(0)?,
                source: row.get(1)?,
                file: row.get(2)?,
                pending_restart: row.get(3)?,
                in_auto_conf: AutoConf::Unknown,
            },
        });
        if let (Some(setting), Some(written)) = (found.last_mut(), &written) {
            let held = written.get(name).cloned().flatten();
            setting.in_auto_conf = held.map_or(AutoConf::Absent, AutoConf::Holds);
        } else if let Some(setting) = found.last_mut() {
            setting.in_auto_conf = setting.guess();
        }
    }
    let bound = found.pop().unwrap_or_else(|| Setting::unknown("-1"));
    Ok((found.pop().unwrap_or_else(|| Setting::unknown("")), bound))
}

impl Setting {
    fn unknown(value: &str) -> Self {
        Setting {
            value: value.to_string(),
            source: "default".into(),
            file: None,
            pending_restart: false,
            in_auto_conf: AutoConf::Absent,
        }
    }

    pub(super) fn is_from_auto_conf(&self) -> bool {
        let file = self.file.as_deref();
        file.is_some_and(|file| file.ends_with("postgresql.auto.conf"))
    }

    /// Guesses the file's content from the value in force, for a user who may not read the files.
    pub(super) fn guess(&self) -> AutoConf {
        match &self.file {
            Some(_) if self.is_from_auto_conf() => AutoConf::Holds(self.value.clone()),
            Some(_) if !self.pending_restart => AutoConf::Absent,
            None if self.source == "default" && !self.pending_restart => AutoConf::Absent,
            _ => AutoConf::Unknown,
        }
    }
}
