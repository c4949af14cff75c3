//! Servers that stop and come back while a pass runs; sessions that are in the way; two at once.

use std::time::Duration;
use support::packages::delete_package;
use support::{Factory, Result, Site, Spec, site};

const A_WHILE: Duration = Duration::from_secs(120);

fn begins(phase: &'static str) -> impl Fn(&str) -> bool {
    move |line| line == phase || line.starts_with(&format!("{phase}: "))
}

/// Each server of each side is killed in the middle and started again: the pass waits, or begins again, and finishes.
#[tokio::test(flavor = "multi_thread")]
async fn every_server_may_be_killed_and_come_back() -> Result<()> {
    let site = Site::own_servers("comeback").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 10).await?;
    site.warm_spare(&["sync"]).await.ok();
    for phase in ["artifacts", "tables"] {
        for (number, victim) in [
            "primary store",
            "spare store",
            "primary datastore",
            "spare datastore",
        ]
        .iter()
        .enumerate()
        {
            let spec = Spec::new("core", "more", &format!("{phase}.{number}")).size(3 << 20);
            factory.package(&site.primary, spec).await?;
            let mut running = site.spawn(&["sync", "--baseline"]);
            running.wait_for_line(begins(phase), A_WHILE).await?;
            match number {
                0 => site.primary.minio.kill9(),
                1 => site.spare.minio.kill9(),
                2 => site.primary.pg.kill9(),
                _ => site.spare.pg.kill9(),
            }
            match number {
                0 => site.primary.minio.start_again().await?,
                1 => site.spare.minio.start_again().await?,
                2 => site.primary.pg.start_again().await?,
                _ => site.spare.pg.start_again().await?,
            }
            let output = running.wait(Duration::from_secs(240)).await?;
            assert_eq!(
                output.code,
                Some(0),
                "{victim} killed during {phase}: {output}"
            );
            site.warm_spare(&["verify", "--deep"]).await.ok();
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_reconnect_for_ever_see_only_whole_databases() -> Result<()> {
    let site = Site::builder("clients").spare_database().start().await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 5).await?;
    site.warm_spare(&["sync"]).await.ok();
    let stop = tokio_util_free::Flag::default();
    let mut clients = Vec::new();
    for _ in 0..6 {
        let (pg, stop) = (site.spare.pg.clone(), stop.clone());
        clients.push(tokio::spawn(async move {
            let (mut seen, mut written) = (std::collections::BTreeSet::new(), 0);
            while !stop.is_set() {
                let Ok(client) = pg.conn("builder").await else {
                    tokio::task::yield_now().await;
                    continue;
                };
                for _ in 0..20 {
                    let Ok(row) = client
                        .query_one("SELECT count(*) FROM origin_packages", &[])
                        .await
                    else {
                        break;
                    };
                    seen.insert(row.get::<_, i64>(0));
                    if client
                        .batch_execute("DELETE FROM origin_channel_packages")
                        .await
                        .is_ok()
                    {
                        written += 1;
                    }
                }
            }
            (seen, written)
        }));
    }
    for number in 0..4 {
        factory
            .package(
                &site.primary,
                Spec::new("core", "more", &number.to_string()),
            )
            .await?;
        let output = site.warm_spare(&["sync"]).await;
        assert_eq!(output.code, Some(0), "{output}");
    }
    stop.set();
    let whole: Vec<i64> = (5..=9).collect();
    for client in clients {
        let (seen, written) = client.await?;
        assert!(seen.iter().all(|count| whole.contains(count)), "{seen:?}");
        assert!(!seen.is_empty(), "it got in at all");
        assert_eq!(written, 0, "the fence held throughout");
    }
    site.warm_spare(&["verify"]).await.ok();
    Ok(())
}

mod tokio_util_free {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Clone, Default)]
    pub(super) struct Flag(Arc<AtomicBool>);

    impl Flag {
        pub(super) fn set(&self) {
            self.0.store(true, Ordering::Relaxed);
        }

        pub(super) fn is_set(&self) -> bool {
            self.0.load(Ordering::Relaxed)
        }
    }
}

/// A migration on the primary waits for our COPY for a second at most; then the copy gives way and begins again.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_on_the_primary_does_not_wait_for_the_copy() -> Result<()> {
    let site = site("migration").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 3).await?;
    // Rows enough, at this rate, for a copy of many seconds.
    site.primary
        .conn()
        .await?
        .batch_execute("UPDATE origin_packages SET manifest = (SELECT string_agg(md5(n::text), ' ') FROM generate_series(1, 100000) n)")
        .await?;
    site.write_config("replication.bandwidth_limit = \"1MB/s\"");
    let mut running = site.spawn(&["sync"]);
    running.wait_for_line(begins("tables"), A_WHILE).await?;
    let client = site.primary.conn().await?;
    support::wait_until("the copy holds its table", A_WHILE, async || {
        let sql = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.relation = 'origin_packages'::regclass \
                   AND a.application_name = 'warm-spare'";
        let held: i64 = client.query_one(sql, &[]).await?.get(0);
        if held > 0 { Ok(()) } else { Err("not yet".into()) }
    })
    .await;
    client
        .batch_execute("ALTER TABLE origin_packages ADD COLUMN added int")
        .await?;
    running
        .wait_for_line(|line| line.contains("waited for our copy"), A_WHILE)
        .await?;
    drop(running);
    site.write_config("");
    site.warm_spare(&["sync"]).await.ok();
    let sql = "SELECT count(*) FROM information_schema.columns WHERE table_name = 'origin_packages' AND column_name = 'added'";
    let arrived: i64 = site.spare.conn().await?.query_one(sql, &[]).await?.get(0);
    assert_eq!(arrived, 1, "the migration arrives with the next pass");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_works_at_a_time() -> Result<()> {
    let site = site("lock").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    site.warm_spare(&["sync"]).await.ok();
    let mut first = site.spawn(&["sync", "--baseline"]);
    first.wait_for_line(begins("snapshot"), A_WHILE).await?;
    first.sigstop();
    let second = site.warm_spare(&["sync"]).await;
    assert_eq!(second.code, Some(4), "{second}");
    assert!(
        second.stderr.contains("another warm-spare is at work"),
        "{second}"
    );

    // Its lock taken from it while it slept, it must notice before it changes anything.
    let admin = site.spare.pg.conn("warm_spare").await?;
    admin
        .batch_execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
        .await?;
    site.warm_spare(&["sync", "--baseline"]).await.ok();
    let point = "SELECT lsn FROM copied";
    let before: String = admin.query_one(point, &[]).await?.get(0);
    first.sigcont();
    let output = first.wait(Duration::from_secs(240)).await?;
    // It begins again with a new token, or gives up; what it must not do is to finish what it had begun.
    assert!(
        output.stderr.contains("starts again") || output.code != Some(0),
        "{output}"
    );
    site.warm_spare(&["verify", "--deep"]).await.ok();
    let after: String = admin.query_one(point, &[]).await?.get(0);
    assert!(
        after == before || output.stderr.contains("starts again"),
        "what was begun with the old token was finished: {output}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fuse_stops_a_shrinking_primary_until_that_change_is_approved() -> Result<()> {
    let site = site("fuse").await;
    let mut factory = Factory::seeded();
    let packages = factory.fill(&site.primary, 30).await?;
    let fuse = "[fuse]\nmax_percent = 10\nmin_count = 4";
    site.write_config(fuse);
    site.warm_spare(&["sync"]).await.ok();
    for package in &packages[..3] {
        delete_package(&site.primary, package).await?;
    }
    site.warm_spare(&["sync"]).await.ok();
    // Three more are 6 of 30 within the window.
    for package in &packages[3..6] {
        delete_package(&site.primary, package).await?;
    }
    let blown = site.warm_spare(&["sync"]).await;
    assert_eq!(blown.code, Some(4), "{blown}");
    assert!(
        blown.stderr.contains("fuse: 6 of 30 packages would vanish"),
        "{blown}"
    );
    let count = async || -> Result<i64> {
        Ok(site
            .spare
            .conn()
            .await?
            .query_one("SELECT count(*) FROM origin_packages", &[])
            .await?
            .get(0))
    };
    assert_eq!(count().await?, 27, "the spare stands as it was");
    site.warm_spare(&["verify", "--deep"]).await.ok();
    assert!(!site.spare.pg.has_database("builder_incoming").await?);
    let id = blown
        .stderr
        .split("fuse.approve = \"")
        .nth(1)
        .and_then(|rest| rest.split('"').next());
    let id = id.expect("the id is printed").to_string();
    site.write_config(&format!("{fuse}\napprove = \"not-this-one\""));
    assert_eq!(site.warm_spare(&["sync"]).await.code, Some(4));
    site.write_config(&format!("{fuse}\napprove = \"{id}\""));
    site.warm_spare(&["sync"]).await.ok();
    assert_eq!(count().await?, 24);
    // What was approved is not held against the next one.
    delete_package(&site.primary, &packages[6]).await?;
    site.warm_spare(&["sync"]).await.ok();
    assert_eq!(count().await?, 23);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lifted_fence_is_set_again() -> Result<()> {
    let site = site("fence").await;
    Factory::seeded().fill(&site.primary, 2).await?;
    site.warm_spare(&["sync"]).await.ok();
    let writes = async || -> Result<bool> {
        Ok(site
            .spare
            .conn()
            .await?
            .batch_execute("CREATE TABLE written ()")
            .await
            .is_ok())
    };
    assert!(!writes().await?);
    site.spare.pg.set_fence(false).await?;
    let stale = site.spare.conn().await?;
    let output = site.warm_spare(&["sync"]).await.ok();
    assert!(
        output.stdout.contains("the fence had been lifted"),
        "{output}"
    );
    assert!(!writes().await?);
    assert!(
        stale
            .batch_execute("CREATE TABLE written ()")
            .await
            .is_err(),
        "sessions from before are ended"
    );
    // A role's own setting goes before the database's: that is said, not overlooked.
    let admin = site.spare.pg.conn("postgres").await?;
    admin
        .batch_execute("ALTER ROLE hab SET default_transaction_read_only = off")
        .await?;
    for arguments in [&["sync"][..], &["sync", "--baseline"]] {
        let output = site.warm_spare(arguments).await;
        assert_eq!(output.code, Some(3), "{output}");
        assert!(
            output
                .stderr
                .contains("ALTER ROLE hab RESET default_transaction_read_only"),
            "{output}"
        );
    }
    Ok(())
}

/// A session that is dropped in the middle of a COPY is gone at once, and its locks with it; left to itself, the library
/// reads to the end, and this copy has none.
#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_session_lets_go_of_the_primary_at_once() -> Result<()> {
    let site = site("dropped").await;
    let config = warm_spare::config::load(&site.write_config(""))?;
    let primary = warm_spare::cluster::PeerCluster::of(&config);
    let peer = primary.builder().await?;
    let endless = "COPY (SELECT generate_series(1, 1000000000000)) TO STDOUT";
    let mut rows = peer.copy_out("copying without end", endless).await?;
    assert!(rows.next().await?.is_some());
    drop(rows);
    drop(peer);
    let client = site.primary.conn().await?;
    support::wait_until("the session is gone", Duration::from_secs(20), async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'warm-spare'";
        let left: i64 = client.query_one(sql, &[]).await?.get(0);
        if left == 0 {
            Ok(())
        } else {
            Err("still there".into())
        }
    })
    .await;
    Ok(())
}
