//! `verify`: 0 no difference, 1 differences, 3 the comparison could not run.

use super::sync::{describe, point_document};
use super::{exit, show};
use crate::config::Config;
use crate::verify::{Verification, verify};
use bytesize::ByteSize;
use serde_json::json;

pub(super) async fn run(config: &Config, deep: bool, as_json: bool) -> u8 {
    let progress = show::progress();
    let verification = verify(config, deep, &progress).await;
    drop(progress);
    match verification {
        Ok(found) => {
            if as_json {
                show::json(&document(&found));
            } else {
                print(&found);
            }
            if found.differences.is_empty() {
                exit::DONE
            } else {
                exit::NO
            }
        }
        Err(error) => show::failure(&error, as_json),
    }
}

fn print(found: &Verification) {
    say!("Recovery point: {}", describe(&found.point));
    say!(
        "Tables: {} with {} compared by content.",
        found.tables,
        show::count(found.rows, "row")
    );
    if found.deep {
        say!(
            "Artifacts: {} ({}) read and compared by checksum; {} good, {} by keys that the database does not hold.",
            found.artifacts,
            ByteSize(found.artifact_bytes),
            show::count(found.signatures_good, "signature"),
            found.signatures_unknown
        );
    } else {
        say!(
            "Artifacts: {} compared by presence and length (--deep reads them).",
            found.artifacts
        );
    }
    for (key, reason) in &found.unavailable {
        say!("Known to be {reason} on the primary: {key}");
    }
    say!(
        "Primary: {}",
        match found.newer {
            Some(true) => "has newer changes; `warm-spare sync` copies them",
            Some(false) => "has committed nothing since",
            None => "did not answer whether it has newer changes",
        }
    );
    for difference in &found.differences {
        say!(
            "DIFFERENT {} {}: {}",
            difference.kind,
            difference.name,
            difference.text
        );
    }
    say!(
        "{}.",
        match found.differences.len() {
            0 => "No differences".to_string(),
            number => show::count(number as u64, "difference"),
        }
    );
}

fn document(found: &Verification) -> serde_json::Value {
    json!({
        "format": 1,
        "recovery_point": point_document(&found.point),
        "deep": found.deep,
        "tables": found.tables,
        "rows": found.rows,
        "artifacts": found.artifacts,
        "artifact_bytes": found.deep.then_some(found.artifact_bytes),
        "signatures": found.deep.then(|| json!({
            "good": found.signatures_good,
            "key_unknown": found.signatures_unknown,
        })),
        "unavailable": found.unavailable.iter()
            .map(|(key, reason)| json!({ "key": key, "reason": reason.to_string() })).collect::<Vec<_>>(),
        "newer": found.newer,
        "differences": found.differences,
    })
}
