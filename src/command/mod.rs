//! The command line: one file for each verb, all of one shape: `run(&Config, …) -> ExitCode`.

/// A line on standard output. A reader that has gone is no failure of the verb.
macro_rules! say {
    ($($arguments:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($arguments)*);
    }};
}

mod check_config;
mod show;
mod sync;
mod verify;

use crate::config::{self, Config, LogFormat};
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

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
    /// Compares the spare with what the primary sent, and lists every difference.
    Verify {
        /// Also read every artifact: its checksum and its signature.
        #[arg(long)]
        deep: bool,
    },
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
    let config = match config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("error: {error}");
            if arguments.json {
                show::json(&serde_json::json!({ "format": 1, "error": {
                    "code": "config",
                    "text": error.to_string(),
                    "next_step": "correct that key; docs/reference.md has them all",
                    "exit_code": exit::CONFIGURATION,
                } }));
            }
            return exit::CONFIGURATION.into();
        }
    };
    start_log(&config);
    let json = arguments.json;
    let code = match arguments.verb {
        Verb::CheckConfig { connect } => {
            check_config::run(&config, &arguments.config, connect, json).await
        }
        Verb::Sync { baseline } => sync::run(&config, baseline, json).await,
        Verb::Verify { deep } => verify::run(&config, deep, json).await,
    };
    code.into()
}

/// Our own lines at the configured level; of the libraries only warnings.
fn start_log(config: &Config) {
    debug_assert_eq!(
        config.log_format,
        LogFormat::Text,
        "json is refused until the service is built"
    );
    let started = env_logger::Builder::new()
        .filter_level(log::LevelFilter::Warn.min(config.log_level))
        .filter_module("warm_spare", config.log_level)
        .format_target(false)
        .target(env_logger::Target::Pipe(Box::new(show::AroundBar)))
        .try_init();
    // A second start would be a library's doing; the first one's lines still appear.
    if started.is_err() {
        eprintln!("warning: a logger was started before ours");
    }
}
