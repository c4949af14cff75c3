//! A generation holds the whole Builder at one point, and a person restores it without the program.

use super::place::{archive, create, directory, generation, name_of};
use support::archive::with_database;
use support::packages::{content, delete_package};
use support::{Factory, Result, Spec, site};

#[tokio::test]
async fn a_generation_is_restored_by_hand() -> Result<()> {
    let site = site("by_hand").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 12).await?;
    let archived = directory(&site, "");
    site.warm_spare(&["sync"]).await.ok();
    let made = create(&site).await;
    let (first, rows) = (name_of(&made), content(&site.primary).await?);
    assert_eq!(made["new_artifacts"], 12, "{made}");
    assert_eq!(made["generation"]["joint"], true);

    // A package more, and one that is uploaded again with other bytes.
    let spec = Spec::new("core", "again", "1.0").release("20260101000000");
    let again = factory.package(&site.primary, spec).await?;
    site.warm_spare(&["sync"]).await.ok();
    let second = create(&site).await;
    assert_eq!(second["new_artifacts"], 1, "{second}");
    let second_rows = content(&site.primary).await?;
    delete_package(&site.primary, &again).await?;
    let spec = Spec::new("core", "again", "1.0")
        .release("20260101000000")
        .size(70_000);
    factory.package(&site.primary, spec).await?;
    site.warm_spare(&["sync"]).await.ok();
    let third = generation(&site).await;
    assert_eq!(
        archived.files("replaced").len(),
        1,
        "{:?}",
        archived.files("replaced")
    );
    let third_rows = content(&site.primary).await?;

    for (number, (name, rows)) in [
        (first, rows),
        (name_of(&second), second_rows),
        (third, third_rows),
    ]
    .into_iter()
    .enumerate()
    {
        let database = format!("by_hand_{number}");
        let restored = archived
            .restore_by_hand(&name, &site.spare.pg, &database)
            .await?;
        assert_eq!(restored.rows, rows, "generation {name}");
        restored.is_whole(&site.spare.pg, &database, &[]).await?;
    }
    let verified = archive(&site, &["verify", "--all", "--json"])
        .await
        .ok()
        .json();
    assert_eq!(verified["ok"], true, "{verified}");
    assert_eq!(verified["generations"], 3, "{verified}");
    Ok(())
}

#[tokio::test]
async fn nothing_new_is_written_if_nothing_was_committed() -> Result<()> {
    let site = site("unchanged").await;
    Factory::seeded().fill(&site.primary, 5).await?;
    let archived = directory(&site, "");
    site.warm_spare(&["sync"]).await.ok();
    let first = create(&site).await;
    let before = archived.files("");
    let second = create(&site).await;
    assert_eq!(second["new_dump"], false, "{second}");
    assert_eq!(second["generation"]["dump"], first["generation"]["dump"]);
    let after = archived.files("");
    let new: Vec<&String> = after.iter().filter(|path| !before.contains(path)).collect();
    let manifest = format!("generations/{}/manifest.json", name_of(&second));
    assert_eq!(new, [&manifest]);
    Ok(())
}

#[tokio::test]
async fn the_program_restores_into_a_fresh_cluster() -> Result<()> {
    let site = site("fresh").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 8).await?;
    let archived = directory(&site, "");
    site.warm_spare(&["sync"]).await.ok();
    let name = generation(&site).await;
    let rows = content(&site.primary).await?;
    // Other rows are not in the generation.
    factory.fill(&site.primary, 3).await?;

    let other = site.other_spare("fresh-other").await?;
    let config = other.write_config(&format!(
        "role = \"keep\"\n[archive]\nlocation = {:?}\n",
        archived.0
    ));
    let run = async |arguments: &[&str]| {
        let running = other.spawn_with_config(&config, arguments);
        running.wait(std::time::Duration::from_secs(120)).await
    };
    let restored = run(&["archive", "restore", &name, "--json"]).await?;
    // The rows need a builder key, which no generation has.
    assert_eq!(restored.code, Some(1), "{restored}");
    let restored = restored.json();
    assert_eq!(
        restored["missing_builder_keys"].as_array().map(Vec::len),
        Some(1),
        "{restored}"
    );
    assert_eq!(restored["artifacts_put"], 8, "{restored}");
    assert_eq!(content(&other.spare).await?, rows);
    let keys = other.spare.keys().await?;
    assert_eq!(keys.len(), 8, "{keys:?}");
    // It is fenced: nobody writes before an operator says so.
    let written = other
        .spare
        .conn()
        .await?
        .batch_execute("CREATE TABLE t ()")
        .await;
    assert!(written.is_err(), "the restored database is not fenced");
    // Again: the cluster is not fresh any more.
    let again = run(&["archive", "restore", &name]).await?;
    assert_eq!(again.code, Some(4), "{}", again.stderr);
    assert!(again.stderr.contains("8 packages"), "{}", again.stderr);
    // Beside it, under another name.
    let beside = run(&[
        "archive",
        "restore",
        &name,
        "--database",
        "looked_at",
        "--json",
    ])
    .await?
    .json();
    assert_eq!(beside["artifacts_put"], 0, "{beside}");
    assert_eq!(
        content(&with_database(&other.spare, "looked_at")).await?,
        rows
    );
    Ok(())
}
