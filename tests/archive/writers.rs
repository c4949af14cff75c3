//! One cluster writes into an archive, and one process of it.

use super::place::{archive, create, directory, generation};
use support::service::Halt;
use support::{Factory, Result, site};

#[tokio::test]
async fn two_processes_of_one_cluster_take_turns() -> Result<()> {
    let site = site("turns").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    directory(&site, "");
    site.warm_spare(&["sync"]).await.ok();
    let (halt, wait_at) = Halt::at("archive.artifacts");
    let first = site.spawn_with(
        &site.config_file(),
        &["archive", "create"],
        &[("WARM_SPARE_WAIT_AT", &wait_at)],
    );
    halt.reached().await;
    for verb in [&["create"][..], &["prune"]] {
        let second = archive(&site, verb).await;
        assert_eq!(second.code, Some(4), "{second}");
        assert!(
            second.stderr.contains("another process of this cluster"),
            "{second}"
        );
    }
    halt.go();
    first.wait(std::time::Duration::from_secs(60)).await?.ok();
    generation(&site).await;
    Ok(())
}

#[tokio::test]
async fn another_builder_is_refused() -> Result<()> {
    let site = site("foreign").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    let archived = directory(&site, "");
    site.warm_spare(&["sync"]).await.ok();
    generation(&site).await;
    let other = support::site("foreign_other").await;
    Factory::new(5).fill(&other.primary, 2).await?;
    other.write_config(&format!("[archive]\nlocation = {:?}\n", archived.0));
    other.warm_spare(&["sync"]).await.ok();
    for arguments in [&["create"][..], &["create", "--take-over"]] {
        let refused = archive(&other, arguments).await;
        assert_eq!(refused.code, Some(4), "{refused}");
        assert!(refused.stderr.contains("another Builder"), "{refused}");
    }
    assert_eq!(archived.names()?.len(), 1);
    Ok(())
}

#[tokio::test]
async fn the_primary_writes_where_its_spare_did_only_by_hand() -> Result<()> {
    let site = site("by_turns").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    let archived = directory(&site, "");
    site.warm_spare(&["sync"]).await.ok();
    generation(&site).await;
    // The primary's own cluster has no state of ours, and no peer.
    let primary = site.turned()?;
    let text = std::fs::read_to_string(primary.write_config(""))?;
    let mut config: toml::Table = text.parse()?;
    config.remove("peer");
    config.insert("role".into(), "keep".into());
    let place =
        toml::Table::from_iter([("location".into(), archived.0.display().to_string().into())]);
    config.insert("archive".into(), place.into());
    std::fs::write(primary.config_file(), config.to_string())?;
    let refused = archive(&primary, &["create"]).await;
    assert_eq!(refused.code, Some(4), "{refused}");
    assert!(refused.stderr.contains("--take-over"), "{refused}");
    let made = archive(&primary, &["create", "--take-over", "--json"])
        .await
        .ok()
        .json();
    assert_eq!(
        made["new_artifacts"], 0,
        "the archive has all of them: {made}"
    );
    assert_eq!(made["generation"]["joint"], false, "{made}");
    assert_eq!(made["generation"]["source"]["role"], "none", "{made}");
    // Nothing of ours is on that server.
    assert!(!site.primary.pg.has_database("warm_spare").await?);
    let late = archive(&site, &["create"]).await;
    assert_eq!(late.code, Some(4), "{late}");
    create_again(&site).await
}

async fn create_again(site: &support::Site) -> Result<()> {
    archive(site, &["create", "--take-over"]).await.ok();
    create(site).await;
    archive(site, &["verify", "--all"]).await.ok();
    Ok(())
}

#[tokio::test]
async fn a_cluster_without_an_archive_is_told_how_to_get_one() -> Result<()> {
    let site = site("none").await;
    site.write_config("");
    let refused = archive(&site, &["list"]).await;
    assert_eq!(refused.code, Some(4), "{refused}");
    assert!(refused.stderr.contains("[[archive]]"), "{refused}");
    directory(&site, "");
    let nothing = archive(&site, &["create"]).await;
    assert_eq!(nothing.code, Some(3), "{nothing}");
    let path = site.dir.path().join("not-mounted");
    site.write_config(&format!("[archive]\nlocation = {path:?}\n"));
    let absent = archive(&site, &["list"]).await;
    assert_eq!(absent.code, Some(3), "{absent}");
    assert!(absent.stderr.contains("not-mounted"), "{absent}");
    Ok(())
}
