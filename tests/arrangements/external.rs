//! The provider replicates the bucket: real MinIO replication, on buckets that keep versions.

use serde_json::Value;
use support::bucket_rules::{keep_versions, lose, replicate};
use support::follow::{bytes_of, until_equal, until_following};
use support::packages::{self, delete_package, insert};
use support::pair::{
    PROMOTE, Pair, Writers, forced, lost, returning, until_primary, until_settled,
};
use support::proxy::Proxy;
use support::service::SOON;
use support::{Cluster, Factory, Package, Result, Service, Site, Spec, seed, wait_until};

const EXTERNAL: &str = "[artifacts]\nmode = \"external\"\n[replication]\ngate_grace = \"300ms\"\n\
                        retry_missing = \"1s\"\nlag_warn = \"1s\"";

fn external(more: &str) -> String {
    // Keys of a table that stands above it.
    EXTERNAL.replacen("[artifacts]", &format!("[artifacts]\n{more}"), 1)
}

/// Both buckets keep versions, and MinIO copies from the primary's to the spare's from now on.
async fn joined(name: &str) -> Result<Pair> {
    let pair = Pair::of_own_stores(name).await?;
    let site = &pair.there;
    keep_versions(&site.primary).await?;
    keep_versions(&site.spare).await?;
    replicate(&site.primary, &site.spare, "").await?;
    // By its status it is known that there is a rule.
    another(1).fill(&site.primary, 1).await?;
    Ok(pair)
}

/// Returns a factory beside the one of the site, which signs with the same keys.
fn another(number: u64) -> Factory {
    Factory::new(seed() + number).with_keys_of(seed())
}

/// Returns the objects of ours, and keys that were written twice: every version and every mark of a
/// deletion is counted by the store itself.
async fn written_by_us(cluster: &Cluster) -> Result<Vec<String>> {
    let versions = cluster.s3().list_versions(&cluster.bucket, "").await?;
    let ours = versions.iter().filter(|key| key.contains(".warm-spare/"));
    let mut found: Vec<String> = ours.cloned().collect();
    for key in cluster.keys().await? {
        if versions.iter().filter(|other| other.contains(&key)).count() > 1 {
            found.push(format!("twice: {key}"));
        }
    }
    Ok(found)
}

async fn has_row(site: &Site, package: &Package) -> Result<bool> {
    let sql = "SELECT FROM origin_packages WHERE ident = $1";
    let client = site.spare.conn().await?;
    Ok(!client.query(sql, &[&package.ident]).await?.is_empty())
}

/// Waits until the rows are equal, and each package has its bytes.
async fn until_whole(site: &Site, made: &[Package]) -> Result<()> {
    until_equal(site).await?;
    for package in made {
        let here = bytes_of(site, &package.key).await?;
        assert_eq!(
            here.as_deref(),
            Some(package.checksum.as_str()),
            "{}",
            package.key
        );
    }
    Ok(())
}

/// Uploads a package to the primary. The provider says that it has brought the object, and the
/// object is not on the spare.
async fn upload_and_lose(site: &Site, package: &Package) -> Result<()> {
    packages::put(&site.primary, package).await?;
    wait_until("MinIO has copied it", SOON, || async {
        let here = site.spare.get(&package.key).await?;
        here.map(drop).ok_or_else(|| "not yet".into())
    })
    .await;
    lose(&site.spare, &package.key)?;
    insert(&site.primary, package).await
}

async fn verified_deep(site: &Site) -> Result<()> {
    let output = site.warm_spare(&["verify", "--deep", "--json"]).await.ok();
    let differences = output.json()["differences"].clone();
    assert_eq!(differences.as_array().map(Vec::len), Some(0), "{output}");
    Ok(())
}

/// Returns the reason of preflight's check `bucket`.
async fn bucket_check(site: &Site) -> String {
    let output = site.warm_spare(&["preflight", "--json"]).await;
    let document = output.json();
    let checks = document["checks"].as_array().cloned().unwrap_or_default();
    let bucket = checks.iter().find(|check| check["name"] == "bucket");
    bucket.map_or_else(String::new, |check| check["reason"].to_string())
}

fn codes(status: &Value) -> Vec<&str> {
    let reasons = status["health"]["reasons"].as_array();
    let codes = reasons.into_iter().flatten();
    codes.filter_map(|reason| reason["code"].as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn from_the_first_copy_to_the_way_back() -> Result<()> {
    let pair = joined("external_life").await?;
    let (site, mut factory) = (&pair.there, another(7));
    // Packages of before the rule: nobody brings them.
    let old = site.primary.keys().await?.len() - 1;
    let service = Service::start(site, EXTERNAL);
    let status = service
        .until("the old ones are listed", |status| {
            status["artifacts"]["not_replicated"] == old
        })
        .await;
    assert_eq!(status["health"]["level"], 2, "{status:#}");
    assert!(codes(&status).contains(&"not_replicated"), "{status:#}");
    assert_eq!(status["artifacts"]["missing_on_primary"], 0);
    assert_eq!(written_by_us(&site.spare).await?, [""; 0]);

    let mut made = factory.fill(&site.primary, 6).await?;
    until_whole(site, &made).await?;

    // Killed at work.
    service.running.kill9()?;
    made.extend(factory.fill(&site.primary, 4).await?);
    let service = Service::start(site, EXTERNAL);
    until_following(&service).await;
    until_whole(site, &made).await?;
    assert_eq!(written_by_us(&site.spare).await?, [""; 0]);

    // Filled by us, on demand: these alone are written.
    service.reconfigure(&external("fill = true"));
    service
        .until("the old ones are brought", |status| {
            status["artifacts"]["not_replicated"] == 0
        })
        .await;
    assert_eq!(written_by_us(&site.spare).await?, [""; 0]);
    verified_deep(site).await?;
    service.reconfigure(EXTERNAL);
    until_following(&service).await;
    assert!(bucket_check(site).await.contains("has no rule"));

    // A planned handover under load.
    let writers = Writers::start([&site.primary, &site.spare], 2);
    writers.until_written(0, 50).await;
    made.extend(factory.fill(&site.primary, 3).await?);
    service.reconfigure(&format!("{PROMOTE}\n{EXTERNAL}"));
    until_primary(&service, 2).await;
    writers.until_written(1, 50).await;
    until_settled(&service).await;
    let acknowledged = writers.stop().await;
    assert_eq!(lost(&site.spare, &acknowledged).await?, [""; 0]);
    for package in &made {
        let here = bytes_of(site, &package.key).await?;
        assert_eq!(here.as_deref(), Some(package.checksum.as_str()));
    }
    assert_eq!(written_by_us(&site.spare).await?, [""; 0]);

    // The way back, with a rule of the other direction.
    replicate(&site.spare, &site.primary, "").await?;
    assert!(bucket_check(site).await.contains("A rule copies"));
    let back = returning(&pair.back, EXTERNAL).await;
    until_following(&back).await;
    let newer = factory.fill(&pair.back.primary, 4).await?;
    until_whole(&pair.back, &newer).await?;
    assert_eq!(written_by_us(&pair.back.spare).await?, [""; 0]);

    // A forced takeover by the old primary: the new one is killed.
    service.running.kill9()?;
    pair.back.primary.pg.kill9();
    back.reconfigure(&format!("{}\n{EXTERNAL}", forced(3)));
    until_primary(&back, 3).await;
    for package in made.iter().chain(&newer) {
        let here = bytes_of(&pair.back, &package.key).await?;
        assert_eq!(here.as_deref(), Some(package.checksum.as_str()));
    }
    assert_eq!(written_by_us(&pair.back.spare).await?, [""; 0]);
    back.stop().await.ok();
    Ok(())
}

/// The provider says that it has brought an object, and it is not here yet: the row waits, and the
/// recovery point with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_waits_until_its_object_has_arrived() -> Result<()> {
    let pair = joined("external_late").await?;
    let (site, mut factory) = (&pair.there, another(8));
    let service = Service::start(site, &external("fill = true"));
    until_following(&service).await;
    let late = factory.make(Spec::new("core", "late", "1.0.0"));
    upload_and_lose(site, &late).await?;
    let status = service
        .until("it is awaited for longer than lag_warn", |status| {
            codes(status).contains(&"provider_behind")
        })
        .await;
    assert_eq!(status["artifacts"]["awaited"], 1, "{status:#}");
    assert_eq!(status["artifacts"]["oldest_awaited"], late.key);
    assert_eq!(status["artifacts"]["missing_on_primary"], 0);
    assert_eq!(status["artifacts"]["not_replicated"], 0);
    assert_eq!(status["replication"]["gate_waiting"], 1);
    assert_eq!(
        service
            .metric("warm_spare_artifacts{state=\"awaited\"}")
            .await?,
        Some(1.0)
    );
    // An older version under the key is not the artifact, and no damage.
    site.spare.put(&late.key, "an older version").await?;
    let waits = |status: &Value| {
        status["artifacts"]["oldest_awaited_seconds"]
            .as_f64()
            .unwrap_or_default()
    };
    let looked_again = waits(&status) + 6.0;
    service
        .until("it is looked for again", |status| {
            waits(status) > looked_again
        })
        .await;
    assert!(!has_row(site, &late).await?, "no row before its artifact");
    packages::put(&site.spare, &late).await?;
    let status = service
        .until("it has arrived", |status| {
            status["artifacts"]["awaited"] == 0
        })
        .await;
    until_whole(site, std::slice::from_ref(&late)).await?;
    assert!(
        status["artifacts"]["arrival_p99_seconds"].as_f64() > Some(1.0),
        "{status:#}"
    );
    let arrived = service
        .metric("warm_spare_artifact_arrival_seconds_count")
        .await?;
    assert!(arrived >= Some(1.0), "{arrived:?}");

    // The same key with other bytes: the row waits for them.
    let release = late.ident.rsplit('/').next().expect("a release");
    let spec = Spec::new("core", "late", "1.0.0").release(release);
    let other = factory.make(spec.size(70_000));
    assert_eq!(other.key, late.key);
    delete_package(&site.primary, &late).await?;
    packages::upload(&site.primary, &other).await?;
    until_whole(site, &[other]).await?;
    service.stop().await.ok();
    Ok(())
}

/// The limit of the time for an arrival ends the wait; a later arrival is noticed.
#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_never_arrives_is_listed_after_its_time() -> Result<()> {
    let pair = joined("external_never").await?;
    let (site, mut factory) = (&pair.there, another(9));
    let short = external("arrival_limit = \"2s\"");
    let service = Service::start(site, &short);
    until_following(&service).await;
    let before = service.status().await?["artifacts"]["not_replicated"].clone();
    let late = factory.make(Spec::new("core", "never", "1.0.0"));
    upload_and_lose(site, &late).await?;
    until_equal(site).await?;
    let more = before.as_u64().unwrap_or_default() + 1;
    service
        .until("it is listed", |status| {
            status["artifacts"]["not_replicated"] == more
        })
        .await;
    packages::put(&site.spare, &late).await?;
    service
        .until("it is found", |status| {
            status["artifacts"]["not_replicated"] == more - 1
        })
        .await;
    service.stop().await.ok();
    Ok(())
}

/// One bucket under one address, and a bucket that nobody replicates.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_buckets_are_named() -> Result<()> {
    let pair = Pair::of_own_stores("external_wrong").await?;
    let site = &pair.there;
    let same = format!(
        "[local.s3]\nendpoint = \"{}\"\nbucket_name = \"{}\"\nkey_id = \"{}\"\nsecret_key = \"{}\"\n{EXTERNAL}",
        site.primary.minio.endpoint(),
        site.primary.bucket,
        site.primary.minio.access_key(),
        site.primary.minio.secret_key()
    );
    let service = Service::start(site, &same);
    service.until_hold("same_bucket").await;
    service.stop().await.ok();
    assert_eq!(written_by_us(&site.primary).await?, [""; 0]);

    // Nobody brings anything: after its time each artifact is listed, and nothing is lost.
    let service = Service::start(site, &external("arrival_limit = \"2s\""));
    let keys = site.primary.keys().await?;
    service
        .until("all are listed", |status| {
            status["artifacts"]["not_replicated"] == keys.len()
        })
        .await;
    until_equal(site).await?;
    assert_eq!(site.spare.keys().await?, [""; 0]);
    service.stop().await.ok();
    Ok(())
}

/// With a prefix of our own in the provider's bucket, the epoch is remembered there, and one bucket
/// under two addresses is found by a probe. No other object is ours.
#[tokio::test(flavor = "multi_thread")]
async fn marks_of_ours_are_under_our_own_prefix_alone() -> Result<()> {
    let pair = joined("external_marks").await?;
    let site = &pair.there;
    let with_marks = external("own_prefix = \".ours/dc2/\"\n");
    let service = Service::start(site, &with_marks);
    until_following(&service).await;
    let bucket = bucket_check(site).await;
    assert!(bucket.contains("under .ours/dc2/"), "{bucket}");

    // The peer's address is another one of the spare's own bucket.
    let line = Proxy::start(site.spare.minio.port()).await?;
    let beside = pair.back.turned()?;
    beside.write_config(&format!(
        "{with_marks}\n[peer.s3]\nendpoint = \"http://127.0.0.1:{}\"\nbucket_name = {:?}\nkey_id = {:?}\nsecret_key = {:?}",
        line.port(),
        site.spare.bucket,
        site.spare.minio.access_key(),
        site.spare.minio.secret_key()
    ));
    let output = beside.warm_spare(&["check-config", "--connect"]).await;
    assert!(output.stderr.contains("same_bucket"), "{output}");

    service.reconfigure(&format!("{PROMOTE}\n{with_marks}"));
    until_primary(&service, 2).await;
    wait_until("the epoch is remembered", SOON, || async {
        let found = site.spare.get(".ours/dc2/epoch.json").await?;
        found.map(drop).ok_or_else(|| "not yet".into())
    })
    .await;
    service.stop().await.ok();
    let versions = site
        .spare
        .s3()
        .list_versions(&site.spare.bucket, "")
        .await?;
    let ours: Vec<_> = versions.iter().filter(|key| key.contains("/.")).collect();
    let ours = ours
        .into_iter()
        .chain(versions.iter().filter(|key| key.starts_with('.')));
    for key in ours {
        assert!(key.contains(".ours/dc2/"), "{key}");
    }
    assert_eq!(written_by_us(&site.spare).await?, [""; 0]);
    Ok(())
}
