//! The package under the real Supervisor: loaded by `hab svc load` and steered by `hab config apply`. Skipped, loudly, where
//! there is no `hab` (`support::supervisor` says what is wanted).

use std::fs;
use std::time::Duration;

use support::service::SOON;
use support::world::{following, follows, load, say, status_at, world, write_builder_api};
use support::{Factory, Result, Spec, content, wait_until};

/// What an operator waits for a gossiped change, by the issue.
const IN_FORCE: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread")]
async fn gossip_steers_it_without_a_restart_and_a_dropped_key_hurts_nothing() -> Result<()> {
    let Some(mut world) = following("gossip").await? else {
        return Ok(());
    };
    let pid = world.ours.pid("warm-spare")?;
    let copies = world.baselines().await?;
    let environ = fs::read(format!("/proc/{pid}/environ"))?;
    assert!(!String::from_utf8_lossy(&environ).contains("hunter2"));
    world.one_more("first").await?;
    wait_until("the Supervisor's health", SOON, || async {
        let (code, body) = world.ours.health("warm-spare", "dc2").await?;
        let good = code == 200 && body["status"] == "OK";
        good.then_some(())
            .ok_or_else(|| format!("{code} {body}").into())
    })
    .await;

    // Good, and the role is dropped by it: the one on record stays.
    let told = world.apply("site = \"one\"\nlog_level = \"debug\"").await;
    let status = world.until("site", |status| status["site"] == "one").await;
    let took = told.elapsed();
    say("a good apply, in force", took);
    assert!(took < IN_FORCE, "{took:?}");
    assert_eq!(status["role"]["wanted"], "keep");
    assert_eq!(status["role"]["actual"], "spare");
    world.one_more("second").await?;

    // Bad: refused by name, and what was in force stays.
    let told = world
        .apply("site = \"two\"\nreplication.rop = \"1h\"")
        .await;
    let status = world
        .until("refused", |status| status["config"]["valid"] == false)
        .await;
    say("a bad apply, refused", told.elapsed());
    assert_eq!(status["site"], "one", "{status:#}");
    assert!(
        status["config"]["errors"][0]
            .to_string()
            .contains("replication.rop"),
        "{status:#}"
    );
    wait_until("the Supervisor says what is wrong", SOON, || async {
        let (_, body) = world.ours.health("warm-spare", "dc2").await?;
        let said =
            body["status"] == "WARNING" && body["stdout"].to_string().contains("replication.rop");
        said.then_some(()).ok_or_else(|| body.to_string().into())
    })
    .await;
    world.one_more("third").await?;

    // Paused; rows meanwhile; the next apply drops the pause, and nothing was lost.
    world.apply("paused = true").await;
    world
        .until("paused", |status| status["hold"]["reason"] == "paused")
        .await;
    let before = content(&world.site.spare).await?;
    let mut factory = Factory::seeded();
    for name in ["fourth", "fifth"] {
        factory
            .package(&world.site.primary, Spec::new("core", name, "1"))
            .await?;
    }
    assert_eq!(
        content(&world.site.spare).await?,
        before,
        "applied while paused"
    );
    let told = world.apply("site = \"three\"").await;
    world
        .until("it follows again", |s| follows(s) && s["site"] == "three")
        .await;
    world.equal().await?;
    say("the pause dropped, and caught up", told.elapsed());

    // Applied empty: everything is back at user.toml and the package's defaults.
    world.apply("").await;
    let status = world.until("no site", |status| status["site"] == "").await;
    assert_eq!(status["role"]["actual"], "spare", "{status:#}");
    world.one_more("sixth").await?;
    assert_eq!(world.ours.pid("warm-spare")?, pid, "it was restarted");
    assert_eq!(world.baselines().await?, copies, "it copied anew");
    Ok(())
}

/// Applied and dropped again, one after the other: no restart, no copy, no other server, no other role.
#[tokio::test(flavor = "multi_thread")]
async fn every_key_may_be_applied_and_dropped() -> Result<()> {
    let Some(mut world) = following("each-key").await? else {
        return Ok(());
    };
    let pid = world.ours.pid("warm-spare")?;
    let copies = world.baselines().await?;
    let texts = [
        "force_epoch = 7",
        "quiet_until = \"2030-01-01T00:00:00Z\"",
        "paused_until = \"2020-01-01T00:00:00Z\"",
        "change = \"CHG-1\"",
        "log_format = \"json\"",
        "replication.interval = \"2s\"",
        "replication.lag_warn = \"2m\"",
        "replication.rpo = \"1h\"",
        "replication.schedule = \"* * * * *\"",
        "replication.jobs = 3",
        "replication.copies = 4",
        "replication.buffer = \"128MiB\"",
        "replication.bandwidth_limit = \"50MB/s\"",
        "replication.gate_grace = \"2s\"",
        "replication.retry_missing = \"1m\"",
        "replication.artifact_retention = \"30d\"",
        "replication.wal_hold_limit = \"5GB\"",
        "replication.wal_unbounded = true",
        "replication.keep_generations = 9",
        "fuse.max_percent = 50",
        "fuse.min_count = 1",
        "fuse.window = \"2h\"",
        "fuse.approve = \"f-1\"",
        "verify.schedule = \"0 4 * * *\"",
        "verify.deep = true",
        "http.port = 1",
        "http.listen = \"::1\"",
        "local.datastore.ssl_mode = \"disable\"",
        "peer.datastore.user = \"hab\"",
        "peer.datastore.host = \"127.0.0.1\"",
        // Bad ones, which are refused: another kind of value, a table's place, nobody's key.
        "peer = 1",
        "local.s3.endpoint = \"minio\"",
        "[replication]\nmode = [1]",
        "x = { y = 1 }",
    ];
    for (number, text) in texts.iter().enumerate() {
        let site = format!("apply {number}");
        world.apply(&format!("site = \"{site}\"\n{text}")).await;
        wait_until("it is seen", SOON, || async {
            let status = status_at(world.port).await?;
            let seen = status["site"] == site || status["config"]["valid"] == false;
            seen.then_some(())
                .ok_or_else(|| format!("{text}: {status:#}").into())
        })
        .await;
        // Dropped.
        let site = format!("after {number}");
        world.apply(&format!("site = \"{site}\"")).await;
        let status = world.until(text, |status| status["site"] == site).await;
        assert_eq!(status["role"]["actual"], "spare", "{text}");
        assert_eq!(status["role"]["epoch"], 1, "{text}");
    }
    world.until("it follows", follows).await;
    world.one_more("after-all").await?;
    assert_eq!(world.ours.pid("warm-spare")?, pid, "it was restarted");
    assert_eq!(world.baselines().await?, copies, "it copied anew");
    Ok(())
}

/// Builder's own word goes before the binds, and nothing of the local side is configured.
#[tokio::test(flavor = "multi_thread")]
async fn a_stock_node_needs_nothing_of_the_local_side() -> Result<()> {
    let Some(mut world) = world("stock").await? else {
        return Ok(());
    };
    let api = write_builder_api(&world)?;
    let mut user: toml::Table = world.ours.user_toml("warm-spare")?.parse()?;
    // In its usual place it would not even be named; this Supervisor's root is another.
    let local = toml::Table::from_iter([("builder_api_config".into(), api.into())]);
    user.insert("local".into(), local.into());
    user.insert("role".into(), "spare".into());
    world
        .ours
        .write_user_toml("warm-spare", &user.to_string())?;
    load(&world.ours, "standalone").await;
    let status = world.until("it follows", follows).await;
    assert_eq!(status["local"]["datastore"]["source"], "builder-api");
    assert_eq!(status["local"]["s3"]["source"], "builder-api");
    assert_eq!(status["peer"]["datastore"]["source"], "bind");
    world.apply("role = \"keep\"").await;
    world
        .until("keep", |s| follows(s) && s["role"]["wanted"] == "keep")
        .await;
    world.one_more("stock").await
}
