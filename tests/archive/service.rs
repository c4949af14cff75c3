//! The service makes generations by the schedule, and reports its archives.

use super::place::directory;
use serde_json::Value;
use std::time::Duration;
use support::archive::Archive;
use support::follow::{followed, prepared};
use support::packages::{content, delete_package};
use support::service::{SOON, Service};
use support::{Factory, Result, Spec, wait_until};

const MINUTELY: &str = "schedule = \"* * * * *\"\n";

fn place(archived: &Archive) -> String {
    format!("[archive]\nlocation = {:?}\n{MINUTELY}", archived.0)
}

fn generations(status: &Value) -> u64 {
    status["archives"][0]["generations"]
        .as_u64()
        .unwrap_or_default()
}

fn codes(status: &Value) -> Vec<String> {
    let reasons = status["health"]["reasons"]
        .as_array()
        .expect("reasons")
        .iter();
    reasons
        .map(|reason| reason["code"].as_str().expect("a code").to_string())
        .collect()
}

#[tokio::test]
async fn a_following_spare_archives_by_the_clock() -> Result<()> {
    let site = support::site("by_the_clock").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 4).await?;
    let archived = directory(&site, "");
    let (service, time) = Service::with_own_time(&site, &place(&archived))?;
    service.until_level().await;
    time.pass(60)?;
    service
        .until("a generation", |status| generations(status) > 0)
        .await;
    let rows = content(&site.primary).await?;
    let first = archived.names()?;
    let restored = archived
        .restore_by_hand(&first[0], &site.spare.pg, "first")
        .await?;
    assert_eq!(restored.rows, rows);
    factory.fill(&site.primary, 1).await?;
    support::packages::arrived(&site).await?;
    time.pass(300)?;
    let newest = wait_until("a generation with the new package", SOON, || async {
        let newest = archived.names()?.pop().expect("a generation");
        match archived.manifest(&newest)?["packages"] == 5 {
            true => Ok(newest),
            false => Err("the newest one is older".into()),
        }
    })
    .await;
    let status = service
        .until("both are counted", |status| generations(status) > 1)
        .await;
    assert!(
        !codes(&status)
            .iter()
            .any(|code| code.starts_with("archive")),
        "{status}"
    );
    let metric = "warm_spare_archive_generations{archive=\"archive\"}";
    assert!(service.metric(metric).await? >= Some(2.0));
    let restored = archived
        .restore_by_hand(&newest, &site.spare.pg, "newest")
        .await?;
    restored.is_whole(&site.spare.pg, "newest", &[]).await?;
    assert_eq!(restored.rows, content(&site.primary).await?);
    service.stop().await;
    Ok(())
}

#[tokio::test]
async fn an_archive_that_is_away_is_reported_and_does_not_stop_the_spare() -> Result<()> {
    let site = support::site("away").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let archived = directory(&site, "");
    let aside = site.dir.path().join("unmounted");
    std::fs::rename(&archived.0, &aside)?;
    let (service, time) = Service::with_own_time(&site, &place(&archived))?;
    service
        .until("the trouble, and nothing worse", |status| {
            codes(status) == ["archive_unreachable"] && status["health"]["level"] == 1
        })
        .await;
    factory.fill(&site.primary, 1).await?;
    support::packages::arrived(&site).await?;
    std::fs::rename(&aside, &archived.0)?;
    time.pass(70)?;
    service
        .until("it works again", |status| {
            status["archives"][0]["trouble"].is_null()
        })
        .await;
    time.pass(150)?;
    service
        .until("a generation", |status| generations(status) > 0)
        .await;
    // Nothing is made for long: the clock tells.
    std::fs::rename(&archived.0, &aside)?;
    time.pass(600)?;
    service
        .until("it is late, and the reason is told", |status| {
            let codes = codes(status);
            ["archive_late", "archive_unreachable"]
                .iter()
                .all(|code| codes.iter().any(|found| found == code))
        })
        .await;
    service.stop().await;
    Ok(())
}

#[tokio::test]
async fn a_cluster_without_a_peer_archives_too() -> Result<()> {
    let site = support::site("alone").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    let archived = directory(&site, "");
    let alone = site.turned()?;
    let file = alone.write_config(&format!("role = \"keep\"\n{}", place(&archived)));
    let mut config: toml::Table = std::fs::read_to_string(file)?.parse()?;
    config.remove("peer");
    let (service, time) = Service::of_text_with_own_time(&alone, &config.to_string())?;
    let status = service.until_hold("peer_unset").await;
    assert_eq!(status["archives"][0]["name"], "archive", "{status}");
    time.pass(70)?;
    service
        .until("a generation", |status| generations(status) > 0)
        .await;
    let name = archived.names()?.remove(0);
    let restored = archived
        .restore_by_hand(&name, &site.spare.pg, "alone")
        .await?;
    assert_eq!(restored.rows, content(&site.primary).await?);
    assert!(!site.primary.pg.has_database("warm_spare").await?);
    service.stop().await;
    Ok(())
}

#[tokio::test]
async fn a_damaged_file_is_found_by_the_daily_verification() -> Result<()> {
    let site = support::site("daily").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    let archived = directory(&site, "");
    site.warm_spare(&["sync"]).await.ok();
    let name = super::place::generation(&site).await;
    let dump = super::place::path_of(&archived, &name, "builder.dump");
    let bytes = std::fs::read(&dump)?;
    std::fs::write(&dump, &bytes[1..])?;
    let verify = format!(
        "[archive]\nlocation = {:?}\n[verify]\nschedule = \"* * * * *\"\n",
        archived.0
    );
    let (service, time) = Service::with_own_time(&site, &verify)?;
    time.pass(70)?;
    let status = service
        .until("it is found", |status| {
            codes(status).contains(&"archive_damaged".into())
        })
        .await;
    assert_eq!(status["archives"][0]["faults"], 1, "{status}");
    std::fs::write(&dump, bytes)?;
    time.pass(200)?;
    service
        .until("it is over", |status| status["archives"][0]["faults"] == 0)
        .await;
    service.stop().await;
    Ok(())
}

/// The stream goes on while a generation is made, and deletes no artifact that it names.
#[tokio::test]
async fn deletions_and_uploads_go_on_while_a_generation_is_made() -> Result<()> {
    let site = prepared("meanwhile").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 3).await?;
    let spec = Spec::new("core", "goes", "1.0").release("20260101000000");
    let goes = factory.package(&site.primary, spec).await?;
    let spec = Spec::new("core", "changes", "1.0").release("20260101000000");
    let changes = factory.package(&site.primary, spec).await?;
    let archived = directory(&site, "");
    let place = format!(
        "[archive]\nlocation = {:?}\n[replication]\nartifact_retention = \"1s\"\n",
        archived.0
    );
    let service = followed(&site, &place).await?;
    let rows = content(&site.primary).await?;
    let (halt, wait_at) = support::service::Halt::at("archive.dumped");
    let making = site.spawn_with(
        &site.config_file(),
        &["archive", "create", "--json"],
        &[("WARM_SPARE_WAIT_AT", &wait_at)],
    );
    halt.reached().await;
    delete_package(&site.primary, &goes).await?;
    delete_package(&site.primary, &changes).await?;
    let spec = Spec::new("core", "changes", "1.0")
        .release("20260101000000")
        .size(50_000);
    factory.package(&site.primary, spec).await?;
    support::packages::arrived(&site).await?;
    // Many times the retention, and several rounds of deletions.
    tokio::time::sleep(Duration::from_secs(4)).await;
    halt.go();
    let made = making.wait(SOON).await?.ok().json();
    let name = super::place::name_of(&made);
    let restored = archived
        .restore_by_hand(&name, &site.spare.pg, "then")
        .await?;
    assert_eq!(restored.rows, rows);
    restored.is_whole(&site.spare.pg, "then", &[]).await?;
    // Afterwards they are deleted.
    wait_until("the artifact is deleted", SOON, || async {
        let keys = site.spare.keys().await?;
        match keys.iter().any(|key| key.contains("/goes/")) {
            true => Err("it is there".into()),
            false => Ok(()),
        }
    })
    .await;
    service.stop().await;
    Ok(())
}
