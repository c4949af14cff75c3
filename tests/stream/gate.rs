//! The gate of the stream: artifact before row, and what happens when the primary does not have it, has it damaged, or has
//! other bytes under the same key; the fuse; and artifacts that go after their time.

use std::time::Duration;
use support::packages::{self, arrived, delete_package};
use support::service::SOON;
use support::{Factory, Postgres, Result, Service, Site, Spec, wait_until};

async fn followed<'a>(site: &'a Site, extra: &str) -> Result<Service<'a>> {
    site.write_config("");
    site.warm_spare(&["prepare"]).await.ok();
    let service = Service::start(site, extra);
    service
        .until("following by the stream", |status| {
            status["replication"]["mode"] == "stream" && status["lag"]["bytes"] == 0
        })
        .await;
    Ok(service)
}

async fn streaming(name: &str) -> Result<Site> {
    let primary = Postgres::builder().logical();
    Site::builder(name).primary(primary).start().await
}

async fn has_row(site: &Site, ident: &str) -> Result<bool> {
    let sql = "SELECT count(*) FROM origin_packages WHERE ident = $1";
    let row = site.spare.conn().await?.query_one(sql, &[&ident]).await?;
    Ok(row.get::<_, i64>(0) == 1)
}

#[tokio::test]
async fn a_row_waits_for_its_artifact_and_passes_without_after_the_grace() -> Result<()> {
    let site = streaming("gate_missing").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 5).await?;
    let slow = "[replication]\ngate_grace = \"1h\"\nretry_missing = \"1s\"";
    let service = followed(&site, slow).await?;
    let late = factory.make(Spec::new("core", "late", "1.0.0"));
    packages::insert(&site.primary, &late).await?;
    let waits = "the gate holds it";
    let status = service
        .until(waits, |status| status["replication"]["gate_waiting"] == 1)
        .await;
    assert_ne!(status["lag"]["bytes"], 0);
    assert!(
        !has_row(&site, &late.ident).await?,
        "no row before its artifact"
    );
    packages::put(&site.primary, &late).await?;
    arrived(&site).await?;
    assert_eq!(
        site.spare
            .s3()
            .checksum(&site.spare.bucket, &late.key)
            .await?,
        Some(late.checksum.clone())
    );

    // Now with a short grace: the row passes, the artifact is on the list, and is brought when it is there.
    service.reconfigure("[replication]\ngate_grace = \"300ms\"\nretry_missing = \"1s\"");
    let lost = factory.make(Spec::new("core", "lost", "1.0.0"));
    packages::insert(&site.primary, &lost).await?;
    arrived(&site).await?;
    let status = service
        .until("it is told", |status| {
            status["artifacts"]["missing_on_primary"] == 1
        })
        .await;
    assert_eq!(status["health"]["level"], 1, "{status:#}");
    assert_eq!(status["artifacts"]["examples"][0]["key"], lost.key);
    packages::put(&site.primary, &lost).await?;
    service
        .until("it is brought", |status| {
            status["artifacts"]["missing_on_primary"] == 0
        })
        .await;
    let verified = site.warm_spare(&["verify", "--deep", "--json"]).await.ok();
    assert_eq!(
        verified.json()["differences"].as_array().map(Vec::len),
        Some(0)
    );
    service.stop().await.ok();
    Ok(())
}

#[tokio::test]
async fn a_later_delete_opens_the_gate_at_once() -> Result<()> {
    let site = streaming("gate_deleted").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 5).await?;
    let service = followed(&site, "[replication]\ngate_grace = \"1h\"").await?;
    let gone = factory.make(Spec::new("core", "gone", "1.0.0"));
    packages::insert(&site.primary, &gone).await?;
    service
        .until("the gate holds it", |status| {
            status["replication"]["gate_waiting"] == 1
        })
        .await;
    delete_package(&site.primary, &gone).await?;
    arrived(&site).await?;
    let status = service.until_level().await;
    assert_eq!(status["artifacts"]["missing_on_primary"], 0);
    service.stop().await.ok();
    Ok(())
}

#[tokio::test]
async fn the_same_key_with_other_bytes_is_replaced_only_when_its_old_row_is_gone() -> Result<()> {
    let site = streaming("gate_other").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 5).await?;
    let release = |spec: Spec| spec.release("20240101000001");
    let old = factory.make(release(Spec::new("core", "twice", "1.0.0")).size(3000));
    factory.origin(&site.primary, "core").await?;
    packages::upload(&site.primary, &old).await?;
    let service = followed(&site, "[replication]\nartifact_retention = \"1h\"").await?;
    let bytes = async || site.spare.s3().checksum(&site.spare.bucket, &old.key).await;
    assert_eq!(bytes().await?, Some(old.checksum.clone()));
    for size in [5000, 7000] {
        let new = factory.make(release(Spec::new("core", "twice", "1.0.0")).size(size));
        assert_eq!(new.key, old.key);
        delete_package(&site.primary, &old).await?;
        packages::upload(&site.primary, &new).await?;
        arrived(&site).await?;
        assert_eq!(bytes().await?, Some(new.checksum.clone()));
    }
    let keys = site.spare.keys().await?;
    let retired = format!(".warm-spare/retired/{}", old.checksum);
    assert!(
        keys.contains(&retired),
        "the old bytes are laid aside: {keys:?}"
    );
    assert!(!keys.iter().any(|key| key.contains("staged")), "{keys:?}");
    // In one transaction: there is no state of the primary between the two.
    let last = factory.make(release(Spec::new("core", "twice", "1.0.0")).size(9000));
    packages::put(&site.primary, &last).await?;
    let sql = "UPDATE origin_packages SET checksum = $1 WHERE ident = $2";
    let client = site.primary.conn().await?;
    client.execute(sql, &[&last.checksum, &last.ident]).await?;
    arrived(&site).await?;
    assert_eq!(bytes().await?, Some(last.checksum.clone()));
    let verified = site.warm_spare(&["verify", "--deep", "--json"]).await.ok();
    assert_eq!(
        verified.json()["differences"].as_array().map(Vec::len),
        Some(0)
    );
    service.stop().await.ok();
    Ok(())
}

#[tokio::test]
async fn many_deletions_blow_the_fuse_until_exactly_that_is_approved() -> Result<()> {
    let site = streaming("gate_fuse").await?;
    let mut factory = Factory::seeded();
    let made = factory.fill(&site.primary, 30).await?;
    let fuse = "[fuse]\nmax_percent = 10\nmin_count = 5\n";
    let service = followed(&site, fuse).await?;
    let client = site.primary.conn().await?;
    let doomed: Vec<String> = made.iter().take(10).map(|p| p.ident.clone()).collect();
    let sql = "WITH gone AS (DELETE FROM origin_channel_packages WHERE package_id IN \
                 (SELECT id FROM origin_packages WHERE ident = ANY ($1))) \
               DELETE FROM origin_packages WHERE ident = ANY ($1)";
    client
        .batch_execute("ALTER TABLE origin_channel_packages DISABLE TRIGGER ALL")
        .await?;
    client.execute(sql, &[&doomed]).await?;
    let held = service.until_hold("fuse").await;
    for ident in &doomed {
        assert!(has_row(&site, ident).await?, "nothing is changed");
    }
    let next = held["hold"]["next_step"].as_str().unwrap_or_default();
    let id = next
        .split('"')
        .nth(1)
        .ok_or("the next step names the change")?;
    service.reconfigure(&format!("{fuse}approve = \"{id}\""));
    arrived(&site).await?;
    service.until_level().await;
    service.stop().await.ok();
    Ok(())
}

#[tokio::test]
async fn an_artifact_goes_when_no_row_has_named_it_for_long_enough() -> Result<()> {
    let site = streaming("gate_retention").await?;
    let mut factory = Factory::seeded();
    let made = factory.fill(&site.primary, 6).await?;
    let service = followed(&site, "[replication]\nartifact_retention = \"2s\"").await?;
    delete_package(&site.primary, &made[0]).await?;
    wait_until("it is deleted", SOON, || async {
        match site.spare.keys().await?.contains(&made[0].key) {
            false => Ok(()),
            true => Err("it is there".into()),
        }
    })
    .await;
    let keys = site.spare.keys().await?;
    for kept in &made[1..] {
        assert!(keys.contains(&kept.key), "{} is named", kept.key);
    }
    // Uploaded anew: brought again like any other.
    packages::upload(&site.primary, &made[0]).await?;
    arrived(&site).await?;
    assert!(site.spare.keys().await?.contains(&made[0].key));
    service.stop().await.ok();
    Ok(())
}

/// What a first copy replaces is somebody's, and may be anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_kept_database_that_is_not_builders_is_no_hindrance() -> Result<()> {
    let site = streaming("gate_foreign").await?;
    let mut factory = Factory::seeded();
    let made = factory.fill(&site.primary, 6).await?;
    site.spare.pg.create_database("builder").await?;
    let mut service = followed(&site, "[replication]\nartifact_retention = \"2s\"").await?;
    delete_package(&site.primary, &made[0]).await?;
    let until_gone = async |key: &str| {
        wait_until("it is deleted", Duration::from_secs(30), || async {
            match site.spare.keys().await?.iter().any(|there| there == key) {
                false => Ok(()),
                true => Err("it is there".into()),
            }
        })
        .await;
    };
    until_gone(&made[0].key).await;
    // One that may hold packages, and cannot be asked, keeps what it may name; and the stream goes on.
    let client = site.spare.pg.conn("postgres").await?;
    let sql = "SELECT datname::text FROM pg_database WHERE datname LIKE 'builder\\_2%'";
    let kept: String = client.query_one(sql, &[]).await?.get(0);
    client
        .batch_execute(&format!("ALTER DATABASE {kept} ALLOW_CONNECTIONS false"))
        .await?;
    delete_package(&site.primary, &made[1]).await?;
    service
        .running
        .wait_for_line(|line| line.contains(&kept) && line.contains("kept"), SOON)
        .await?;
    assert!(site.spare.keys().await?.contains(&made[1].key));
    packages::upload(
        &site.primary,
        &factory.make(Spec::new("core", "after", "1")),
    )
    .await?;
    arrived(&site).await?;
    let status = service.until_level().await;
    let told = support::follow::events(&status, "hold");
    assert_eq!(told, Vec::<String>::new());
    client
        .batch_execute(&format!("ALTER DATABASE {kept} ALLOW_CONNECTIONS true"))
        .await?;
    until_gone(&made[1].key).await;
    Ok(())
}
