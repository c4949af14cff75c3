//! Real versions of PostgreSQL beside each other: first copy, stream, verification, switchover, and the way back.

use std::path::{Path, PathBuf};
use support::follow::{logical, prepare, until_equal, until_following};
use support::pair::{PROMOTE, returned, until_primary, until_settled, write};
use support::postgres::other_version;
use support::{Factory, Postgres, Result, Service, Site, Spec};

/// From one version to another. `clients`: the directory of the only client programs, of a version that both know.
async fn there_and_back(primary: &Path, spare: &Path, clients: &Path) -> Result<()> {
    let mut site = Site::builder("versions")
        .primary(logical().programs(primary))
        .spare(logical().programs(spare))
        .start()
        .await?;
    let clients = clients.display().to_string();
    site.environment = vec![("WARM_SPARE_PG_CLIENTS".into(), clients)];
    prepare(&site).await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 3).await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    factory
        .package(&site.primary, Spec::new("core", "streamed", "1"))
        .await?;
    until_equal(&site).await?;
    site.warm_spare(&["verify", "--deep"]).await.ok();

    service.reconfigure(PROMOTE);
    until_primary(&service, 2).await;
    until_settled(&service).await;
    write(&site.spare, "on the new primary").await?;
    let back = site.turned()?;
    if site.primary.pg.version() == site.spare.pg.version() {
        let _returned = returned(&back, "").await?;
        factory
            .package(&back.primary, Spec::new("core", "back", "1"))
            .await?;
        until_equal(&back).await?;
        back.warm_spare(&["verify", "--deep"]).await.ok();
    } else {
        // The old primary is the older server, and no program writes what an older server reads.
        back.write_config("");
        let refused = back.warm_spare(&["check-config", "--connect"]).await;
        assert_eq!(refused.code, Some(3), "{refused}");
        assert!(refused.stderr.contains("version: "), "{refused}");
    }
    Ok(())
}

/// Those of this machine's own version.
async fn own() -> Result<PathBuf> {
    Ok(Postgres::builder().start().await?.programs().into())
}

#[tokio::test(flavor = "multi_thread")]
async fn from_15_to_17() -> Result<()> {
    let Some(to) = other_version(17) else {
        support::skip("no PostgreSQL 17 here (scripts/setup: npm)");
        return Ok(());
    };
    let from = own().await?;
    there_and_back(&from, &to, &from).await
}

#[tokio::test(flavor = "multi_thread")]
async fn from_17_to_18() -> Result<()> {
    let (Some(from), Some(to)) = (other_version(17), other_version(18)) else {
        support::skip("no PostgreSQL 17 and 18 here (scripts/setup: npm, pip)");
        return Ok(());
    };
    there_and_back(&from, &to, &to).await
}

#[tokio::test(flavor = "multi_thread")]
async fn from_18_to_18() -> Result<()> {
    let Some(version) = other_version(18) else {
        support::skip("no PostgreSQL 18 here (scripts/setup: pip)");
        return Ok(());
    };
    there_and_back(&version, &version, &version).await
}
