//! `health`: prints one line. Exit codes for the Supervisor's health hook: 0 ok, 1 warning, 2
//! critical, 3 unknown. The verb has its own time limit, because the Supervisor sets none.

use super::{ask, show};
use crate::observe::Level;
use serde_json::json;
use std::path::Path;
use std::time::Duration;

pub(super) async fn run(config: &Path, limit: Duration, as_json: bool) -> u8 {
    let answer = ask::ask(config, "/health", limit).await;
    let (level, body) = match answer {
        Ok(answer) => {
            // An answer that does not come from a warm-spare service says nothing about health,
            // even if it looks well.
            let level = Level::ALL.into_iter().find(|level| {
                answer.body["level"] == level.code()
                    && answer.body["status"] == level.to_string()
                    && answer.status == level.http_status()
            });
            match level {
                Some(level) => (level.code(), answer.body),
                None => unknown(&format!(
                    "the program on that port answered {}, which is not a health answer of warm-spare",
                    answer.status
                )),
            }
        }
        Err(error) => unknown(&error.to_string()),
    };
    if as_json {
        show::json(&body);
    } else {
        say!("{}", body["line"].as_str().unwrap_or_default());
    }
    level
}

fn unknown(text: &str) -> (u8, serde_json::Value) {
    let level = Level::Unknown;
    let body = json!({
        "format": 1,
        "status": level.to_string(),
        "level": level.code(),
        "line": format!("{level}: {text}"),
        "reasons": [{ "code": "no_service", "text": text }],
    });
    (level.code(), body)
}
