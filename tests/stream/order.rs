//! The primary's transactions arrive one after the other, artifact before row, whatever kind of change they make.

use support::packages::{arrived, delete_package, promote};
use support::{Factory, Postgres, Result, Service, Site, Spec, content};

async fn streaming(name: &str) -> Result<Site> {
    let site = Site::builder(name)
        .primary(Postgres::builder().logical())
        .start()
        .await?;
    site.write_config("");
    Ok(site)
}

/// What an operator's `warm-spare prepare` makes.
async fn prepare(site: &Site) -> Result<()> {
    site.warm_spare(&["prepare"]).await.ok();
    Ok(())
}

#[tokio::test]
async fn what_is_committed_after_the_copy_comes_through_the_slot() -> Result<()> {
    let site = streaming("stream_sync").await?;
    let mut factory = Factory::seeded();
    let made = factory.fill(&site.primary, 10).await?;
    prepare(&site).await?;
    let first = site.warm_spare(&["sync", "--json"]).await.ok().json();
    assert_eq!(first["outcome"], "copied");
    promote(&site.primary, &made[0], "stable").await?;
    delete_package(&site.primary, &made[1]).await?;
    factory
        .package(&site.primary, Spec::new("core", "later", "1.0.0"))
        .await?;
    let second = site.warm_spare(&["sync", "--json"]).await.ok().json();
    assert_eq!(second["outcome"], "followed", "{second:#}");
    assert_eq!(content(&site.primary).await?, content(&site.spare).await?);
    Ok(())
}

#[tokio::test]
async fn a_running_service_follows_every_commit() -> Result<()> {
    let site = streaming("stream_service").await?;
    let mut factory = Factory::seeded();
    let made = factory.fill(&site.primary, 10).await?;
    prepare(&site).await?;
    let service = Service::start(&site, "");
    service
        .until("following by the stream", |status| {
            status["state"] == "following"
                && status["replication"]["mode"] == "stream"
                && status["lag"]["bytes"] == 0
        })
        .await;
    for number in 0..20 {
        let spec = Spec::new("core", "later", &format!("1.0.{number}"));
        factory.package(&site.primary, spec).await?;
    }
    promote(&site.primary, &made[2], "stable").await?;
    delete_package(&site.primary, &made[3]).await?;
    arrived(&site).await?;
    let status = service.status().await?;
    println!("{status:#}");
    println!("{}", service.running.stderr().join("\n"));
    service.stop().await.ok();
    Ok(())
}
