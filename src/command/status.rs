//! `status`: asks the running service; none: 3.

use super::{ask, exit, show};
use crate::observe::describe;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(10);

pub async fn run(config: &Path, as_json: bool) -> u8 {
    let answer = match ask::ask(config, "/status", LIMIT).await {
        Ok(answer) => answer,
        Err(error) => {
            let next_step = "is it loaded (`hab svc status`), or does `warm-spare run` run?";
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
