//! Each file that is damaged or missing is found and named, with the generations that need it.

use super::place::{archive, directory, generation, path_of};
use serde_json::Value;
use std::path::PathBuf;
use support::archive::Archive;
use support::{Factory, Result, Site, site};

/// A site with two generations. The second has one artifact more.
async fn two(name: &str) -> Result<(Site, Archive, [String; 2])> {
    let site = site(name).await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 4).await?;
    let archived = directory(&site, "");
    site.warm_spare(&["sync"]).await.ok();
    let first = generation(&site).await;
    factory.fill(&site.primary, 1).await?;
    site.warm_spare(&["sync"]).await.ok();
    let second = generation(&site).await;
    Ok((site, archived, [first, second]))
}

fn turn_one_bit(path: &PathBuf) {
    let mut bytes = std::fs::read(path).expect("it is there");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).expect("it is written");
}

/// Verifies all generations. Returns the paths and the generations of the faults.
async fn faults(site: &Site, arguments: &[&str]) -> Vec<(String, Vec<String>)> {
    let verified = archive(site, &[&["verify", "--all", "--json"], arguments].concat()).await;
    assert_eq!(verified.code, Some(1), "{verified}");
    let text = |value: &Value| value.as_str().expect("a text").to_string();
    let document = verified.json();
    let faults = document["faults"].as_array().expect("faults").iter();
    let names = |fault: &Value| {
        fault["generations"]
            .as_array()
            .expect("names")
            .iter()
            .map(text)
            .collect()
    };
    faults
        .map(|fault| (text(&fault["path"]), names(fault)))
        .collect()
}

#[tokio::test]
async fn one_bit_in_each_kind_of_file_is_found() -> Result<()> {
    let (site, archived, [first, second]) = two("one_bit").await?;
    let whole = archive(&site, &["verify", "--all"]).await.ok();
    assert!(whole.stdout.contains("All are right"), "{whole}");

    let dump = format!("generations/{second}/builder.dump");
    let artifact = archived.files("artifacts")[0].clone();
    let lists = archived.manifest(&second)?["lists"].clone();
    let of_first = archived.manifest(&first)?["lists"].clone();
    let is_new = |list: &&Value| !of_first.as_array().expect("lists").contains(list);
    let new = lists
        .as_array()
        .expect("lists")
        .iter()
        .find(is_new)
        .expect("a new list");
    let list = new["path"].as_str().expect("a path").to_string();
    for (path, needed_by) in [(&dump, vec![&second]), (&list, vec![&second])] {
        let file = archived.0.join(path);
        let before = std::fs::read(&file)?;
        turn_one_bit(&file);
        let found = faults(&site, &[]).await;
        let needed_by = needed_by.into_iter().cloned().collect();
        assert_eq!(found, [(path.clone(), needed_by)]);
        std::fs::write(&file, before)?;
    }
    let file = archived.0.join(&artifact);
    turn_one_bit(&file);
    let found = faults(&site, &[]).await;
    assert_eq!((found.len(), &found[0].0), (1, &artifact), "{found:?}");
    assert!(found[0].1.contains(&second), "{found:?}");
    // Only its length is looked at, and its length is right. It was never proved, and says so.
    let looked = archive(&site, &["verify", "--all", "--read", "0"])
        .await
        .ok();
    assert!(looked.stdout.contains("never read"), "{looked}");
    // It is the one that was not read for the longest time, so a small part is enough.
    assert_eq!(faults(&site, &["--read", "1%"]).await.len(), 1);
    std::fs::remove_file(&file)?;
    assert_eq!(faults(&site, &["--read", "0"]).await[0].0, artifact);
    Ok(())
}

#[tokio::test]
async fn a_manifest_that_cannot_be_read_is_listed_and_nothing_is_pruned() -> Result<()> {
    let (site, archived, [first, second]) = two("manifest").await?;
    let manifest = path_of(&archived, &first, "manifest.json");
    let before = std::fs::read(&manifest)?;
    for (bytes, word) in [
        (b"{\"format\": 1".to_vec(), "archive_damaged"),
        (b"{\"format\": 99}".to_vec(), "newer_format"),
        (
            String::from_utf8_lossy(&before)
                .replace("\"path\": \"lists/", "\"path\": \"../lists/")
                .into_bytes(),
            "archive_damaged",
        ),
    ] {
        std::fs::write(&manifest, bytes)?;
        let listed = archive(&site, &["list"]).await.ok();
        assert!(
            listed.stdout.contains(&format!("{first}: NOT READABLE")),
            "{listed}"
        );
        assert!(listed.stdout.contains(word), "{listed}");
        assert!(listed.stdout.contains(&second), "{listed}");
        let shown = archive(&site, &["show", &first]).await;
        assert_eq!(shown.code, Some(3), "{shown}");
        let restored = archive(&site, &["restore", &first, "--database", "x"]).await;
        assert_eq!(restored.code, Some(3), "{restored}");
        let pruned = archive(&site, &["prune"]).await;
        assert_eq!(pruned.code, Some(4), "{pruned}");
        assert!(pruned.stderr.contains("nothing is removed"), "{pruned}");
        // The other generation is as good as before.
        archive(&site, &["verify", &second]).await.ok();
    }
    std::fs::write(&manifest, before)?;
    archive(&site, &["verify", "--all"]).await.ok();
    Ok(())
}

#[tokio::test]
async fn a_damaged_archive_is_mended_by_the_next_generation_where_it_can() -> Result<()> {
    let (site, archived, [_, second]) = two("mended").await?;
    // A list of the newest generation: the next one cannot trust it, and looks at each artifact.
    for list in archived.files("lists") {
        std::fs::write(archived.0.join(list), "garbage\n")?;
    }
    std::fs::remove_dir_all(site.dir.path().join("data/archive"))?;
    let third = generation(&site).await;
    assert_ne!(third, second);
    archive(&site, &["verify", &third]).await.ok();
    Ok(())
}

#[tokio::test]
async fn a_truncated_dump_is_not_restored() -> Result<()> {
    let (site, archived, [_, second]) = two("truncated").await?;
    let dump = path_of(&archived, &second, "builder.dump");
    let bytes = std::fs::read(&dump)?;
    std::fs::write(&dump, &bytes[..bytes.len() / 2])?;
    let restored = archive(&site, &["restore", &second, "--database", "half"]).await;
    assert_eq!(restored.code, Some(3), "{restored}");
    assert!(
        restored.stderr.contains("builder.dump: expected"),
        "{restored}"
    );
    assert!(!site.spare.pg.has_database("half").await?);
    Ok(())
}

#[tokio::test]
async fn a_generation_that_does_not_exist_is_refused_with_the_way_to_the_names() -> Result<()> {
    let (site, _, _) = two("no_such").await?;
    for name in ["2026-12-01T00-00-00-000Z", "../x", "", "a/b"] {
        let shown = archive(&site, &["show", name]).await;
        assert_eq!(shown.code, Some(4), "{shown}");
        assert!(shown.stderr.contains("archive list"), "{shown}");
    }
    let early = archive(
        &site,
        &["restore", "--to", "2020-01-01T00:00:00Z", "--database", "x"],
    )
    .await;
    assert_eq!(early.code, Some(4), "{early}");
    Ok(())
}
