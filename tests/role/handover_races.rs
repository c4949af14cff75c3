//! Two processes, an operator and a pooled client at the wrong moment of a handover: in the end there is one primary.

use std::time::Duration;

use support::follow::{events, followed, until_equal, until_following};
use support::pair::{
    PROMOTE, Pair, forced, is_writable, returned, until_primary, until_read_only, until_settled,
    until_writable, write,
};
use support::proxy::{Mode, Proxy};
use support::service::SOON;
use support::{Result, Service, Site, wait_until};

const BY_ITS_SESSION: &str = "INSERT INTO accounts (name) VALUES ('by a session that lives on')";

/// Builder keeps its sessions: one that began while the fence stood must not be read-only for ever.
#[tokio::test]
async fn no_session_stays_read_only_after_an_undone_switchover() -> Result<()> {
    let pair = Pair::start("races_pooled").await?;
    let site = &pair.there;
    followed(site, "").await?.stop().await.ok();
    let theirs = Service::start(&pair.back, PROMOTE);
    until_primary(&theirs, 1).await;
    Service::doomed(site, PROMOTE, "switchover.drain")
        .dead()
        .await?;
    theirs.until_state("fenced").await;
    let pooled = site.primary.conn().await?;
    assert!(pooled.execute(BY_ITS_SESSION, &[]).await.is_err());
    let service = Service::start(site, "");
    until_writable(&site.primary).await;
    until_following(&service).await;
    wait_until("the session may write, or is gone", SOON, || async {
        match pooled.execute(BY_ITS_SESSION, &[]).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_closed() || error.code().is_none_or(|c| c.code() == "57P01") => {
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    })
    .await;
    theirs
        .until("nothing holds the old primary", |status| {
            status["state"] == "primary" && status["hold"].is_null()
        })
        .await;
    theirs.stop().await.ok();
    service.stop().await.ok();
    Ok(())
}

/// `sync` and a process that stands by wait for the lock of one that is killed just after it has promoted.
#[tokio::test]
async fn whoever_gets_the_lock_of_a_promoted_cluster_sees_that_it_is_one() -> Result<()> {
    let pair = Pair::start("races_lock").await?;
    let site = &pair.there;
    followed(site, "").await?.stop().await.ok();
    let (service, halt) = Service::halting(site, PROMOTE, "promote.before_commit");
    halt.reached().await;
    let beside = service.beside(PROMOTE);
    beside.until_state("standby").await;
    let sync = site.spawn(&["sync"]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    halt.go();
    wait_until("it is promoted", SOON, || async {
        let client = site.spare.pg.conn("warm_spare").await?;
        let sql = "SELECT role FROM cluster";
        match client.query_one(sql, &[]).await?.get(0) {
            "primary" => Ok(()),
            role => Err(role.into()),
        }
    })
    .await;
    service.running.signal(rustix::process::Signal::KILL);
    let ended = sync.wait(SOON).await?;
    assert!(matches!(ended.code, Some(3 | 4)), "{ended}");
    until_primary(&beside, 2).await;
    let status = until_settled(&beside).await;
    assert_eq!(events(&status, "promotion").len(), 1, "{status:#}");
    write(&site.spare, "after").await?;
    assert!(!is_writable(&site.primary).await);
    assert_eq!(beside.get("/primary").await?.status, 200);
    beside.stop().await.ok();
    Ok(())
}

/// The spare's machine is lost in the middle of a switchover, the primary is taken back by force, and the machine comes again.
#[tokio::test]
async fn what_was_begun_before_another_promotion_is_over() -> Result<()> {
    let pair = Pair::start("races_takeback").await?;
    let site = &pair.there;
    followed(site, "").await?.stop().await.ok();
    let on_a = Service::start(&pair.back, PROMOTE);
    until_primary(&on_a, 1).await;
    Service::doomed(site, PROMOTE, "switchover.drain")
        .dead()
        .await?;
    on_a.until_state("fenced").await;
    let status = on_a.until_hold("force_needed").await;
    assert_eq!(status["role"]["next_epoch"], 3, "{status:#}");
    on_a.reconfigure(&forced(3));
    until_primary(&on_a, 3).await;
    write(&site.primary, "taken back").await?;
    let on_b = Service::start(site, PROMOTE);
    on_b.until("the wish is over", |status| {
        let reasons = status["health"]["reasons"].as_array();
        reasons.is_some_and(|all| all.iter().any(|reason| reason["code"] == "handover_undone"))
    })
    .await;
    until_equal(site).await?;
    write(&site.primary, "still").await?;
    until_equal(site).await?;
    assert!(is_writable(&site.primary).await && !is_writable(&site.spare).await);
    // Asked for anew it is another wish.
    on_b.reconfigure(&format!("{PROMOTE}\nchange = \"again\""));
    until_primary(&on_b, 4).await;
    on_a.until_state("fenced").await;
    on_a.stop().await.ok();
    on_b.stop().await.ok();
    Ok(())
}

#[tokio::test]
async fn an_undo_at_another_server_is_none() -> Result<()> {
    let pair = Pair::start("races_other").await?;
    let site = &pair.there;
    followed(site, "").await?.stop().await.ok();
    let third = Site::builder("races_third")
        .primary(support::follow::logical())
        .start()
        .await?;
    Service::doomed(site, PROMOTE, "switchover.drain")
        .dead()
        .await?;
    let service = Service::start(site, &third.primary.pg.as_peer(""));
    service.until_hold("force_needed").await;
    assert!(!third.primary.pg.has_database("warm_spare").await?);
    service.reconfigure("");
    until_writable(&site.primary).await;
    until_following(&service).await;
    until_equal(site).await?;
    service.stop().await.ok();
    Ok(())
}

/// What another server said of its epoch is remembered, and makes no difference to the fence that stands at the right one.
#[tokio::test]
async fn a_fence_is_withdrawn_although_a_wrong_servers_epoch_was_heard() -> Result<()> {
    let pair = Pair::start("races_heard").await?;
    let site = &pair.there;
    followed(site, "").await?.stop().await.ok();
    let wrong = Pair::start("races_wrong").await?;
    let elsewhere = Service::start(&wrong.back, PROMOTE);
    until_primary(&elsewhere, 1).await;
    elsewhere.stop().await.ok();
    let wrong = &wrong.there.primary.pg;
    let state = wrong.conn("warm_spare").await?;
    state.batch_execute("UPDATE cluster SET epoch = 7").await?;
    Service::doomed(site, PROMOTE, "switchover.drain")
        .dead()
        .await?;
    let service = Service::start(site, &wrong.as_peer(PROMOTE));
    service
        .until("the epoch is heard", |status| {
            status["role"]["next_epoch"] == 8
        })
        .await;
    assert!(!is_writable(&site.primary).await);
    service.reconfigure("");
    until_writable(&site.primary).await;
    until_following(&service).await;
    until_equal(site).await?;
    service.stop().await.ok();
    Ok(())
}

/// A failover goes on when what was in its way is over, and brings what a primary that answers still has.
#[tokio::test]
async fn a_failover_is_not_given_up_for_a_passing_fault() -> Result<()> {
    let pair = Pair::start("races_fault").await?;
    let site = &pair.there;
    followed(site, "").await?.stop().await.ok();
    write(&site.primary, "brought").await?;
    Service::doomed(site, &forced(2), "failover.drain")
        .dead()
        .await?;
    let (service, halt) = Service::halting(site, &forced(2), "failover.sequences");
    halt.reached().await;
    let admin = site.spare.pg.conn("postgres").await?;
    let connect = async |may: bool| {
        let sql = format!("ALTER DATABASE builder ALLOW_CONNECTIONS {may}");
        admin.batch_execute(&sql).await
    };
    connect(false).await?;
    halt.go();
    service
        .until("it waits", |status| !status["hold"].is_null())
        .await;
    connect(true).await?;
    let status = until_primary(&service, 2).await;
    let told = support::follow::events(&status, "promotion");
    assert!(told[0].contains("by switchover"), "{told:?}");
    assert_eq!(
        support::content(&site.primary).await?,
        support::content(&site.spare).await?
    );
    service.stop().await.ok();
    Ok(())
}

/// Clients of the spare that are about to be seen when the fence is lifted.
#[tokio::test]
async fn no_session_of_the_new_primary_is_read_only_for_life() -> Result<()> {
    let pair = Pair::start("races_late").await?;
    let site = &pair.there;
    let service = followed(site, "").await?;
    let url = format!(
        "{}?options=-c%20post_auth_delay%3D1",
        site.spare.pg.url("builder")
    );
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..20 {
        let url = url.clone();
        clients.spawn(async move {
            tokio::time::sleep(Duration::from_millis(50 * number)).await;
            let mut kept = Vec::new();
            for _ in 0..4 {
                if let Ok((client, wire)) =
                    tokio_postgres::connect(&url, tokio_postgres::NoTls).await
                {
                    tokio::spawn(wire);
                    kept.push(client);
                }
            }
            kept
        });
    }
    service.reconfigure(PROMOTE);
    until_primary(&service, 2).await;
    let mut read_only = 0;
    while let Some(kept) = clients.join_next().await {
        for client in kept? {
            let shown = client.query_one("SHOW transaction_read_only", &[]).await;
            read_only += usize::from(shown.is_ok_and(|row| row.get::<_, String>(0) == "on"));
        }
    }
    assert_eq!(read_only, 0);
    service.stop().await.ok();
    Ok(())
}

/// The other side is the primary by a switchover, and nothing of ours is left on the old one but its fence.
async fn handed_over(pair: &Pair) -> Result<Service<'_>> {
    let service = followed(&pair.there, "").await?;
    service.reconfigure(PROMOTE);
    until_primary(&service, 2).await;
    until_settled(&service).await;
    let admin = pair.there.primary.pg.conn("postgres").await?;
    let slots = "SELECT count(*) FROM pg_replication_slots";
    wait_until("the slot is gone", SOON, || async {
        match admin.query_one(slots, &[]).await?.get::<_, i64>(0) {
            0 => Ok(()),
            _ => Err("it is there".into()),
        }
    })
    .await;
    Ok(service)
}

/// Something is, and nobody calls it exact.
async fn assert_listed(old: &Site) {
    let told = old.warm_spare(&["divergence", "--json"]).await;
    assert_eq!(told.code, Some(1), "{told}");
    assert_eq!(told.json()["divergence"]["exact"], false, "{told}");
}

/// A planned handover is compared too: what the new primary did itself is nothing that was lost, and a client that goes
/// round the fence writes what nobody else has.
#[tokio::test]
async fn what_was_written_round_the_fence_after_a_planned_handover_is_listed() -> Result<()> {
    for written in [false, true] {
        let pair = Pair::start("races_round").await?;
        let site = &pair.there;
        let service = handed_over(&pair).await?;
        write(&site.spare, "on the new one").await?;
        let new = site.spare.conn().await?;
        new.batch_execute(
            "UPDATE accounts SET email = 'changed there' WHERE name <> 'on the new one'; \
             DELETE FROM origin_channel_packages",
        )
        .await?;
        if written {
            let round = site.primary.conn().await?;
            let set = "SET default_transaction_read_only = off";
            round.batch_execute(set).await?;
            let sql = "INSERT INTO accounts (name, email) VALUES ('round the fence', '')";
            round.batch_execute(sql).await?;
        }
        let back = returned(&pair.back, "").await?;
        let told = pair.back.warm_spare(&["divergence", "--json"]).await;
        assert_eq!(told.code, Some(i32::from(written)), "{told}");
        let found = &told.json()["divergence"];
        assert_eq!(found["exact"], !written, "{told}");
        assert_eq!(found["rows"], i32::from(written), "{told}");
        back.stop().await.ok();
        service.stop().await.ok();
    }
    Ok(())
}

/// Nobody of ours saw it: no service ran on either side.
#[tokio::test]
async fn what_was_written_while_nobody_looked_after_the_fence_is_listed() -> Result<()> {
    let pair = Pair::start("races_unseen").await?;
    let site = &pair.there;
    let service = handed_over(&pair).await?;
    service.stop().await.ok();
    site.primary.pg.set_fence(false).await?;
    write(&site.primary, "while it was open").await?;
    site.primary.pg.set_fence(true).await?;
    let service = Service::start(site, "");
    until_primary(&service, 2).await;
    let back = returned(&pair.back, "").await?;
    assert_listed(&pair.back).await;
    back.stop().await.ok();
    service.stop().await.ok();
    Ok(())
}

/// A failback that was stopped after its list was made is taken up again, months later: what was written since is on it.
#[tokio::test]
async fn what_was_written_between_two_tries_to_come_back_is_listed() -> Result<()> {
    let pair = Pair::start("races_resumed").await?;
    let site = &pair.there;
    let service = followed(site, "").await?;
    service.stop().await.ok();
    let service = Service::start(site, &forced(2));
    until_primary(&service, 2).await;
    until_settled(&service).await;
    pair.back.write_config("");
    support::follow::prepare(&pair.back).await;
    Service::doomed(&pair.back, "", "failback.role")
        .dead()
        .await?;
    // The slot is gone by now.
    let nobody = "SELECT count(*) FROM pg_replication_slots";
    let slots = site.primary.conn().await?.query_one(nobody, &[]).await?;
    assert_eq!(slots.get::<_, i64>(0), 0);
    service.stop().await.ok();
    site.primary.pg.set_fence(false).await?;
    write(&site.primary, "in an emergency").await?;
    site.primary.pg.set_fence(true).await?;
    let service = Service::start(site, &forced(2));
    until_primary(&service, 2).await;
    let back = returned(&pair.back, "").await?;
    assert_listed(&pair.back).await;
    let told = pair.back.warm_spare(&["divergence", "--json"]).await.json();
    assert_eq!(told["divergence"]["rows"], 1, "{told:#}");
    back.stop().await.ok();
    service.stop().await.ok();
    Ok(())
}

/// What somebody wrote behind a fence that was lifted for a while is looked for, and never called nothing.
#[tokio::test]
async fn what_was_written_behind_a_lifted_fence_is_listed() -> Result<()> {
    let pair = Pair::start("races_lifted").await?;
    let site = &pair.there;
    let service = handed_over(&pair).await?;
    site.primary.pg.set_fence(false).await?;
    write(&site.primary, "around the fence").await?;
    until_read_only(&site.primary).await;
    let back = returned(&pair.back, "").await?;
    assert_listed(&pair.back).await;
    back.stop().await.ok();
    service.stop().await.ok();
    Ok(())
}

#[tokio::test]
async fn what_was_written_until_the_old_primary_closed_its_fence_itself_is_listed() -> Result<()> {
    let pair = Pair::start("races_closed").await?;
    let site = &pair.there;
    let service = handed_over(&pair).await?;
    // It sees nothing of what follows.
    service.stop().await.ok();
    site.primary.pg.set_fence(false).await?;
    write(&site.primary, "around the fence").await?;
    let old = Service::start(&pair.back, "");
    until_read_only(&site.primary).await;
    let service = Service::start(site, "");
    until_primary(&service, 2).await;
    old.stop().await.ok();
    let back = returned(&pair.back, "role = \"spare\"").await?;
    assert_listed(&pair.back).await;
    back.stop().await.ok();
    service.stop().await.ok();
    Ok(())
}

#[tokio::test]
async fn a_fence_that_is_set_again_is_set_to_its_end_whoever_dies_over_it() -> Result<()> {
    let pair = Pair::start("races_refence").await?;
    let site = &pair.there;
    let service = handed_over(&pair).await?;
    service.stop().await.ok();
    site.primary.pg.set_fence(false).await?;
    let pooled = site.primary.conn().await?;
    Service::doomed(site, "", "fence.recorded").dead().await?;
    let service = Service::start(site, "");
    wait_until("the session from before is ended", SOON, || async {
        let sql = "INSERT INTO accounts (name, email) VALUES (gen_random_uuid()::text, '')";
        match pooled.execute(sql, &[]).await {
            Err(error) if error.is_closed() || error.as_db_error().is_some() => Ok(()),
            other => Err(format!("{other:?}").into()),
        }
    })
    .await;
    assert!(!is_writable(&site.primary).await);
    service.stop().await.ok();
    Ok(())
}

/// Clocks are set in just this moment: what gives the primary its writers back is not put off by it.
#[tokio::test]
async fn a_clock_that_is_set_back_delays_no_undoing() -> Result<()> {
    let Some(library) = faketime() else {
        support::skip("a clock that is set back: there is no libfaketime here");
        return Ok(());
    };
    let mut pair = Pair::start("races_clock").await?;
    let line = Proxy::start(pair.there.primary.pg.port()).await?;
    let settings = line.to_peer("[takeover]\nfence_retry = \"1s\"");
    followed(&pair.there, &settings).await?.stop().await.ok();
    let promote = format!("{PROMOTE}\n{settings}");
    let doomed = Service::doomed(&pair.there, &promote, "switchover.drain");
    doomed.dead().await?;
    until_read_only(&pair.there.primary).await;
    line.lose().await;
    let time = pair.there.dir.path().join("time");
    std::fs::write(&time, "+0")?;
    let environment = [
        ("LD_PRELOAD", library),
        ("FAKETIME_TIMESTAMP_FILE", time.display().to_string()),
        ("FAKETIME_NO_CACHE", "1".into()),
        ("DONT_FAKE_MONOTONIC", "1".into()),
    ];
    let environment = environment.map(|(name, value)| (name.to_string(), value));
    pair.there.environment.extend(environment);
    let service = Service::start(&pair.there, &settings);
    let status = service.until_hold("force_needed").await;
    assert!(
        status["hold"]["detail"]
            .to_string()
            .contains("was given up")
    );
    std::fs::write(&time, "-3600")?;
    let now = status["time"].as_str().expect("a time").to_string();
    service
        .until("its clock was set back", |status| {
            status["time"].as_str().is_some_and(|time| *time < *now)
        })
        .await;
    line.set(Mode::Pass).await;
    let began = std::time::Instant::now();
    until_writable(&pair.there.primary).await;
    assert!(
        began.elapsed() < Duration::from_secs(30),
        "{:?}",
        began.elapsed()
    );
    service.stop().await.ok();
    Ok(())
}

fn faketime() -> Option<String> {
    let found = std::fs::read_dir("/usr/lib").ok()?.filter_map(|entry| {
        let library = entry.ok()?.path().join("faketime/libfaketime.so.1");
        library.exists().then(|| library.display().to_string())
    });
    found.last()
}
