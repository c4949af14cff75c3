//! The verbs `promote` and `fence`: what a person does where the service cannot run.

use std::time::Duration;
use support::follow::followed;
use support::pair::{
    PROMOTE, Pair, forced, is_writable, returned, until_primary, until_settled, write,
};
use support::proxy::{Mode, Proxy};
use support::service::SOON;
use support::{Factory, Output, Result, Service, Site, wait_until};

async fn promote(site: &Site, epoch: &str) -> Output {
    site.warm_spare(&["promote", "--epoch", epoch]).await
}

fn refused(output: &Output, words: &str) {
    assert_eq!(output.code, Some(4), "{output}");
    assert!(output.stderr.contains(words), "{output}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spare_without_its_service_is_promoted_and_fences_the_old_primary_later() -> Result<()> {
    let pair = Pair::start("by_hand").await?;
    let site = &pair.there;
    let mut factory = Factory::new(3);
    factory.fill(&site.primary, 3).await?;
    let service = followed(site, "").await?;
    refused(&promote(site, "2").await, "another warm-spare");
    service.stop().await.ok();
    site.primary.pg.kill9();

    refused(
        &promote(site, "3").await,
        "the next one of this cluster, which is 2",
    );
    refused(&promote(site, "0").await, "which is 2");
    assert!(!is_writable(&site.spare).await);
    let done = promote(site, "2").await.ok();
    assert!(done.stdout.contains("the primary of epoch 2"), "{done}");
    assert!(is_writable(&site.spare).await);
    // The epoch is on record outside PostgreSQL too.
    let witness = site.spare.get(".warm-spare/epoch.json").await?;
    let witness = witness.expect("an object with the epoch");
    assert!(String::from_utf8_lossy(&witness).contains("\"epoch\":2"));
    write(&site.spare, "after").await?;
    // No id is given twice: the sequences were ahead of the last ones that were copied.
    factory.fill(&site.spare, 2).await?;
    refused(&promote(site, "3").await, "the primary of epoch 2 already");

    // The old primary comes up again, with nobody to tell it.
    site.primary.pg.start_again().await?;
    assert!(is_writable(&site.primary).await);
    let shown = site.warm_spare(&["fence", "--peer"]).await;
    assert_eq!(shown.code, Some(0), "{shown}");
    let service = Service::start(site, "role = \"keep\"");
    until_settled(&service).await;
    assert!(!is_writable(&site.primary).await);
    let shown = site.warm_spare(&["--json", "fence", "--peer"]).await;
    assert_eq!(shown.code, Some(1), "{shown}");
    let by = &shown.json()["by"];
    assert_eq!(
        (&by["epoch"], &by["final"]),
        (&2.into(), &true.into()),
        "{shown}"
    );
    let back = returned(&pair.back, "").await?;
    back.stop().await.ok();
    service.stop().await.ok();
    Ok(())
}

/// A fenced old primary whose successor is lost takes the role back.
#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_old_primary_is_promoted_above_its_fence() -> Result<()> {
    let pair = Pair::start("by_hand_back").await?;
    let site = &pair.there;
    Factory::new(3).fill(&site.primary, 2).await?;
    let service = followed(site, "").await?;
    service.reconfigure(support::pair::PROMOTE);
    until_settled(&service).await;
    service.stop().await.ok();
    pair.back.write_config("role = \"keep\"");
    let shown = pair.back.warm_spare(&["fence"]).await;
    assert_eq!(shown.code, Some(1), "{shown}");
    assert!(shown.stdout.contains("under epoch 2, for good"), "{shown}");
    refused(&promote(&pair.back, "2").await, "which is 3");
    let lifted = pair.back.warm_spare(&["fence", "--lift"]).await;
    refused(&lifted, "has fenced this cluster under epoch 2");
    assert!(!is_writable(&site.primary).await);
    let done = promote(&pair.back, "3").await.ok();
    assert!(
        done.stdout.contains("Nothing fences the other cluster"),
        "{done}"
    );
    assert!(is_writable(&site.primary).await);
    Ok(())
}

/// Kills the verb at this point of the program.
async fn kill_promotion(site: &Site, epoch: &str, point: &str) {
    let arguments = ["promote", "--epoch", epoch];
    let kill = [("WARM_SPARE_KILL_AT", point)];
    let killed = site.spawn_with(&site.config_file(), &arguments, &kill);
    let ended = killed.wait(SOON).await.expect("it ends");
    assert_eq!(ended.code, None, "{ended}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_that_was_killed_is_finished_by_the_same_command() -> Result<()> {
    let pair = Pair::start("by_hand_killed").await?;
    let site = &pair.there;
    followed(site, "").await?.stop().await.ok();
    site.primary.pg.kill9();
    let from_before = site.spare.conn().await?;
    kill_promotion(site, "2", "promote.before_commit").await;
    assert!(!is_writable(&site.spare).await);
    kill_promotion(site, "2", "promote.after_commit").await;
    let done = promote(site, "2").await.ok();
    assert!(
        done.stdout.contains("the primary of epoch 2 already"),
        "{done}"
    );
    // A session from before would stay read-only.
    wait_until("the session from before is ended", SOON, || async {
        match from_before.simple_query("SELECT 1").await {
            Ok(_) => Err("it lives".into()),
            Err(_) => Ok(()),
        }
    })
    .await;
    promote(site, "2").await.ok();
    Ok(())
}

/// A takeover by the service was killed, and is finished by hand under its own number.
#[tokio::test(flavor = "multi_thread")]
async fn a_takeover_that_was_killed_leaves_its_number() -> Result<()> {
    let pair = Pair::start("by_hand_number").await?;
    let site = &pair.there;
    followed(site, "").await?.stop().await.ok();
    Service::doomed(site, PROMOTE, "switchover.drain")
        .dead()
        .await?;
    promote(site, "2").await.ok();
    let service = Service::start(site, "role = \"keep\"");
    until_settled(&service).await;
    assert!(!is_writable(&site.primary).await);
    service.stop().await.ok();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_without_a_copy_is_not_promoted() -> Result<()> {
    let site = support::site("by_hand_never").await;
    Factory::new(3).fill(&site.primary, 2).await?;
    site.write_config("");
    let kill = [("WARM_SPARE_KILL_AT", "baseline.tables")];
    let killed = site.spawn_with(&site.config_file(), &["sync"], &kill);
    assert_eq!(killed.wait(SOON).await?.code, None);
    refused(
        &promote(&site, "2").await,
        "no role of this cluster is on record",
    );

    let pair = Pair::start("by_hand_returning").await?;
    let service = followed(&pair.there, "").await?;
    service.reconfigure(PROMOTE);
    until_settled(&service).await;
    write(&pair.there.spare, "after").await?;
    Service::doomed(&pair.back, "", "baseline.tables")
        .dead()
        .await?;
    refused(&promote(&pair.back, "3").await, "has copied nothing yet");
    assert!(!is_writable(&pair.there.primary).await);
    service.stop().await.ok();
    Ok(())
}

/// What was begun in one bucket is not carried out in another one.
/// Somebody has put another database in the place of the copy.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_not_the_copy_is_not_promoted() -> Result<()> {
    let pair = Pair::start("by_hand_other").await?;
    let site = &pair.there;
    Factory::new(4).fill(&site.primary, 2).await?;
    followed(site, "").await?.stop().await.ok();
    site.primary.pg.kill9();
    let aside = "ALTER DATABASE builder RENAME TO aside";
    let server = site.spare.pg.conn("postgres").await?;
    server.batch_execute(aside).await?;
    refused(
        &promote(site, "2").await,
        "not the database that was copied",
    );
    site.spare.create_builder_database().await?;
    refused(
        &promote(site, "2").await,
        "not the database that was copied",
    );
    server.batch_execute("DROP DATABASE builder").await?;
    server
        .batch_execute("ALTER DATABASE aside RENAME TO builder")
        .await?;
    promote(site, "2").await.ok();
    assert!(is_writable(&site.spare).await);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_leaves_another_bucket_alone() -> Result<()> {
    let pair = Pair::start("by_hand_bucket").await?;
    let site = &pair.there;
    followed(site, "").await?.stop().await.ok();
    site.primary.pg.kill9();
    let (key, other) = ("core/theirs/1/1/x86_64/linux/theirs.hart", "by-hand-other");
    site.spare.s3().create_bucket(other).await?;
    site.spare.s3().put(other, key, "theirs").await?;
    let state = site.spare.pg.conn("warm_spare").await?;
    let sql = "INSERT INTO replacement (key, old_checksum, new_checksum) VALUES ($1, '', 'x')";
    state.execute(sql, &[&key]).await?;
    site.write_config(&format!("[local.s3]\nbucket_name = \"{other}\""));
    promote(site, "2").await.ok();
    let found = site.spare.s3().get(other, key).await?;
    assert_eq!(found.as_deref(), Some(&b"theirs"[..]));
    Ok(())
}

/// In an emergency the verbs need no peer, and no good configuration but the one that was in force.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_peer_in_the_configuration_does_not_stop_the_verbs() -> Result<()> {
    let pair = Pair::start("by_hand_peerless").await?;
    let site = &pair.there;
    followed(site, "").await?.stop().await.ok();
    let mut peerless: toml::Table = std::fs::read_to_string(site.config_file())?.parse()?;
    peerless.remove("peer");
    std::fs::write(site.config_file(), peerless.to_string())?;
    let shown = site.warm_spare(&["fence"]).await;
    assert_eq!(shown.code, Some(1), "{shown}");
    let done = promote(site, "2").await.ok();
    assert!(
        done.stderr.contains("the last good configuration is used"),
        "{done}"
    );
    assert!(is_writable(&site.spare).await);
    Ok(())
}

/// An old primary comes back while the new one is far away: no client is sent to it meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_primary_serves_nobody_before_it_has_asked() -> Result<()> {
    let pair = Pair::start("by_hand_asks").await?;
    let site = &pair.there;
    let on_b = followed(site, "").await?;
    let on_a = Service::start(&pair.back, PROMOTE);
    until_primary(&on_a, 1).await;
    wait_until("/primary", SOON, || async {
        match on_a.get("/primary").await?.status {
            200 => Ok(()),
            other => Err(format!("{other}").into()),
        }
    })
    .await;
    on_a.stop().await.ok();
    site.primary.pg.kill9();
    on_b.reconfigure(&forced(2));
    until_primary(&on_b, 2).await;
    on_b.stop().await.ok();
    site.primary.pg.start_again().await?;
    let far = Proxy::start(site.spare.pg.port()).await?;
    far.set(Mode::Far(Duration::from_millis(100))).await;
    let on_a = Service::start(&pair.back, &far.to_peer(PROMOTE));
    loop {
        let Ok(answer) = on_a.get("/primary").await else {
            continue;
        };
        assert_eq!(answer.status, 503, "{answer:?}");
        if answer.json()["state"] == "fenced" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    on_a.stop().await.ok();
    Ok(())
}

/// The same, with a service that has outlived its datastore.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_outlived_its_datastore_asks_again() -> Result<()> {
    let pair = Pair::start("by_hand_outlived").await?;
    let site = &pair.there;
    let on_b = followed(site, "").await?;
    let far = Proxy::start(site.spare.pg.port()).await?;
    let on_a = Service::start(&pair.back, &far.to_peer(PROMOTE));
    until_primary(&on_a, 1).await;
    wait_until("/primary", SOON, || async {
        match on_a.get("/primary").await?.status {
            200 => Ok(()),
            other => Err(format!("{other}").into()),
        }
    })
    .await;
    site.primary.pg.kill9();
    on_b.reconfigure(&forced(2));
    until_primary(&on_b, 2).await;
    on_b.stop().await.ok();
    on_a.until("it has seen that its datastore is away", |status| {
        status["hold"]["reason"] == "local_unreachable"
    })
    .await;
    far.set(Mode::Far(Duration::from_millis(100))).await;
    site.primary.pg.start_again().await?;
    loop {
        let Ok(answer) = on_a.get("/primary").await else {
            continue;
        };
        assert_eq!(answer.status, 503, "{answer:?}");
        if answer.json()["state"] == "fenced" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    on_a.stop().await.ok();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fence_is_told_as_a_client_meets_it() -> Result<()> {
    let site = Site::own_servers("fence_truth").await;
    site.write_config("");
    // There is no database yet.
    let shown = site.warm_spare(&["fence"]).await;
    assert!(shown.code.is_some_and(|code| code > 1), "{shown}");
    site.spare.create_builder_database().await?;
    let admin = site.spare.pg.conn("postgres").await?;
    let sql = "ALTER SYSTEM SET default_transaction_read_only = on";
    admin.batch_execute(sql).await?;
    admin.batch_execute("SELECT pg_reload_conf()").await?;
    wait_until("the server is read-only", SOON, || async {
        match is_writable(&site.spare).await {
            true => Err("not yet".into()),
            false => Ok(()),
        }
    })
    .await;
    let shown = site.warm_spare(&["fence"]).await;
    assert_eq!(shown.code, Some(1), "{shown}");
    assert!(shown.stdout.contains("but not by a fence"), "{shown}");
    Ok(())
}

/// What another cluster has written is data, and moves no terminal.
#[tokio::test(flavor = "multi_thread")]
async fn the_name_of_another_cluster_cannot_write_a_line() -> Result<()> {
    let pair = Pair::start("fence_name").await?;
    let service = followed(&pair.there, "").await?;
    service.reconfigure(PROMOTE);
    until_settled(&service).await;
    service.stop().await.ok();
    let state = pair.there.primary.pg.conn("warm_spare").await?;
    state
        .batch_execute("UPDATE fence SET by_cluster = E'\\x1b[2Jnobody\\nforged'")
        .await?;
    pair.back.write_config("role = \"keep\"");
    let shown = pair.back.warm_spare(&["fence"]).await;
    assert!(shown.stdout.contains("nobody"), "{shown}");
    assert!(!shown.stdout.contains('\u{1b}'), "{shown}");
    assert!(
        !shown.stdout.lines().any(|line| line.starts_with("forged")),
        "{shown}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fence_is_shown_and_lifted_only_where_nobody_needs_it() -> Result<()> {
    let site = support::site("fence_verb").await;
    Factory::new(3).fill(&site.primary, 2).await?;
    site.write_config("");
    site.warm_spare(&["sync"]).await.ok();
    let shown = site.warm_spare(&["fence"]).await;
    assert_eq!(shown.code, Some(1), "{shown}");
    assert!(
        shown.stdout.contains("This is the fence of every spare."),
        "{shown}"
    );
    let shown = site.warm_spare(&["fence", "--peer"]).await;
    assert_eq!(shown.code, Some(0), "{shown}");
    refused(
        &site.warm_spare(&["fence", "--lift"]).await,
        "is on record as spare",
    );
    assert!(!is_writable(&site.spare).await);
    site.warm_spare(&["release", "--local", "--force"])
        .await
        .ok();
    let shown = site.warm_spare(&["fence"]).await;
    assert_eq!(shown.code, Some(1), "{shown}");
    let lifted = site.warm_spare(&["fence", "--lift"]).await.ok();
    assert!(lifted.stdout.contains("The fence is lifted"), "{lifted}");
    assert!(is_writable(&site.spare).await);
    let again = site.warm_spare(&["fence", "--lift"]).await.ok();
    assert!(again.stdout.contains("was not fenced"), "{again}");
    Ok(())
}
