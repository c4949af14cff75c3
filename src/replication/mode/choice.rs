//! Chooses how the spare follows: by the stream, or by a full copy whenever something has changed.
//! It gives the reason, and the way to change it.

use crate::cluster::preparation::{
    AutoConf, CopiedTable, How, OLDEST_STREAM, Prepared, PublicationState, Setting, Wanted,
    extension, plan_to_prepare, set_bound, set_wal_level,
};
use crate::cluster::{MayApply, Provider, Replicates, quote_ident};
use crate::config::Mode;
use crate::domain::ErrorCode;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    Stream,
    Snapshot(Because),
    /// The stream is demanded, and not possible at present.
    NotPrepared(Because),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Because {
    pub reason: String,
    /// The action that would change it.
    pub change: String,
}

fn because(reason: impl Into<String>, change: impl Into<String>) -> Because {
    Because {
        reason: reason.into(),
        change: change.into(),
    }
}

const PREPARE: &str = "run `warm-spare prepare`";

/// Chooses the mode. `may_apply`: our user on the spare may set `session_replication_role`.
pub fn choose(mode: Mode, prepared: &Prepared, wanted: Wanted, may_apply: MayApply) -> Choice {
    let unmet = unmet(prepared, wanted, may_apply);
    match (mode, unmet) {
        (Mode::Snapshot, _) => Choice::Snapshot(because(
            "replication.mode is snapshot",
            "set replication.mode = \"auto\"",
        )),
        (_, None) => Choice::Stream,
        (Mode::Auto, Some(unmet)) => Choice::Snapshot(unmet),
        (Mode::Stream, Some(unmet)) => Choice::NotPrepared(unmet),
    }
}

/// Returns the first reason against the stream. Reasons that take the longest to remove come first.
fn unmet(prepared: &Prepared, wanted: Wanted, may_apply: MayApply) -> Option<Because> {
    if prepared.major < OLDEST_STREAM {
        return Some(because(
            format!(
                "the primary's PostgreSQL is {}, and the stream needs {OLDEST_STREAM} or newer",
                prepared.major
            ),
            "upgrade the primary's datastore",
        ));
    }
    if let MayApply::No(provider) = may_apply {
        return Some(may_not_apply(provider));
    }
    wal_level(prepared)
        .or_else(|| bound(prepared, wanted))
        .or_else(|| replication_right(prepared))
        .or_else(|| obstacle(prepared, wanted))
        .or_else(|| tables(prepared))
}

fn may_not_apply(provider: Option<Provider>) -> Because {
    because(
        "our user on the spare may not set session_replication_role, and triggers and cascades would change rows on their own",
        match provider {
            Some(Provider::Amazon) => {
                "GRANT rds_superuser TO local.datastore.user on the spare, whose provider gives this right to that role alone"
            }
            Some(Provider::Google) => {
                "let the spare have another server: Google Cloud SQL gives this right to nobody"
            }
            Some(Provider::Azure) | None => {
                "use Builder's own user hab as local.datastore.user, or grant it (PostgreSQL 15: GRANT SET ON PARAMETER session_replication_role)"
            }
        },
    )
}

fn wal_level(prepared: &Prepared) -> Option<Because> {
    let level = &prepared.wal_level;
    if level.value != "logical" {
        let written = matches!(&level.in_auto_conf, AutoConf::Holds(value) if value == "logical");
        return Some(if written && level.source == "command line" {
            because(
                format!("wal_level is {} by the primary's command line", level.value),
                "start the primary's datastore without that option",
            )
        } else if written || level.pending_restart {
            because(
                "wal_level = logical is set on the primary, and is in force only after a restart",
                "restart the primary's datastore",
            )
        } else {
            because(
                format!("wal_level is {} on the primary, not logical", level.value),
                match prepared.console() {
                    Some(provider) => set_wal_level(provider).to_string(),
                    None => format!("{PREPARE}, then restart the primary's datastore"),
                },
            )
        });
    }
    if prepared.names.slot_is_premade {
        return None;
    }
    match &level.in_auto_conf {
        AutoConf::Holds(value) if value == "logical" => None,
        // With a slot, a server that starts with another value refuses to start.
        AutoConf::Holds(_) => Some(next_start(level)),
        _ if level.pending_restart => Some(next_start(level)),
        // Every start of such a server reads all its files, and has the same command line.
        _ if !prepared.counts_as_builder_datastore() => None,
        AutoConf::Unknown => Some(because(
            format!(
                "the primary's user {} cannot see whether every start of the server has wal_level = logical",
                prepared.user
            ),
            format!(
                "GRANT pg_read_all_settings TO {} on the primary",
                prepared.user
            ),
        )),
        _ => Some(because(
            format!(
                "wal_level = logical comes from the primary's {}, and an upgrade of builder-datastore starts the server without it: with a slot it would refuse to start",
                level.file.as_deref().unwrap_or(&level.source)
            ),
            format!("{PREPARE}, which sets it in postgresql.auto.conf"),
        )),
    }
}

fn next_start(level: &Setting) -> Because {
    let next = match &level.in_auto_conf {
        AutoConf::Holds(value) => format!("postgresql.auto.conf has {value}"),
        _ => "its configuration was changed".into(),
    };
    because(
        format!(
            "wal_level is logical on the primary only until its next start ({next}): with a slot it would refuse to start"
        ),
        format!("undo that change on the primary, or {PREPARE}, which sets logical"),
    )
}

fn bound(prepared: &Prepared, wanted: Wanted) -> Option<Because> {
    if prepared.bound_bytes().is_some() || wanted.wal_unbounded {
        return None;
    }
    Some(because(
        "max_slot_wal_keep_size is unlimited on the primary: WAL held for a spare that is gone would fill its disk",
        match prepared.console() {
            Some(provider) => set_bound(provider, &wanted.bound()),
            None => format!("{PREPARE}, or accept it with replication.wal_unbounded = true"),
        },
    ))
}

fn replication_right(prepared: &Prepared) -> Option<Because> {
    let user = quote_ident(&prepared.user);
    match &prepared.rights.replicates {
        Replicates::Yes => None,
        Replicates::Denied => Some(because(
            format!("the peer's user {} may not replicate", prepared.user),
            match prepared.provider {
                Some(Provider::Amazon) => format!("GRANT rds_replication TO {user} on the primary"),
                _ => format!("ALTER ROLE {user} REPLICATION on the primary"),
            },
        )),
        Replicates::Refused(text) => Some(because(
            format!("the peer refuses a connection of the replication protocol: {text}"),
            "name the PostgreSQL server itself in peer.datastore, and no proxy or pooler before it",
        )),
    }
}

/// Returns an obstacle that no preparation removes: existing objects that do not fit, unlogged
/// tables, no free slot.
fn obstacle(prepared: &Prepared, wanted: Wanted) -> Option<Because> {
    let plan = plan_to_prepare(prepared, wanted);
    let mut found = plan.obstacles.into_iter();
    let first = found.find(|obstacle| obstacle.check != ErrorCode::Privilege)?;
    Some(because(first.text, first.next_step))
}

fn tables(prepared: &Prepared) -> Option<Because> {
    let name = &prepared.names.publication;
    if prepared.publication_state() == PublicationState::Absent {
        return Some(because(
            format!("the primary has no publication {name}"),
            PREPARE,
        ));
    }
    if is_extendable(prepared) {
        return None;
    }
    let unidentified: Vec<String> = prepared
        .unidentified()
        .map(CopiedTable::full_name)
        .collect();
    Some(match prepared.publication_state() {
        PublicationState::Differs(how) => because(
            format!(
                "publication {name} is not what the tables need: {}",
                how.join("; ")
            ),
            PREPARE,
        ),
        _ => because(
            format!("no replica identity: {}", unidentified.join(", ")),
            PREPARE,
        ),
    })
}

/// Returns whether the publication differs only by new or removed tables, and our user may add or
/// drop them: by [`extension`], before a slot is made.
pub fn is_extendable(prepared: &Prepared) -> bool {
    let steps = extension(prepared);
    if steps.is_empty() {
        return true;
    }
    let publication = prepared.publication.as_ref();
    let may_change = !prepared.names.publication_is_premade
        && publication.is_some_and(|there| there.owned && !there.all_tables);
    let only_tables = steps
        .iter()
        .all(|step| matches!(step.how, How::Identity | How::Publication));
    may_change && only_tables && prepared.tables.iter().all(|table| table.owned)
}

#[cfg(test)]
mod tests;
