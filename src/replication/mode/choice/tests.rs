use crate::cluster::preparation::samples::{
    WANTED, managed, publication, ready, setting, slot, stock, table,
};
use crate::replication::mode::choice::*;

/// Reason and remedy in `auto`; in `stream` they must be the same.
fn refused(prepared: &Prepared, wanted: Wanted, may_apply: MayApply) -> (String, String) {
    let auto = choose(Mode::Auto, prepared, wanted, may_apply);
    let stream = choose(Mode::Stream, prepared, wanted, may_apply);
    match (auto, stream) {
        (Choice::Snapshot(one), Choice::NotPrepared(other)) if one == other => {
            (one.reason, one.change)
        }
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn assert_refused(prepared: &Prepared, reason: &str, change: &str) {
    let (said, remedy) = refused(prepared, WANTED, MayApply::Yes);
    assert!(said.contains(reason), "{said}");
    assert!(remedy.contains(change), "{remedy}");
}

fn is_streamed(prepared: &Prepared, wanted: Wanted) -> bool {
    [Mode::Auto, Mode::Stream]
        .iter()
        .all(|mode| choose(*mode, prepared, wanted, MayApply::Yes) == Choice::Stream)
}

#[test]
fn a_prepared_primary_is_streamed_unless_snapshots_are_demanded() {
    assert!(is_streamed(&ready(), WANTED));
    let Choice::Snapshot(because) = choose(Mode::Snapshot, &ready(), WANTED, MayApply::Yes) else {
        panic!("it is demanded");
    };
    assert_eq!(because.reason, "replication.mode is snapshot");
    let mut with_slot = ready();
    with_slot.slot = Some(slot("warm_spare_0123abcd"));
    (with_slot.free_slots, with_slot.free_senders) = (0, 0);
    assert!(is_streamed(&with_slot, WANTED));
}

#[test]
fn each_missing_condition_has_its_reason_and_its_remedy() {
    assert_refused(&stock(), "wal_level is replica", "prepare`, then restart");

    let mut old = ready();
    old.major = 13;
    assert_refused(&old, "PostgreSQL is 13", "upgrade");
    let (reason, change) = refused(&ready(), WANTED, MayApply::No(None));
    assert!(reason.contains("session_replication_role") && change.contains("hab"));

    let mut waiting = ready();
    waiting.wal_level.value = "replica".into();
    assert_refused(&waiting, "only after a restart", "restart the primary's");
    waiting.wal_level.source = "command line".into();
    assert_refused(&waiting, "command line", "without that option");

    let mut from_elsewhere = ready();
    from_elsewhere.wal_level = setting("logical", "configuration file", AutoConf::Absent);
    from_elsewhere.wal_level.file = Some("/hab/svc/x/postgresql.conf".into());
    assert_refused(&from_elsewhere, "/hab/svc/x/postgresql.conf", "prepare");
    let mut of_a_provider = from_elsewhere.clone();
    of_a_provider.config_file = Some("/rdsdbdata/config/postgresql.conf".into());
    of_a_provider.wal_level.file = of_a_provider.config_file.clone();
    assert!(is_streamed(&of_a_provider, WANTED));
    of_a_provider.wal_level.source = "command line".into();
    assert!(is_streamed(&of_a_provider, WANTED));
    let mut changed = of_a_provider.clone();
    changed.wal_level.in_auto_conf = AutoConf::Holds("replica".into());
    assert_refused(&changed, "only until its next start", "prepare");
    changed.wal_level.in_auto_conf = AutoConf::Absent;
    changed.wal_level.pending_restart = true;
    assert_refused(&changed, "only until its next start", "undo that change");
    from_elsewhere.wal_level.file = None;
    from_elsewhere.config_file = None;
    from_elsewhere.wal_level.in_auto_conf = AutoConf::Unknown;
    assert_refused(
        &from_elsewhere,
        "cannot see whether every start",
        "pg_read_all_settings TO hab",
    );

    let mut endless = ready();
    endless.wal_bound = setting("-1", "default", AutoConf::Absent);
    assert_refused(&endless, "unlimited", "replication.wal_unbounded = true");
    let accepted = Wanted {
        wal_unbounded: true,
        ..WANTED
    };
    assert!(is_streamed(&endless, accepted));

    let mut powerless = ready();
    powerless.rights.replicates = Replicates::Denied;
    assert_refused(
        &powerless,
        "may not replicate",
        "ALTER ROLE \"hab\" REPLICATION",
    );

    let mut crowded = ready();
    crowded.free_slots = 1;
    assert_refused(&crowded, "1 replication slots", "max_replication_slots");

    let mut foreign = ready();
    let mut physical = slot("warm_spare_0123abcd");
    physical.logical = false;
    foreign.slot = Some(physical);
    assert_refused(&foreign, "physical", "drop it");

    let mut unlogged = ready();
    unlogged.tables[0].unlogged = true;
    assert_refused(&unlogged, "UNLOGGED", "SET LOGGED");
}

#[test]
fn our_publication_may_miss_tables_if_we_may_add_them() {
    let mut absent = ready();
    absent.publication = None;
    assert_refused(&absent, "no publication warm_spare_0123abcd", "prepare");

    let mut newer = ready();
    newer.tables.push(table("added", false, 'd'));
    assert!(is_streamed(&newer, WANTED), "we add it ourselves");
    newer.tables[2].owned = false;
    assert_refused(&newer, "it does not have public.added", "prepare");

    let mut all = ready();
    let everything = publication(&[]);
    all.publication = Some(crate::cluster::preparation::Publication {
        all_tables: true,
        ..everything
    });
    assert_refused(&all, "FOR ALL TABLES", "prepare");
}

#[test]
fn what_an_administrator_made_must_fit_and_is_not_changed() {
    let mut made = ready();
    made.names.publication = "by_the_dba".into();
    made.names.publication_is_premade = true;
    assert!(is_streamed(&made, WANTED));
    made.tables.push(table("added", true, 'd'));
    assert_refused(&made, "by_the_dba", "clear replication.publication");
    made.publication = None;
    assert_refused(
        &made,
        "has none of that name",
        "clear replication.publication",
    );

    let mut made = ready();
    made.names.slot = "by_the_dba".into();
    made.names.slot_is_premade = true;
    assert_refused(
        &made,
        "the primary has none of that name",
        "pg_create_logical",
    );
    made.slot = Some(slot("by_the_dba"));
    // Then wal_level may come from anywhere.
    made.wal_level = setting("logical", "command line", AutoConf::Unknown);
    assert!(is_streamed(&made, WANTED));
}

/// The same conditions hold for a provider's server; the remedies are its console's.
#[test]
fn a_providers_server_has_the_remedies_of_its_console() {
    let mut there = managed(Provider::Amazon);
    assert_refused(
        &there,
        "wal_level is replica",
        "rds.logical_replication = 1",
    );
    there.wal_level.pending_restart = true;
    assert_refused(&there, "only after a restart", "restart");
    there.wal_level = setting("logical", "configuration file", AutoConf::Unknown);
    assert_refused(&there, "unlimited", "in the primary's parameter group");
    there.wal_bound.value = "2048".into();
    assert!(is_streamed(&there, WANTED));
    // It need not be seen where the level comes from.
    there.config_file = None;
    assert!(is_streamed(&there, WANTED));
    there.provider = None;
    assert_refused(&there, "cannot see whether", "pg_read_all_settings");

    let mut google = managed(Provider::Google);
    google.wal_level.value = "logical".into();
    assert_refused(&google, "unlimited", "replication.wal_unbounded = true");
    let accepted = Wanted {
        wal_unbounded: true,
        ..WANTED
    };
    assert!(is_streamed(&google, accepted));
}

#[test]
fn a_right_to_replicate_that_is_refused_is_told_with_the_providers_grant() {
    let mut denied = ready();
    denied.provider = Some(Provider::Amazon);
    denied.rights.replicates = Replicates::Denied;
    assert_refused(
        &denied,
        "may not replicate",
        "GRANT rds_replication TO \"hab\"",
    );
    denied.rights.replicates = Replicates::Refused("feature not supported".into());
    assert_refused(&denied, "feature not supported", "no proxy or pooler");
}

#[test]
fn a_spare_that_may_not_apply_says_whether_it_ever_may() {
    let told = |provider| refused(&ready(), WANTED, MayApply::No(provider)).1;
    assert!(told(None).contains("GRANT SET ON PARAMETER"));
    assert!(told(Some(Provider::Amazon)).contains("GRANT rds_superuser"));
    assert!(told(Some(Provider::Google)).contains("to nobody"));
}
