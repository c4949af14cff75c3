//! The health of the archives. A fault of an archive warns: it does not keep the spare from a
//! takeover.

use super::{Findings, Level};
use crate::domain::{ErrorCode, HealthCode};
use crate::observe::state::{ArchiveFacts, ServiceState};
use chrono::{DateTime, TimeDelta, Utc};

/// Time without a verification after which health warns. By default there is one each day.
const VERIFIED_WITHIN: TimeDelta = TimeDelta::days(3);
/// Age of the oldest proof above which health warns. The daily verification reads each file once in
/// 30 days.
const PROVED_WITHIN: TimeDelta = TimeDelta::days(60);

pub(super) fn of_the_archives(state: &ServiceState, now: DateTime<Utc>, found: &mut Findings) {
    for archive in &state.archives {
        of_the_trouble(archive, found);
        if let Some(late) = archive.late_after().filter(|late| *late < now) {
            let newest = match &archive.newest {
                Some(newest) => format!("its newest generation was made at {}", at(newest.made)),
                None => "it has no generation".into(),
            };
            let text = format!(
                "archive {}: {newest}; by its schedule there should be a newer one since {}",
                archive.name,
                at(late)
            );
            found.add(Level::Warning, HealthCode::ArchiveLate, text);
        }
        of_the_proof(archive, now, found);
    }
}

fn of_the_trouble(archive: &ArchiveFacts, found: &mut Findings) {
    let Some(trouble) = &archive.trouble else {
        return;
    };
    let code = match trouble.code {
        ErrorCode::ArchiveForeign => HealthCode::ArchiveForeign,
        ErrorCode::ArchiveDamaged => HealthCode::ArchiveDamaged,
        ErrorCode::ArchiveUnreachable | ErrorCode::DiskFull => HealthCode::ArchiveUnreachable,
        _ => HealthCode::ArchiveFailed,
    };
    let text = format!("{} (since {})", trouble.text, at(trouble.since));
    found.add(Level::Warning, code, text);
}

fn of_the_proof(archive: &ArchiveFacts, now: DateTime<Utc>, found: &mut Findings) {
    let (name, proof) = (&archive.name, &archive.proof);
    if proof.faults > 0 {
        let example = proof.example.as_deref().unwrap_or_default();
        let text = format!(
            "archive {name}: files that are missing or damaged: {}, for example {example}",
            proof.faults
        );
        found.add(Level::Warning, HealthCode::ArchiveDamaged, text);
    }
    let verified = proof.verified.unwrap_or(archive.since);
    if now - verified > VERIFIED_WITHIN {
        let text = match proof.verified {
            Some(time) => format!("archive {name}: the last verification was at {}", at(time)),
            None => format!("archive {name}: it was never verified"),
        };
        found.add(Level::Warning, HealthCode::ArchiveUnproven, text);
    } else if let Some(oldest) = proof.oldest.filter(|oldest| now - *oldest > PROVED_WITHIN) {
        let text = format!("archive {name}: a file was not read since {}", at(oldest));
        found.add(Level::Warning, HealthCode::ArchiveUnproven, text);
    }
}

fn at(time: DateTime<Utc>) -> String {
    time.format("%Y-%m-%d %H:%M:%S UTC").to_string()
}
