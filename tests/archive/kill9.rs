//! Killed at any point, every listed generation is whole, and the next run finishes.

use super::place::{archive, create, directory, generation};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::time::Duration;
use support::archive::Archive;
use support::packages::{content, delete_package};
use support::{Factory, Result, Site, Spec, every_other, seed, site};
use warm_spare::killpoint::ARCHIVE;

const LIMIT: Duration = Duration::from_secs(60);

/// Runs a verb that is killed at a point. Returns whether it came there.
async fn killed(site: &Site, point: &str, arguments: &[&str]) -> Result<bool> {
    let arguments: Vec<&str> = ["archive"].iter().chain(arguments).copied().collect();
    let running = site.spawn_with(
        &site.config_file(),
        &arguments,
        &[("WARM_SPARE_KILL_AT", point)],
    );
    Ok(running.wait(LIMIT).await?.code.is_none())
}

/// Checks each listed generation with the program and without it.
async fn all_are_whole(site: &Site, archived: &Archive, round: &str) -> Result<()> {
    let verified = archive(site, &["verify", "--all"]).await;
    assert_eq!(verified.code, Some(0), "{round}: {verified}");
    for (number, name) in archived.names()?.into_iter().enumerate() {
        let database = format!(
            "whole_{}_{number}",
            round.replace(|c: char| !c.is_ascii_alphanumeric(), "_")
        );
        let restored = archived
            .restore_by_hand(&name, &site.spare.pg, &database)
            .await;
        let restored = restored.map_err(|error| format!("{round}: generation {name}: {error}"))?;
        restored.is_whole(&site.spare.pg, &database, &[]).await?;
        site.spare
            .pg
            .conn("postgres")
            .await?
            .batch_execute(&format!("DROP DATABASE {database}"))
            .await?;
    }
    Ok(())
}

#[tokio::test]
async fn create_and_prune_killed_at_each_point() -> Result<()> {
    let site = site("killed").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 4).await?;
    let archived = directory(
        &site,
        "[archive.keep]\nlast = 2\ndaily = 0\nweekly = 0\nmonthly = 0\n",
    );
    site.warm_spare(&["sync"]).await.ok();
    generation(&site).await;
    let points = ARCHIVE
        .iter()
        .filter(|point| !point.starts_with("restore."));
    for (number, point) in every_other(points).into_iter().enumerate() {
        let spec = Spec::new("core", &format!("kill{number}"), "1.0");
        let package = factory.package(&site.primary, spec).await?;
        site.warm_spare(&["sync"]).await.ok();
        let is_create = point.starts_with("archive.");
        let verb = if is_create { "create" } else { "prune" };
        if !is_create {
            // Something to remove, in both passes.
            generation(&site).await;
            factory.fill(&site.primary, 1).await?;
            site.warm_spare(&["sync"]).await.ok();
            generation(&site).await;
            archive(&site, &["prune"]).await.ok();
            factory.fill(&site.primary, 1).await?;
            site.warm_spare(&["sync"]).await.ok();
            generation(&site).await;
        }
        assert!(
            killed(&site, point, &[verb]).await?,
            "{point} was not reached"
        );
        all_are_whole(&site, &archived, point).await?;
        create(&site).await;
        archive(&site, &["prune", "--agree"]).await.ok();
        all_are_whole(&site, &archived, point).await?;
        assert!(
            archived.files(".tmp").is_empty(),
            "{:?}",
            archived.files(".tmp")
        );
        delete_package(&site.primary, &package).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_restore_killed_at_each_point_is_finished_by_the_next() -> Result<()> {
    let site = site("restore_killed").await;
    Factory::seeded().fill(&site.primary, 5).await?;
    let archived = directory(&site, "");
    site.warm_spare(&["sync"]).await.ok();
    let name = generation(&site).await;
    let rows = content(&site.primary).await?;
    let points = ARCHIVE
        .iter()
        .copied()
        .filter(|point| point.starts_with("restore."));
    for point in every_other(points) {
        let bucket = format!("other-{}", point.replace(['.', '_'], "-"));
        let other = site.other_spare(&bucket).await?;
        other.write_config(&format!(
            "role = \"keep\"\n[archive]\nlocation = {:?}\n",
            archived.0
        ));
        assert!(
            killed(&other, point, &["restore", &name]).await?,
            "{point} was not reached"
        );
        if point != "restore.done" {
            let again = archive(&other, &["restore", &name]).await;
            // Only the builder key is missing.
            assert_eq!(again.code, Some(1), "{point}: {again}");
            assert!(!again.stdout.contains("NOT restored"), "{point}: {again}");
        }
        assert_eq!(content(&other.spare).await?, rows, "{point}");
        assert_eq!(other.spare.keys().await?.len(), 5, "{point}");
        let sql = "SELECT count(*) FROM pg_database WHERE datname LIKE 'warm_spare_restore%'";
        let left: i64 = other
            .spare
            .pg
            .conn("postgres")
            .await?
            .query_one(sql, &[])
            .await?
            .get(0);
        assert_eq!(left, 0, "{point}");
    }
    Ok(())
}

#[tokio::test]
async fn killed_at_any_moment() -> Result<()> {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    let site = site("any_moment").await;
    let mut factory = Factory::new(seed);
    factory.fill(&site.primary, 4).await?;
    let archived = directory(
        &site,
        "[archive.keep]\nlast = 3\ndaily = 0\nweekly = 0\nmonthly = 0\n",
    );
    site.warm_spare(&["sync"]).await.ok();
    generation(&site).await;
    for round in 0..6 {
        let spec = Spec::new("core", &format!("round{round}"), "1.0");
        let package = factory.package(&site.primary, spec).await?;
        site.warm_spare(&["sync"]).await.ok();
        let verb: &[&str] = if rng.random_bool(0.7) {
            &["create"]
        } else {
            &["prune", "--agree"]
        };
        let running = site.spawn(&[&["archive"], verb].concat());
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..900))).await;
        let _ = running.kill9();
        all_are_whole(&site, &archived, &format!("round {round}")).await?;
        create(&site).await;
        if rng.random_bool(0.5) {
            delete_package(&site.primary, &package).await?;
        }
    }
    all_are_whole(&site, &archived, "the end").await
}
