//! `status`: prints the state that the running service reports; 3 if no service answers.

use super::{ask, exit, show};
use crate::observe::describe;
use std::path::Path;
use std::time::Duration;

/// Time limit for the answer of the service.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) async fn run(config: &Path, as_json: bool) -> u8 {
    let answer = match ask::ask(config, "/status", REPLY_TIMEOUT).await {
        Ok(answer) => answer,
        Err(error) => {
            let next_step =
                "check that the service is loaded (`hab svc status`) or that `warm-spare run` runs";
            eprintln!("error: {error}\nnext step: {next_step}");
            if as_json {
                show::json(&serde_json::json!({ "format": 1, "error": {
                    "code": "no_service",
                    "text": error.to_string(),
                    "next_step": next_step,
                    "exit_code": exit::UNFINISHED,
                } }));
            }
            return exit::UNFINISHED;
        }
    };
    if as_json {
        show::json(&answer.body);
    } else {
        for line in describe(&answer.body) {
            say!("{line}");
        }
    }
    exit::DONE
}
