//! `health`: one line, and 0 ok, 1 warning, 2 critical, 3 unknown, as the Supervisor's health hook wants them. It has its
//! own time limit, for the Supervisor has none.

use super::{ask, show};
use crate::observe::Level;
use serde_json::json;
use std::path::Path;
use std::time::Duration;

pub async fn run(config: &Path, limit: Duration, as_json: bool) -> u8 {
    let answer = ask::ask(config, "/health", limit).await;
    let (level, body) = match answer {
        Ok(answer) => {
            // What is no answer of ours is no health, however well it reads.
            let level = Level::ALL.into_iter().find(|level| {
                answer.body["level"] == level.code()
                    && answer.body["status"] == level.to_string()
                    && answer.status == level.http_status()
            });
            match level {
                Some(level) => (level.code(), answer.body),
                None => unknown(&format!(
                    "what listens there answered {} and no health of a warm-spare",
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
