//! An archive in a bucket: the same files, also under an object lock, and faults of the store.

use super::place::{archive, create, generation};
use support::bucket_rules::{keep_versions, locked_bucket};
use support::packages::content;
use support::{Cluster, Factory, Minio, Result, Site, site};

/// Makes a bucket for an archive on a store of its own, and writes it into the configuration.
async fn bucket(site: &Site, minio: &Minio, name: &str, extra: &str) -> Result<()> {
    if !minio.s3()?.has_bucket(name).await? {
        minio.s3()?.create_bucket(name).await?;
    }
    site.write_config(&format!(
        "{extra}\n[archive]\nendpoint = {:?}\nbucket_name = {name:?}\nprefix = \"builder/\"\nkey_id = {:?}\nsecret_key = {:?}\n",
        minio.endpoint(),
        minio.access_key(),
        minio.secret_key()
    ));
    Ok(())
}

/// Copies an archive out of its bucket, as `mc mirror` does.
async fn mirror(minio: &Minio, bucket: &str, site: &Site) -> Result<support::archive::Archive> {
    let root = site.dir.path().join("mirror");
    let s3 = minio.s3()?;
    for key in s3.list(bucket, "builder/").await? {
        let bytes = s3.get(bucket, &key).await?.ok_or("it has gone")?;
        let path = root.join(key.strip_prefix("builder/").ok_or("another prefix")?);
        std::fs::create_dir_all(path.parent().expect("a folder"))?;
        std::fs::write(path, bytes)?;
    }
    Ok(support::archive::Archive(root))
}

#[tokio::test]
async fn a_bucket_holds_the_same_files() -> Result<()> {
    let site = site("bucket").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 6).await?;
    // Larger than a part of an upload.
    let spec = support::Spec::new("core", "large", "1.0").size(40 << 20);
    factory.package(&site.primary, spec).await?;
    let minio = Minio::start().await?;
    bucket(&site, &minio, "archive", "").await?;
    site.warm_spare(&["sync"]).await.ok();
    let name = generation(&site).await;
    let verified = archive(&site, &["verify", "--all", "--json"])
        .await
        .ok()
        .json();
    assert!(
        verified["bytes_read"].as_u64() > Some(40 << 20),
        "{verified}"
    );
    let archived = mirror(&minio, "archive", &site).await?;
    let restored = archived
        .restore_by_hand(&name, &site.spare.pg, "from_bucket")
        .await?;
    assert_eq!(restored.rows, content(&site.primary).await?);
    restored
        .is_whole(&site.spare.pg, "from_bucket", &[])
        .await?;
    let text = site.config_file();
    let text = std::fs::read_to_string(text)?;
    assert!(text.contains("prefix"), "{text}");
    let foreign = minio.s3()?.list("archive", "").await?;
    assert!(
        foreign.iter().all(|key| key.starts_with("builder/")),
        "{foreign:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_locked_bucket_keeps_what_a_prune_would_remove_and_that_is_told() -> Result<()> {
    let site = site("locked").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let minio = Minio::start().await?;
    locked_bucket(&minio, "locked").await?;
    let keep = "[archive.keep]\nlast = 1\ndaily = 0\nweekly = 0\nmonthly = 0\n";
    bucket(&site, &minio, "locked", keep).await?;
    site.warm_spare(&["sync"]).await.ok();
    for _ in 0..2 {
        factory.fill(&site.primary, 1).await?;
        site.warm_spare(&["sync"]).await.ok();
        generation(&site).await;
    }
    archive(&site, &["verify", "--all"]).await.ok();
    let pruned = archive(&site, &["prune", "--json"]).await.ok().json();
    assert_eq!(
        pruned["locked_generations"].as_array().map(Vec::len),
        Some(1),
        "{pruned}"
    );
    let listed = archive(&site, &["list", "--json"]).await.ok().json();
    assert_eq!(
        listed["generations"].as_array().map(Vec::len),
        Some(2),
        "{listed}"
    );
    archive(&site, &["verify", "--all"]).await.ok();
    Ok(())
}

#[tokio::test]
async fn a_bucket_with_versions_is_pruned_for_good() -> Result<()> {
    let site = site("versions").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let minio = std::sync::Arc::new(Minio::start().await?);
    let cluster = Cluster::new(site.spare.pg.clone(), minio.clone(), "versions").await?;
    keep_versions(&cluster).await?;
    let keep = "[archive.keep]\nlast = 1\ndaily = 0\nweekly = 0\nmonthly = 0\n";
    bucket(&site, &minio, "versions", keep).await?;
    site.warm_spare(&["sync"]).await.ok();
    let first = generation(&site).await;
    for _ in 0..2 {
        factory.fill(&site.primary, 1).await?;
        site.warm_spare(&["sync"]).await.ok();
        generation(&site).await;
        archive(&site, &["prune", "--agree"]).await.ok();
    }
    let versions = minio
        .s3()?
        .list_versions("versions", &format!("builder/generations/{first}"))
        .await?;
    assert!(versions.is_empty(), "{versions:?}");
    archive(&site, &["verify", "--all"]).await.ok();
    Ok(())
}

#[tokio::test]
async fn a_store_that_is_gone_or_refuses_is_named_and_nothing_is_lost() -> Result<()> {
    let site = site("refuses").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let minio = Minio::start().await?;
    bucket(&site, &minio, "archive", "").await?;
    site.warm_spare(&["sync"]).await.ok();
    generation(&site).await;
    let text = std::fs::read_to_string(site.config_file())?;
    let good = minio.secret_key();
    let wrong = text.replace(good, "a-wrong-secret-key");
    // The spare's own store has the same key.
    let wrong = match site.spare.minio.secret_key() == good {
        true => text.replace(
            &format!("bucket_name = {:?}", "archive"),
            "bucket_name = \"no-such-bucket\"",
        ),
        false => wrong,
    };
    std::fs::write(site.config_file(), wrong)?;
    let refused = archive(&site, &["create"]).await;
    assert_eq!(refused.code, Some(3), "{refused}");
    assert!(
        refused
            .stderr
            .contains("archive_unreachable: archive archive"),
        "{refused}"
    );
    std::fs::write(site.config_file(), &text)?;
    create(&site).await;
    minio.kill9();
    let gone = archive(&site, &["list"]).await;
    assert_eq!(gone.code, Some(3), "{gone}");
    assert!(gone.stderr.contains("archive_unreachable"), "{gone}");
    minio.start_again().await?;
    archive(&site, &["verify", "--all"]).await.ok();
    Ok(())
}
