//! The places of generations: one table `[archive]`, or several `[[archive]]`.
//!
//! Each element of a list is read as if it were the one table, so that both have the same keys and
//! checks. An element of a list takes its secrets from files only.

use super::endpoint::parse_endpoint;
use super::sides;
use super::values::Values;
use super::{Backend, ConfigError, S3, Schedule, Side};
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::{Table, Value};

/// Name of the table, and prefix of its keys.
pub(super) const TABLE: &str = "archive";

/// The plan for one place of generations.
#[derive(Debug, Clone, PartialEq)]
pub struct ArchivePlan {
    pub name: String,
    pub place: ArchivePlace,
    /// Times at which a generation is made; None: only by hand.
    pub schedule: Option<Schedule>,
    pub keep: Keep,
    /// Maximum number of bytes a second that a verification reads; None: no limit.
    pub verify_budget: Option<u64>,
    /// Time for which the switch to a new copy waits for a dump.
    pub max_hold: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub enum ArchivePlace {
    /// An absolute path.
    Directory(PathBuf),
    /// `prefix` begins the key of each object. It ends with `/`, or is empty.
    Bucket { s3: Box<S3>, prefix: String },
}

/// The rules that keep generations. A generation stays while one of them keeps it.
#[derive(Debug, Clone, PartialEq)]
pub struct Keep {
    /// Number of the newest generations.
    pub last: u32,
    /// Number of hours, days, weeks and months of which the newest generation stays.
    pub hourly: u32,
    pub daily: u32,
    pub weekly: u32,
    pub monthly: u32,
    /// Age up to which all stay, counted back from the newest; None: no such rule.
    pub within: Option<Duration>,
}

/// Returns the values of each place: those of the one table, or of each element of the list.
pub(super) fn places(table: &Table, values: &Values) -> Result<Vec<Values>, ConfigError> {
    let elements = match table.get(TABLE) {
        Some(Value::Array(elements)) => elements,
        _ if values.sets_any_of(TABLE) => return Ok(vec![values.only(TABLE)]),
        _ => return Ok(Vec::new()),
    };
    let mut places = Vec::new();
    for (number, element) in (1..).zip(elements) {
        let of = |error: ConfigError| in_element(number, error);
        if !element.is_table() {
            let problem = format!("expected a table, found {}", element.type_str());
            return Err(of(ConfigError::key(TABLE, problem)));
        }
        let alone = Table::from_iter([(TABLE.to_string(), element.clone())]);
        let values = Values::read(&alone).map_err(of)?;
        if let Some(key) = values.inline_secrets().next() {
            let problem =
                format!("a list of archives takes secrets from files only: set {key}_file");
            return Err(of(ConfigError::key(key, problem)));
        }
        places.push(values.only(TABLE));
    }
    Ok(places)
}

fn in_element(number: usize, error: ConfigError) -> ConfigError {
    match error {
        ConfigError::Key { key, problem } => {
            let rest = key.strip_prefix(TABLE).unwrap_or(&key);
            ConfigError::key(format!("{TABLE}[{number}]{rest}"), problem)
        }
        other => other,
    }
}

/// Builds the plans, and checks that no place is another one, or a bucket of a side.
pub(super) fn plans(places: &[Values], sides: [&Side; 2]) -> Result<Vec<ArchivePlan>, ConfigError> {
    let of = |number: usize, error| match places.len() {
        1 => error,
        _ => in_element(number, error),
    };
    let mut plans: Vec<ArchivePlan> = Vec::new();
    for (number, values) in (1..).zip(places) {
        let plan = plan(values).map_err(|error| of(number, error))?;
        let clash = clash(&plan, &plans, sides);
        if let Some((key, problem)) = clash {
            return Err(of(
                number,
                ConfigError::key(format!("{TABLE}.{key}"), problem),
            ));
        }
        plans.push(plan);
    }
    Ok(plans)
}

fn plan(values: &Values) -> Result<ArchivePlan, ConfigError> {
    let number = |key: &str| values.int(&format!("archive.keep.{key}"));
    let keep = Keep {
        last: number("last")?,
        hourly: number("hourly")?,
        daily: number("daily")?,
        weekly: number("weekly")?,
        monthly: number("monthly")?,
        within: values.duration("archive.keep.within").ok(),
    };
    let numbers = [
        keep.last,
        keep.hourly,
        keep.daily,
        keep.weekly,
        keep.monthly,
    ];
    if numbers.iter().all(|number| *number == 0) && keep.within.is_none() {
        let problem =
            "keeps nothing: set at least one of last, hourly, daily, weekly, monthly, within";
        return Err(ConfigError::key("archive.keep", problem));
    }
    Ok(ArchivePlan {
        name: values.required("archive.name")?.to_string(),
        place: place(values)?,
        schedule: values.schedule("archive.schedule").cloned(),
        keep,
        verify_budget: values.bytes("archive.verify_budget"),
        max_hold: values.duration("archive.max_hold")?,
    })
}

fn place(values: &Values) -> Result<ArchivePlace, ConfigError> {
    match (
        values.text("archive.location"),
        values.text("archive.endpoint"),
    ) {
        (Some(path), None) => match values.text("archive.bucket_name") {
            None => Ok(ArchivePlace::Directory(PathBuf::from(path))),
            Some(_) => Err(ConfigError::key(
                "archive.bucket_name",
                "is set, and archive.location is set too: a place is a directory or a bucket",
            )),
        },
        (None, Some(_)) => Ok(ArchivePlace::Bucket {
            s3: Box::new(sides::archive(values)?),
            prefix: values
                .text("archive.prefix")
                .unwrap_or_default()
                .to_string(),
        }),
        (Some(_), Some(_)) => Err(ConfigError::key(
            "archive.location",
            "is set, and archive.endpoint is set too: a place is a directory or a bucket",
        )),
        (None, None) => Err(ConfigError::key(
            "archive.location",
            "not set, and neither is archive.endpoint: set a directory, or the keys of a bucket",
        )),
    }
}

/// Returns the key and the problem if a place cannot be used beside the others.
fn clash(
    plan: &ArchivePlan,
    others: &[ArchivePlan],
    sides: [&Side; 2],
) -> Option<(&'static str, String)> {
    if others.iter().any(|other| other.name == plan.name) {
        let problem = format!("two archives have the name {:?}", plan.name);
        return Some(("name", problem));
    }
    let same_bucket = |a: &S3, b: &S3| a.endpoint == b.endpoint && a.bucket_name == b.bucket_name;
    match &plan.place {
        ArchivePlace::Directory(path) => {
            let within = |other: &ArchivePlan| match &other.place {
                ArchivePlace::Directory(other) => overlap(path, other),
                ArchivePlace::Bucket { .. } => false,
            };
            let other = others.iter().find(|other| within(other))?;
            let problem = format!(
                "{} and the directory of archive {:?} are the same, or one is in the other",
                path.display(),
                other.name
            );
            Some(("location", problem))
        }
        ArchivePlace::Bucket { s3, prefix } => {
            if let Some(side) = sides.iter().position(|side| same_bucket(&side.s3, s3)) {
                let side = ["local", "peer"][side];
                let problem = format!(
                    "{} is Builder's own bucket ({side}.s3): an archive in it would be lost with it",
                    s3.bucket_name
                );
                return Some(("bucket_name", problem));
            }
            let within = |other: &ArchivePlan| match &other.place {
                ArchivePlace::Bucket {
                    s3: their,
                    prefix: others,
                } => {
                    same_bucket(their, s3)
                        && (others.starts_with(prefix.as_str())
                            || prefix.starts_with(others.as_str()))
                }
                ArchivePlace::Directory(_) => false,
            };
            let other = others.iter().find(|other| within(other))?;
            let problem = format!(
                "archive {:?} is in the same bucket, and one prefix begins with the other",
                other.name
            );
            Some(("prefix", problem))
        }
    }
}

fn overlap(one: &Path, other: &Path) -> bool {
    one.starts_with(other) || other.starts_with(one)
}

/// Returns the S3 keys of a side that nobody can reach, for a cluster without a peer.
pub(super) fn no_store(near: &S3) -> S3 {
    let endpoint = parse_endpoint(Backend::Minio, "http://no-peer.invalid:9");
    S3 {
        endpoint: endpoint.map_or_else(|_| String::new(), |endpoint| endpoint.url),
        proxy: None,
        ca_file: None,
        ..near.clone()
    }
}
