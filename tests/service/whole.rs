//! The service follows by itself, reports its state, and ends on a signal.

use serde_json::Value;
use support::service::SOON;
use support::{Factory, Output, Result, Service, Site, Spec, site, wait_until};

#[tokio::test(flavor = "multi_thread")]
async fn it_copies_follows_and_says_so() -> Result<()> {
    let site = site("service").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 5).await?;
    let service = Service::start(&site, "site = \"dc2\"");
    let status = service.until_level().await;
    assert_eq!(status["health"]["level"], 0, "{status:#}");
    assert_eq!(status["role"]["actual"], "spare");
    assert_eq!(status["active"], true);
    assert_eq!(status["local"]["fenced"], true);
    assert!(
        status["lag"]["seconds"].as_f64().expect("a lag") < 60.0,
        "{status:#}"
    );
    let first = status["recovery_point"]["lsn"].clone();

    let package = factory
        .package(&site.primary, Spec::new("core", "new", "1"))
        .await?;
    service
        .until("the new package is here", |status| {
            status["recovery_point"]["lsn"] != first && status["lag"]["bytes"] == 0
        })
        .await;
    let rows = site.spare.conn().await?;
    let row = rows
        .query_one("SELECT count(*) FROM origin_packages", &[])
        .await?;
    assert_eq!(row.get::<_, i64>(0), 6);
    assert!(site.spare.get(&package.key).await?.is_some());

    let line = service.health().await;
    assert_eq!(line.code, Some(0), "{line}");
    assert!(
        line.stdout.starts_with("OK: following, complete "),
        "{line}"
    );
    let told = site.warm_spare(&["status"]).await.ok();
    assert!(
        told.stdout
            .starts_with("OK: dc2 following (spare, epoch 1)\n"),
        "{told}"
    );
    assert_eq!(told.stdout.lines().count(), 5, "{told}");
    let output = service.stop().await;
    assert_eq!(output.code, Some(0), "{output}");
    let line = site.warm_spare(&["health", "--timeout", "2s"]).await;
    assert_eq!(line.code, Some(3), "{line}");
    assert_eq!(site.warm_spare(&["status"]).await.code, Some(3));
    site.warm_spare(&["verify", "--deep"]).await.ok();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_crashed_and_came_back_is_followed() -> Result<()> {
    let site = Site::own_servers("crashed").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 5).await?;
    let service = Service::start(&site, "");
    service.until_level().await;
    site.primary.pg.kill9();
    service.until_hold("peer_unreachable").await;
    site.primary.pg.start_again().await?;
    let before = service
        .until("a look", |status| status["hold"].is_null())
        .await;
    factory
        .package(&site.primary, Spec::new("core", "again", "1"))
        .await?;
    service
        .until("the new package", |status| {
            status["recovery_point"]["lsn"] != before["recovery_point"]["lsn"]
        })
        .await;
    let status = service.until_level().await;
    assert_eq!(status["health"]["level"], 0, "{status:#}");
    let rows = site.spare.conn().await?;
    let sql = "SELECT count(*) FROM origin_packages";
    assert_eq!(rows.query_one(sql, &[]).await?.get::<_, i64>(0), 6);
    Ok(())
}

fn seconds(value: &serde_json::Value) -> f64 {
    value.as_f64().unwrap_or_default()
}

fn time(value: &serde_json::Value) -> chrono::DateTime<chrono::Utc> {
    let text = value.as_str().unwrap_or_default();
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// With 0, having said so, and long before the Supervisor would kill it (8 s); how fast is for the benchmark.
#[track_caller]
fn ends(when: &str, output: Output) {
    assert_eq!(output.code, Some(0), "{when}: {output}");
    assert!(
        output.stderr.trim_end().ends_with("stopped"),
        "{when}: {output}"
    );
}

/// A cluster whose role was never set does nothing at all, and says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_was_never_told_does_nothing() -> Result<()> {
    let site = Site::own_servers("roleless").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    let service = Service::start(&site, "role = \"keep\"");
    let status = service.until_hold("role_unset").await;
    assert_eq!(status["health"]["level"], 1, "{status:#}");
    assert_eq!(status["role"]["actual"], serde_json::Value::Null);
    assert_eq!(status["active"], false);
    assert!(
        status["hold"]["next_step"]
            .as_str()
            .unwrap_or_default()
            .contains("role = \"spare\""),
        "{status:#}"
    );
    let databases = site.spare.pg.conn("postgres").await?;
    let sql = "SELECT count(*) FROM pg_database WHERE datname NOT IN ('postgres', 'template0', 'template1')";
    let made: i64 = databases.query_one(sql, &[]).await?.get(0);
    assert_eq!(made, 0, "nothing is made on our own server");
    assert_eq!(site.spare.keys().await?, Vec::<String>::new());
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'warm-spare'";
    let peer = site.primary.conn().await?;
    assert_eq!(peer.query_one(sql, &[]).await?.get::<_, i64>(0), 0);

    service.reconfigure("role = \"spare\"");
    service.until_level().await;
    // Once told, `keep` keeps it.
    service.reconfigure("role = \"keep\"\nchange = \"C-2\"");
    service
        .until("keep", |status| status["role"]["wanted"] == "keep")
        .await;
    service.until_level().await;
    Ok(())
}

async fn until_set_again(service: &Service<'_>) -> Value {
    let told = |status: &Value| !support::follow::events(status, "fence").is_empty();
    service.until("the fence is set again", told).await
}

/// Invariant 6: the fence is a condition, looked at every few seconds and set again.
#[tokio::test(flavor = "multi_thread")]
async fn a_lifted_fence_is_set_again() -> Result<()> {
    let site = site("refence").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    let service = Service::start(&site, "change = \"CHG-7\"");
    service.until_level().await;
    site.spare.pg.set_fence(false).await?;
    let status = until_set_again(&service).await;
    assert_eq!(
        support::follow::events(&status, "fence").len(),
        1,
        "{status:#}"
    );
    assert_eq!(status["events"][0]["change"], "CHG-7", "{status:#}");
    assert_eq!(status["local"]["fenced"], true, "{status:#}");
    let client = site.spare.conn().await?;
    let written = client.batch_execute("DELETE FROM origin_packages").await;
    assert!(written.is_err(), "a client that connects now cannot write");
    // Told in the database too, for those who look later.
    let state = site.spare.pg.conn("warm_spare").await?;
    let sql = "SELECT count(*) FROM event WHERE kind = 'fence'";
    wait_until("it is kept", SOON, || async {
        match state.query_one(sql, &[]).await?.get::<_, i64>(0) {
            0 => Err("not yet".into()),
            _ => Ok(()),
        }
    })
    .await;
    Ok(())
}

/// Whoever sets it again may be killed over it: the next one ends the sessions from before all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_fence_that_was_set_again_and_not_enforced_is_enforced_by_the_next() -> Result<()> {
    let site = site("refence_killed").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    site.warm_spare(&["sync"]).await.ok();
    site.spare.pg.set_fence(false).await?;
    let before = site.spare.conn().await?;
    Service::doomed(&site, "", "fence.set_again").dead().await?;
    let write = "CREATE TABLE written (); DROP TABLE written";
    before.batch_execute(write).await?;
    let service = Service::start(&site, "");
    until_set_again(&service).await;
    assert!(
        before.batch_execute(write).await.is_err(),
        "it may still write"
    );
    service.stop().await.ok();
    Ok(())
}

/// As the documents tell an operator to take over by hand: from then on nothing is fenced and nothing copied.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_made_primary_by_hand_is_left_alone() -> Result<()> {
    let site = site("by_hand").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 3).await?;
    let service = Service::start(&site, "");
    service.until_level().await;
    assert_eq!(service.get("/spare").await?.status, 200);
    assert_eq!(service.get("/primary").await?.status, 503);
    let state = site.spare.pg.conn("warm_spare").await?;
    state
        .batch_execute("UPDATE cluster SET role = 'primary', since = now()")
        .await?;
    service.until_hold("conflict").await;
    service.reconfigure("role = \"keep\"");
    let told = |code: &'static str| {
        move |status: &serde_json::Value| {
            status["state"] == "primary" && status["health"]["reasons"][0]["code"] == code
        }
    };
    // Nobody lifts for an operator what no record of a fence explains.
    service
        .until("a primary that is read-only", told("primary_read_only"))
        .await;
    assert_eq!(service.get("/spare").await?.status, 503);
    assert_eq!(service.get("/primary").await?.status, 503);
    site.spare.pg.set_fence(false).await?;
    service
        .until("a primary that nobody follows", told("no_spare"))
        .await;
    assert_eq!(service.get("/primary").await?.status, 200);
    // Longer than the guard would leave it.
    let looked = service.status().await?["time"].clone();
    service
        .until("some looks at the role", |status| {
            time(&status["time"]) > time(&looked) + chrono::TimeDelta::seconds(11)
        })
        .await;
    let client = site.spare.conn().await?;
    client
        .batch_execute("DELETE FROM origin_channel_packages")
        .await?;
    Ok(())
}

/// Whatever it is doing: it ends with 0, and the next one goes on from there.
#[tokio::test(flavor = "multi_thread")]
async fn it_ends_when_it_is_told_to() -> Result<()> {
    let site = Site::own_servers("stop").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 5).await?;
    factory
        .package(
            &site.primary,
            Spec::new("core", "large", "1").size(40 << 20),
        )
        .await?;
    // A rate at which the large one takes as long as the test: it is under way whenever we look.
    let mut service = Service::start(&site, "[replication]\nbandwidth_limit = \"200KB/s\"");
    service
        .running
        .wait_for_line(|line| line.contains("phase artifacts"), SOON)
        .await?;
    ends("in a copy", service.stop().await);

    for phase in ["checks", "schema", "tables", "indexes", "switch"] {
        let mut service = Service::start(&site, "");
        // Something to copy, whether the pass before was finished or not.
        factory
            .package(&site.primary, Spec::new("core", "more", phase))
            .await?;
        let line = format!("phase {phase}");
        service
            .running
            .wait_for_line(|said| said.ends_with(&line), SOON)
            .await?;
        ends(phase, service.stop().await);
    }

    let service = Service::start(&site, "");
    service.until_level().await;
    ends("following", service.stop().await);

    let service = Service::start(&site, "");
    service.until_level().await;
    site.primary.pg.sigstop();
    // It has begun to ask, and has no answer.
    service
        .until("silence", |status| seconds(&status["lag"]["seconds"]) > 3.0)
        .await;
    ends("with a frozen primary", service.stop().await);
    site.primary.pg.sigcont();

    let service = Service::start(&site, "");
    service.until_level().await;
    site.spare.pg.sigstop();
    ends("with a frozen datastore of its own", service.stop().await);
    site.spare.pg.sigcont();

    let service = Service::start(&site, "");
    service.until_level().await;
    ends("at the end", service.stop().await);
    site.warm_spare(&["verify", "--deep"]).await.ok();
    Ok(())
}
