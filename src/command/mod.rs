//! The command line: one file for each verb, all of one shape: `run(&Config, …) -> ExitCode`.

/// A line on standard output. A reader that has gone is no failure of the verb.
macro_rules! say {
    ($($arguments:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($arguments)*);
    }};
}

mod ask;
mod check_config;
mod divergence;
mod drill;
mod generations;
mod health;
mod log_lines;
mod preflight;
mod prepare;
mod release;
mod run;
mod show;
mod status;
mod sync;
mod verify;

use crate::cluster::preparation::is_cluster_id;
use crate::config;
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
    /// The configuration, a TOML file.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        default_value = "/hab/svc/warm-spare/config/config.toml"
    )]
    config: PathBuf,
    /// One JSON document on standard output; everything else on standard error.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// The service: follows the primary for as long as it runs, and answers over HTTP how it stands.
    Run,
    /// Asks the running service how the spare stands.
    Status,
    /// Asks the running service for its health: one line, and 0 ok, 1 warning, 2 critical, 3 unknown.
    Health {
        /// Longest wait for its answer.
        #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = config::parse_duration)]
        timeout: Duration,
    },
    #[command(flatten)]
    Once(Once),
}

/// The verbs that do one thing, by a good configuration.
#[derive(Subcommand)]
enum Once {
    /// Reads the configuration and says what is wrong with it.
    CheckConfig {
        /// Also connects to both sides and looks whether a copy could be made.
        #[arg(long)]
        connect: bool,
    },
    /// Brings the spare to the primary's present, once.
    Sync {
        /// Copy all rows again, even if the primary has committed nothing since the last time.
        #[arg(long)]
        baseline: bool,
    },
    /// Makes on the primary what the stream of its changes needs: identities of tables, a publication, settings.
    Prepare {
        /// Change nothing: print the SQL of it.
        #[arg(long)]
        print: bool,
        /// Also set a bound that other slots of the primary come under.
        #[arg(long)]
        bound_other_slots: bool,
    },
    /// Removes from the primary what is ours there, or from here what we keep.
    Release {
        /// Change nothing: print the SQL of it.
        #[arg(long)]
        print: bool,
        /// What another cluster has left on the primary, by its id.
        #[arg(long, value_name = "ID", value_parser = cluster_id, conflicts_with = "local")]
        cluster: Option<String>,
        /// Our own state on this side, and nothing on the primary.
        #[arg(long)]
        local: bool,
        /// With --local: also what is needed still.
        #[arg(long, requires = "local")]
        force: bool,
    },
    /// Asks whether a promotion of this cluster would work today, and why not; changes nothing.
    Preflight {
        /// Which promotion: with the primary's help, or without it.
        #[arg(long = "for", value_name = "PURPOSE", default_value = "planned")]
        purpose: preflight::For,
    },
    /// Lists what this cluster had as a primary, and the new primary lacks.
    Divergence {
        /// Also brings the artifacts that only this side has into that directory, each checked.
        #[arg(long, value_name = "DIR")]
        fetch: Option<PathBuf>,
    },
    /// The replaced databases that are kept.
    Generations {
        #[command(subcommand)]
        verb: Generations,
    },
    /// Rehearses a takeover on a clone of the database, and removes everything again.
    Drill(DrillArguments),
    /// Compares the spare with what the primary sent, and lists every difference.
    Verify {
        /// Also read every artifact: its checksum and its signature.
        #[arg(long)]
        deep: bool,
    },
}

fn cluster_id(text: &str) -> Result<String, String> {
    if is_cluster_id(text) {
        Ok(text.to_string())
    } else {
        Err("expected the 8 hexadecimal digits of a cluster's id, as in warm_spare_0123abcd".into())
    }
}

/// The exit codes of all verbs but `health`.
pub mod exit {
    pub const DONE: u8 = 0;
    pub const NO: u8 = 1;
    pub const CONFIGURATION: u8 = 2;
    pub const UNFINISHED: u8 = 3;
}

/// Runs the verb; what it has to say is printed when it returns.
pub async fn run(arguments: Arguments) -> ExitCode {
    let (path, json) = (&arguments.config, arguments.json);
    let code = match arguments.verb {
        Verb::Run => run::run(path).await,
        Verb::Status => status::run(path, json).await,
        Verb::Health { timeout } => health::run(path, timeout, json).await,
        Verb::Once(verb) => run_once(verb, path, json).await,
    };
    code.into()
}

async fn run_once(verb: Once, path: &Path, json: bool) -> u8 {
    let config = match config::load(path) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("error: {error}");
            if json {
                show::json(&serde_json::json!({ "format": 1, "error": {
                    "code": "config",
                    "text": error.to_string(),
                    "next_step": "correct that key; docs/reference.md has them all",
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
        Once::Generations { verb } => generations::run(&config, &verb, json).await,
        Once::Drill(arguments) => drill::run(&config, &arguments, json).await,
        Once::Verify { deep } => verify::run(&config, deep, json).await,
    }
}
