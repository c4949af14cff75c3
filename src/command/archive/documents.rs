//! The results as JSON.

use crate::archive::{Judged, Made, Manifest, Pruned, Restored, Verified};
use serde_json::{Value, json};

pub(super) fn made(made: &Made) -> Value {
    json!({
        "format": 1,
        "generation": made.manifest,
        "new_dump": made.new_dump,
        "new_artifacts": made.new_artifacts,
        "new_bytes": made.new_bytes,
        "removed_unfinished_files": made.removed,
    })
}

pub(super) fn manifest(manifest: &Manifest) -> Value {
    json!({ "format": 1, "generation": manifest })
}

pub(super) fn pin(name: &str, reason: Option<&str>) -> Value {
    json!({ "format": 1, "name": name, "pinned": reason.is_some(), "reason": reason })
}

pub(super) fn list(judged: &[Judged]) -> Value {
    json!({ "format": 1, "generations": generations(judged) })
}

fn generations(judged: &[Judged]) -> Vec<Value> {
    judged.iter().map(generation).collect()
}

fn generation(judged: &Judged) -> Value {
    let (listed, manifest) = (&judged.listed, judged.listed.manifest.as_ref());
    let known = |of: fn(&Manifest) -> Value| manifest.map_or(Value::Null, of);
    json!({
        "name": listed.name,
        "time": known(|m| json!(m.time)),
        "made": known(|m| json!(m.finished)),
        "joint": known(|m| json!(m.joint)),
        "packages": known(|m| json!(m.packages)),
        "artifacts": known(|m| json!(m.artifacts)),
        "artifact_bytes": known(|m| json!(m.artifact_bytes)),
        "dump_bytes": known(|m| json!(m.dump.bytes)),
        "absent": known(|m| json!(m.absent.len())),
        "gone_meanwhile": known(|m| json!(m.gone_meanwhile.len())),
        "error": manifest.err().map(ToString::to_string),
        "pinned": listed.pin.as_ref().map(|pin| &pin.reason),
        "kept_for": judged.reasons,
    })
}

pub(super) fn verified(verified: &Verified) -> Value {
    let faults = verified.faults.iter().map(
        |fault| json!({ "path": fault.path, "text": fault.text, "generations": fault.generations }),
    );
    json!({
        "format": 1,
        "ok": verified.ok(),
        "generations": verified.generations,
        "files_read": verified.read,
        "bytes_read": verified.bytes,
        "files_looked_at": verified.looked_at,
        "oldest_proof": verified.oldest_proof,
        "faults": faults.collect::<Vec<_>>(),
    })
}

pub(super) fn restored(restored: &Restored) -> Value {
    let unrestored = restored.unrestored.iter();
    let unrestored = unrestored.map(|one| json!({ "key": one.key, "text": one.text }));
    json!({
        "format": 1,
        "ok": restored.ok(),
        "generation": restored.manifest.name,
        "time": restored.manifest.time,
        "database": restored.database,
        "replaced": restored.replaced,
        "artifacts_put": restored.put,
        "artifacts_proved": restored.proved,
        "unrestored": unrestored.collect::<Vec<_>>(),
        "not_in_generation": restored.not_in_generation().collect::<Vec<_>>(),
        "missing_builder_keys": restored.missing_keys,
    })
}

pub(super) fn pruned(pruned: &Pruned, dry_run: bool) -> Value {
    json!({
        "format": 1,
        "dry_run": dry_run,
        "generations": generations(&pruned.generations),
        "removed_files": pruned.removed_files,
        "removed_bytes": pruned.removed_bytes,
        "waiting_files": pruned.waiting_files,
        "locked_files": pruned.locked_files,
        "locked_generations": pruned.locked_generations,
    })
}
