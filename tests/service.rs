//! The service follows by itself, says how it stands, and ends when it is told to.

mod support;

use support::{Factory, Result, Service, Site, Spec, site};

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
    let before = service.until("a look", |status| status["hold"].is_null()).await;
    factory.package(&site.primary, Spec::new("core", "again", "1")).await?;
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
