use super::samples::{WANTED, managed, publication, ready, setting, slot, stock, table};
use super::*;
use crate::cluster::{Provider, Replicates};

fn sql(plan: &Plan) -> Vec<&str> {
    let steps = plan.steps.iter();
    steps
        .flat_map(|step| step.sql.iter().map(String::as_str))
        .collect()
}

fn texts(plan: &Plan) -> Vec<&str> {
    plan.obstacles.iter().map(|o| o.text.as_str()).collect()
}

#[test]
fn a_stock_primary_gets_identities_before_the_publication_and_then_settings() {
    let plan = plan_to_prepare(&stock(), WANTED);
    assert_eq!(
        sql(&plan),
        [
            r#"ALTER TABLE "public"."audit_package" REPLICA IDENTITY FULL"#,
            r#"CREATE PUBLICATION "warm_spare_0123abcd" FOR TABLE ONLY "public"."accounts", ONLY "public"."audit_package" WITH (publish = 'insert, update, delete, truncate')"#,
            "ALTER SYSTEM SET wal_level = 'logical'",
            "ALTER SYSTEM SET max_slot_wal_keep_size = '7630MB'",
            "SELECT pg_reload_conf()",
        ]
    );
    assert!(plan.obstacles.is_empty());
    assert!(plan.notes[0].contains("restart"), "{:?}", plan.notes);
    assert_eq!(
        plan.steps[0].script(),
        "-- replica identity FULL of public.audit_package: it has no primary key: published without an identity, \
         Builder's updates and deletions of it would fail\n\
         BEGIN;\nSET LOCAL lock_timeout = '200ms';\n\
         ALTER TABLE \"public\".\"audit_package\" REPLICA IDENTITY FULL;\nCOMMIT;\n"
    );
}

#[test]
fn what_is_there_is_not_made_again() {
    assert_eq!(plan_to_prepare(&ready(), WANTED), Plan::default());
    let mut waiting = ready();
    waiting.wal_level.value = "replica".into();
    let plan = plan_to_prepare(&waiting, WANTED);
    assert!(plan.steps.is_empty() && plan.notes.len() == 1, "{plan:?}");

    let mut bounded = stock();
    bounded.wal_bound.value = "100".into();
    assert!(
        !sql(&plan_to_prepare(&bounded, WANTED))
            .concat()
            .contains("max_slot")
    );
    let accepted = Wanted {
        wal_unbounded: true,
        ..WANTED
    };
    assert!(
        !sql(&plan_to_prepare(&stock(), accepted))
            .concat()
            .contains("max_slot")
    );
}

#[test]
fn a_file_that_the_server_was_not_told_to_read_is_read() {
    let mut stopped = ready();
    stopped.wal_bound.value = "-1".into();
    stopped.wal_bound.source = "default".into();
    assert_eq!(
        sql(&plan_to_prepare(&stopped, WANTED)),
        ["SELECT pg_reload_conf()"]
    );
    stopped.wal_bound.source = "command line".into();
    assert!(plan_to_prepare(&stopped, WANTED).steps.is_empty());
    let mut stopped = stock();
    stopped.wal_bound.value = "7630".into();
    stopped.wal_bound.file = Some("/data/postgresql.auto.conf".into());
    assert_eq!(
        sql(&plan_to_release(&stopped, WANTED)),
        ["SELECT pg_reload_conf()"]
    );
}

#[test]
fn tables_that_came_or_went_are_put_into_the_publication() {
    let mut changed = ready();
    changed.tables.remove(0);
    changed.tables.push(table("added", false, 'n'));
    changed.tables.push(table("hidden", true, 'n'));
    assert_eq!(
        sql(&plan_to_prepare(&changed, WANTED)),
        [
            r#"ALTER TABLE "public"."added" REPLICA IDENTITY FULL"#,
            r#"ALTER TABLE "public"."hidden" REPLICA IDENTITY DEFAULT"#,
            r#"ALTER PUBLICATION "warm_spare_0123abcd" SET TABLE ONLY "public"."audit_package", ONLY "public"."added", ONLY "public"."hidden""#,
        ]
    );
}

#[test]
fn every_way_in_which_a_publication_may_differ_is_named() {
    let wanted = ready().tables;
    let good = publication(&wanted);
    assert_eq!(good.differences(&wanted), Vec::<String>::new());
    let altered = |alter: &dyn Fn(&mut Publication)| {
        let mut publication = good.clone();
        alter(&mut publication);
        publication.differences(&wanted).join("; ")
    };
    for (said, alter) in [
        (
            "FOR ALL TABLES",
            &(|p: &mut Publication| p.all_tables = true) as &dyn Fn(&mut Publication),
        ),
        ("whole schemas (public)", &|p| {
            p.schemas = vec!["public".into()]
        }),
        ("it does not have public.audit_package", &|p| {
            drop(p.tables.pop())
        }),
        ("it has public.extra, which is not copied", &|p| {
            let extra = publication(&[table("extra", true, 'd')]);
            p.tables.extend(extra.tables);
        }),
        ("a row filter on public.accounts", &|p| {
            p.tables[0].row_filter = true
        }),
        ("a column list on public.accounts", &|p| {
            p.tables[0].column_list = true;
        }),
        ("it leaves out delete, truncate", &|p| {
            p.missing = vec!["delete", "truncate"];
        }),
        ("by way of their root", &|p| p.via_root = true),
        ("generated columns", &|p| p.generated_columns = true),
    ] {
        let found = altered(alter);
        assert!(found.contains(said), "{said}: {found}");
    }
}

#[test]
fn rights_are_asked_for_only_where_a_step_needs_them() {
    let mut powerless = ready();
    powerless.rights = Rights {
        replicates: Replicates::Yes,
        ..Rights::default()
    };
    powerless.tables[0].owned = false;
    assert_eq!(plan_to_prepare(&powerless, WANTED).obstacles, []);
    let mut powerless = stock();
    powerless.rights = Rights::default();
    powerless.tables[1].owned = false;
    let plan = plan_to_prepare(&powerless, WANTED);
    let [said] = texts(&plan)[..] else {
        panic!("{plan:?}");
    };
    for what in [
        "REPLICATION",
        "own public.audit_package",
        "CREATE on",
        "ALTER SYSTEM",
    ] {
        assert!(said.contains(what), "{what}: {said}");
    }
}

#[test]
fn release_takes_the_slot_first_and_the_settings_last() {
    let mut followed = ready();
    followed.slot = Some(slot("warm_spare_0123abcd"));
    let plan = plan_to_release(&followed, WANTED);
    let sql = sql(&plan);
    assert!(sql[0].contains("pg_terminate_backend") && sql[1].contains("pg_drop_replication_slot"));
    assert_eq!(
        sql[2..],
        [
            r#"ALTER TABLE "public"."audit_package" REPLICA IDENTITY DEFAULT"#,
            r#"ALTER PUBLICATION "warm_spare_0123abcd" DROP TABLE ONLY "public"."audit_package""#,
            r#"DROP PUBLICATION "warm_spare_0123abcd""#,
            "ALTER SYSTEM RESET wal_level",
            "ALTER SYSTEM RESET max_slot_wal_keep_size",
            "SELECT pg_reload_conf()",
        ]
    );
    assert_eq!(plan_to_release(&stock(), WANTED), Plan::default());
    let mut begun = stock();
    begun.tables[1].identity = 'f';
    let plan = plan_to_release(&begun, WANTED);
    assert!(plan.steps.is_empty() && plan.notes[0].contains("left on public.audit_package"));
}

#[test]
fn release_leaves_what_others_need() {
    let mut shared = ready();
    shared.tables[1].in_other_publication = true;
    shared.other_slots = vec![slot("of_a_report"), slot("warm_spare_0123abcd_2")];
    shared.wal_bound.in_auto_conf = AutoConf::Holds("5GB".into());
    let plan = plan_to_release(&shared, WANTED);
    let said = plan.notes.join("\n");
    assert!(said.contains("public.audit_package keeps"), "{said}");
    assert!(said.contains("left at 5GB"), "{said}");
    assert!(
        said.contains("others need them (slot of_a_report)"),
        "{said}"
    );
    let sql = sql(&plan).concat();
    assert!(!sql.contains("IDENTITY") && !sql.contains("RESET"), "{sql}");
    assert!(sql.contains("'warm_spare_0123abcd_2'"), "{sql}");

    let mut premade = ready();
    premade.names.publication_is_premade = true;
    premade.names.slot_is_premade = true;
    premade.slot = Some(slot("warm_spare_0123abcd"));
    let plan = plan_to_release(&premade, WANTED);
    assert!(plan.steps.is_empty(), "{plan:?}");
    assert_eq!(plan.notes.len(), 3, "{:?}", plan.notes);
}

#[test]
fn a_table_leaves_a_publication_of_everything_after_it() {
    let mut all = ready();
    all.publication = Some(Publication {
        all_tables: true,
        ..publication(&[])
    });
    let plan = plan_to_release(&all, WANTED);
    let sql = sql(&plan);
    assert!(sql[0].starts_with("DROP PUBLICATION"), "{sql:?}");
    assert!(sql[1].ends_with("REPLICA IDENTITY DEFAULT"), "{sql:?}");
    let plan = plan_to_prepare(&all, WANTED);
    assert!(plan.steps[0].sql[0].starts_with("DROP PUBLICATION"));
    assert!(plan.steps[0].sql[1].starts_with("CREATE PUBLICATION"));
}

/// Our own slot is created again with the next copy. A slot that was made for us would be copied
/// for again and again.
#[test]
fn a_slot_that_lost_its_log_is_an_obstacle_only_if_it_is_not_ours_to_make() {
    let mut lost = ready();
    let mut there = slot("warm_spare_0123abcd");
    there.wal_status = Some("lost".into());
    lost.slot = Some(there);
    let plan = plan_to_prepare(&lost, WANTED);
    assert!(plan.obstacles.is_empty(), "{plan:?}");
    assert!(plan.notes[0].contains("makes a new copy"), "{plan:?}");

    lost.names.slot_is_premade = true;
    let plan = plan_to_prepare(&lost, WANTED);
    assert!(
        texts(&plan)[0].contains("made for us, has lost its WAL"),
        "{plan:?}"
    );
    assert!(plan.notes.is_empty(), "{plan:?}");
}

#[test]
fn names_tell_their_cluster() {
    assert_eq!(id_of("warm_spare_0123abcd"), Some("0123abcd"));
    assert_eq!(id_of("warm_spare_0123abcd_copy"), Some("0123abcd"));
    for other in [
        "warm_spare_",
        "warm_spare_0123abc",
        "warm_spare_0123abcde",
        "warm_spare_0123ABCD",
        "other",
    ] {
        assert_eq!(id_of(other), None, "{other}");
    }
    let mut crowded = stock();
    crowded.other_slots = vec![slot("warm_spare_ffffffff"), slot("of_a_report")];
    crowded.other_publications = vec!["warm_spare_ffffffff".into()];
    let orphans = crowded.orphans();
    assert_eq!(orphans["ffffffff"].len(), 2, "{orphans:?}");
    assert_eq!(orphans.len(), 1);
}

#[test]
fn where_a_setting_stands_is_not_guessed_beyond_what_is_seen() {
    let seen = |value: &str, source: &str, file: Option<&str>, pending| {
        let mut setting = setting(value, source, AutoConf::Unknown);
        setting.file = file.map(String::from);
        setting.pending_restart = pending;
        setting.guess()
    };
    let auto = Some("/data/postgresql.auto.conf");
    let held = AutoConf::Holds("logical".into());
    assert_eq!(seen("logical", "configuration file", auto, false), held);
    let other = Some("/data/postgresql.conf");
    assert_eq!(
        seen("replica", "configuration file", other, false),
        AutoConf::Absent
    );
    assert_eq!(
        seen("replica", "configuration file", other, true),
        AutoConf::Unknown
    );
    assert_eq!(seen("replica", "default", None, false), AutoConf::Absent);
    assert_eq!(
        seen("logical", "configuration file", None, false),
        AutoConf::Unknown
    );
}

fn printed(plan: &Plan) -> Vec<&str> {
    let grants = plan.grants.iter();
    grants
        .flat_map(|step| step.sql.iter().map(String::as_str))
        .collect()
}

/// The settings are the console's, and the rest is made as on any other server.
#[test]
fn a_providers_settings_are_named_in_the_words_of_its_console() {
    for (provider, level, bound) in [
        (
            Provider::Amazon,
            "rds.logical_replication = 1",
            "max_slot_wal_keep_size = 7630 (MB)",
        ),
        (
            Provider::Google,
            "cloudsql.logical_decoding = on",
            "Cloud SQL has no such flag: accept it with replication.wal_unbounded = true",
        ),
        (
            Provider::Azure,
            "server parameter wal_level = logical",
            "max_slot_wal_keep_size = 7630 (MB)",
        ),
    ] {
        let plan = plan_to_prepare(&managed(provider), WANTED);
        assert_eq!(sql(&plan), [""; 0], "{plan:?}");
        assert_eq!(texts(&plan), [""; 0], "{plan:?}");
        let [first, second] = &plan.notes[..] else {
            panic!("{plan:?}");
        };
        assert!(first.contains(level), "{first}");
        assert!(second.contains(bound), "{second}");
    }
    let mut begun = managed(Provider::Amazon);
    begun.publication = None;
    begun.foreign_slots = vec![slot("of_a_report")];
    let plan = plan_to_prepare(&begun, WANTED);
    assert_eq!(texts(&plan), [""; 0], "the bound is not ours to set");
    assert!(sql(&plan)[0].starts_with("CREATE PUBLICATION"), "{plan:?}");

    let mut set = managed(Provider::Azure);
    set.wal_level = setting("logical", "configuration file", AutoConf::Unknown);
    set.wal_bound.value = "2048".into();
    set.config_file = None;
    assert_eq!(plan_to_prepare(&set, WANTED), Plan::default());
    set.allowed_extensions = Some(vec!["pgcrypto".into()]);
    let notes = plan_to_prepare(&set, WANTED).notes;
    assert!(
        notes[0].contains("azure.extensions does not list intarray"),
        "{notes:?}"
    );
    set.allowed_extensions = Some(vec!["intarray".into()]);
    assert_eq!(plan_to_prepare(&set, WANTED), Plan::default());
    let notes = plan_to_release(&set, WANTED).notes;
    assert!(notes[0].contains("parameters of Azure"), "{notes:?}");
}

#[test]
fn a_limited_role_is_told_its_grants_and_gets_none_by_us() {
    assert!(plan_to_prepare(&ready(), WANTED).grants.is_empty());
    let mut limited = managed(Provider::Amazon);
    limited.rights.replicates = Replicates::Denied;
    limited.rights.monitor = false;
    limited.rights.signal = false;
    let plan = plan_to_prepare(&limited, WANTED);
    assert_eq!(
        printed(&plan),
        [
            r#"GRANT rds_replication TO "hab""#,
            r#"GRANT pg_monitor TO "hab""#,
            r#"GRANT pg_signal_backend TO "hab""#,
        ]
    );
    assert!(sql(&plan).is_empty(), "{plan:?}");
    assert!(texts(&plan)[0].contains("rds_replication"), "{plan:?}");
    limited.provider = Some(Provider::Google);
    let plan = plan_to_prepare(&limited, WANTED);
    assert_eq!(printed(&plan)[0], r#"ALTER ROLE "hab" REPLICATION"#);
    // A proxy is no matter of a grant.
    limited.rights.replicates = Replicates::Refused("not supported".into());
    let plan = plan_to_prepare(&limited, WANTED);
    assert_eq!(printed(&plan)[0], r#"GRANT pg_monitor TO "hab""#);
    assert!(
        texts(&plan)[0].contains("a proxy is in between"),
        "{plan:?}"
    );
}

#[test]
fn only_a_builder_datastore_must_have_the_level_in_its_auto_conf() {
    let mut server = ready();
    server.wal_level = setting("logical", "configuration file", AutoConf::Absent);
    let needs = |server: &Prepared| {
        let plan = plan_to_prepare(server, WANTED);
        sql(&plan).concat().contains("wal_level")
    };
    assert!(needs(&server));
    server.config_file = Some("/etc/postgresql/15/main/postgresql.conf".into());
    assert!(!needs(&server));
    server.wal_level.source = "command line".into();
    assert!(!needs(&server));
    // `release` has taken it back, and the server was not started since.
    server.wal_level.pending_restart = true;
    assert!(needs(&server));
    server.wal_level.pending_restart = false;
    // A server whose file we may not see counts as a builder-datastore, unless a fact speaks against it.
    server.config_file = None;
    assert!(server.counts_as_builder_datastore() && needs(&server));
    server.provider = Some(Provider::Amazon);
    assert!(!server.counts_as_builder_datastore() && !needs(&server));
    server.provider = None;
    server.names.slot_is_premade = true;
    assert!(!server.counts_as_builder_datastore());
    // The file that is seen counts more than a setting that anybody may set.
    server.provider = Some(Provider::Amazon);
    server.config_file = Some("/hab/svc/builder-datastore/config/postgresql.conf".into());
    assert!(server.counts_as_builder_datastore());
}
