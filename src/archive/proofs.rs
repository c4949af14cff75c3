//! The memory of the proofs: when each file of an archive was last read whole and found right.
//!
//! It is a file in the data directory of the service. If it is lost, every file counts as never
//! read.

use super::place::Place;
use crate::config::write_whole;
use crate::replication::ReplicationError;
use chrono::{DateTime, Utc};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

const FILE: &str = "proofs";

/// The times of the last proofs, by path.
pub(super) struct Proofs {
    file: Option<PathBuf>,
    times: HashMap<String, i64>,
}

/// Name of the line that has the time of the last verification.
const VERIFIED: &str = "/verified";

impl Proofs {
    /// Reads what is remembered of a place. Lines that cannot be read are left out.
    pub(super) fn of(data: Option<&Path>, place: &Place) -> Proofs {
        let file = data.map(|data| data.join("archive").join(place.name()).join(FILE));
        let text = file
            .as_ref()
            .and_then(|file| std::fs::read_to_string(file).ok());
        let text = text.unwrap_or_default();
        let mut lines = text.lines();
        // The first line names the place: another one may have had the same name.
        let is_ours = lines.next() == Some(place.address().as_str());
        let line = |line: &str| {
            let (time, path) = line.split_once(' ')?;
            Some((path.to_string(), time.parse().ok()?))
        };
        let times = match is_ours {
            true => lines.filter_map(line).collect(),
            false => HashMap::new(),
        };
        Proofs { file, times }
    }

    /// Returns the time of the last proof. None: the file was never read.
    pub(super) fn time_of(&self, path: &str) -> Option<DateTime<Utc>> {
        DateTime::from_timestamp(*self.times.get(path)?, 0)
    }

    /// Returns the time of the last verification that came to its end.
    pub(super) fn verified(&self) -> Option<DateTime<Utc>> {
        self.time_of(VERIFIED)
    }

    pub(super) fn note_end(&mut self) {
        self.note(VERIFIED, Utc::now());
    }

    pub(super) fn note(&mut self, path: &str, time: DateTime<Utc>) {
        self.times.insert(path.to_string(), time.timestamp());
    }

    pub(super) fn forget(&mut self, path: &str) {
        self.times.remove(path);
    }

    /// Writes the memory to the disk.
    pub(super) fn save(&self, place: &Place) -> Result<(), ReplicationError> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let mut lines: Vec<(&String, &i64)> = self.times.iter().collect();
        lines.sort();
        let mut text = format!("{}\n", place.address());
        for (path, time) in lines {
            text.push_str(&format!("{time} {path}\n"));
        }
        let written = file.parent().map_or(Ok(()), std::fs::create_dir_all);
        let written = written.and_then(|()| write_whole(file, text.as_bytes()));
        written.map_err(|source| ReplicationError::Scratch {
            what: file.display().to_string(),
            source,
        })
    }
}
