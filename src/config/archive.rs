//! The places of an archive: one table `[archive]`, or a list `[[archive]]`.
//!
//! Each place is read alone, so that both forms have the same keys and checks. Within this room its
//! keys are `archive.NAME`; an error about an element of the list has `archive[N].NAME`, where N counts
//! from 1.

use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::{Table, Value};

use super::endpoint::is_same_server;
use super::secret_places::real;
use super::values::{Source, Values};
use super::{ConfigError, S3, Schedule, Side, sides};

/// Name of the table, and of the list.
pub(super) const TABLE: &str = "archive";

/// Keys that only a bucket has. One of them without an endpoint is an error.
const OF_A_BUCKET: [&str; 9] = [
    "bucket_name",
    "prefix",
    "key_id",
    "key_id_file",
    "secret_key",
    "secret_key_file",
    "ca_file",
    "proxy",
    "proxy_file",
];

/// The plan for one place that keeps generations.
#[derive(Debug, Clone, PartialEq)]
pub struct ArchivePlan {
    /// No two places have the same name.
    pub name: String,
    pub place: ArchivePlace,
    /// Times at which a generation is made; None: only when somebody asks for one.
    pub schedule: Option<Schedule>,
    pub keep: Keep,
    /// Maximum number of bytes a second that a verification reads; None: no limit.
    pub verify_budget: Option<u64>,
}

/// A directory, or a part of a bucket.
#[derive(Debug, Clone, PartialEq)]
pub enum ArchivePlace {
    /// An absolute path. Whether the directory exists is not looked at here.
    Directory(PathBuf),
    /// The prefix begins every key. It ends with a slash, or is empty.
    Bucket { s3: Box<S3>, prefix: String },
}

/// The rules that keep generations. A generation is kept if one of them keeps it; at least one of them
/// is set.
#[derive(Debug, Clone, PartialEq)]
pub struct Keep {
    /// Number of the newest generations.
    pub last: u32,
    /// Number of hours of which the newest generation is kept; likewise days, weeks and months.
    pub hourly: u32,
    pub daily: u32,
    pub weekly: u32,
    pub monthly: u32,
    /// Age up to which every generation is kept; None: there is no such rule.
    pub within: Option<Duration>,
}

/// One place as the file has it, in which every key was checked alone.
pub(super) struct Entry {
    pub values: Values,
    /// Index in the list; None: it is the one table.
    pub index: Option<usize>,
    /// True: the file has the table `keep`, so a rule that is not in it keeps nothing.
    keep_is_given: bool,
}

/// Reads the places of the file. Two with the same name are refused, because the kept secrets have the
/// name in their own.
pub(super) fn entries(table: &Table) -> Result<Vec<Entry>, ConfigError> {
    let list = match table.get(TABLE) {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(Value::Table(table)) => return Ok(vec![Entry::read(None, table)?]),
        Some(other) => {
            let problem = format!(
                "expected a table or a list of tables, found {}",
                other.type_str()
            );
            return Err(ConfigError::key(TABLE, problem));
        }
    };
    let mut entries: Vec<Entry> = Vec::new();
    for (index, element) in list.iter().enumerate() {
        let Value::Table(table) = element else {
            let problem = format!("expected a table, found {}", element.type_str());
            return Err(ConfigError::key(shown(Some(index)), problem));
        };
        let entry = Entry::read(Some(index), table)?;
        if let Some(other) = entries.iter().find(|other| other.name() == entry.name()) {
            let problem = format!(
                "{:?} is the name of {} too: give each place a name of its own",
                entry.name(),
                shown(other.index)
            );
            return Err(entry.error("name", &problem));
        }
        entries.push(entry);
    }
    Ok(entries)
}

/// Builds the plans of all places. `sides` are the local one and the peer: a place may not be the bucket
/// of either. Files that a place names are read once to check them.
pub(super) fn plans(entries: &[Entry], sides: [&Side; 2]) -> Result<Vec<ArchivePlan>, ConfigError> {
    let mut plans: Vec<ArchivePlan> = Vec::new();
    for entry in entries {
        let plan = entry.plan().map_err(|error| entry.named(error))?;
        entry.refuse_builders(&plan.place, sides)?;
        for (other, before) in entries.iter().zip(&plans) {
            entry.refuse_overlap(&plan.place, &before.place, &shown(other.index))?;
        }
        plans.push(plan);
    }
    Ok(plans)
}

impl Entry {
    fn read(index: Option<usize>, table: &Table) -> Result<Self, ConfigError> {
        let values = Values::read_table(TABLE, table).map_err(|error| named(index, error))?;
        let keep_is_given = table.contains_key("keep");
        Ok(Self {
            values,
            index,
            keep_is_given,
        })
    }

    fn name(&self) -> &str {
        self.text("name").unwrap_or(TABLE)
    }

    /// Returns the name of the file for a kept secret. In a list it has the name of the place and not
    /// its number, so that a secret never becomes that of another place when the list changes.
    pub(super) fn secret_file(&self, key: &str) -> String {
        match (self.index, key.strip_prefix(TABLE)) {
            (Some(_), Some(rest)) => format!("{TABLE}.{}{rest}", self.name()),
            _ => key.to_string(),
        }
    }

    /// Returns the error with the element of the list in it.
    pub(super) fn named(&self, error: ConfigError) -> ConfigError {
        named(self.index, error)
    }

    fn error(&self, name: &str, problem: &str) -> ConfigError {
        ConfigError::key(format!("{}.{name}", shown(self.index)), problem)
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.values.text(&key(name))
    }

    fn plan(&self) -> Result<ArchivePlan, ConfigError> {
        Ok(ArchivePlan {
            name: self.name().to_string(),
            place: self.place()?,
            schedule: self.values.schedule(&key("schedule")).cloned(),
            keep: self.keep()?,
            verify_budget: self.values.bytes(&key("verify_budget")),
        })
    }

    fn place(&self) -> Result<ArchivePlace, ConfigError> {
        let bucket_key = OF_A_BUCKET.iter().find(|name| self.text(name).is_some());
        let problem = match (self.text("location"), self.text("endpoint"), bucket_key) {
            (None, Some(_), _) => {
                let prefix = self.text("prefix").unwrap_or_default().to_string();
                let s3 = Box::new(sides::archive(&self.values)?);
                return Ok(ArchivePlace::Bucket { s3, prefix });
            }
            (Some(path), None, None) => return Ok(ArchivePlace::Directory(path.into())),
            (Some(_), None, Some(name)) => {
                let problem = "is set, and archive.location is set too: a place is a directory or a bucket, so remove one of them";
                return Err(ConfigError::key(key(name), problem));
            }
            (Some(_), Some(_), _) => {
                "is set, and archive.endpoint is set too: a place is a directory or a bucket, so remove one of them"
            }
            (None, None, _) => {
                "not set, and archive.endpoint is not set either: set this key for a directory, or that one for a bucket"
            }
        };
        Err(ConfigError::key(key("location"), problem))
    }

    fn keep(&self) -> Result<Keep, ConfigError> {
        let keep = Keep {
            last: self.count("last")?,
            hourly: self.count("hourly")?,
            daily: self.count("daily")?,
            weekly: self.count("weekly")?,
            monthly: self.count("monthly")?,
            within: self.values.duration(&key("keep.within")).ok(),
        };
        let nothing = Keep {
            last: 0,
            hourly: 0,
            daily: 0,
            weekly: 0,
            monthly: 0,
            within: None,
        };
        if keep == nothing {
            let problem = "keeps no generation: set at least one of last, hourly, daily, weekly, monthly, within";
            return Err(ConfigError::key(key("keep"), problem));
        }
        Ok(keep)
    }

    /// Returns the number of a rule. A table `keep` that does not set it has 0.
    fn count(&self, name: &str) -> Result<u32, ConfigError> {
        let key = key(&format!("keep.{name}"));
        match self.values.source(&key) {
            Some(Source::Default) if self.keep_is_given => Ok(0),
            _ => self.values.int(&key),
        }
    }

    /// Refuses a bucket of Builder itself. It would be lost together with its archive.
    fn refuse_builders(&self, place: &ArchivePlace, sides: [&Side; 2]) -> Result<(), ConfigError> {
        let ArchivePlace::Bucket { s3, .. } = place else {
            return Ok(());
        };
        for (name, side) in ["local", "peer"].into_iter().zip(sides) {
            if is_same_bucket(s3, &side.s3) {
                let problem = format!(
                    "{} at {} is Builder's own bucket ({name}.s3), with which the archive would be lost: name another bucket",
                    s3.bucket_name, s3.endpoint
                );
                return Err(self.error("bucket_name", &problem));
            }
        }
        Ok(())
    }

    /// Refuses a place that is another one, or inside of it, or around it.
    fn refuse_overlap(
        &self,
        place: &ArchivePlace,
        before: &ArchivePlace,
        other: &str,
    ) -> Result<(), ConfigError> {
        use ArchivePlace::{Bucket, Directory};
        match (place, before) {
            (Directory(path), Directory(before)) if is_one_in_the_other(path, before) => {
                let problem = format!(
                    "{} and {} ({other}) are one directory, or one is inside the other: give each place a directory of its own",
                    path.display(),
                    before.display()
                );
                Err(self.error("location", &problem))
            }
            (
                Bucket { s3, prefix },
                Bucket {
                    s3: before,
                    prefix: begins,
                },
            ) if is_same_bucket(s3, before)
                && (prefix.starts_with(begins.as_str()) || begins.starts_with(prefix.as_str())) =>
            {
                let problem = format!(
                    "{prefix:?} and {begins:?} ({other}) are in one bucket, and are the same or one is inside the other: give each place a prefix of its own"
                );
                Err(self.error("prefix", &problem))
            }
            _ => Ok(()),
        }
    }
}

fn key(name: &str) -> String {
    format!("{TABLE}.{name}")
}

/// Returns the name of a place for people: that of the one table, or that of the element.
fn shown(index: Option<usize>) -> String {
    match index {
        Some(index) => format!("{TABLE}[{}]", index + 1),
        None => TABLE.to_string(),
    }
}

/// Puts the element of the list into an error. Other keys of the place, which the text may name, are
/// keys of that element too.
fn named(index: Option<usize>, error: ConfigError) -> ConfigError {
    let place = shown(index);
    match error {
        ConfigError::Key { key, problem } => {
            let rest = key.strip_prefix(TABLE).unwrap_or_default();
            let problem = problem.replace(&format!(" {TABLE}."), &format!(" {place}."));
            ConfigError::key(format!("{place}{rest}"), problem)
        }
        other => other,
    }
}

fn is_same_bucket(one: &S3, other: &S3) -> bool {
    one.bucket_name == other.bucket_name && is_same_server(&one.endpoint, &other.endpoint)
}

fn is_one_in_the_other(one: &Path, other: &Path) -> bool {
    let (one, other) = (real(one), real(other));
    one.starts_with(&other) || other.starts_with(&one)
}
