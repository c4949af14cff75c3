//! `archive`: makes, lists, proves, restores and removes generations. Exit codes: 0 done, 1 the
//! answer is no (a damaged file, an incomplete restore), 2 usage or configuration, 3 not finished, 4
//! refused by a safety rule.

mod documents;
mod print;

use super::{exit, show};
use crate::archive::{self, Chosen, Extent, Making, Place, Pruning, Target};
use crate::config::{ArchivePlan, Config, parse_rate};
use crate::domain::ErrorCode;
use crate::replication::ReplicationError;
use chrono::{DateTime, Utc};
use clap::{Args, Subcommand};
use std::path::Path;

#[derive(Args)]
pub(super) struct ArchiveArguments {
    /// Name of the archive in the configuration. It may be left out if there is only one.
    #[arg(long, global = true, value_name = "ARCHIVE")]
    archive: Option<String>,
    #[command(subcommand)]
    verb: ArchiveVerb,
}

#[derive(Subcommand)]
enum ArchiveVerb {
    /// Makes a generation: a dump of Builder's database, and every artifact that its rows name and
    /// the archive does not have yet.
    Create {
        /// This cluster writes into the archive from now on, in place of the one that did.
        #[arg(long)]
        take_over: bool,
    },
    /// Lists the generations, the newest first, each with the reasons for which a prune keeps it.
    List,
    /// Shows one generation: its point, its size, what it does not have.
    Show {
        /// Name of the generation, as `archive list` prints it.
        name: String,
    },
    /// Keeps a generation, whatever the rules of `archive.keep` say.
    Pin {
        /// Name of the generation, as `archive list` prints it.
        name: String,
        /// Reason for the pin, which `archive list` shows.
        #[arg(long, value_name = "TEXT", required_unless_present = "remove")]
        reason: Option<String>,
        /// Takes the pin away.
        #[arg(long, conflicts_with = "reason")]
        remove: bool,
    },
    /// Reads a generation, or all of them, and checks every byte. Exits with 1 if a file is missing
    /// or damaged.
    Verify {
        /// Name of the generation. Without it: the newest one.
        #[arg(conflicts_with = "all")]
        name: Option<String>,
        /// Verifies all generations. Each file is read once.
        #[arg(long)]
        all: bool,
        /// Percentage of the artifacts to read, those first that were not read for the longest time.
        /// Of the others presence and length are checked.
        #[arg(long, value_name = "PERCENT", default_value = "100", value_parser = percent)]
        read: f64,
        /// Maximum number of bytes to read in a second, such as 50MB/s. Default:
        /// `archive.verify_budget`.
        #[arg(long, value_name = "RATE", value_parser = parse_rate)]
        budget: Option<u64>,
    },
    /// Restores a generation into this cluster, which must have no packages and no role, or into a
    /// new database beside Builder's.
    Restore {
        /// Name of the generation, as `archive list` prints it.
        #[arg(required_unless_present = "to", conflicts_with = "to")]
        name: Option<String>,
        /// Restores the newest generation that is not after this time (RFC 3339).
        #[arg(long, value_name = "TIME", value_parser = time)]
        to: Option<DateTime<Utc>>,
        /// Restores the rows into this new database, and no artifact.
        #[arg(long, value_name = "NAME")]
        database: Option<String>,
    },
    /// Removes the generations that no rule of `archive.keep` keeps, and the files that no
    /// generation needs any more.
    Prune {
        /// Changes nothing: prints each generation with the reasons for which it would stay.
        #[arg(long)]
        dry_run: bool,
        /// Removes them even if more than half of the generations go, or if the newest one is old.
        #[arg(long, conflicts_with = "dry_run")]
        agree: bool,
    },
}

fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse::<f64>();
    match number {
        Ok(number) if (0.0..=100.0).contains(&number) => Ok(number),
        _ => Err("expected a percentage from 0 to 100".into()),
    }
}

fn time(text: &str) -> Result<DateTime<Utc>, String> {
    let time = DateTime::parse_from_rfc3339(text);
    time.map(|time| time.with_timezone(&Utc))
        .map_err(|_| "expected a time such as 2026-12-01T03:00:00Z".into())
}

pub(super) async fn run(
    config: &Config,
    data: &Path,
    arguments: &ArchiveArguments,
    as_json: bool,
) -> u8 {
    let done = match plan(config, arguments.archive.as_deref()) {
        Ok(plan) => Box::pin(carry_out(config, plan, data, &arguments.verb, as_json)).await,
        Err(error) => Err(error),
    };
    match done {
        Ok(true) => exit::DONE,
        Ok(false) => exit::NO,
        Err(error) => show::failure(&error, as_json),
    }
}

/// Finds the archive in the configuration.
fn plan<'a>(config: &'a Config, name: Option<&str>) -> Result<&'a ArchivePlan, ReplicationError> {
    let names: Vec<&str> = config
        .archives
        .iter()
        .map(|plan| plan.name.as_str())
        .collect();
    let refused = |text: String, next_step: String| ReplicationError::Refused {
        rule: ErrorCode::NoArchive,
        text,
        next_step,
    };
    let found = match name {
        Some(name) => config.archives.iter().find(|plan| plan.name == name),
        None if names.len() > 1 => {
            let text = format!(
                "the configuration has {} archives: {}",
                names.len(),
                names.join(", ")
            );
            return Err(refused(text, "name one of them with --archive".into()));
        }
        None => config.archives.first(),
    };
    found.ok_or_else(|| match name {
        Some(name) if !names.is_empty() => refused(
            format!("the configuration has no archive {name}"),
            format!("name one of these: {}", names.join(", ")),
        ),
        _ => refused(
            "the configuration has no archive".into(),
            "add a table [[archive]] with a location (docs/archive.md)".into(),
        ),
    })
}

/// Returns whether the answer is yes.
async fn carry_out(
    config: &Config,
    plan: &ArchivePlan,
    data: &Path,
    verb: &ArchiveVerb,
    as_json: bool,
) -> Result<bool, ReplicationError> {
    let data = Some(data);
    let progress = show::progress();
    match verb {
        ArchiveVerb::Create { take_over } => {
            let making = Making {
                take_over: *take_over,
            };
            let made = archive::create(config, plan, data, &making, &progress).await?;
            drop(progress);
            match as_json {
                true => show::json(&documents::made(&made)),
                false => print::made(plan, &made),
            }
        }
        ArchiveVerb::List => {
            let judged = archive::judge(plan, data).await?;
            match as_json {
                true => show::json(&documents::list(&judged)),
                false => print::list(&judged),
            }
        }
        ArchiveVerb::Show { name } => {
            let manifest = archive::manifest(&Place::open(plan)?, name).await?;
            match as_json {
                true => show::json(&documents::manifest(&manifest)),
                false => print::manifest(&manifest),
            }
        }
        ArchiveVerb::Pin { name, reason, .. } => {
            archive::pin(plan, name, reason.as_deref()).await?;
            match (as_json, reason) {
                (true, _) => show::json(&documents::pin(name, reason.as_deref())),
                (false, Some(_)) => say!("Pinned: {name}."),
                (false, None) => say!("No longer pinned: {name}."),
            }
        }
        ArchiveVerb::Verify {
            name,
            all,
            read,
            budget,
        } => {
            let name = match (name, all) {
                (_, true) => None,
                (Some(name), false) => Some(name.clone()),
                (None, false) => Some(archive::newest(plan).await?),
            };
            let extent = Extent {
                name,
                percent: *read,
                rate: budget.or(plan.verify_budget),
            };
            let verified = archive::verify(plan, data, &extent, &progress).await?;
            drop(progress);
            match as_json {
                true => show::json(&documents::verified(&verified)),
                false => print::verified(&verified),
            }
            return Ok(verified.ok());
        }
        ArchiveVerb::Restore { name, to, database } => {
            let chosen = match (name, to) {
                (Some(name), _) => Chosen::Name(name.clone()),
                (None, Some(time)) => Chosen::NotAfter(*time),
                (None, None) => unreachable!("the command line asks for one of them"),
            };
            let target = match database {
                Some(name) => Target::Beside(name.clone()),
                None => Target::FreshCluster,
            };
            let restored =
                archive::restore(config, plan, data, &chosen, &target, &progress).await?;
            drop(progress);
            match as_json {
                true => show::json(&documents::restored(&restored)),
                false => print::restored(&restored),
            }
            return Ok(restored.ok());
        }
        ArchiveVerb::Prune { dry_run, agree } => {
            let pruning = Pruning {
                dry_run: *dry_run,
                agreed: *agree,
            };
            let pruned = archive::prune(config, plan, data, &pruning).await?;
            match as_json {
                true => show::json(&documents::pruned(&pruned, *dry_run)),
                false => print::pruned(&pruned, *dry_run),
            }
        }
    }
    Ok(true)
}
