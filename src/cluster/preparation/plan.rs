//! Plans the steps of `prepare`, with a reason for each: it is pure, and plans only missing things.

use super::OLDEST_STREAM;
use super::console;
use super::facts::{CopiedTable, Prepared, why_lost};
use super::publication::{PublicationState, listed};
use super::setting::AutoConf;
use super::step::{How, RELOAD, Step};
use crate::cluster::{Replicates, quote_ident};
use crate::domain::ErrorCode;

/// The part of the configuration that it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    pub wal_hold_limit: u64,
    pub wal_unbounded: bool,
}

impl Wanted {
    pub fn of(replication: &crate::config::Replication) -> Self {
        Wanted {
            wal_hold_limit: replication.wal_hold_limit,
            wal_unbounded: replication.wal_unbounded,
        }
    }

    /// Returns `max_slot_wal_keep_size` as we set it. The server's limit is above ours, so that our
    /// own limit drops the slot first, in an orderly way.
    pub fn bound(self) -> String {
        self.bound_above(0)
    }

    /// Returns the same, well above the log that other slots hold already.
    fn bound_above(self, held: u64) -> String {
        let bytes = self.wal_hold_limit.max(held).saturating_mul(2);
        let mib = bytes.div_ceil(1 << 20);
        format!("{}MB", mib.min(i32::MAX as u64))
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    pub steps: Vec<Step>,
    /// Rights of our user that are missing. They are printed for an administrator, and never
    /// carried out.
    pub grants: Vec<Step>,
    /// While there is an obstacle, nothing is done.
    pub obstacles: Vec<Obstacle>,
    /// Further facts that an operator should know, or actions to take.
    pub notes: Vec<String>,
}

impl Plan {
    /// Turns obstacles of this kind into notes: the operator takes the consequences.
    pub fn consent_to(&mut self, check: ErrorCode) {
        let (consented, left) = std::mem::take(&mut self.obstacles)
            .into_iter()
            .partition(|obstacle| obstacle.check == check);
        self.obstacles = left;
        let consented: Vec<Obstacle> = consented;
        let notes = consented.into_iter().map(|obstacle| obstacle.text);
        self.notes.extend(notes);
    }
}

/// A problem that no step of ours can solve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// One word for programs.
    pub check: ErrorCode,
    pub text: String,
    pub next_step: String,
}

impl Obstacle {
    pub(super) fn new(check: ErrorCode, text: String, next_step: &str) -> Self {
        Obstacle {
            check,
            text,
            next_step: next_step.to_string(),
        }
    }
}

/// Plans everything that the stream needs on the primary and that is missing.
pub fn plan_to_prepare(prepared: &Prepared, wanted: Wanted) -> Plan {
    let mut steps = extension(prepared);
    let settings = settings(prepared, wanted);
    let restart = needs_restart(prepared);
    steps.extend(settings);
    let mut plan = Plan {
        obstacles: obstacles(prepared, wanted, &steps),
        steps,
        grants: console::grants(prepared),
        notes: in_the_console(prepared, wanted),
    };
    if restart {
        plan.notes.push(
            "wal_level = logical is in force only after a restart of the primary's datastore: restart it at a convenient time".into(),
        );
    }
    if let Some(slot) = &prepared.slot
        && slot.is_lost()
        && !prepared.names.slot_is_premade
    {
        plan.notes.push(format!(
            "slot {} has lost its WAL ({}): the service makes a new copy, and a new slot with it",
            slot.name,
            why_lost(slot.lost_for.as_deref())
        ));
    }
    for (id, what) in prepared.orphans() {
        plan.notes.push(format!(
            "another warm-spare ({id}) has its own objects there: {}. If it is gone for good: release --cluster {id}",
            what.join(", ")
        ));
    }
    plan
}

/// Returns the settings that are a provider's parameters, with the words of its console.
fn in_the_console(prepared: &Prepared, wanted: Wanted) -> Vec<String> {
    let Some(provider) = prepared.console() else {
        return Vec::new();
    };
    let mut notes = Vec::new();
    let level = &prepared.wal_level;
    if level.value != "logical" && !level.pending_restart {
        notes.push(format!(
            "wal_level is {}, and is a parameter of {}: {}",
            level.value,
            provider.name(),
            console::set_wal_level(provider)
        ));
    }
    if needs_bound(prepared, wanted) {
        notes.push(format!(
            "max_slot_wal_keep_size is unlimited, and is a parameter of {}: {}",
            provider.name(),
            console::set_bound(provider, &wanted.bound_above(held_by_others(prepared)))
        ));
    }
    notes.extend(console::extension(prepared));
    notes
}

/// Plans the part that tables need: identities first, then the publication. Empty when it is exact.
pub fn extension(prepared: &Prepared) -> Vec<Step> {
    let mut steps: Vec<Step> = prepared.unidentified().map(identity).collect();
    steps.extend(publication(prepared));
    steps
}

fn identity(table: &CopiedTable) -> Step {
    // With a key, the setting that hides it is removed. Without a key, the whole row must identify
    // itself.
    let (identity, reason) = if table.keyed {
        (
            "DEFAULT",
            "it has a primary key, and is set not to use it: published like this, its updates would fail",
        )
    } else {
        (
            "FULL",
            "it has no primary key: published without an identity, Builder's updates and deletions of it would fail",
        )
    };
    let sql = format!("ALTER TABLE {} REPLICA IDENTITY {identity}", table.quoted());
    let what = format!("replica identity {identity} of {}", table.full_name());
    Step::new(How::Identity, what, reason, vec![sql]).locks(vec![table.oid])
}

fn publication(prepared: &Prepared) -> Option<Step> {
    if prepared.names.publication_is_premade {
        return None;
    }
    let name = quote_ident(&prepared.names.publication);
    let tables: Vec<String> = prepared.tables.iter().map(only).collect();
    let tables = tables.join(", ");
    let create = format!(
        "CREATE PUBLICATION {name} FOR TABLE {tables} WITH (publish = 'insert, update, delete, truncate')"
    );
    let (reason, sql) = match (prepared.publication_state(), &prepared.publication) {
        (PublicationState::Exact, _) => return None,
        (PublicationState::Absent, _) | (_, None) => (
            "it names the tables whose changes are sent".to_string(),
            vec![create],
        ),
        (PublicationState::Differs(how), Some(there)) => {
            let reason = format!("it is not what the tables need: {}", how.join("; "));
            // A publication FOR ALL TABLES cannot be changed into one with a list.
            let replaced = || vec![format!("DROP PUBLICATION {name}"), create.clone()];
            let sql = if there.all_tables {
                replaced()
            } else {
                let mut sql = vec![format!("ALTER PUBLICATION {name} SET TABLE {tables}")];
                if !there.missing.is_empty() || there.via_root {
                    sql.push(format!(
                        "ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate', publish_via_partition_root = false)"
                    ));
                }
                if there.generated_columns {
                    sql.push(format!(
                        "ALTER PUBLICATION {name} SET (publish_generated_columns = none)"
                    ));
                }
                sql
            };
            (reason, sql)
        }
    };
    let what = format!("publication {}", prepared.names.publication);
    let oids = prepared.tables.iter().map(|table| table.oid).collect();
    Some(Step::new(How::Publication, what, &reason, sql).locks(oids))
}

/// Returns the table as a publication lists it: tables that inherit from it are listed themselves.
pub(super) fn only(table: &CopiedTable) -> String {
    format!("ONLY {}", table.quoted())
}

fn settings(prepared: &Prepared, wanted: Wanted) -> Vec<Step> {
    let mut steps = Vec::new();
    if prepared.console().is_some() {
        return steps;
    }
    if needs_wal_level(prepared) {
        steps.push(Step::new(
            How::Alone,
            "wal_level".into(),
            match prepared.counts_as_builder_datastore() {
                true => {
                    "logical decoding needs it, in postgresql.auto.conf: builder-datastore's upgrade starts the server without \
                     Builder's own file, and with a slot it refuses to start on less"
                }
                false => "logical decoding needs it",
            },
            vec!["ALTER SYSTEM SET wal_level = 'logical'".into()],
        ));
    }
    if needs_bound(prepared, wanted) {
        steps.push(Step::new(
            How::Alone,
            "max_slot_wal_keep_size".into(),
            "nothing else limits the log that the primary keeps for a spare that is gone: twice replication.wal_hold_limit",
            vec![format!(
                "ALTER SYSTEM SET max_slot_wal_keep_size = '{}'",
                wanted.bound_above(held_by_others(prepared))
            )],
        ));
    }
    if !steps.is_empty() || prepared.bound_is_unread() {
        steps.push(reload());
    }
    steps
}

pub(super) fn reload() -> Step {
    Step::new(
        How::Alone,
        "configuration".into(),
        "the server reads it again",
        vec![RELOAD.into()],
    )
}

fn needs_wal_level(prepared: &Prepared) -> bool {
    let level = &prepared.wal_level;
    match &level.in_auto_conf {
        AutoConf::Holds(value) => value != "logical",
        // An administrator who made a slot has also ensured that the server starts with this
        // setting.
        _ if prepared.names.slot_is_premade && level.value == "logical" => false,
        // The value in force was taken back, and the next start has another one.
        _ if level.pending_restart && level.value == "logical" => true,
        _ if !prepared.counts_as_builder_datastore() && level.value == "logical" => false,
        AutoConf::Absent => true,
        AutoConf::Unknown => level.value != "logical",
    }
}

fn needs_bound(prepared: &Prepared, wanted: Wanted) -> bool {
    let written =
        matches!(&prepared.wal_bound.in_auto_conf, AutoConf::Holds(value) if value != "-1");
    prepared.bound_bytes().is_none() && !wanted.wal_unbounded && !written
}

fn held_by_others(prepared: &Prepared) -> u64 {
    let held = prepared.foreign_slots.iter();
    held.filter_map(|slot| slot.held_bytes).max().unwrap_or(0)
}

/// Returns an obstacle if other slots exist, because the limit is the server's and not only our
/// slot's: a standby that is away for longer would have to be copied again.
fn other_slots(prepared: &Prepared, wanted: Wanted) -> Option<Obstacle> {
    let is_ours_to_set = needs_bound(prepared, wanted) && prepared.console().is_none();
    if prepared.foreign_slots.is_empty() || !is_ours_to_set {
        return None;
    }
    let slots: Vec<String> = prepared
        .foreign_slots
        .iter()
        .map(|slot| match slot.logical {
            true => slot.describe(),
            false => format!("physical {}", slot.describe()),
        })
        .collect();
    Some(Obstacle::new(
        ErrorCode::OtherSlots,
        format!(
            "max_slot_wal_keep_size = {} would bound every slot of the primary, so also {}: a reader of such a slot that is away for longer than that much WAL loses it",
            wanted.bound_above(held_by_others(prepared)),
            listed(&slots)
        ),
        "to set it all the same: `warm-spare prepare --bound-other-slots`; or set max_slot_wal_keep_size on the primary to a value that suits all of them, or replication.wal_unbounded = true here",
    ))
}

fn needs_restart(prepared: &Prepared) -> bool {
    let level = &prepared.wal_level;
    let written = matches!(&level.in_auto_conf, AutoConf::Holds(value) if value == "logical");
    let is_set = prepared.console().is_none() && needs_wal_level(prepared);
    level.value != "logical" && (is_set || written || level.pending_restart)
}

fn obstacles(prepared: &Prepared, wanted: Wanted, steps: &[Step]) -> Vec<Obstacle> {
    let mut found = Vec::new();
    if prepared.major < OLDEST_STREAM {
        let text = format!(
            "the primary's PostgreSQL is {}, and the stream needs {OLDEST_STREAM} or newer",
            prepared.major
        );
        found.push(Obstacle::new(
            ErrorCode::Version,
            text,
            "replicate by snapshots, or upgrade the primary's datastore",
        ));
    }
    let unlogged = prepared.tables.iter().filter(|table| table.unlogged);
    let unlogged: Vec<String> = unlogged.map(CopiedTable::full_name).collect();
    if !unlogged.is_empty() {
        found.push(Obstacle::new(
            ErrorCode::Unlogged,
            format!(
                "UNLOGGED, so that no change of it can be streamed: {}",
                listed(&unlogged)
            ),
            "ALTER TABLE … SET LOGGED on the primary, or replicate by snapshots",
        ));
    }
    found.extend(premade_publication(prepared));
    found.extend(slot(prepared));
    found.extend(other_slots(prepared, wanted));
    let missing = missing_rights(prepared, steps);
    if !missing.is_empty() {
        found.push(Obstacle::new(
            ErrorCode::Privilege,
            format!("the peer's user {} {}", prepared.user, missing.join(", and ")),
            "use Builder's own user hab as peer.datastore.user, or let a superuser run what `warm-spare prepare --print` prints",
        ));
    }
    found
}

pub(super) fn premade_publication(prepared: &Prepared) -> Option<Obstacle> {
    if !prepared.names.publication_is_premade {
        return None;
    }
    let name = &prepared.names.publication;
    let text = match prepared.publication_state() {
        PublicationState::Exact => return None,
        PublicationState::Absent => format!(
            "replication.publication names {name}, and database {} has none of that name",
            prepared.database
        ),
        PublicationState::Differs(how) => format!(
            "publication {name}, made for us, is not what the tables need: {}",
            how.join("; ")
        ),
    };
    Some(Obstacle::new(
        ErrorCode::Publication,
        text,
        "let it have all of Builder's tables by name, and all operations; or clear replication.publication, so that prepare makes one",
    ))
}

pub(super) fn slot(prepared: &Prepared) -> Option<Obstacle> {
    let name = &prepared.names.slot;
    let premade = prepared.names.slot_is_premade;
    match &prepared.slot {
        // Our own slot is created again with the next copy; this one is not ours to create.
        Some(slot) if premade && slot.is_lost() => Some(Obstacle::new(
            ErrorCode::Slot,
            format!(
                "slot {name}, made for us, has lost its WAL: {}",
                why_lost(slot.lost_for.as_deref())
            ),
            "drop it on the primary and make it anew (SELECT pg_create_logical_replication_slot(…, 'pgoutput')), or clear replication.slot",
        )),
        Some(slot) => slot.flaw(&prepared.database).map(|flaw| {
            Obstacle::new(
                ErrorCode::Slot,
                format!("slot {name} on the primary cannot be used: {flaw}"),
                "drop it there, or name another one in replication.slot",
            )
        }),
        None if premade => Some(Obstacle::new(
            ErrorCode::Slot,
            format!("replication.slot names {name}, and the primary has none of that name"),
            "create it there (SELECT pg_create_logical_replication_slot(…, 'pgoutput')), or clear replication.slot",
        )),
        // One for the copy, one that stays, and for a moment as many walsenders.
        None if prepared.free_slots < 2 || prepared.free_senders < 2 => Some(Obstacle::new(
            ErrorCode::Slot,
            format!(
                "the primary has {} replication slots and {} walsenders left, and a first copy takes two",
                prepared.free_slots, prepared.free_senders
            ),
            "drop slots that nobody uses, or raise max_replication_slots and max_wal_senders there",
        )),
        None => None,
    }
}

/// Returns missing rights: only those that the steps need, and the right to follow.
fn missing_rights(prepared: &Prepared, steps: &[Step]) -> Vec<String> {
    let rights = &prepared.rights;
    let mut missing = Vec::new();
    match &rights.replicates {
        Replicates::Yes => {}
        Replicates::Denied => missing.push(
            "may not replicate (ALTER ROLE … REPLICATION; on Amazon RDS: GRANT rds_replication TO …)"
                .to_string(),
        ),
        Replicates::Refused(text) => missing.push(format!(
            "was refused a connection of the replication protocol ({text}): a proxy is in between, if the server's own address is another one"
        )),
    }
    let altered = |table: &&CopiedTable| steps.iter().any(|step| step.tables.contains(&table.oid));
    let foreign: Vec<String> = prepared
        .tables
        .iter()
        .filter(|table| !table.owned)
        .filter(altered)
        .map(CopiedTable::full_name)
        .collect();
    if !foreign.is_empty() {
        missing.push(format!("does not own {}", listed(&foreign)));
    }
    let publication = steps.iter().any(|step| step.how == How::Publication);
    match &prepared.publication {
        Some(there) if publication && !there.owned => missing.push(format!(
            "does not own publication {}",
            prepared.names.publication
        )),
        None if publication && !rights.create => {
            missing.push("may not make publications (CREATE on the database)".into());
        }
        _ => {}
    }
    let alters = steps.iter().any(|step| step.how == How::Alone);
    if alters && !(rights.alter_system && rights.reload) {
        missing.push("may not change the server's settings (ALTER SYSTEM, pg_reload_conf)".into());
    }
    missing
}
