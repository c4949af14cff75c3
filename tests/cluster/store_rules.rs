//! What an operator has set on the buckets: MinIO's own replication between them, versions, a lock, a quota.

use serde_json::Value;
use support::between::config;
use support::bucket_rules::{keep_versions, locked_bucket, lose, replicate, set_quota};
use support::follow::bytes_of;
use support::http_fault::{Fault, HttpFault};
use support::packages::{insert, put};
use support::proxy::Proxy;
use support::{Cluster, Factory, Result, Site, Spec, site};
use tokio::sync::watch;
use warm_spare::cluster::{Keeps, LocalStore, Store, differ_in_bucket, prove_writable};
use warm_spare::domain::Side;

/// MinIO of the one side answers for what only the other has.
async fn answers_for_the_other(one: &Cluster, other: &Cluster) -> Result<bool> {
    other.put("by-hand", "of the other side").await?;
    let found = one.get("by-hand").await?.is_some();
    other.delete("by-hand").await?;
    Ok(found)
}

/// Both buckets joined by MinIO before: each is still a bucket of its own, and each object is looked for where it has to be.
#[tokio::test(flavor = "multi_thread")]
async fn buckets_that_minio_joins_are_two() -> Result<()> {
    let site = site("joined_buckets").await;
    let made = Factory::seeded().fill(&site.primary, 6).await?;
    for side in [&site.primary, &site.spare] {
        keep_versions(side).await?;
    }
    // One way: the primary's MinIO answers for the spare's objects.
    replicate(&site.primary, &site.spare, "").await?;
    assert!(answers_for_the_other(&site.primary, &site.spare).await?);
    site.write_config("[replication]\ngate_grace = \"200ms\"");
    site.warm_spare(&["sync"]).await.ok();
    for package in &made {
        let here = bytes_of(&site, &package.key).await?;
        assert_eq!(here.as_deref(), Some(package.checksum.as_str()));
    }
    // Emptied, it is not taken for the primary's because the spare has what it had.
    for package in &made {
        lose(&site.primary, &package.key)?;
        assert!(site.primary.get(&package.key).await?.is_some());
    }
    let lost = Factory::seeded().make(Spec::new("core", "lost", "1"));
    insert(&site.primary, &lost).await?;
    let output = site.warm_spare(&["sync"]).await;
    assert_eq!(output.code, Some(3), "{output}");
    assert!(output.stderr.contains("missing_artifacts"), "{output}");

    // The other way too: what the primary alone has is not taken for what is here.
    replicate(&site.spare, &site.primary, "").await?;
    assert!(answers_for_the_other(&site.spare, &site.primary).await?);
    for package in made.iter().chain([&lost]) {
        put(&site.primary, package).await?;
        lose(&site.spare, &package.key)?;
        assert!(bytes_of(&site, &package.key).await?.is_some());
    }
    site.warm_spare(&["sync"]).await.ok();
    for package in made.iter().chain([&lost]) {
        let object = site.spare.minio.data_dir().join(&site.spare.bucket);
        assert!(object.join(&package.key).exists(), "{}", package.key);
    }
    Ok(())
}

/// The stores of a site, with the spare's as the local one.
fn stores(site: &Site) -> Result<(LocalStore, Store)> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let local = config(&site.spare, site.spare.minio.endpoint());
    let peer = config(&site.primary, site.primary.minio.endpoint());
    Ok((LocalStore::open(&local)?, Store::open(Side::Peer, &peer)?))
}

/// A first copy between two buckets that MinIO joins by these rules, each from the primary or from the spare, with its prefix.
async fn first_copy_between_joined(name: &str, rules: &[(Side, &str)]) -> Result<()> {
    let site = site(name).await;
    let made = Factory::seeded().fill(&site.primary, 3).await?;
    let (primary, spare) = (&site.primary, &site.spare);
    for side in [primary, spare] {
        keep_versions(side).await?;
    }
    for (from, prefix) in rules {
        match from {
            Side::Peer => replicate(primary, spare, prefix).await?,
            Side::Local => replicate(spare, primary, prefix).await?,
        }
    }
    let (local, peer) = stores(&site)?;
    for _ in 0..3 {
        differ_in_bucket(&local, &peer).await?;
    }
    site.write_config("");
    site.warm_spare(&["sync"]).await.ok();
    for package in &made {
        let here = spare.minio.data_dir().join(&spare.bucket);
        assert!(here.join(&package.key).exists(), "{}", package.key);
        let bytes = bytes_of(&site, &package.key).await?;
        assert_eq!(bytes.as_deref(), Some(package.checksum.as_str()));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_one_way_does_not_make_one_bucket_of_two() -> Result<()> {
    // Each MinIO with a rule answers for objects that only the other has.
    first_copy_between_joined("rule_there", &[(Side::Peer, "")]).await?;
    first_copy_between_joined("rule_back", &[(Side::Local, "")]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_both_ways_do_not_make_one_bucket_of_two() -> Result<()> {
    first_copy_between_joined("rules", &[(Side::Peer, ""), (Side::Local, "")]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_with_a_prefix_do_not_make_one_bucket_of_two() -> Result<()> {
    // First only the probes are copied to the peer, and then all objects except the probes.
    let probes = [(Side::Peer, "core/"), (Side::Local, ".warm-spare/")];
    first_copy_between_joined("prefix_probes", &probes).await?;
    let others = [(Side::Peer, ".warm-spare/"), (Side::Local, "core/")];
    first_copy_between_joined("prefix_others", &others).await
}

/// A tool that copies between the buckets and marks nothing as a copy: one sight of the probe is no proof.
#[tokio::test(flavor = "multi_thread")]
async fn a_copied_probe_does_not_make_one_bucket_of_two() -> Result<()> {
    let site = site("copied_probe").await;
    let (local, _) = stores(&site)?;
    let line = HttpFault::start(site.primary.minio.port()).await?;
    let (go, gone) = watch::channel(false);
    line.times(1, |r| r.uri.path().contains("probe"), Fault::Until(gone));
    let peer = Store::open(Side::Peer, &config(&site.primary, line.endpoint()))?;
    let tool = async {
        let asked = async || match line.count("GET", "probe") {
            0 => Err("not asked for".into()),
            _ => Ok(()),
        };
        support::wait_until("the probe", support::SERVER_DEADLINE, asked).await;
        for key in site.spare.keys().await? {
            let bytes = site.spare.get(&key).await?.expect("it is there");
            site.primary.put(&key, bytes).await?;
        }
        go.send(true)?;
        Ok::<(), support::Error>(())
    };
    let (judged, copied) = tokio::join!(differ_in_bucket(&local, &peer), tool);
    copied?;
    judged?;
    assert_eq!(site.primary.keys().await?.len(), 1, "the tool's copy");
    assert_eq!(
        line.count("GET", "probe"),
        2,
        "the copy, and not its change"
    );
    assert_eq!(site.spare.keys().await?, [""; 0]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bucket_under_two_addresses_is_recognised() -> Result<()> {
    let mut site = site("two_addresses").await;
    Factory::seeded().fill(&site.primary, 2).await?;
    let line = Proxy::start(site.primary.minio.port()).await?;
    site.spare.minio = site.primary.minio.clone();
    site.spare.bucket = site.primary.bucket.clone();
    let keys = site.primary.keys().await?;
    for versions in [false, true] {
        if versions {
            keep_versions(&site.primary).await?;
        }
        site.write_config(&format!(
            "peer.s3.endpoint = \"http://127.0.0.1:{}\"",
            line.port()
        ));
        let output = site.warm_spare(&["sync"]).await;
        assert_eq!(output.code, Some(4), "{output}");
        for words in [
            "same_bucket",
            "a replication between two buckets makes them look so",
            "so was its change",
            "exclude .warm-spare/",
        ] {
            assert!(output.stderr.contains(words), "{words}: {output}");
        }
        let s3 = site.primary.s3();
        assert_eq!(
            s3.list_versions(&site.primary.bucket, ".warm-spare/")
                .await?,
            [""; 0]
        );
        assert_eq!(site.primary.keys().await?, keys);
    }
    Ok(())
}

async fn preflight(site: &Site) -> Result<Value> {
    let checks = site.warm_spare(&["preflight", "--json"]).await.json();
    let all = checks["checks"].as_array().cloned().unwrap_or_default();
    let found = all.into_iter().find(|check| check["name"] == "bucket");
    found.ok_or_else(|| format!("no such check: {checks:#}").into())
}

/// Objects of ours in the spare's bucket, each version and each mark of a deletion counted.
async fn of_ours(site: &Site) -> Result<Vec<String>> {
    let s3 = site.spare.s3();
    s3.list_versions(&site.spare.bucket, ".warm-spare/probe")
        .await
}

/// A probe leaves no versions behind; where it must, one of a process.
#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_keeps_versions_does_not_fill_with_probes() -> Result<()> {
    let mut site = site("versions").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    site.write_config("");
    keep_versions(&site.spare).await?;
    site.warm_spare(&["sync"]).await.ok();
    let check = preflight(&site).await?;
    assert_eq!(check["result"], "warn", "{check:#}");
    assert!(
        check["reason"].to_string().contains("keeps a version"),
        "{check:#}"
    );
    assert_eq!(of_ours(&site).await?, [""; 0]);

    site.spare.bucket = format!("{}-locked", site.spare.bucket);
    locked_bucket(&site.spare.minio, &site.spare.bucket).await?;
    site.write_config("");
    let (local, peer) = stores(&site)?;
    for _ in 0..3 {
        let keeps = prove_writable(&local).await?;
        assert_eq!(keeps, Keeps::Locked);
        differ_in_bucket(&local, &peer).await?;
        differ_in_bucket(&local, local.reading())
            .await
            .expect_err("it is the same");
    }
    // The probe, and its one change.
    assert_eq!(of_ours(&site).await?.len(), 2);
    site.warm_spare(&["sync"]).await.ok();
    let check = preflight(&site).await?;
    assert_eq!(check["result"], "warn", "{check:#}");
    assert!(
        check["reason"].to_string().contains("cannot be deleted"),
        "{check:#}"
    );
    Ok(())
}

/// MinIO's own quota: told as one, by the pass that meets it.
#[tokio::test(flavor = "multi_thread")]
async fn a_quota_of_the_bucket_is_named() -> Result<()> {
    let site = site("bucket_quota").await;
    set_quota(&site.spare, 1 << 20).await?;
    let big = Spec::new("core", "big", "1").size(2 << 20);
    Factory::seeded().package(&site.primary, big).await?;
    site.write_config("");
    let output = site.warm_spare(&["sync"]).await;
    assert_eq!(output.code, Some(3), "{output}");
    for words in ["quota", "raise the quota of the bucket"] {
        assert!(output.stderr.contains(words), "{output}");
    }
    Ok(())
}

/// MinIO refuses at once what is more than it was set to take.
#[tokio::test(flavor = "multi_thread")]
async fn stores_that_take_one_request_at_once_are_enough() -> Result<()> {
    let site = Site::builder("one_request").own_stores().start().await?;
    let made = Factory::seeded().fill(&site.primary, 24).await?;
    for side in [&site.primary, &site.spare] {
        side.minio.stop().await?;
        side.minio.set("MINIO_API_REQUESTS_MAX", "1");
        side.minio.start_again().await?;
    }
    site.write_config("[replication]\ncopies = 8");
    let report = site.warm_spare(&["sync", "--json"]).await.ok().json();
    assert_eq!(report["artifacts"]["unavailable"], serde_json::json!([]));
    // This client does not try again.
    site.spare.minio.stop().await?;
    site.spare.minio.set("MINIO_API_REQUESTS_MAX", "0");
    site.spare.minio.start_again().await?;
    for package in &made {
        let here = bytes_of(&site, &package.key).await?;
        assert_eq!(here.as_deref(), Some(package.checksum.as_str()));
    }
    Ok(())
}
