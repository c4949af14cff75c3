//! A prune removes the generations that no rule keeps, and no file that another generation needs.

use super::place::{archive, directory, generation};
use support::archive::Archive;
use support::packages::delete_package;
use support::{Factory, Output, Result, Site, Spec, site};

/// Makes generations; each has one package more, and lacks the one of the generation before.
async fn generations(site: &Site, number: usize) -> Result<Vec<String>> {
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 3).await?;
    let mut names = Vec::new();
    let mut last = None;
    for round in 0..number {
        if let Some(last) = last.take() {
            delete_package(&site.primary, &last).await?;
        }
        let spec = Spec::new("core", &format!("round{round}"), "1.0");
        last = Some(factory.package(&site.primary, spec).await?);
        site.warm_spare(&["sync"]).await.ok();
        names.push(generation(site).await);
    }
    Ok(names)
}

async fn prune(site: &Site, arguments: &[&str]) -> Output {
    archive(site, &[&["prune"], arguments].concat()).await
}

async fn all_are_whole(site: &Site, archived: &Archive, left: usize) -> Result<()> {
    assert_eq!(archived.names()?.len(), left);
    archive(site, &["verify", "--all"]).await.ok();
    Ok(())
}

const LAST_TWO: &str = "[archive.keep]\nlast = 2\ndaily = 0\nweekly = 0\nmonthly = 0\n";

#[tokio::test]
async fn files_go_in_two_passes_and_only_if_nobody_needs_them() -> Result<()> {
    let site = site("passes").await;
    let archived = directory(&site, LAST_TWO);
    let names = generations(&site, 3).await?;
    let planned = prune(&site, &["--dry-run"]).await.ok();
    assert!(
        planned.stdout.contains(&format!("{}: would go", names[0])),
        "{planned}"
    );
    assert!(
        planned
            .stdout
            .contains(&format!("{}: would stay: last 1 of 2", names[2])),
        "{planned}"
    );
    all_are_whole(&site, &archived, 3).await?;

    let before = archived.files("artifacts");
    let first = prune(&site, &["--json"]).await.ok().json();
    assert_eq!(first["removed_files"], 0, "{first}");
    assert!(
        first["waiting_files"].as_u64() >= Some(3),
        "{}",
        first["waiting_files"]
    );
    all_are_whole(&site, &archived, 2).await?;
    // Without another generation nothing goes.
    let second = prune(&site, &["--json"]).await.ok().json();
    assert_eq!(second["removed_files"], 0, "{second}");
    assert_eq!(archived.files("artifacts"), before);

    let mut factory = Factory::new(99);
    factory.fill(&site.primary, 1).await?;
    site.warm_spare(&["sync"]).await.ok();
    generation(&site).await;
    let third = prune(&site, &["--json"]).await.ok().json();
    // The dump was removed by the generation in between, as a file of no generation.
    assert!(third["removed_files"].as_u64() >= Some(2), "{third}");
    assert!(!archived.0.join("generations").join(&names[0]).exists());
    let gone: Vec<String> = before
        .into_iter()
        .filter(|path| !archived.files("artifacts").contains(path))
        .collect();
    assert_eq!(gone.len(), 1, "{gone:?}");
    assert!(gone[0].contains("round0"), "{gone:?}");
    all_are_whole(&site, &archived, 2).await
}

#[tokio::test]
async fn bytes_that_a_new_generation_takes_over_stay() -> Result<()> {
    let site = site("taken_over").await;
    let archived = directory(&site, LAST_TWO);
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let spec = Spec::new("core", "comes-back", "1.0").release("20260101000000");
    let package = factory.package(&site.primary, spec).await?;
    site.warm_spare(&["sync"]).await.ok();
    generation(&site).await;
    delete_package(&site.primary, &package).await?;
    for number in 0..2 {
        factory.fill(&site.primary, 1 + number).await?;
        site.warm_spare(&["sync"]).await.ok();
        generation(&site).await;
    }
    // The first pass writes down that the package's file may go.
    let first = prune(&site, &["--json"]).await.ok().json();
    assert!(first["waiting_files"].as_u64() >= Some(1), "{first}");
    support::packages::upload(&site.primary, &package).await?;
    site.warm_spare(&["sync"]).await.ok();
    let with_it = super::place::create(&site).await;
    assert_eq!(
        with_it["new_artifacts"], 0,
        "the archive has its bytes: {with_it}"
    );
    prune(&site, &[]).await.ok();
    all_are_whole(&site, &archived, 2).await
}

#[tokio::test]
async fn a_dump_that_a_later_generation_names_outlives_its_own() -> Result<()> {
    let site = site("shared_dump").await;
    let archived = directory(
        &site,
        "[archive.keep]\nlast = 1\ndaily = 0\nweekly = 0\nmonthly = 0\n",
    );
    Factory::seeded().fill(&site.primary, 3).await?;
    site.warm_spare(&["sync"]).await.ok();
    let first = generation(&site).await;
    for _ in 0..3 {
        let made = super::place::create(&site).await;
        assert_eq!(made["new_dump"], false, "{made}");
        prune(&site, &["--agree"]).await.ok();
        all_are_whole(&site, &archived, 1).await?;
    }
    assert!(
        archived
            .0
            .join(format!("generations/{first}/builder.dump"))
            .exists()
    );
    Ok(())
}

#[tokio::test]
async fn a_pin_holds_and_can_be_taken_away() -> Result<()> {
    let site = site("pinned").await;
    let archived = directory(&site, LAST_TWO);
    let names = generations(&site, 3).await?;
    archive(&site, &["pin", &names[0], "--reason", "before the upgrade"])
        .await
        .ok();
    let listed = archive(&site, &["list"]).await.ok();
    assert!(
        listed.stdout.contains("pinned: before the upgrade"),
        "{listed}"
    );
    prune(&site, &[]).await.ok();
    assert_eq!(archived.names()?.len(), 3);
    archive(&site, &["pin", &names[0], "--remove"]).await.ok();
    prune(&site, &[]).await.ok();
    assert_eq!(archived.names()?.len(), 2);
    let unnamed = archive(&site, &["pin", &names[1]]).await;
    assert_eq!(unnamed.code, Some(2), "{unnamed}");
    let gone = archive(&site, &["pin", &names[0], "--reason", "late"]).await;
    assert_eq!(gone.code, Some(4), "{gone}");
    Ok(())
}

#[tokio::test]
async fn a_prune_of_more_than_half_asks_first() -> Result<()> {
    let site = site("half").await;
    let archived = directory(
        &site,
        "[archive.keep]\nlast = 1\ndaily = 0\nweekly = 0\nmonthly = 0\n",
    );
    generations(&site, 4).await?;
    let refused = prune(&site, &[]).await;
    assert_eq!(refused.code, Some(4), "{refused}");
    assert!(refused.stderr.contains("3 of 4"), "{refused}");
    all_are_whole(&site, &archived, 4).await?;
    prune(&site, &["--agree"]).await.ok();
    all_are_whole(&site, &archived, 1).await
}
