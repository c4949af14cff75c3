//! A file system that comes to the other site with the takeover.

use crate::unproven::until_unproven;
use serde_json::Value;
use support::follow::{logical, prepare, until_equal, until_following};
use support::packages::Package;
use support::pair::{PROMOTE, Pair, forced, is_writable, returning, until_primary, write};
use support::{Cluster, Factory, Result, Service, Site, seed};

const ATTACHED: &str =
    "[artifacts]\nmode = \"shared\"\nattach = \"at_takeover\"\nlease_ttl = \"2s\"";

/// Waits until the takeover says that it waits for these words.
async fn until_waiting(service: &Service<'_>, words: &str) -> Value {
    service
        .until(&format!("it waits: {words}"), |status| {
            let detail = status["hold"]["detail"].as_str().unwrap_or_default();
            status["hold"]["reason"] == "not_attached" && detail.contains(words)
        })
        .await
}

async fn has_all(cluster: &Cluster, packages: &[Package]) -> Result<()> {
    for package in packages {
        let found = cluster.s3().checksum(&cluster.bucket, &package.key).await?;
        assert_eq!(found.as_deref(), Some(package.checksum.as_str()));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_files_follow_the_takeover_and_come_back() -> Result<()> {
    let site = Site::builder("attached")
        .primary(logical())
        .spare(logical());
    let there = site.own_stores().one_file_system().start().await?;
    let mut factory = Factory::new(seed());
    let mut made = factory.fill(&there.primary, 4).await?;
    prepare(&there).await;
    let pair = Pair::of(there)?;
    let (a, b) = (&pair.there.primary, &pair.there.spare);
    let old = Service::start(&pair.back, &format!("role = \"primary\"\n{ATTACHED}"));
    old.until("the lease is ours", |status| {
        status["lease"]["permitted"] == true
    })
    .await;
    let service = Service::start(&pair.there, ATTACHED);
    until_following(&service).await;
    a.minio.copy_files_to(&b.minio)?;
    made.extend(factory.fill(a, 3).await?);
    until_equal(&pair.there).await?;
    let output = pair.there.warm_spare(&["verify", "--deep", "--json"]).await;
    assert_eq!(output.ok().json()["artifacts"], made.len());
    let status = until_unproven(&service, 0).await;
    assert_eq!(status["health"]["level"], 0, "{status:#}");

    // Planned: the operator moves the files. An old copy of them is not taken.
    service.reconfigure(&format!("{PROMOTE}\n{ATTACHED}"));
    let status = until_waiting(&service, "still accepts connections").await;
    assert_eq!(status["transition"]["step"], "attach", "{status:#}");
    assert!(!is_writable(a).await && !is_writable(b).await);
    a.minio.stop().await?;
    until_waiting(&service, "local artifact store").await;
    b.minio.start_again().await?;
    until_waiting(&service, "this is another file system, or an old copy").await;
    assert!(!is_writable(b).await);
    b.minio.stop().await?;
    a.minio.move_files_to(&b.minio)?;
    b.minio.start_again().await?;
    until_primary(&service, 2).await;
    write(b, "after the takeover").await?;
    has_all(b, &made).await?;
    old.stop().await.ok();

    // The way back, by force: the new primary is killed.
    let back = returning(&pair.back, ATTACHED).await;
    until_following(&back).await;
    made.extend(factory.fill(b, 2).await?);
    until_equal(&pair.back).await?;
    service.running.kill9()?;
    b.pg.kill9();
    b.minio.kill9();
    back.reconfigure(&format!("{}\n{ATTACHED}", forced(3)));
    until_waiting(&back, "local artifact store").await;
    b.minio.move_files_to(&a.minio)?;
    a.minio.start_again().await?;
    until_primary(&back, 3).await;
    write(a, "after the way back").await?;
    has_all(a, &made).await?;
    back.until("the lease is ours", |status| {
        status["lease"]["permitted"] == true
    })
    .await;
    back.stop().await.ok();
    Ok(())
}
