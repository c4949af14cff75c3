//! Every session of ours may be ended by somebody, on either server and at any time; and what we hold on the primary is let go.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use support::follow::{
    copies, followed, logical, prepare, prepared, until_copied, until_equal, until_following,
};
use support::inventory::{self, Inventory, Session, lasting_sessions, until_nothing_is_held};
use support::packages::{insert, put};
use support::service::SOON;
use support::{Factory, Postgres, Result, Service, Site, Spec, wait_until};
use warm_spare::cluster::{LocalCluster, SpareDb, StateError};

/// After so long an upload must be here, whatever was ended.
const LIMIT: Duration = Duration::from_secs(30);

async fn until_here(site: &Site, package: &support::Package, ended: &str) {
    let what = format!("the upload after the end of {ended}");
    wait_until(&what, LIMIT, || async {
        let sql = "SELECT 1 FROM origin_packages WHERE ident = $1";
        let rows = site.spare.conn().await?;
        match rows.query_opt(sql, &[&package.ident]).await? {
            Some(_) => Ok(()),
            None => Err("it is not here".into()),
        }
    })
    .await;
}

/// Ends one session after the other, and uploads after each.
async fn end_each(
    site: &Site,
    (side, server): (&str, &Postgres),
    factory: &mut Factory,
    frozen: bool,
) -> Result<usize> {
    let least = if side == "here" { 6 } else { 1 };
    let count = wait_until("its sessions are there", LIMIT, || async {
        match lasting_sessions(server).await?.len() {
            count if count >= least => Ok(count),
            count => Err(format!("{count} of {least}").into()),
        }
    })
    .await;
    for number in 0..count {
        // Those that went with the one before are there again.
        let what = format!("{side}: {count} sessions");
        let sessions: Vec<Session> = wait_until(&what, LIMIT, || async {
            match lasting_sessions(server).await? {
                found if found.len() >= count => Ok(found),
                found => Err(format!("{found:#?}").into()),
            }
        })
        .await;
        let session = &sessions[number];
        let name = format!("{side}{}", u8::from(frozen));
        let package = factory.make(Spec::new("core", &name, &number.to_string()));
        put(&site.primary, &package).await?;
        if frozen {
            site.primary.minio.sigstop();
            insert(&site.primary, &package).await?;
        }
        inventory::end(server, session).await?;
        let ended = format!("{side}, {}: {}", session.database, session.did);
        let began = std::time::Instant::now();
        match frozen {
            true => site.primary.minio.sigcont(),
            false => insert(&site.primary, &package).await?,
        }
        until_here(site, &package, &ended).await;
        println!("{:.1?} after the end of {ended}", began.elapsed());
    }
    Ok(count)
}

/// The matrix: each session, on either server, in one state.
async fn matrix(name: &str, frozen: bool) -> Result<()> {
    let site = Site::builder(name).primary(logical()).own_stores();
    let site = site.start().await?;
    prepare(&site).await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 1).await?;
    let service = followed(&site, "").await?;
    let here = end_each(&site, ("here", &site.spare.pg), &mut factory, frozen).await?;
    let there = end_each(&site, ("there", &site.primary.pg), &mut factory, frozen).await?;
    println!("{here} sessions here, {there} there");
    until_following(&service).await;
    assert_eq!(copies(&service).await?, 1, "no new baseline");
    until_nothing_is_held(&site.primary.pg, LIMIT).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn whichever_session_is_ended_the_next_upload_arrives() -> Result<()> {
    matrix("ended", false).await
}

#[tokio::test(flavor = "multi_thread")]
async fn whichever_session_is_ended_while_the_gate_waits_the_upload_arrives() -> Result<()> {
    matrix("ended_waiting", true).await
}

/// The fence is set again by ending every session, and ours are among them.
#[tokio::test(flavor = "multi_thread")]
async fn a_fence_that_is_set_again_does_not_hold_the_stream() -> Result<()> {
    let site = prepared("fence_again").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 1).await?;
    let service = followed(&site, "").await?;
    site.spare.pg.set_fence(false).await?;
    service
        .until("the fence is set again", |status| {
            let events = support::follow::events(status, "fence");
            events.iter().any(|text| text.contains("set again"))
        })
        .await;
    let package = factory
        .package(&site.primary, Spec::new("core", "fenced", "1"))
        .await?;
    until_here(&site, &package, "all of them").await;
    until_equal(&site).await
}

/// A walsender that exported a snapshot keeps it until its next command.
#[tokio::test(flavor = "multi_thread")]
async fn the_primarys_snapshot_is_let_go_when_the_rows_are_copied() -> Result<()> {
    let site = prepared("snapshot").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let (service, halt) = Service::halting(&site, "", "baseline.tables");
    halt.reached().await;
    let held = |found: &Inventory| (found.snapshots, found.idle_in_transaction, found.locks);
    wait_until("no snapshot is held", Duration::from_secs(5), || async {
        match held(&Inventory::of(&site.primary.pg).await?) {
            (0, 0, 0) => Ok(()),
            found => Err(format!("{found:?}").into()),
        }
    })
    .await;
    let builder = site.primary.conn().await?;
    // It waits for every session with an older snapshot.
    builder
        .batch_execute("SET statement_timeout = '5s'")
        .await?;
    let index = "CREATE INDEX CONCURRENTLY meanwhile ON accounts (email)";
    builder.batch_execute(index).await?;
    builder.batch_execute("DROP INDEX meanwhile").await?;
    halt.go();
    until_following(&service).await;
    until_nothing_is_held(&site.primary.pg, LIMIT).await;
    Ok(())
}

/// From the lasting slot on, the temporary one is of no use and would hold log that nobody measures.
#[tokio::test(flavor = "multi_thread")]
async fn the_temporary_slot_goes_when_the_lasting_one_is_there() -> Result<()> {
    let site = prepared("temporary").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let (service, halt) = Service::halting(&site, "", "catch_up.begin");
    halt.reached().await;
    wait_until("no temporary slot", Duration::from_secs(5), || async {
        match Inventory::of(&site.primary.pg).await?.temporary_slots {
            0 => Ok(()),
            slots => Err(format!("{slots} temporary slots").into()),
        }
    })
    .await;
    halt.go();
    until_following(&service).await;
    Ok(())
}

/// It waits within the server's lock manager, where a server does not notice that its client has gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_cannot_be_made_leaves_nothing_behind() -> Result<()> {
    let primary = logical().setting("max_prepared_transactions", "5");
    let site = Site::builder("blocked").primary(primary).start().await?;
    prepare(&site).await;
    Factory::seeded().fill(&site.primary, 1).await?;
    let writer = site.primary.conn().await?;
    let forgotten = "BEGIN; UPDATE origins SET updated_at = now(); PREPARE TRANSACTION 'forgotten'";
    writer.batch_execute(forgotten).await?;
    let service = Service::start(&site, "");
    let pg = &site.primary.pg;
    until_waiting(pg).await;
    // Stopped in the middle of it.
    service.stop().await;
    until_nothing_is_held(pg, Duration::from_secs(5)).await;

    // And given up by itself, and tried again: each time for the same reason.
    let service = Service::start(&site, "");
    let named = |status: &serde_json::Value| {
        let detail = status["hold"]["detail"].as_str().unwrap_or_default();
        detail.contains("prepared transaction") && detail.contains("forgotten")
    };
    // The first copy does not wait for it.
    service
        .until("a copy without a slot", |status| {
            status["recovery_point"]["lsn"].is_string()
        })
        .await;
    service.until("it says whom it waits for", named).await;
    until_nothing_is_held(pg, Duration::from_secs(5)).await;
    until_waiting(pg).await;
    service.until("it says so again", named).await;
    writer.batch_execute("COMMIT PREPARED 'forgotten'").await?;
    until_following(&service).await;
    until_equal(&site).await
}

/// The columns that would tell are empty for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_may_not_look_says_so() -> Result<()> {
    let site = Site::builder("blind").primary(logical()).start().await?;
    prepare(&site).await;
    Factory::seeded().fill(&site.primary, 1).await?;
    let writer = site.primary.conn().await?;
    writer
        .batch_execute(
            "CREATE ROLE copier LOGIN REPLICATION PASSWORD 'copies' IN ROLE pg_read_all_settings, pg_read_all_data",
        )
        .await?;
    writer
        .batch_execute("BEGIN; CREATE TABLE hold_xid (i int)")
        .await?;
    let copier = "replication.mode = \"stream\"\npeer.datastore.user = \"copier\"\npeer.datastore.password = \"copies\"";
    let service = Service::start(&site, copier);
    let told = |status: &serde_json::Value| {
        let detail = status["hold"]["detail"].as_str().unwrap_or_default();
        detail.contains("transaction of hab")
            && detail.contains("GRANT pg_read_all_stats TO copier")
    };
    service.until("it says what it may not see", told).await;
    Ok(())
}

/// Our walsender waits for the transaction.
async fn until_waiting(primary: &Postgres) {
    wait_until("a slot is being made", SOON, || async {
        let sql = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'warm-spare'
                     AND backend_type = 'walsender' AND wait_event_type = 'Lock'";
        let client = primary.conn("postgres").await?;
        let found = client.query_opt(sql, &[]).await?;
        found.map(|_| ()).ok_or_else(|| "nobody waits".into())
    })
    .await;
}

/// What is ours on the primary is an inventory: what nothing explains is told.
#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_uses_any_more_on_the_primary_is_told() -> Result<()> {
    let site = prepared("left_over").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = followed(&site, "").await?;
    let status = service
        .until("the inventory", |status| {
            status["peer"]["footprint"]["walsenders"] == 1
        })
        .await;
    let footprint = &status["peer"]["footprint"];
    assert_eq!(footprint["temporary_slots"], 0, "{footprint}");
    let left = site.primary.conn().await?;
    let name = status["cluster_id"].as_str().unwrap_or_default();
    let sql = "SELECT pg_create_logical_replication_slot($1::text, 'pgoutput', true)";
    left.execute(sql, &[&format!("warm_spare_{name}_7_7")])
        .await?;
    let told = |status: &serde_json::Value| {
        let reasons = status["health"]["reasons"].to_string();
        reasons.contains("left_on_primary") && reasons.contains("1 temporary slots")
    };
    let status = service.until("it is told", told).await;
    assert_eq!(status["health"]["level"], 1, "{status:#}");
    // The next copy ends it.
    let copy = "CREATE TABLE another (a int PRIMARY KEY)";
    let client = site.primary.conn().await?;
    client.batch_execute(copy).await?;
    until_copied(&service, 1).await;
    assert!(
        left.batch_execute("SELECT 1").await.is_err(),
        "it was ended"
    );
    until_nothing_is_held(&site.primary.pg, LIMIT).await;
    Ok(())
}

/// Statements are sent behind BEGIN without waiting for its answer. If it failed, they fail.
#[tokio::test(flavor = "multi_thread")]
async fn the_applying_session_writes_only_in_transactions() -> Result<()> {
    let site = prepared("applying").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    site.warm_spare(&["sync"]).await.ok();
    let config = warm_spare::config::load(&site.config_file())?;
    let session = LocalCluster::of(&config).applying("builder").await?;
    session.write_only_in_transactions().await?;
    let delete = "DELETE FROM public.origin_packages";
    let error = session.batch("a test", delete).await.expect_err("refused");
    assert!(error.to_string().contains("read-only"), "{error}");
    let spare = site.spare.conn().await?;
    let sql = "SELECT token FROM warm_spare.recovery_point";
    let token: i64 = spare.query_one(sql, &[]).await?.get(0);
    let another = SpareDb::of(&session).begin_to_apply(token + 1).await;
    assert!(
        matches!(another, Err(StateError::Superseded)),
        "{another:?}"
    );
    assert!(session.batch("a test", delete).await.is_err());
    session.roll_back("a test").await?;
    SpareDb::of(&session).begin_to_apply(token).await?;
    session.batch("a test", delete).await?;
    session.commit("a test").await?;
    let sql = "SELECT count(*) FROM origin_packages";
    let left: i64 = spare.query_one(sql, &[]).await?.get(0);
    assert_eq!(left, 0);
    Ok(())
}

/// The number of sessions that a test has opened on Builder's database.
#[derive(Default)]
struct Opened(AtomicUsize);

impl Opened {
    /// Opens sessions, one after the other, until one is refused or `others` is done.
    async fn beside(
        &self,
        config: &warm_spare::config::Config,
        others: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        let sessions = async {
            loop {
                match LocalCluster::of(config).builder().await {
                    Ok(_) => self.0.fetch_add(1, Relaxed),
                    Err(refused) => break refused,
                };
            }
        };
        tokio::select! {
            done = others => done,
            refused = sessions => Err(refused.into()),
        }
    }

    fn number(&self) -> usize {
        self.0.load(Relaxed)
    }

    /// Waits for two more: a real switch, or a real fence, is not followed by another one at once.
    async fn until_two_more(&self, before: usize) {
        while self.number() < before + 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// A switch renames Builder's database and the incoming one in one transaction. A server that has found a database by its
/// name looks at the name once more, and refuses a session if it is another one by then.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_meets_the_switch_gets_the_new_database() -> Result<()> {
    let site = support::site("renamed").await;
    site.write_config("");
    let config = warm_spare::config::load(&site.config_file())?;
    let admin = site.spare.pg.conn("postgres").await?;
    admin.batch_execute("CREATE DATABASE builder").await?;
    admin.batch_execute("CREATE DATABASE incoming").await?;
    let opened = Opened::default();
    let switches = async {
        let switch = "BEGIN; ALTER DATABASE builder RENAME TO aside; ALTER DATABASE incoming RENAME TO builder; \
                      ALTER DATABASE aside RENAME TO incoming; COMMIT";
        let mut switched = 0;
        while switched < 150 {
            let before = opened.number();
            match admin.batch_execute(switch).await {
                Ok(()) => switched += 1,
                // A session is there.
                Err(_) => admin.batch_execute("ROLLBACK").await?,
            }
            opened.until_two_more(before).await;
        }
        Ok(())
    };
    opened.beside(&config, switches).await
}

/// A fence, and a switch, end every session that was there before them. One of them may just be opening.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_ended_while_it_opens_is_opened_again() -> Result<()> {
    let site = support::site("ended_opening").await;
    site.write_config("");
    let config = warm_spare::config::load(&site.config_file())?;
    let admin = site.spare.pg.conn("postgres").await?;
    admin.batch_execute("CREATE DATABASE builder").await?;
    let opened = Opened::default();
    let ends = async {
        let end =
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'builder'";
        for _ in 0..150 {
            while admin.query(end, &[]).await?.is_empty() {}
            opened.until_two_more(opened.number()).await;
        }
        Ok(())
    };
    opened.beside(&config, ends).await
}
