//! The command line. Each verb has one file, and all files have one shape:
//! `run(&Config, …) -> ExitCode`.

/// Prints a line on standard output. A closed pipe is no failure of the verb.
macro_rules! say {
    ($($arguments:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($arguments)*);
    }};
}

mod archive;
mod ask;
mod check_config;
mod divergence;
mod drill;
mod fence;
mod generations;
mod health;
mod log_lines;
mod preflight;
mod prepare;
mod promote;
mod release;
mod run;
mod show;
mod status;
mod sync;
mod verify;

use crate::cluster::preparation::is_cluster_id;
use crate::config::{self, Config};
use crate::domain::Side;
use archive::ArchiveArguments;
use clap::{Parser, Subcommand};
use drill::DrillArguments;
use generations::Generations;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Keeps a spare cluster of Habitat Builder at a checked point of the primary's history.
#[derive(Parser)]
#[command(name = "warm-spare", version, about)]
pub struct Arguments {
    /// Configuration file (TOML).
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        default_value = "/hab/svc/warm-spare/config/config.toml"
    )]
    config: PathBuf,
    /// Prints one JSON document on standard output; everything else goes to standard error.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Runs the service: follows the primary until it is stopped, and reports its state over HTTP.
    Run,
    /// Asks the running service for the state of the spare.
    Status,
    /// Asks the running service for its health: prints one line, and exits with 0 ok, 1 warning, 2
    /// critical or 3 unknown.
    Health {
        /// Longest wait for the answer of the service.
        #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = config::parse_duration)]
        timeout: Duration,
    },
    #[command(flatten)]
    Once(Once),
}

/// Verbs that do one thing and exit. They need a good configuration.
#[derive(Subcommand)]
enum Once {
    /// Checks the configuration and names every error.
    CheckConfig {
        /// Also connects to both sides and checks that a copy is possible.
        #[arg(long)]
        connect: bool,
    },
    /// Copies to the spare, once, what the primary has committed up to now.
    Sync {
        /// Copies all rows again, even if the primary has committed nothing since the last pass.
        #[arg(long)]
        baseline: bool,
    },
    /// Makes on the primary what logical decoding needs: replica identities of tables, a
    /// publication, settings.
    Prepare {
        /// Changes nothing: prints the SQL instead.
        #[arg(long)]
        print: bool,
        /// Also sets max_slot_wal_keep_size, although it then limits other slots of the primary
        /// too.
        #[arg(long)]
        bound_other_slots: bool,
    },
    /// Removes from the primary what warm-spare made there, or with --local the state of warm-spare
    /// on this side.
    Release {
        /// Changes nothing: prints the SQL instead.
        #[arg(long)]
        print: bool,
        /// Removes what another cluster has left on the primary. ID: the 8 hexadecimal digits of
        /// that cluster.
        #[arg(long, value_name = "ID", value_parser = cluster_id, conflicts_with = "local")]
        cluster: Option<String>,
        /// Removes the state of warm-spare on this side, and nothing on the primary.
        #[arg(long)]
        local: bool,
        /// With --local: removes the state even if it is still needed.
        #[arg(long, requires = "local")]
        force: bool,
    },
    /// Checks whether a promotion of this cluster would work now, and gives the reason if not.
    /// Changes nothing.
    Preflight {
        /// Kind of promotion: with the help of the primary (planned) or without it (unplanned).
        #[arg(long = "for", value_name = "PURPOSE", default_value = "planned")]
        purpose: preflight::For,
    },
    /// Lists what this cluster had as a primary and the new primary does not have.
    Divergence {
        /// Also copies the artifacts that only this side has into directory DIR, and checks each of
        /// them.
        #[arg(long, value_name = "DIR")]
        fetch: Option<PathBuf>,
    },
    /// Shows whether the database of this cluster takes writes, and who fenced it. Exits with 1 if
    /// it is read-only.
    Fence {
        /// Shows the fence of the peer.
        #[arg(long)]
        peer: bool,
        /// Lifts the fence of this cluster, if no role is on record here any more.
        #[arg(long, conflicts_with = "peer")]
        lift: bool,
    },
    /// Makes this cluster the primary without the service and without the old primary, which must be
    /// lost. No service may be at work for this cluster.
    Promote {
        /// The next epoch of this cluster. A refusal names it.
        #[arg(long, value_name = "N")]
        epoch: u64,
    },
    /// Makes, lists, proves, restores and removes generations of the whole Builder in an archive.
    Archive(ArchiveArguments),
    /// Lists or drops the replaced databases that are kept.
    Generations {
        #[command(subcommand)]
        verb: Generations,
    },
    /// Rehearses a takeover on a clone of the database, then removes the clone.
    Drill(DrillArguments),
    /// Compares the spare with the data that the primary sent, and lists every difference.
    Verify {
        /// Also reads every artifact and checks its checksum and its signature.
        #[arg(long)]
        deep: bool,
    },
}

fn cluster_id(text: &str) -> Result<String, String> {
    if is_cluster_id(text) {
        Ok(text.to_string())
    } else {
        Err("expected the 8 hexadecimal digits of a cluster id, such as 0123abcd in warm_spare_0123abcd".into())
    }
}

/// Exit codes of all verbs except `health`.
pub mod exit {
    pub const DONE: u8 = 0;
    pub const NO: u8 = 1;
    pub const CONFIGURATION: u8 = 2;
    pub const UNFINISHED: u8 = 3;
}

/// Runs the verb. Its output is printed when this function returns.
pub async fn run(arguments: Arguments) -> ExitCode {
    let (path, json) = (&arguments.config, arguments.json);
    let code = match arguments.verb {
        Verb::Run => Box::pin(run::run(path)).await,
        Verb::Status => status::run(path, json).await,
        Verb::Health { timeout } => health::run(path, timeout, json).await,
        Verb::Once(verb) => run_once(verb, path, json).await,
    };
    code.into()
}

/// Returns the configuration that the service would use, for the verbs of an emergency. They ask no
/// peer, and must not fail for a key that they do not need.
fn last_good(verb: &Once, path: &Path) -> Option<Config> {
    match verb {
        Once::Promote { .. } | Once::Fence { peer: false, .. } => {
            config::load_kept(&config::data_dir(path)).ok().flatten()
        }
        _ => None,
    }
}

async fn run_once(verb: Once, path: &Path, json: bool) -> u8 {
    let config = match config::load(path) {
        Ok(config) => config,
        Err(config::ConfigError::PeerUnset { alone }) if matches!(verb, Once::Archive(_)) => *alone,
        Err(error) if let Some(config) = last_good(&verb, path) => {
            eprintln!("warning: {error}; the last good configuration is used");
            config
        }
        Err(error) => {
            eprintln!("error: {error}");
            if json {
                show::json(&serde_json::json!({ "format": 1, "error": {
                    "code": "config",
                    "text": error.to_string(),
                    "next_step": "correct that key; docs/reference.md describes every key",
                    "exit_code": exit::CONFIGURATION,
                } }));
            }
            return exit::CONFIGURATION;
        }
    };
    log_lines::start(config.log_level, config.log_format);
    match verb {
        Once::CheckConfig { connect } => check_config::run(&config, path, connect, json).await,
        Once::Prepare {
            print,
            bound_other_slots,
        } => prepare::run(&config, print, bound_other_slots, json).await,
        Once::Release {
            print,
            local: true,
            force,
            ..
        } => release::run_local(&config, print, force, json).await,
        Once::Release { print, cluster, .. } => {
            release::run(&config, cluster.as_deref(), print, json).await
        }
        Once::Sync { baseline } => sync::run(&config, baseline, json).await,
        Once::Preflight { purpose } => preflight::run(&config, purpose.into(), json).await,
        Once::Divergence { fetch } => divergence::run(&config, fetch.as_deref(), json).await,
        Once::Fence { lift, peer } => {
            let side = if peer { Side::Peer } else { Side::Local };
            fence::run(&config, side, lift, json).await
        }
        Once::Promote { epoch } => promote::run(&config, path, epoch, json).await,
        Once::Generations { verb } => generations::run(&config, &verb, json).await,
        Once::Archive(arguments) => {
            archive::run(&config, &config::data_dir(path), &arguments, json).await
        }
        Once::Drill(arguments) => drill::run(&config, &arguments, json).await,
        Once::Verify { deep } => verify::run(&config, deep, json).await,
    }
}
