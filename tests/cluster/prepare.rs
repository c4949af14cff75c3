//! What is made on the primary is named, harms nobody while it is made, and goes again without a trace.

use std::process::Stdio;
use std::time::{Duration, Instant};
use support::{Factory, Output, Postgres, Result, Running, Site, site};
use tokio_postgres::Client;
use warm_spare::cluster::preparation::{
    Names, PreparationError, Wanted, inspect, plan_to_prepare, plan_to_release,
};
use warm_spare::cluster::{LocalCluster, PeerCluster};
use warm_spare::config;

/// Everything that `prepare` may touch, as it stands: what `release` must give back.
async fn standing(site: &Site) -> Result<String> {
    let client = site.primary.conn().await?;
    let sql = "SELECT coalesce(string_agg(line, E'\\n' ORDER BY line), '') FROM ( \
                 SELECT 'identity ' || c.oid::regclass || ' ' || c.relreplident::text FROM pg_class c \
                   WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace \
                 UNION ALL SELECT 'publication ' || pubname FROM pg_publication \
                 UNION ALL SELECT 'slot ' || slot_name FROM pg_replication_slots \
                 UNION ALL SELECT 'setting ' || name || ' ' || setting FROM pg_settings WHERE name = 'max_slot_wal_keep_size' \
               ) l (line)";
    let text: String = client.query_one(sql, &[]).await?.get(0);
    let auto = site.primary.pg.data_dir().join("postgresql.auto.conf");
    Ok(format!("{text}\n{}", std::fs::read_to_string(auto)?))
}

async fn restart(site: &Site) -> Result<()> {
    site.primary.pg.stop_fast().await?;
    site.primary.pg.start_again().await
}

async fn show(site: &Site, setting: &str) -> Result<String> {
    let client = site.primary.conn().await?;
    let row = client.query_one(&format!("SHOW {setting}"), &[]).await?;
    Ok(row.get(0))
}

/// What Builder's API does to tables without a key; it must work at any time.
const BUILDERS: &str = "
    UPDATE origin_members SET member_role = 'owner' WHERE origin = 'core';
    INSERT INTO audit_package (operation, trigger, requester_id, requester_name, origin, channel, package_ident)
        VALUES ('promote', 'hab_client', 1, 'me', 'core', 'stable', 'core/a/1/2');
    INSERT INTO origin_members (origin, account_id) SELECT 'core', id FROM accounts
        WHERE id NOT IN (SELECT account_id FROM origin_members WHERE origin = 'core') LIMIT 1;
    DELETE FROM origin_members WHERE origin = 'core' AND member_role <> 'owner';";

async fn filled(name: &str) -> Result<Site> {
    filled_on(name, Postgres::builder()).await
}

async fn filled_on(name: &str, primary: support::postgres::Builder) -> Result<Site> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let site = Site::builder(name).primary(primary).start().await?;
    Factory::seeded().fill(&site.primary, 3).await?;
    Ok(site)
}

fn refused(output: &Output, code: i32, words: &[&str]) {
    assert_eq!(output.code, Some(code), "{output}");
    for word in words {
        assert!(output.stderr.contains(word), "no {word:?}: {output}");
    }
    assert!(output.stderr.contains("next step: "), "{output}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_primary_is_prepared_once_and_released_without_a_trace() -> Result<()> {
    let site = filled("whole").await?;
    let before = standing(&site).await?;
    let builder = site.primary.conn().await?;
    builder.batch_execute(BUILDERS).await?;

    let made = site.warm_spare(&["prepare"]).await.ok().stdout;
    for line in [
        "Made: replica identity FULL of public.audit_package.",
        "Made: replica identity FULL of public.audit_package_group.",
        "Made: replica identity FULL of public.origin_members.",
        "Made: publication warm_spare_",
        "Made: wal_level.",
        "Made: max_slot_wal_keep_size.",
        "Note: wal_level = logical is in force only after a restart",
        "Stream: not yet. wal_level = logical is set on the primary, and is in force only after a restart",
    ] {
        assert!(made.contains(line), "{line}:\n{made}");
    }
    builder.batch_execute(BUILDERS).await?;
    assert_eq!(show(&site, "wal_level").await?, "replica");
    assert_eq!(show(&site, "max_slot_wal_keep_size").await?, "7630MB");

    let after = standing(&site).await?;
    let again = site.warm_spare(&["prepare"]).await.ok().stdout;
    assert!(again.starts_with("Nothing to do"), "{again}");
    assert_eq!(standing(&site).await?, after, "a second time makes nothing");

    restart(&site).await?;
    assert_eq!(show(&site, "wal_level").await?, "logical");
    let builder = site.primary.conn().await?;
    builder.batch_execute(BUILDERS).await?;
    let document = site.warm_spare(&["prepare", "--json"]).await.ok().json();
    assert_eq!(document["steps"], serde_json::json!([]), "{document}");
    assert_eq!(document["notes"], serde_json::json!([]), "{document}");
    assert_eq!(document["stream"]["possible"], true, "{document}");
    assert!(
        document["ours"][0]
            .as_str()
            .is_some_and(|ours| ours.starts_with("publication warm_spare_")),
        "{document}"
    );

    let gone = site.warm_spare(&["release"]).await.ok().stdout;
    assert!(gone.contains("Removed: wal_level."), "{gone}");
    assert!(
        gone.contains("until the primary's datastore is restarted"),
        "{gone}"
    );
    assert_eq!(standing(&site).await?, before);
    builder.batch_execute(BUILDERS).await?;
    let again = site.warm_spare(&["release"]).await.ok().stdout;
    assert!(again.starts_with("Nothing to do"), "{again}");
    restart(&site).await?;
    assert_eq!(show(&site, "wal_level").await?, "replica");
    assert_eq!(standing(&site).await?, before);
    Ok(())
}

/// Whatever step was the last before a kill: Builder can write, and the next run ends what was begun.
#[tokio::test(flavor = "multi_thread")]
async fn stopped_after_any_step_it_goes_on_from_there() -> Result<()> {
    let site = filled("steps").await?;
    let before = standing(&site).await?;
    let config = config::load(&site.write_config(""))?;
    let state = LocalCluster::of(&config).state().await?;
    let names = Names::of(&state.cluster().await?.id, &config.replication);
    let wanted = Wanted::of(&config.replication);
    let writing = PeerCluster::of(&config).preparation().await?;
    let builder = site.primary.conn().await?;
    let patience = Duration::from_secs(30);
    let to_make = plan_to_prepare(&writing.inspect(&names).await?, wanted).steps;
    site.warm_spare(&["prepare"]).await.ok();
    let made = standing(&site).await?;
    let to_remove = plan_to_release(&writing.inspect(&names).await?, wanted).steps;
    assert_eq!((to_make.len(), to_remove.len()), (7, 7));
    for number in 0..7 {
        // Everything is made: some of it goes, then the rest.
        writing
            .carry_out(&to_remove[..number], patience, |_| {})
            .await?;
        builder.batch_execute(BUILDERS).await?;
        site.warm_spare(&["release"]).await.ok();
        assert_eq!(standing(&site).await?, before, "after {number} of release");
        writing
            .carry_out(&to_make[..number], patience, |_| {})
            .await?;
        builder.batch_execute(BUILDERS).await?;
        site.warm_spare(&["prepare"]).await.ok();
        assert_eq!(standing(&site).await?, made, "after {number} of prepare");
    }
    // And what was begun is taken back.
    site.warm_spare(&["release"]).await.ok();
    let identities = &to_make[..3];
    writing.carry_out(identities, patience, |_| {}).await?;
    builder.batch_execute(BUILDERS).await?;
    Ok(())
}

/// Feeds a script to psql, as an administrator would.
async fn psql(site: &Site, script: &str) -> Result<()> {
    let file = site.dir.path().join("script.sql");
    std::fs::write(&file, script)?;
    let output = tokio::process::Command::new(site.primary.pg.program("psql"))
        .args(["-X", "-q", "-d", &site.primary.pg.url("builder")])
        .stdin(std::fs::File::open(file)?)
        .output()
        .await?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && !said.contains("ERROR"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_printed_does_the_same_and_printing_does_nothing() -> Result<()> {
    let site = filled("printed").await?;
    let before = standing(&site).await?;
    let script = site.warm_spare(&["prepare", "--print"]).await.ok().stdout;
    assert_eq!(standing(&site).await?, before);
    psql(&site, &script).await?;
    let by_hand = standing(&site).await?;
    let again = site.warm_spare(&["prepare"]).await.ok().stdout;
    assert!(again.starts_with("Nothing to do"), "{again}");
    let script = site.warm_spare(&["prepare", "--print"]).await.ok().stdout;
    assert!(script.contains("-- nothing to do"), "{script}");

    let script = site.warm_spare(&["release", "--print"]).await.ok().stdout;
    assert_eq!(standing(&site).await?, by_hand);
    psql(&site, &script).await?;
    assert_eq!(standing(&site).await?, before);
    site.warm_spare(&["prepare"]).await.ok();
    assert_eq!(standing(&site).await?, by_hand, "by hand and by us alike");
    Ok(())
}

/// The longest of many statements of others on a table, until told to stop.
async fn longest_wait(
    client: Client,
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
) -> Duration {
    let mut longest = Duration::ZERO;
    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
        let started = Instant::now();
        client
            .batch_execute("SELECT count(*) FROM audit_package")
            .await
            .expect("others may read");
        client
            .batch_execute(BUILDERS)
            .await
            .expect("Builder may write");
        longest = longest.max(started.elapsed());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    longest
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_reader_holds_nobody_up_behind_us() -> Result<()> {
    let site = filled("reader").await?;
    let reader = site.primary.conn().await?;
    reader
        .batch_execute("BEGIN; SELECT count(*) FROM audit_package")
        .await?;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let others = tokio::spawn(longest_wait(site.primary.conn().await?, stop.clone()));

    // The reader does not go: its table is named, nothing is published, and the others are ready.
    let config = config::load(&site.write_config(""))?;
    let names = Names::of_cluster("0123abcd");
    let writing = PeerCluster::of(&config).preparation().await?;
    let wanted = Wanted::of(&config.replication);
    let plan = plan_to_prepare(&writing.inspect(&names).await?, wanted);
    let patience = Duration::from_secs(3);
    let error = writing.carry_out(&plan.steps, patience, |_| {}).await;
    let Err(PreparationError::Busy { what, holders, .. }) = error else {
        panic!("it was held: {error:?}");
    };
    assert_eq!(what, "replica identity FULL of public.audit_package");
    assert!(
        holders.contains("warm-spare-tests, idle in transaction"),
        "{holders}"
    );
    let left = plan_to_prepare(&writing.inspect(&names).await?, wanted);
    let first: Vec<&str> = left.steps.iter().map(|step| step.what.as_str()).collect();
    assert_eq!(
        first[..2],
        [
            "replica identity FULL of public.audit_package",
            "publication warm_spare_0123abcd"
        ]
    );

    // It goes after a while.
    let mut running = site.spawn(&["prepare"]);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(running.stderr().is_empty(), "{:?}", running.stderr());
    reader.batch_execute("COMMIT").await?;
    running.forget();
    running.wait(Duration::from_secs(30)).await?.ok();
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let longest = others.await?;
    println!("the longest wait of another session: {longest:?}");
    assert!(longest < Duration::from_secs(1), "{longest:?}");
    Ok(())
}

/// Somebody who follows a slot, as the service does.
fn follow(site: &Site, slot: &str, publication: &str) -> Running {
    let mut command = support::process::bound(site.primary.pg.program("pg_recvlogical"));
    command
        .args(["-d", &site.primary.pg.url("builder"), "--start", "-f", "-"])
        .args(["--slot", slot, "-o", "proto_version=1", "-o"])
        .arg(format!("publication_names={publication}"))
        .stdin(Stdio::null());
    Running::start(command).expect("pg_recvlogical starts")
}

async fn until_active(client: &Client, slot: &str) {
    support::wait_until("a follower", Duration::from_secs(20), async || {
        let sql = "SELECT active FROM pg_replication_slots WHERE slot_name = $1";
        match client.query_one(sql, &[&slot]).await?.get(0) {
            true => Ok(()),
            false => Err("nobody follows".into()),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_in_use_goes_before_the_settings_and_an_orphans_by_its_id() -> Result<()> {
    let site = filled("slots").await?;
    let before = standing(&site).await?;
    site.warm_spare(&["prepare"]).await.ok();
    restart(&site).await?;
    let config = config::load(&site.config_file())?;
    let state = LocalCluster::of(&config).existing_state().await?;
    let id = state.expect("it was made").cluster().await?.id;
    let ours = format!("warm_spare_{id}");
    let client = site.primary.conn().await?;
    client
        .batch_execute(&format!(
            "SELECT pg_create_logical_replication_slot('{ours}', 'pgoutput'); \
             SELECT pg_create_logical_replication_slot('warm_spare_ffffffff', 'pgoutput'); \
             CREATE PUBLICATION warm_spare_ffffffff FOR TABLE accounts, origin_members"
        ))
        .await?;
    let _following = follow(&site, &ours, &ours);
    until_active(&client, &ours).await;

    let noted = site.warm_spare(&["prepare"]).await.ok().stdout;
    assert!(noted.contains("release --cluster ffffffff"), "{noted}");
    // The orphan needs the settings and one of the identities: they stay.
    let gone = site.warm_spare(&["release"]).await.ok().stdout;
    for line in [
        format!("Removed: slot {ours}, which holds"),
        format!("Removed: publication {ours}."),
        "Note: public.origin_members keeps its replica identity".into(),
        "others need them (slot warm_spare_ffffffff, publication warm_spare_ffffffff)".into(),
    ] {
        assert!(gone.contains(&line), "{line}:\n{gone}");
    }
    assert_eq!(show(&site, "max_slot_wal_keep_size").await?, "7630MB");
    client.batch_execute(BUILDERS).await?;

    let refusal = site.warm_spare(&["release", "--cluster", "nonsense"]).await;
    assert_eq!(refusal.code, Some(2), "{refusal}");
    site.warm_spare(&["release", "--cluster", "ffffffff"])
        .await
        .ok();
    assert_eq!(standing(&site).await?, before);
    let again = site.warm_spare(&["release", "--cluster", "ffffffff"]).await;
    assert!(again.ok().stdout.starts_with("Nothing to do"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_made_by_an_administrator_must_fit() -> Result<()> {
    let site = filled_on("premade", Postgres::builder().logical()).await?;
    let client = site.primary.conn().await?;
    let sql = "SELECT string_agg(format('ONLY %I', tablename), ', ') FROM pg_tables WHERE schemaname = 'public'";
    let all: String = client.query_one(sql, &[]).await?.get(0);
    let without = all
        .replace("ONLY job_graph, ", "")
        .replace(", ONLY job_graph", "");
    assert_ne!(all, without);
    site.write_config("replication.publication = \"made\"");
    refused(
        &site.warm_spare(&["prepare"]).await,
        3,
        &["publication: replication.publication names made, and database builder has none"],
    );
    for (made, words) in [
        (
            format!("FOR TABLE {without}"),
            "it does not have public.job_graph",
        ),
        ("FOR ALL TABLES".into(), "it is FOR ALL TABLES"),
        (
            "FOR TABLES IN SCHEMA public".into(),
            "whole schemas (public)",
        ),
        (
            format!("FOR TABLE {without}, job_graph WHERE (id > 5)"),
            "a row filter on public.job_graph",
        ),
        (
            format!("FOR TABLE {without}, job_graph (id, group_id)"),
            "a column list on public.job_graph",
        ),
        (
            format!("FOR TABLE {all} WITH (publish = 'insert, update')"),
            "it leaves out delete, truncate",
        ),
        (
            format!("FOR TABLE {all} WITH (publish_via_partition_root = true)"),
            "by way of their root",
        ),
    ] {
        client
            .batch_execute(&format!("CREATE PUBLICATION made {made}"))
            .await?;
        let before = standing(&site).await?;
        let output = site.warm_spare(&["prepare"]).await;
        refused(
            &output,
            3,
            &["publication: publication made, made for us,", words],
        );
        assert_eq!(standing(&site).await?, before, "{made}");
        client.batch_execute("DROP PUBLICATION made").await?;
    }
    client
        .batch_execute(&format!("CREATE PUBLICATION made FOR TABLE {all}"))
        .await?;
    client
        .batch_execute("SELECT pg_create_logical_replication_slot('cut', 'pgoutput')")
        .await?;
    site.write_config("[replication]\npublication = \"made\"\nslot = \"cut\"");
    let document = site.warm_spare(&["prepare", "--json"]).await.ok().json();
    assert_eq!(document["stream"]["possible"], true, "{document}");
    assert_eq!(
        document["steps"].as_array().map(Vec::len),
        Some(3),
        "identities: {document}"
    );
    let output = site.warm_spare(&["release"]).await.ok().stdout;
    assert!(output.contains("Nothing to do"), "{output}");
    assert!(
        output.contains("slot cut") && output.contains("publication made was made by"),
        "{output}"
    );
    client.batch_execute(BUILDERS).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_come_and_go_are_followed_and_the_list_is_the_copys() -> Result<()> {
    let site = filled("tables").await?;
    let client = site.primary.conn().await?;
    site.warm_spare(&["prepare"]).await.ok();
    client
        .batch_execute(
            "CREATE SCHEMA \"Other one\"; CREATE TABLE \"Other one\".\"it's\" (a int); CREATE TABLE keyed (a int PRIMARY KEY); \
             CREATE TABLE heir () INHERITS (audit_package); CREATE SCHEMA warm_spare; CREATE TABLE warm_spare.x (a int); \
             CREATE TEMPORARY TABLE passing (a int); DROP TABLE job_graph CASCADE",
        )
        .await?;
    let made = site.warm_spare(&["prepare"]).await.ok().stdout;
    for what in [
        "FULL of Other one.it's",
        "FULL of public.heir",
        "publication warm_spare_",
    ] {
        assert!(made.contains(what), "{what}:\n{made}");
    }
    assert!(!made.contains("wal_level."), "{made}");
    let again = site.warm_spare(&["prepare"]).await.ok().stdout;
    assert!(again.starts_with("Nothing to do"), "{again}");
    let config = config::load(&site.config_file())?;
    let peer = PeerCluster::of(&config).builder().await?;
    let prepared = inspect(&peer, &Names::of_cluster("0123abcd")).await?;
    let mut copied: Vec<String> = peer.tables().await?.iter().map(|t| t.full_name()).collect();
    copied.sort();
    let mut seen: Vec<String> = prepared.tables.iter().map(|t| t.full_name()).collect();
    seen.sort();
    assert_eq!(seen, copied);

    client
        .batch_execute("CREATE UNLOGGED TABLE unlogged (a int PRIMARY KEY)")
        .await?;
    let before = standing(&site).await?;
    refused(
        &site.warm_spare(&["prepare"]).await,
        3,
        &["unlogged: UNLOGGED", "public.unlogged"],
    );
    assert_eq!(standing(&site).await?, before);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_done_where_it_may_not_be() -> Result<()> {
    let site = filled("refusals").await?;
    let before = standing(&site).await?;
    site.write_config("role = \"keep\"");
    refused(&site.warm_spare(&["prepare"]).await, 4, &["role_unset"]);
    refused(&site.warm_spare(&["release"]).await, 3, &["no_cluster_id"]);
    let (port, password) = (site.primary.pg.port(), site.primary.pg.password());
    site.write_config(&format!(
        "local.datastore.port = {port}\nlocal.datastore.password = \"{password}\""
    ));
    for verb in [
        &["prepare"][..],
        &["prepare", "--print"],
        &["release", "--cluster", "0123abcd"],
    ] {
        refused(&site.warm_spare(verb).await, 4, &["same_server"]);
    }
    // A user that may read, and nothing more: it is told what lacks, and what an administrator can run.
    let client = site.primary.conn().await?;
    client
        .batch_execute(
            "CREATE ROLE looker LOGIN PASSWORD 'looks'; GRANT SELECT ON ALL TABLES IN SCHEMA public TO looker; \
             ALTER ROLE looker REPLICATION",
        )
        .await?;
    site.write_config("peer.datastore.user = \"looker\"\npeer.datastore.password = \"looks\"");
    refused(
        &site.warm_spare(&["prepare"]).await,
        3,
        &[
            "privilege: the peer's user looker does not own",
            "CREATE on the database",
            "ALTER SYSTEM",
            "prepare --print",
        ],
    );
    assert_eq!(standing(&site).await?, before);
    let script = site.warm_spare(&["prepare", "--print"]).await.ok().stdout;
    assert!(
        script.contains("-- IN THE WAY: the peer's user looker"),
        "{script}"
    );
    assert!(
        script.contains("GRANT pg_monitor TO \"looker\";"),
        "{script}"
    );
    psql(&site, &script).await?;
    restart(&site).await?;
    // It cannot see where wal_level comes from until it may.
    let client = site.primary.conn().await?;
    client
        .batch_execute("REVOKE pg_monitor FROM looker")
        .await?;
    let document = site.warm_spare(&["prepare", "--json"]).await.ok().json();
    let reason = document["stream"]["change"].as_str().unwrap_or_default();
    assert!(
        reason.contains("GRANT pg_read_all_settings TO looker"),
        "{document}"
    );
    let client = site.primary.conn().await?;
    client
        .batch_execute("GRANT pg_read_all_settings TO looker")
        .await?;
    let document = site.warm_spare(&["prepare", "--json"]).await.ok().json();
    assert_eq!(document["stream"]["possible"], true, "{document}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn local_traces_go_and_what_is_builders_stays() -> Result<()> {
    let site = site("traces").await;
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 3).await?;
    site.warm_spare(&["sync"]).await.ok();
    factory.fill(&site.primary, 1).await?;
    site.warm_spare(&["sync"]).await.ok();
    site.spare.put(".warm-spare/retired/x", "old bytes").await?;
    let config = config::load(&site.config_file())?;
    let state = LocalCluster::of(&config).existing_state().await?;
    let state = state.expect("it was copied");
    let kept = state.generations().await?[0].name.clone();
    let artifacts = site.spare.keys().await?.len() - 1;

    // Another one works, or waits for its turn.
    state.lock(config.replication.direction).await?;
    refused(
        &site.warm_spare(&["release", "--local"]).await,
        4,
        &["another warm-spare is at work"],
    );
    drop(state);
    let waiting = LocalCluster::of(&config).existing_state().await?;
    refused(
        &site.warm_spare(&["release", "--local"]).await,
        4,
        &["standby_waits"],
    );
    drop(waiting);

    let printed = site
        .warm_spare(&["release", "--local", "--print"])
        .await
        .ok()
        .stdout;
    for line in [
        "DROP DATABASE IF EXISTS \"warm_spare\";",
        "DROP SCHEMA IF EXISTS warm_spare CASCADE;",
        "-- and 1 objects: mc rm",
        &format!("-- stays: database '{kept}'"),
    ] {
        assert!(printed.contains(line), "{line}:\n{printed}");
    }
    assert!(site.spare.pg.has_database("warm_spare").await?);

    support::wait_until(
        "the sessions to be gone",
        Duration::from_secs(10),
        async || {
            let admin = site.spare.pg.conn("postgres").await?;
            let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'warm_spare'";
            match admin.query_one(sql, &[]).await?.get::<_, i64>(0) {
                0 => Ok(()),
                _ => Err("still there".into()),
            }
        },
    )
    .await;
    let output = site.warm_spare(&["release", "--local"]).await.ok().stdout;
    for line in [
        "Removed: database warm_spare.",
        "Removed: schema warm_spare in database builder.",
        "Removed: 1 object under .warm-spare/",
        &format!("Kept: database {kept}"),
        "ALTER DATABASE \"builder\" RESET default_transaction_read_only;",
    ] {
        assert!(output.contains(line), "{line}:\n{output}");
    }
    assert!(!site.spare.pg.has_database("warm_spare").await?);
    assert!(site.spare.pg.has_database(&kept).await?);
    let keys = site.spare.keys().await?;
    assert!(
        keys.len() == artifacts && !keys.iter().any(|key| key.starts_with('.')),
        "{keys:?}"
    );
    let plain = site.spare.conn().await?;
    let sql = "SELECT count(*) FROM origin_packages WHERE to_regnamespace('warm_spare') IS NULL";
    assert_eq!(plain.query_one(sql, &[]).await?.get::<_, i64>(0), 4);
    assert!(
        plain.batch_execute("CREATE TABLE t ()").await.is_err(),
        "the fence stays"
    );
    let again = site.warm_spare(&["release", "--local"]).await.ok().stdout;
    assert!(again.starts_with("Nothing to do"), "{again}");
    assert!(!site.spare.pg.has_database("warm_spare").await?);
    Ok(())
}

/// The bound is the server's: a standby of the primary's own comes under it, and nobody sets it unasked.
#[tokio::test(flavor = "multi_thread")]
async fn slots_of_others_are_bounded_only_when_that_is_asked_for() -> Result<()> {
    let site = filled("other_slots").await?;
    let client = site.primary.conn().await?;
    let sql = "SELECT pg_create_physical_replication_slot('standby1', true)";
    client.query_one(sql, &[]).await?;
    let before = standing(&site).await?;
    let output = site.warm_spare(&["prepare"]).await;
    refused(
        &output,
        3,
        &[
            "other_slots",
            "physical slot standby1",
            "--bound-other-slots",
        ],
    );
    assert_eq!(standing(&site).await?, before, "nothing was made");
    let printed = site.warm_spare(&["prepare", "--print"]).await.ok().stdout;
    assert!(
        printed.contains("-- IN THE WAY: max_slot_wal_keep_size"),
        "{printed}"
    );
    let asked = ["prepare", "--bound-other-slots"];
    let made = site.warm_spare(&asked).await.ok().stdout;
    assert!(made.contains("Made: max_slot_wal_keep_size."), "{made}");
    assert_eq!(show(&site, "max_slot_wal_keep_size").await?, "7630MB");
    // One that is there already bounds them by somebody else's will.
    let again = site.warm_spare(&["prepare"]).await.ok().stdout;
    assert!(again.starts_with("Nothing to do"), "{again}");
    Ok(())
}

/// What is kept here and nowhere else is not removed without its being said.
#[tokio::test(flavor = "multi_thread")]
async fn the_state_of_a_promoted_cluster_is_not_removed_unasked() -> Result<()> {
    let site = filled("needed").await?;
    site.warm_spare(&["sync"]).await.ok();
    let state = site.spare.pg.conn("warm_spare").await?;
    let sql = "UPDATE cluster SET role = 'primary', epoch = 2;
        INSERT INTO promotion (epoch, kind, time, lsn, system_id, timeline, peer_cluster, slot, publication, peer_fenced, settled)
            VALUES (2, 'failover', now(), '0/1', '1', 1, '', '', '', false, false);
        INSERT INTO divergence (epoch, exact, reason, from_lsn, to_lsn, transactions) VALUES (1, true, '', '0/1', '0/2', 1);
        INSERT INTO diverged_row (epoch, table_name, change) VALUES (1, 'public.accounts', 'insert')";
    state.batch_execute(sql).await?;
    drop(state);
    let no_sessions = async || {
        let admin = site.spare.pg.conn("postgres").await?;
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'warm_spare'";
        match admin.query_one(sql, &[]).await?.get::<_, i64>(0) {
            0 => Ok(()),
            _ => Err("still there".into()),
        }
    };
    let limit = Duration::from_secs(10);
    support::wait_until("the sessions to be gone", limit, no_sessions).await;
    refused(
        &site.warm_spare(&["release", "--local"]).await,
        4,
        &[
            "state_is_needed",
            "old primary is to be fenced under epoch 2",
            "1 rows",
            "--force",
        ],
    );
    assert!(site.spare.pg.has_database("warm_spare").await?);
    support::wait_until("the sessions to be gone", limit, no_sessions).await;
    let output = site
        .warm_spare(&["release", "--local", "--force"])
        .await
        .ok();
    assert!(
        output.stderr.contains("lost by release --local --force"),
        "{output}"
    );
    assert!(!site.spare.pg.has_database("warm_spare").await?);
    Ok(())
}

/// A server of a provider: its parameters are in a file of its own, and the user is no superuser.
#[tokio::test(flavor = "multi_thread")]
async fn a_providers_server_is_followed_with_its_own_parameters() -> Result<()> {
    let site = site("provider").await;
    Factory::seeded().fill(&site.primary, 1).await?;
    let client = site.primary.conn().await?;
    client
        .batch_execute(
            "CREATE ROLE rds_replication;
             CREATE ROLE copier LOGIN PASSWORD 'copies' IN ROLE pg_read_all_settings, pg_read_all_data, rds_replication;
             ALTER DATABASE builder OWNER TO copier",
        )
        .await?;
    site.primary
        .pg
        .append_configuration("wal_level = logical\nmax_slot_wal_keep_size = 8GB\n")?;
    restart(&site).await?;
    site.write_config("peer.datastore.user = \"copier\"\npeer.datastore.password = \"copies\"");
    let script = site.warm_spare(&["prepare", "--print"]).await.ok().stdout;
    assert!(!script.contains("ALTER SYSTEM"), "{script}");
    // Membership in a role of that name is no right here: the right is tried.
    let grant = "ALTER ROLE \"copier\" REPLICATION;";
    assert!(script.contains(grant), "{script}");
    // An administrator makes the publication, whose tables are not the user's own.
    psql(&site, &script).await?;
    let document = site.warm_spare(&["prepare", "--json"]).await.ok().json();
    assert_eq!(document["stream"]["possible"], true, "{document}");
    Ok(())
}
