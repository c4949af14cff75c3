//! Plans the steps of `release`. The slot comes first, because with a slot the server cannot start
//! on a lesser `wal_level`.

use super::facts::{CopiedTable, Prepared, Slot};
use super::plan::{Obstacle, Plan, Wanted, only, reload};
use super::publication::{Publication, listed};
use super::setting::{AutoConf, Setting};
use super::step::{How, Step};
use crate::cluster::{Replicates, quote_ident, quote_literal};
use crate::domain::ErrorCode;

/// Plans to remove all of our objects there, and nothing that anybody else needs.
pub fn plan_to_release(prepared: &Prepared, wanted: Wanted) -> Plan {
    let mut plan = Plan::default();
    slots(prepared, &mut plan);
    publication(prepared, &mut plan);
    settings(prepared, wanted, &mut plan);
    let missing = missing_rights(prepared, &plan.steps);
    if !missing.is_empty() {
        plan.obstacles.push(Obstacle::new(
            ErrorCode::Privilege,
            format!("the peer's user {} {}", prepared.user, missing.join(", and ")),
            "use Builder's own user hab as peer.datastore.user, or let a superuser run what `warm-spare release --print` prints",
        ));
    }
    plan
}

fn slots(prepared: &Prepared, plan: &mut Plan) {
    let names = &prepared.names;
    let all = prepared.slot.iter().chain(&prepared.other_slots);
    for slot in all.filter(|slot| slot.name == names.slot || names.made(&slot.name)) {
        if names.slot_is_premade && slot.name == names.slot {
            plan.notes.push(format!(
                "{} was made by an administrator and is left: without us it holds WAL up to the primary's limit",
                slot.describe()
            ));
        } else {
            plan.steps.push(drop_slot(slot));
        }
    }
}

fn drop_slot(slot: &Slot) -> Step {
    let name = quote_literal(&slot.name);
    let of = format!("FROM pg_catalog.pg_replication_slots WHERE slot_name = {name}");
    let sql = vec![
        // This waits for the end, because otherwise the slot would still be in use.
        format!(
            "SELECT pg_catalog.pg_terminate_backend(active_pid, 5000) {of} AND active_pid IS NOT NULL"
        ),
        format!("SELECT pg_catalog.pg_drop_replication_slot(slot_name) {of}"),
    ];
    let reason = "it holds WAL, and with it the server does not start on a lesser wal_level";
    Step::new(How::Slot, slot.describe(), reason, sql)
}

fn publication(prepared: &Prepared, plan: &mut Plan) {
    let name = &prepared.names.publication;
    if prepared.names.publication_is_premade {
        plan.notes.push(format!(
            "publication {name} was made by an administrator and is left, and so are its tables' replica identities"
        ));
        return;
    }
    let Some(there) = &prepared.publication else {
        plan.notes.extend(left_over(prepared));
        return;
    };
    let drop = Step::new(
        How::Publication,
        format!("publication {name}"),
        "nobody follows it any more",
        vec![format!("DROP PUBLICATION {}", quote_ident(name))],
    );
    let (back, kept): (Vec<&CopiedTable>, Vec<&CopiedTable>) = prepared
        .tables
        .iter()
        .filter(|table| table.identity == 'f' && !table.keyed && publishes(there, table))
        .partition(|table| !table.in_other_publication);
    for table in kept {
        plan.notes.push(format!(
            "{} keeps its replica identity: it is in another publication too",
            table.full_name()
        ));
    }
    let listed = !there.all_tables && there.schemas.is_empty();
    let steps = back.iter().map(|table| identity(table, name, listed));
    if listed {
        // The table leaves the publication with its identity: published without an identity, it
        // could not be updated.
        plan.steps.extend(steps);
        plan.steps.push(drop);
    } else {
        plan.steps.push(drop);
        plan.steps.extend(steps);
    }
}

/// Returns a note about leftover identities. Without a publication nothing shows who set an
/// identity: `prepare` may have been stopped before it made the publication.
fn left_over(prepared: &Prepared) -> Option<String> {
    let full =
        |table: &&CopiedTable| table.identity == 'f' && !table.keyed && !table.in_other_publication;
    let tables = prepared.tables.iter().filter(full);
    let names: Vec<String> = tables.map(CopiedTable::full_name).collect();
    (!names.is_empty()).then(|| {
        format!(
            "REPLICA IDENTITY FULL is left on {}, which no publication needs: if nobody else set it, run prepare, then release",
            listed(&names)
        )
    })
}

fn publishes(publication: &Publication, table: &CopiedTable) -> bool {
    let named = |listed: &super::PublishedTable| listed.full_name() == table.full_name();
    publication.all_tables
        || publication.schemas.contains(&table.schema)
        || publication.tables.iter().any(named)
}

fn identity(table: &CopiedTable, publication: &str, listed: bool) -> Step {
    let mut sql = vec![format!(
        "ALTER TABLE {} REPLICA IDENTITY DEFAULT",
        table.quoted()
    )];
    if listed {
        sql.push(format!(
            "ALTER PUBLICATION {} DROP TABLE {}",
            quote_ident(publication),
            only(table)
        ));
    }
    let what = format!("replica identity DEFAULT of {}", table.full_name());
    let reason = "it was FULL for the publication only";
    Step::new(How::Identity, what, reason, sql).locks(vec![table.oid])
}

fn settings(prepared: &Prepared, wanted: Wanted, plan: &mut Plan) {
    if let Some(provider) = prepared.console() {
        plan.notes.push(format!(
            "wal_level and max_slot_wal_keep_size are parameters of {}: set them back in its console, if nobody else needs them",
            provider.name()
        ));
        return;
    }
    let ours = [
        ("wal_level", &prepared.wal_level, "logical".to_string()),
        (
            "max_slot_wal_keep_size",
            &prepared.wal_bound,
            wanted.bound(),
        ),
    ];
    let mut steps = Vec::new();
    for (name, setting, value) in ours {
        match &setting.in_auto_conf {
            AutoConf::Holds(held) if *held == value => steps.push(Step::new(
                How::Alone,
                name.to_string(),
                "it was set for the stream only",
                vec![format!("ALTER SYSTEM RESET {name}")],
            )),
            AutoConf::Holds(held) => plan.notes.push(format!(
                "{name} is left at {held}, which is not what prepare sets by this configuration ({value})"
            )),
            AutoConf::Unknown => plan
                .notes
                .push(format!("{name} is left: it cannot be seen whether prepare set it")),
            AutoConf::Absent => {}
        }
    }
    if steps.is_empty() {
        if prepared.bound_is_unread() {
            plan.steps.push(reload());
        }
        return;
    }
    let needed = needed_by(prepared);
    if needed.is_empty() {
        plan.steps.extend(steps);
        plan.steps.push(reload());
        if in_force(&prepared.wal_level) {
            plan.notes.push(
                "wal_level stays logical until the primary's datastore is restarted, which can wait".into(),
            );
        }
    } else {
        plan.notes.push(format!(
            "wal_level and max_slot_wal_keep_size are left: others need them ({})",
            needed.join(", ")
        ));
    }
}

fn in_force(level: &Setting) -> bool {
    level.value == "logical"
}

/// Returns other logical slots, other clusters' publications, and objects that an administrator
/// made for us.
fn needed_by(prepared: &Prepared) -> Vec<String> {
    let names = &prepared.names;
    let slots = prepared.slot.iter().filter(|_| names.slot_is_premade);
    let others = prepared.other_slots.iter();
    let slots = slots.chain(others.filter(|slot| !names.made(&slot.name)));
    let publications = prepared.other_publications.iter();
    let publications = publications.filter(|name| !names.made(name));
    let slots = slots.map(|slot| format!("slot {}", slot.name));
    slots
        .chain(publications.map(|name| format!("publication {name}")))
        .collect()
}

fn missing_rights(prepared: &Prepared, steps: &[Step]) -> Vec<String> {
    let has = |how| steps.iter().any(|step: &Step| step.how == how);
    let rights = &prepared.rights;
    let mut missing = Vec::new();
    if has(How::Slot) && rights.replicates == Replicates::Denied {
        missing.push("may not drop slots (ALTER ROLE … REPLICATION)".to_string());
    }
    let foreign = |table: &CopiedTable| {
        !table.owned && steps.iter().any(|step| step.tables.contains(&table.oid))
    };
    let publication = prepared.publication.as_ref();
    if has(How::Publication) && publication.is_some_and(|p| !p.owned) {
        missing.push(format!(
            "does not own publication {}",
            prepared.names.publication
        ));
    }
    if prepared.tables.iter().any(foreign) {
        missing.push("does not own Builder's tables".into());
    }
    if has(How::Alone) && !(rights.alter_system && rights.reload) {
        missing.push("may not change the server's settings (ALTER SYSTEM, pg_reload_conf)".into());
    }
    missing
}
