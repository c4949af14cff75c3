//! A planned handover: the primary is fenced, drained, and its spare promoted; or all is as it was.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use support::packages::delete_package;
use support::service::SOON;
use support::{Factory, Postgres, Result, Service, Spec, content, wait_until};
use tokio::task::JoinSet;
use tokio_postgres::NoTls;

use support::follow::{events, followed, prepare, until_equal, until_following};
use support::pair::{
    PROMOTE, Pair, Writers, is_writable, lost, sequences, until_primary, until_read_only,
    until_settled, until_writable, write,
};

#[tokio::test]
async fn what_the_primary_acknowledged_is_on_the_new_primary() -> Result<()> {
    let pair = Pair::start("switchover_writers").await?;
    let site = &pair.there;
    let service = followed(site, "").await?;
    // The primary's own, which looks on.
    let theirs = Service::start(&pair.back, PROMOTE);
    until_primary(&theirs, 1).await;
    let writers = Writers::start([&site.primary, &site.spare], 4);
    writers.until_written(0, 200).await;
    service.reconfigure(PROMOTE);
    until_primary(&service, 2).await;
    writers.until_written(1, 200).await;
    let status = until_settled(&service).await;
    let acknowledged = writers.stop().await;
    let old = acknowledged.values().filter(|side| **side == 0).count();
    println!(
        "{} rows, {old} of them by the old primary",
        acknowledged.len()
    );
    assert_eq!(
        lost(&site.spare, &acknowledged).await?,
        Vec::<String>::new()
    );
    assert!(!is_writable(&site.primary).await);
    assert!(write(&site.primary, "late").await.is_err());
    assert_eq!(events(&status, "promotion").len(), 1, "{status:#}");
    // Nothing of ours is left on the old primary but the record of its fence.
    let sql = "SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication)";
    wait_until("nothing of ours is left", SOON, || async {
        let left = site.primary.conn().await?.query_one(sql, &[]).await?;
        match left.get::<_, i64>(0) {
            0 => Ok(()),
            some => Err(format!("{some} of slot and publication").into()),
        }
    })
    .await;
    theirs.until_state("fenced").await;
    theirs.stop().await.ok();
    service.stop().await.ok();
    Ok(())
}

/// Each connects for every row, and some are held up by the server between having read their settings and being seen.
#[tokio::test]
async fn clients_that_connect_for_ever_and_exactly_now_do_not_slip_through() -> Result<()> {
    let pair = Pair::start("switchover_storm").await?;
    let site = &pair.there;
    let service = followed(site, "").await?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for number in 0..12 {
        // A third of them is late by a second, which is longer than all of the fencing.
        let late = number % 3 == 0;
        let mut url = site.primary.pg.url("builder");
        if late {
            url.push_str("?options=-c%20post_auth_delay%3D1");
        }
        let stop = stop.clone();
        clients.spawn(async move {
            let mut acknowledged = BTreeMap::new();
            for row in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let name = format!("storm-{number}-{row}");
                if let Ok((client, wire)) = tokio_postgres::connect(&url, NoTls).await {
                    let wire = tokio::spawn(wire);
                    let sql = "INSERT INTO accounts (name) VALUES ($1)";
                    if client.execute(sql, &[&name]).await.is_ok() {
                        acknowledged.insert(name, 0);
                    }
                    wire.abort();
                }
            }
            acknowledged
        });
    }
    let count = "SELECT count(*) FROM accounts WHERE name LIKE 'storm-%'";
    wait_until("they write", SOON, || async {
        let row = site.primary.conn().await?.query_one(count, &[]).await?;
        match row.get::<_, i64>(0) {
            100.. => Ok(()),
            few => Err(format!("{few} rows").into()),
        }
    })
    .await;
    service.reconfigure(PROMOTE);
    until_primary(&service, 2).await;
    until_settled(&service).await;
    stop.store(true, Ordering::Relaxed);
    let mut acknowledged = BTreeMap::new();
    while let Some(by) = clients.join_next().await {
        acknowledged.extend(by?);
    }
    println!("{} rows acknowledged", acknowledged.len());
    assert_eq!(
        lost(&site.spare, &acknowledged).await?,
        Vec::<String>::new()
    );
    service.stop().await.ok();
    Ok(())
}

/// With a service on each side, all the time.
#[tokio::test]
async fn back_and_forth() -> Result<()> {
    let pair = Pair::start("switchover_ten").await?;
    let on_b = followed(&pair.there, "").await?;
    let on_a = Service::start(&pair.back, PROMOTE);
    until_primary(&on_a, 1).await;
    let mut epoch = 1;
    for round in 0..5 {
        for (new, old) in [(&on_b, &on_a), (&on_a, &on_b)] {
            let site = new.site;
            write(&site.primary, &format!("round-{round}-{epoch}")).await?;
            epoch += 1;
            new.reconfigure(PROMOTE);
            until_primary(new, epoch).await;
            until_settled(new).await;
            old.until_state("fenced").await;
            assert!(!is_writable(&site.primary).await);
            assert_eq!(
                sequences(&site.primary).await?,
                sequences(&site.spare).await?
            );
            write(&site.spare, &format!("after-{round}-{epoch}")).await?;
            old.site.write_config("");
            prepare(old.site).await;
            old.reconfigure("");
            until_following(old).await;
            until_equal(old.site).await?;
            let healthy = new
                .until("a spare follows", |status| status["health"]["level"] == 0)
                .await;
            assert_eq!(healthy["peer"]["role"], "spare");
            let deep = ["verify", "--deep"];
            old.site.warm_spare(&deep).await.ok();
        }
    }
    assert_eq!(epoch, 11);
    // What a promotion would meet is known without being asked for.
    on_b.until("preflight", |status| {
        status["preflight"]["unplanned"] == "warn"
    })
    .await;
    let there = &pair.there;
    assert_eq!(content(&there.primary).await?, content(&there.spare).await?);
    on_a.stop().await.ok();
    on_b.stop().await.ok();
    Ok(())
}

#[tokio::test]
async fn in_snapshot_mode_the_last_copy_is_made_behind_the_fence() -> Result<()> {
    let pair = Pair::with("switchover_snapshot", Postgres::builder()).await?;
    let site = &pair.there;
    let on_b = Service::start(site, "[replication]\ninterval = \"1h\"\nrpo = \"2h\"");
    on_b.until_level().await;
    let on_a = Service::start(&pair.back, PROMOTE);
    until_primary(&on_a, 1).await;
    // Nobody looks for an hour.
    let late = Factory::new(9)
        .package(&site.primary, Spec::new("core", "late", "1"))
        .await?;
    write(&site.primary, "late").await?;
    on_b.reconfigure(&format!(
        "{PROMOTE}\n[replication]\ninterval = \"1h\"\nrpo = \"2h\""
    ));
    let status = until_primary(&on_b, 2).await;
    assert_eq!(events(&status, "promotion").len(), 1);
    assert_eq!(content(&site.primary).await?, content(&site.spare).await?);
    assert_eq!(site.spare.get(&late.key).await?, Some(late.bytes()));
    assert_eq!(
        sequences(&site.primary).await?,
        sequences(&site.spare).await?
    );
    on_a.until_state("fenced").await;
    on_a.stop().await.ok();
    on_b.stop().await.ok();
    Ok(())
}

/// One row that was made while the primary's clock stood in another year keeps nobody from being promoted: new ids are
/// smaller there too.
#[tokio::test]
async fn an_id_of_a_time_to_come_keeps_no_handover_from_its_end() -> Result<()> {
    let pair = Pair::start("switchover_id").await?;
    let site = &pair.there;
    let client = site.primary.conn().await?;
    let sql = "INSERT INTO accounts (id, name) VALUES ((900000000000::int8 << 23), 'later')";
    client.batch_execute(sql).await?;
    let service = followed(site, "").await?;
    service.reconfigure(PROMOTE);
    let status = until_primary(&service, 2).await;
    let told = events(&status, "promotion");
    assert!(told[0].contains("by switchover"), "{told:?}");
    service.stop().await.ok();
    Ok(())
}

/// The switch of the last copy is one transaction. Called off while its commit is on its way, it is there whole or not at
/// all, and nothing is put back of bytes whose rows have come.
#[tokio::test(flavor = "multi_thread")]
async fn in_snapshot_mode_a_switchover_may_be_called_off_at_its_last_commit() -> Result<()> {
    let pair = Pair::with("switchover_last_commit", Postgres::builder()).await?;
    let site = &pair.there;
    let mut factory = Factory::new(11);
    let spec = Spec::new("core", "again", "1").release("20240101000000");
    let old = factory.package(&site.primary, spec.clone()).await?;
    let service = Service::start(site, "");
    service.until_level().await;
    let slow = "[replication]\ninterval = \"1h\"\nrpo = \"2h\"";
    service.reconfigure(slow);
    delete_package(&site.primary, &old).await?;
    let new = factory.package(&site.primary, spec.size(9000)).await?;
    // The commit of the switch takes its time.
    let state = site.spare.pg.conn("warm_spare").await?;
    let slowly = "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS \
                    $$ BEGIN PERFORM pg_catalog.pg_sleep(1.5); RETURN NULL; END $$; \
                  CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON event DEFERRABLE INITIALLY DEFERRED \
                    FOR EACH ROW WHEN (NEW.kind = 'baseline') EXECUTE FUNCTION slowly()";
    state.batch_execute(slowly).await?;
    service.reconfigure(&format!("{PROMOTE}\n{slow}"));
    wait_until("the switch is at its commit", SOON, || async {
        let sql = "SELECT FROM pg_stat_activity WHERE query = 'COMMIT' AND wait_event = 'PgSleep'";
        let rows = state.query(sql, &[]).await?;
        (!rows.is_empty()).then_some(()).ok_or("not yet".into())
    })
    .await;
    service.reconfigure(slow);
    until_writable(&site.primary).await;
    service
        .until("it is over", |status| status["transition"].is_null())
        .await;
    wait_until("the commit has come or gone", SOON, || async {
        let sql = "SELECT FROM pg_stat_activity WHERE query = 'COMMIT' AND state = 'active'";
        let rows = state.query(sql, &[]).await?;
        rows.is_empty().then_some(()).ok_or("not yet".into())
    })
    .await;
    let sql = "SELECT checksum FROM origin_packages WHERE ident LIKE 'core/again/%'";
    let row = site.spare.conn().await?.query_one(sql, &[]).await?;
    let bytes = site.spare.get(&new.key).await?.expect("it is there");
    let named = row.get::<_, String>(0);
    let size = if named == new.checksum {
        new.size
    } else {
        old.size
    };
    assert_eq!(bytes.len() as u64, size, "row and bytes are of one state");
    // In memory too: the service knows where it stands.
    service.reconfigure("");
    let last = factory.package(&site.primary, Spec::new("core", "last", "1"));
    last.await?;
    until_equal(site).await?;
    service.until_level().await;
    service.stop().await.ok();
    site.warm_spare(&["verify"]).await.ok();
    Ok(())
}

/// Nobody can write while the last copy is made: who sees that it takes too long calls it off, and so does its limit.
#[tokio::test]
async fn in_snapshot_mode_a_switchover_is_called_off_or_given_up_in_time() -> Result<()> {
    let pair = Pair::with("switchover_called_off", Postgres::builder()).await?;
    let site = &pair.there;
    let service = Service::start(site, "");
    service.until_level().await;
    let slow = "[replication]\ninterval = \"1h\"\nrpo = \"2h\"\nbandwidth_limit = \"50KB/s\"";
    service.reconfigure(slow);
    let large = Spec::new("core", "large", "1").size(20 << 20);
    Factory::new(9).package(&site.primary, large).await?;
    service.reconfigure(&format!("{PROMOTE}\n{slow}"));
    service
        .until("the last copy is made", |status| {
            status["transition"]["step"] == "drain"
        })
        .await;
    until_read_only(&site.primary).await;
    service.reconfigure(slow);
    until_writable(&site.primary).await;
    service
        .until("it is over", |status| status["transition"].is_null())
        .await;

    let limited =
        format!("{PROMOTE}\nchange = \"2\"\n{slow}\n[takeover]\nread_only_limit = \"2s\"");
    service.reconfigure(&limited);
    let told = |line: &str| line.contains("not made within takeover.read_only_limit = 2s");
    let mut service = service;
    service.running.wait_for_line(told, SOON).await?;
    until_writable(&site.primary).await;
    service.stop().await.ok();
    Ok(())
}
