//! The facts about the archives, one entry for each place of the configuration.

use crate::domain::ErrorCode;
use chrono::{DateTime, TimeDelta, Utc};

/// An archive that the service looks after.
#[derive(Debug, Clone, PartialEq)]
pub struct ArchiveFacts {
    pub name: String,
    /// Time since which this process looks after it.
    pub since: DateTime<Utc>,
    /// Longest interval between two generations by the schedule; None: there is no schedule.
    pub pause: Option<TimeDelta>,
    /// Time at which the next generation is due.
    pub due: Option<DateTime<Utc>>,
    /// Time since which a generation is being made.
    pub making: Option<DateTime<Utc>>,
    /// Number of generations; None: the place was not read yet.
    pub generations: Option<u64>,
    pub newest: Option<NewestGeneration>,
    pub trouble: Option<ArchiveTrouble>,
    pub proof: ArchiveProof,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewestGeneration {
    pub name: String,
    /// Time to which it belongs.
    pub time: DateTime<Utc>,
    /// Time at which it was finished.
    pub made: DateTime<Utc>,
    pub joint: bool,
}

/// The reason why the last work on an archive failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiveTrouble {
    pub code: ErrorCode,
    pub text: String,
    pub next_step: String,
    pub since: DateTime<Utc>,
}

/// The result of reading the archive back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ArchiveProof {
    /// Time of the last verification that came to its end; None: there was none.
    pub verified: Option<DateTime<Utc>>,
    /// Number of files that it found missing or damaged, and one of them.
    pub faults: u64,
    pub example: Option<String>,
    /// Time of the oldest proof of all files. None: not known, or a file was never read.
    pub oldest: Option<DateTime<Utc>>,
}

impl ArchiveFacts {
    /// Returns the facts about an archive that was not read yet.
    pub fn new(name: &str, since: DateTime<Utc>) -> Self {
        ArchiveFacts {
            name: name.to_string(),
            since,
            pause: None,
            due: None,
            making: None,
            generations: None,
            newest: None,
            trouble: None,
            proof: ArchiveProof::default(),
        }
    }

    /// Returns the time up to which nothing was archived for too long: two intervals of the
    /// schedule after the newest generation, or after the service began.
    pub fn late_after(&self) -> Option<DateTime<Utc>> {
        let newest = self
            .newest
            .as_ref()
            .map_or(self.since, |newest| newest.made);
        newest.checked_add_signed(self.pause? * 2)
    }
}
