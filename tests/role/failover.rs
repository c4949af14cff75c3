//! The primary is gone: its spare is promoted by force, and the old one, when it comes again, is fenced and comes back.

use support::follow::{events, followed, prepare, until_equal, until_following};
use support::packages::delete_package;
use support::pair::{
    PROMOTE, Pair, Writers, forced, is_writable, returned, sequences, until_primary, until_settled,
    write,
};
use support::service::{SOON, approval, until_conflict};
use support::{Cluster, Factory, Result, Service, Site, Spec};

#[tokio::test]
async fn what_a_failover_under_load_lost_is_on_record_to_the_row() -> Result<()> {
    let pair = Pair::start("failover_load").await?;
    let site = &pair.there;
    let mut factory = Factory::new(7);
    let kept = factory
        .package(&site.primary, Spec::new("core", "kept", "1"))
        .await?;
    let service = followed(site, "").await?;
    let writers = Writers::start([&site.primary, &site.spare], 4);
    writers.until_written(0, 200).await;
    // From here on the spare hears of nothing.
    service.running.signal(rustix::process::Signal::STOP);
    writers.until_written(0, 50).await;
    let lost = factory
        .package(&site.primary, Spec::new("core", "lost", "1"))
        .await?;
    delete_package(&site.primary, &kept).await?;
    site.primary.pg.kill9();
    service.reconfigure(&forced(2));
    service.running.signal(rustix::process::Signal::CONT);
    until_primary(&service, 2).await;
    writers.until_written(1, 200).await;
    site.primary.pg.start_again().await?;
    until_settled(&service).await;
    let acknowledged = writers.stop().await;
    assert!(!is_writable(&site.primary).await);

    let back = returned(&pair.back, "").await?;
    until_equal(&pair.back).await?;
    let missing = support::pair::lost(&site.spare, &acknowledged).await?;
    println!(
        "{} rows acknowledged, {} of them lost",
        acknowledged.len(),
        missing.len()
    );
    assert!(!missing.is_empty(), "there was nothing to lose");
    let state = site.primary.pg.conn("warm_spare").await?;
    let sql = "SELECT n FROM unnest($1::text[]) n WHERE NOT EXISTS ( \
                 SELECT FROM diverged_row WHERE table_name = 'public.accounts' AND new->>'name' = n)";
    let unknown = state.query(sql, &[&missing]).await?;
    assert_eq!(unknown.len(), 0, "lost, and not on record");

    let folder = tempfile::tempdir()?;
    let fetch = folder.path().to_string_lossy().into_owned();
    let told = pair
        .back
        .warm_spare(&["divergence", "--json", "--fetch", &fetch])
        .await;
    assert_eq!(told.code, Some(1), "{told}");
    let found = told.json();
    let found = &found["divergence"];
    assert_eq!(found["exact"], true, "{found:#}");
    let class = |ident: &str| {
        let all = found["packages"].as_array().cloned().unwrap_or_default();
        let one = all
            .iter()
            .find(|package| package["ident"] == ident)
            .cloned();
        one.unwrap_or_default()
    };
    assert_eq!(class(&lost.ident)["class"], "only_here", "{found:#}");
    assert_eq!(class(&kept.ident)["class"], "gone_here", "{found:#}");
    let file = class(&lost.ident)["file"]
        .as_str()
        .unwrap_or_default()
        .to_string();
    let bytes = std::fs::read(folder.path().join(&file)).or_else(|_| std::fs::read(&file))?;
    assert_eq!(bytes, lost.bytes());
    back.stop().await.ok();
    service.stop().await.ok();
    Ok(())
}

#[tokio::test]
async fn only_the_right_number_promotes_without_the_primary() -> Result<()> {
    let pair = Pair::start("failover_forced").await?;
    let site = &pair.there;
    let service = followed(site, "").await?;
    site.primary.pg.kill9();
    service.reconfigure(PROMOTE);
    let status = service.until_hold("force_needed").await;
    assert_eq!(status["role"]["next_epoch"], 2, "{status:#}");
    let step = status["hold"]["next_step"].as_str().unwrap_or_default();
    assert!(step.contains("force_epoch = 2"), "{step}");
    service.reconfigure(&forced(7));
    let wrong = service
        .until("the wrong number", |status| {
            status["role"]["wanted"] == "primary" && status["hold"]["reason"] == "force_needed"
        })
        .await;
    assert_eq!(wrong["role"]["actual"], "spare");
    assert!(!is_writable(&site.spare).await);
    let before = sequences(&site.spare).await?;
    service.reconfigure(&forced(2));
    until_primary(&service, 2).await;
    // None is given twice, as far as one can know.
    for (name, value) in sequences(&site.spare).await? {
        assert!(value >= before[&name] + 1024, "{name}: {value}");
    }
    write(&site.spare, "first").await?;
    assert_eq!(service.get("/primary").await?.status, 200);

    // A later apply of something else drops the role, or shows the one of before.
    service.reconfigure("role = \"keep\"\nsite = \"dc2\"");
    service
        .until("still the primary", |status| {
            status["site"] == "dc2" && status["state"] == "primary" && status["hold"].is_null()
        })
        .await;
    service.reconfigure("site = \"dc3\"");
    // Whether there is a newer primary cannot be asked.
    let status = service.until_hold("peer_unreachable").await;
    assert_eq!(status["state"], "primary", "{status:#}");
    write(&site.spare, "second").await?;

    // The peer's address is moved to this very cluster.
    service.reconfigure(&site.spare.pg.as_peer(PROMOTE));
    service.until_hold("same_server").await;
    write(&site.spare, "third").await?;
    service.reconfigure(PROMOTE);
    let status = service
        .until("an old primary that may be open", |status| {
            status["health"]["reasons"][0]["code"] == "old_primary_open"
        })
        .await;
    assert_eq!(status["health"]["level"], 1, "{status:#}");
    site.primary.pg.start_again().await?;
    until_settled(&service).await;
    assert!(write(&site.primary, "late").await.is_err());
    let events = events(&service.status().await?, "promotion");
    assert_eq!(events.len(), 1, "{events:?}");
    service.stop().await.ok();
    Ok(())
}

/// By its own service, which sees what the new primary cannot do.
#[tokio::test]
async fn a_primary_that_sees_a_newer_one_fences_itself() -> Result<()> {
    let pair = Pair::start("failover_split").await?;
    let (site, back) = (&pair.there, &pair.back);
    let line = support::proxy::Proxy::start(site.primary.pg.port()).await?;
    let old = Service::start(back, PROMOTE);
    until_primary(&old, 1).await;
    let new = followed(site, &line.to_peer("")).await?;
    old.until("a spare follows", |status| status["health"]["level"] == 0)
        .await;
    line.lose().await;
    new.reconfigure(&line.to_peer(&forced(2)));
    until_primary(&new, 2).await;
    let status = old.until_state("fenced").await;
    assert_eq!(status["health"]["level"], 2, "{status:#}");
    assert!(!is_writable(&site.primary).await);
    assert_eq!(old.get("/primary").await?.status, 503);

    // Started again with the configuration of before, it stays what it is.
    let old = {
        old.running.signal(rustix::process::Signal::KILL);
        old.start_again()
    };
    old.until_state("fenced").await;
    assert!(!is_writable(&site.primary).await);
    let wanted = old.status().await?["role"]["next_epoch"].clone();
    assert_eq!(wanted, 3);

    // Taken back by force: now the other one gives way.
    old.reconfigure(&forced(3));
    // It is held as one of two primaries as soon as it has seen the other one.
    old.until("taken back", |status| status["role"]["epoch"] == 3)
        .await;
    write(&site.primary, "taken back").await?;
    line.set(support::proxy::Mode::Pass).await;
    new.until_state("fenced").await;
    assert!(!is_writable(&site.spare).await);
    site.write_config("");
    prepare(site).await;
    new.reconfigure(&line.to_peer(""));
    support::follow::until_following(&new).await;
    until_equal(site).await?;
    old.stop().await.ok();
    new.stop().await.ok();
    Ok(())
}

fn two_phase() -> support::postgres::Builder {
    support::follow::logical().setting("max_prepared_transactions", "5")
}

/// One that no session holds, and whoever commits it writes.
async fn prepare_transaction(primary: &Cluster) -> Result<()> {
    let sql =
        "BEGIN; INSERT INTO accounts (name, email) VALUES ('open', ''); PREPARE TRANSACTION 'open'";
    Ok(primary.conn().await?.batch_execute(sql).await?)
}

/// A prepared transaction may be committed behind any fence: it is told until somebody ends it.
#[tokio::test]
async fn a_primary_that_cannot_close_its_fence_tries_until_it_can() -> Result<()> {
    let pair = Pair::prepared("failover_open", two_phase()).await?;
    let (site, back) = (&pair.there, &pair.back);
    let line = support::proxy::Proxy::start(site.primary.pg.port()).await?;
    let old = Service::start(back, PROMOTE);
    until_primary(&old, 1).await;
    let new = followed(site, &line.to_peer("")).await?;
    prepare_transaction(&site.primary).await?;

    line.lose().await;
    new.reconfigure(&line.to_peer(&forced(2)));
    until_primary(&new, 2).await;
    let status = old
        .until("a fence that does not hold", |status| {
            status["state"] == "fenced" && status["local"]["fenced"] == false
        })
        .await;
    assert_eq!(status["health"]["level"], 2, "{status:#}");
    assert!(write(&site.primary, "late").await.is_err());
    let client = site.primary.conn().await?;
    client.batch_execute("ROLLBACK PREPARED 'open'").await?;
    old.until("the fence holds", |status| {
        status["local"]["fenced"] == true
    })
    .await;
    old.stop().await.ok();
    new.stop().await.ok();
    Ok(())
}

/// As docs/takeover.md says where the service does not start at all. What an earlier promotion has on record is not of this one.
#[tokio::test]
async fn what_is_lost_by_a_promotion_by_hand_is_listed_too() -> Result<()> {
    let pair = Pair::start("failover_by_hand").await?;
    let (site, back) = (&pair.there, &pair.back);
    let on_b = followed(site, "").await?;
    on_b.reconfigure(PROMOTE);
    until_primary(&on_b, 2).await;
    until_settled(&on_b).await;
    let on_a = returned(back, "").await?;
    on_a.reconfigure(PROMOTE);
    until_primary(&on_a, 3).await;
    until_settled(&on_a).await;
    site.write_config("");
    prepare(site).await;
    on_b.reconfigure("role = \"spare\"");
    support::follow::until_following(&on_b).await;
    until_equal(site).await?;
    on_b.stop().await.ok();
    write(&site.primary, "nobody else has it").await?;
    on_a.stop().await.ok();

    let by_hand = "BEGIN; UPDATE cluster SET role = 'primary', epoch = greatest(epoch, 1) + 1, since = now();
        DELETE FROM fence; DELETE FROM transition; ALTER DATABASE builder RESET default_transaction_read_only; COMMIT";
    let state = site.spare.pg.conn("warm_spare").await?;
    state.batch_execute(by_hand).await?;
    let on_a = returned(back, "role = \"spare\"").await?;
    let told = back.warm_spare(&["divergence", "--json"]).await;
    assert_eq!(told.code, Some(1), "{told}");
    let found = &told.json()["divergence"];
    assert_eq!(
        (&found["epoch"], &found["exact"]),
        (&4.into(), &false.into()),
        "{found:#}"
    );
    assert_eq!(found["rows"], 1, "{found:#}");
    on_a.stop().await.ok();
    Ok(())
}

/// A primary that nobody told of its role may be told to come back while somebody can still write.
#[tokio::test]
async fn a_failback_that_cannot_close_its_fence_says_so_and_ends_when_it_can() -> Result<()> {
    let pair = Pair::prepared("failback_open", two_phase()).await?;
    let (site, back) = (&pair.there, &pair.back);
    let line = support::proxy::Proxy::start(site.primary.pg.port()).await?;
    let new = followed(site, &line.to_peer("")).await?;
    line.lose().await;
    new.reconfigure(&line.to_peer(&forced(2)));
    until_primary(&new, 2).await;
    prepare_transaction(&site.primary).await?;
    let old = support::pair::returning(back, "role = \"spare\"").await;
    let status = old
        .until("it is told what keeps it open", |status| {
            status["hold"]["reason"] == "failed" && status["local"]["fenced"] == false
        })
        .await;
    let detail = status["hold"]["detail"].as_str().unwrap_or_default();
    assert!(detail.contains("can still write"), "{status:#}");
    // Neither another look at the peer takes that back, nor a proof by a session that began later.
    support::wait_until("the keeping of the fence fails too", SOON, || async {
        let told = old.running.stderr();
        match told
            .iter()
            .filter(|line| line.contains("can still write"))
            .count()
        {
            0 | 1 => Err("not yet".into()),
            _ => Ok(()),
        }
    })
    .await;
    let still = old.status().await?;
    assert_eq!(still["hold"]["reason"], "failed", "{still:#}");
    assert_eq!(still["local"]["fenced"], false, "{still:#}");
    let client = site.primary.conn().await?;
    client.batch_execute("ROLLBACK PREPARED 'open'").await?;
    support::follow::until_following(&old).await;
    old.stop().await.ok();
    new.stop().await.ok();
    Ok(())
}

/// In both orders: whoever was declared first, and whoever is chosen.
#[tokio::test]
async fn two_declared_primaries_are_told_and_one_comes_over_when_asked() -> Result<()> {
    for reversed in [false, true] {
        let site = Site::builder("failover_two")
            .primary(support::follow::logical())
            .spare(support::follow::logical())
            .spare_database()
            .start()
            .await?;
        Factory::seeded().fill(&site.primary, 1).await?;
        // Either may become the spare, and no empty one is copied.
        Factory::new(5).fill(&site.spare, 1).await?;
        let pair = Pair::of(site)?;
        match reversed {
            false => chosen(&pair.there, &pair.back).await?,
            true => chosen(&pair.back, &pair.there).await?,
        }
    }
    Ok(())
}

/// The second one is chosen.
async fn chosen(first: &Site, second: &Site) -> Result<()> {
    let one = Service::start(first, PROMOTE);
    until_primary(&one, 1).await;
    let two = Service::start(second, PROMOTE);
    for service in [&one, &two] {
        let status = until_conflict(service, &["another line", "system id"]).await;
        assert_eq!(status["state"], "primary", "{status:#}");
    }
    // Nobody decides for the operator, and neither obeys a stranger.
    two.reconfigure(&forced(2));
    until_primary(&two, 2).await;
    until_conflict(&one, &["another line", "epoch 2"]).await;
    assert!(is_writable(&first.spare).await && is_writable(&second.spare).await);
    one.reconfigure("role = \"spare\"");
    let status = until_conflict(&one, &["stranger", "another line"]).await;
    assert!(is_writable(&first.spare).await);
    one.reconfigure(&format!("role = \"spare\"\n{}", approval(&status)));
    one.until_state("following").await;
    assert!(!is_writable(&first.spare).await);
    write(&second.spare, "chosen").await?;
    until_equal(first).await?;
    one.stop().await.ok();
    two.stop().await.ok();
    Ok(())
}

/// Nobody can write while the last copy of a forced promotion is made.
#[tokio::test]
async fn by_snapshots_a_failover_waits_for_its_last_copy_only_so_long() -> Result<()> {
    let site = Site::builder("failover_copy").own_stores().start().await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 3).await?;
    let service = Service::start(&site, "");
    service.until_level().await;
    service.stop().await.ok();
    factory
        .package(&site.primary, Spec::new("core", "late", "1"))
        .await?;
    // It answers no question any more.
    site.primary.minio.sigstop();
    let wish = format!("{}\n[takeover]\ndrain_timeout = \"1s\"", forced(2));
    let service = Service::start(&site, &wish);
    let status = until_primary(&service, 2).await;
    site.primary.minio.sigcont();
    let promoted = &events(&status, "promotion")[0];
    assert!(
        promoted.to_string().contains("promoted by failover"),
        "{promoted}"
    );
    let text = "the last copy was not made within takeover.drain_timeout = 1s";
    let told = |line: &String| line.contains(text);
    assert!(service.running.stderr().iter().any(told));
    service.stop().await.ok();
    Ok(())
}

/// As a server whose first packet is lost: nobody answers, and a second later somebody does.
#[tokio::test(flavor = "multi_thread")]
async fn one_lost_packet_does_not_make_a_failover_lossy() -> Result<()> {
    use rustix::net::{AddressFamily, SocketType, bind, listen, socket};
    let pair = Pair::start("failover_packet").await?;
    let site = &pair.there;
    // One connection waits to be accepted, and no more.
    let door = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    bind(&door, &std::net::SocketAddr::from(([127, 0, 0, 1], 0)))?;
    listen(&door, 0)?;
    let door = std::net::TcpListener::from(door);
    door.set_nonblocking(true)?;
    let port = door.local_addr()?.port();
    let door = tokio::net::TcpListener::from_std(door)?;
    let (open, mut may) = tokio::sync::watch::channel(true);
    let to = site.primary.pg.port();
    let _keeper = tokio::spawn(async move {
        loop {
            if may.wait_for(|open| *open).await.is_err() {
                return;
            }
            let accepted = tokio::select! {
                accepted = door.accept() => accepted,
                _ = may.changed() => continue,
            };
            let Ok((mut client, _)) = accepted else {
                continue;
            };
            tokio::spawn(async move {
                let server = tokio::net::TcpStream::connect(("127.0.0.1", to)).await;
                if let Ok(mut server) = server {
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                }
            });
        }
    });
    let through = format!("[peer.datastore]\nport = {port}");
    let mut service = followed(site, &through).await?;
    write(&site.primary, "acknowledged").await?;
    open.send_replace(false);
    // A connection that comes now finds the one place taken.
    let knocks: Vec<_> = (0..3)
        .map(|_| tokio::net::TcpStream::connect(("127.0.0.1", port)))
        .collect();
    let waiting = tokio::spawn(async move {
        for knock in knocks {
            let _ = tokio::time::timeout(std::time::Duration::from_millis(100), knock).await;
        }
        std::future::pending::<()>().await;
    });
    tokio::time::sleep(std::time::Duration::from_millis(400)).await;
    service.running.forget();
    service.reconfigure(&format!("{}\n{through}", forced(2)));
    let begins = |line: &str| line.contains("failover: step 2 of 8: fence");
    service.running.wait_for_line(begins, SOON).await?;
    tokio::time::sleep(std::time::Duration::from_millis(700)).await;
    waiting.abort();
    open.send_replace(true);
    let status = until_primary(&service, 2).await;
    let told = events(&status, "promotion");
    assert!(told[0].contains("by switchover"), "{told:?}");
    assert!(!is_writable(&site.primary).await);
    service.stop().await.ok();
    Ok(())
}

/// A usual tuning line must not let a promotion be told before it is on disk.
#[tokio::test]
async fn a_promotion_outlasts_a_power_cut_whatever_the_server_is_set_to() -> Result<()> {
    let lazy = || {
        support::follow::logical()
            .setting("synchronous_commit", "off")
            .setting("wal_writer_delay", "10s")
    };
    let site = Site::builder("failover_lazy").primary(lazy()).spare(lazy());
    let site = site.start().await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    prepare(&site).await;
    // Right after the commit: what comes later would bring it to the disk too.
    let (service, halt) = Service::halting(&site, "", "promote.after_commit");
    until_following(&service).await;
    service.reconfigure(PROMOTE);
    halt.reached().await;
    site.spare.pg.kill9();
    site.primary.pg.kill9();
    halt.go();
    site.spare.pg.start_again().await?;
    site.primary.pg.start_again().await?;
    let role = "SELECT role, epoch FROM cluster";
    let state = site.spare.pg.conn("warm_spare").await?;
    let row = state.query_one(role, &[]).await?;
    let found: (String, i64) = (row.get(0), row.get(1));
    assert_eq!(found, ("primary".into(), 2), "the promotion was forgotten");
    assert!(!is_writable(&site.primary).await, "the fence was forgotten");
    service.stop().await.ok();
    Ok(())
}
