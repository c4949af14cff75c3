//! The results for people.

use super::super::show::count;
use crate::archive::{Judged, Made, Manifest, Pruned, Restored, Verified};
use crate::config::ArchivePlan;
use bytesize::ByteSize;
use chrono::{DateTime, Utc};

/// Maximum number of lines of a list within an output.
const LINES: usize = 20;

fn at(time: DateTime<Utc>) -> String {
    time.format("%Y-%m-%d %H:%M:%S UTC").to_string()
}

pub(super) fn made(plan: &ArchivePlan, made: &Made) {
    let manifest = &made.manifest;
    let dump = match made.new_dump {
        true => format!("dump {}", ByteSize(manifest.dump.bytes)),
        false => "nothing was committed since the one before, whose dump it names".into(),
    };
    say!(
        "Generation {} of archive {}: {dump}.",
        manifest.name,
        plan.name
    );
    say!(
        "{}, {} new ({}); {}.",
        count(manifest.artifacts, "artifact"),
        made.new_artifacts,
        ByteSize(made.new_bytes),
        point(manifest)
    );
    gaps(manifest);
}

/// Says at which point a generation stands, and what that means.
fn point(manifest: &Manifest) -> String {
    let time = at(manifest.time);
    match &manifest.point {
        Some(point) => format!("recovery point {} of {time}", point.lsn),
        None => format!("snapshot of {time}"),
    }
}

fn gaps(manifest: &Manifest) {
    let absent = manifest
        .absent
        .iter()
        .map(|a| format!("{}: {}", a.key, a.reason));
    lines("Missing or damaged on the primary too", absent);
    let gone = manifest.gone_meanwhile.iter();
    lines(
        "Deleted while the generation was made",
        gone.map(|a| format!("{}: {}", a.key, a.reason)),
    );
    if !manifest.builder_keys.is_empty() {
        say!(
            "It needs these builder keys, which it does not have: {}.",
            manifest.builder_keys.join(", ")
        );
    }
}

fn lines(title: &str, items: impl Iterator<Item = String>) {
    let items: Vec<String> = items.collect();
    if items.is_empty() {
        return;
    }
    say!("{title}: {}", items.len());
    for item in items.iter().take(LINES) {
        say!("  {item}");
    }
    if items.len() > LINES {
        say!("  … and {} more (--json names all)", items.len() - LINES);
    }
}

pub(super) fn list(judged: &[Judged]) {
    for one in judged {
        let name = &one.listed.name;
        match &one.listed.manifest {
            Ok(manifest) => {
                let joint = if manifest.joint { "" } else { ", not joint" };
                let gaps = manifest.absent.len() + manifest.gone_meanwhile.len();
                let gaps = match gaps {
                    0 => String::new(),
                    gaps => format!(", {} absent", count(gaps as u64, "artifact")),
                };
                say!(
                    "{name}: {}, {}, {}{joint}{gaps}; {}",
                    point(manifest),
                    count(manifest.packages, "package"),
                    ByteSize(manifest.artifact_bytes + manifest.dump.bytes),
                    kept_for(&one.reasons)
                );
            }
            Err(error) => say!("{name}: NOT READABLE: {error}"),
        }
    }
    say!("{}.", count(judged.len() as u64, "generation"));
}

fn kept_for(reasons: &[String]) -> String {
    match reasons.is_empty() {
        true => "goes at the next prune".into(),
        false => reasons.join(", "),
    }
}

pub(super) fn manifest(manifest: &Manifest) {
    let source = &manifest.source;
    say!("Generation {}", manifest.name);
    say!("Point:     {}", point(manifest));
    say!(
        "Made:      {} to {}, by {}",
        at(manifest.started),
        at(manifest.finished),
        manifest.made_by
    );
    say!(
        "Of:        cluster {} {}({}, epoch {}), PostgreSQL {}, dump by pg_dump {}",
        source.cluster,
        match source.site.as_str() {
            "" => String::new(),
            site => format!("at {site} "),
        },
        source.role,
        source.epoch,
        source.server_version,
        source.pg_dump
    );
    say!(
        "Dump:      {} ({}, SHA-256 {})",
        manifest.dump.path,
        ByteSize(manifest.dump.bytes),
        manifest.dump.sha256
    );
    say!(
        "Artifacts: {} of {}, {}, in {}",
        manifest.artifacts,
        count(manifest.packages, "package"),
        ByteSize(manifest.artifact_bytes),
        count(manifest.lists.len() as u64, "list")
    );
    if !manifest.joint {
        say!(
            "Not joint: packages may have been deleted between the snapshot and the copy of their artifacts."
        );
    }
    gaps(manifest);
}

pub(super) fn verified(verified: &Verified) {
    for fault in verified.faults.iter().take(LINES) {
        say!(
            "{}: {} (needed by {})",
            fault.path,
            fault.text,
            fault.generations.join(", ")
        );
    }
    if verified.faults.len() > LINES {
        say!(
            "… and {} more (--json names all)",
            verified.faults.len() - LINES
        );
    }
    let looked_at = match verified.looked_at {
        0 => String::new(),
        files => format!(", {} looked at", count(files, "file")),
    };
    say!(
        "{}: {} read ({}){looked_at}.",
        count(verified.generations, "generation"),
        count(verified.read, "file"),
        ByteSize(verified.bytes)
    );
    match (verified.faults.len(), verified.oldest_proof) {
        (0, Some(oldest)) => say!("All are right. The oldest proof is of {}.", at(oldest)),
        (0, None) => say!("All that was read is right. Some files were never read."),
        (1, _) => say!("1 file is missing or damaged."),
        (faults, _) => say!("{faults} files are missing or damaged."),
    }
}

pub(super) fn restored(restored: &Restored) {
    let manifest = &restored.manifest;
    say!(
        "Generation {} ({}) is in database {}.",
        manifest.name,
        point(manifest),
        restored.database
    );
    if let Some(replaced) = &restored.replaced {
        say!("The database that was there is kept as {replaced}.");
    }
    if restored.put + restored.proved > 0 {
        say!(
            "{} put into the bucket, {} were there and are right.",
            count(restored.put, "artifact"),
            restored.proved
        );
    }
    lines(
        "NOT restored",
        restored
            .unrestored
            .iter()
            .map(|one| format!("{}: {}", one.key, one.text)),
    );
    lines(
        "Not in the generation",
        restored
            .not_in_generation()
            .map(|one| format!("{}: {}", one.key, one.reason)),
    );
    if !restored.missing_keys.is_empty() {
        say!(
            "Bring these builder keys, without which tokens and secrets cannot be used: {} (docs/builder-keys.md).",
            restored.missing_keys.join(", ")
        );
    }
}

pub(super) fn pruned(pruned: &Pruned, dry_run: bool) {
    let (would_go, went) = if dry_run {
        ("would go", "would stay")
    } else {
        ("removed", "stays")
    };
    for one in &pruned.generations {
        if pruned.locked_generations.contains(&one.listed.name) {
            say!(
                "{}: cannot be removed yet: an object lock keeps it",
                one.listed.name
            );
            continue;
        }
        match one.reasons.is_empty() {
            true => say!("{}: {would_go}", one.listed.name),
            false => say!("{}: {went}: {}", one.listed.name, one.reasons.join(", ")),
        }
    }
    if dry_run {
        return;
    }
    say!(
        "{} removed ({}).",
        count(pruned.removed_files, "file"),
        ByteSize(pruned.removed_bytes)
    );
    if pruned.waiting_files > 0 {
        say!(
            "{} that no generation needs: removed by a prune after the next generation.",
            count(pruned.waiting_files, "file")
        );
    }
    if pruned.locked_files > 0 {
        say!(
            "{} cannot be removed yet: an object lock keeps them, or the key may not delete.",
            count(pruned.locked_files, "file")
        );
    }
}
