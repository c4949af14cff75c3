//! Artifacts: what the primary lacks or has damaged, what changes while it is copied, and what is very large.

use std::time::Duration;
use support::http_fault::{Fault, HttpFault};
use support::packages::{self, delete_package};
use support::{Factory, Result, Site, Spec, site};

async fn checksum(site: &Site, key: &str) -> Result<Option<String>> {
    site.spare.s3().checksum(&site.spare.bucket, key).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_primary_lacks_or_has_damaged_is_recorded_and_not_fatal() -> Result<()> {
    let site = site("lacking").await;
    let mut factory = Factory::seeded();
    let packages = factory.fill(&site.primary, 6).await?;
    site.primary.delete(&packages[0].key).await?;
    site.primary
        .put(&packages[1].key, "these are not the bytes")
        .await?;

    let output = site.warm_spare(&["sync"]).await.ok();
    assert!(
        output
            .stdout
            .contains("WARNING: 2 artifacts missing or damaged on the primary"),
        "{output}"
    );
    assert!(
        output
            .stdout
            .contains(&format!("missing {}", packages[0].key)),
        "{output}"
    );
    assert!(
        output
            .stdout
            .contains(&format!("damaged {}", packages[1].key)),
        "{output}"
    );
    assert_eq!(
        checksum(&site, &packages[1].key).await?,
        None,
        "damaged bytes do not arrive"
    );
    let verified = site
        .warm_spare(&["--json", "verify", "--deep"])
        .await
        .ok()
        .json();
    assert_eq!(verified["unavailable"].as_array().map(Vec::len), Some(2));
    assert_eq!(verified["artifacts"], 4);

    // Mended on the primary by somebody: brought by the next pass, though no row has changed.
    packages::put(&site.primary, &packages[0]).await?;
    packages::put(&site.primary, &packages[1]).await?;
    let again = site.warm_spare(&["--json", "sync"]).await.ok().json();
    assert_eq!(again["artifacts"]["copied"], 2);
    assert_eq!(
        again["artifacts"]["unavailable"].as_array().map(Vec::len),
        Some(0)
    );
    let verified = site
        .warm_spare(&["--json", "verify", "--deep"])
        .await
        .ok()
        .json();
    assert_eq!(verified["artifacts"], 6);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_key_with_other_bytes_is_replaced_with_the_row_that_names_them() -> Result<()> {
    let site = site("anew").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 3).await?;
    let spec = Spec::new("core", "again", "1").release("20240101000000");
    let old = factory.package(&site.primary, spec.clone()).await?;
    site.warm_spare(&["sync"]).await.ok();
    delete_package(&site.primary, &old).await?;
    let new = factory.package(&site.primary, spec.size(9000)).await?;

    site.warm_spare(&["sync"]).await.ok();
    assert_eq!(checksum(&site, &new.key).await?, Some(new.checksum.clone()));
    let retired = format!(".warm-spare/retired/{}", old.checksum);
    assert_eq!(
        checksum(&site, &retired).await?,
        Some(old.checksum),
        "the old bytes are kept"
    );
    let ours: Vec<String> = site
        .spare
        .keys()
        .await?
        .into_iter()
        .filter(|key| key.starts_with(".warm-spare/"))
        .collect();
    assert_eq!(ours, [retired]);
    site.warm_spare(&["verify", "--deep"]).await.ok();
    Ok(())
}

/// The proxy holds the last artifact of the first round, the primary changes, and goes on.
#[tokio::test(flavor = "multi_thread")]
async fn packages_deleted_and_uploaded_anew_while_the_baseline_runs() -> Result<()> {
    let site = site("meanwhile").await;
    let mut factory = Factory::seeded();
    let packages = factory.fill(&site.primary, 8).await?;
    let spec = Spec::new("core", "again", "1").release("20240101000000");
    let old = factory.package(&site.primary, spec.clone()).await?;
    let proxy = HttpFault::start(site.primary.minio.port()).await?;
    site.write_config(&format!("peer.s3.endpoint = \"{}\"", proxy.endpoint()));
    let held = packages[3].key.clone();
    let slow = held.clone();
    let (open, until) = tokio::sync::watch::channel(false);
    proxy.set(move |request| {
        if request
            .uri
            .path()
            .ends_with(slow.rsplit('/').next().expect("a name"))
        {
            Fault::Until(until.clone())
        } else {
            Fault::Forward
        }
    });
    let mut running = site.spawn(&["sync"]);
    running
        .wait_for_line(
            |line| line.starts_with("artifacts: 9"),
            Duration::from_secs(60),
        )
        .await?;
    support::wait_until(
        "the held artifact is asked for",
        Duration::from_secs(30),
        async || {
            let name = held.rsplit('/').next().expect("a name");
            if proxy.count("GET", name) > 0 {
                Ok(())
            } else {
                Err("not yet".into())
            }
        },
    )
    .await;
    delete_package(&site.primary, &packages[0]).await?;
    delete_package(&site.primary, &old).await?;
    let new = factory.package(&site.primary, spec.size(7000)).await?;
    open.send_replace(true);
    let output = running.wait(Duration::from_secs(120)).await?.ok();
    assert!(output.stdout.contains("Copied 8 packages"), "{output}");
    assert_eq!(checksum(&site, &new.key).await?, Some(new.checksum));
    site.warm_spare(&["verify", "--deep"]).await.ok();
    Ok(())
}

/// Resident memory, in KiB, of a process: its highest so far.
fn peak_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_and_a_gibibyte_arrive_in_little_memory() -> Result<()> {
    let site = site("sizes").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let huge = factory
        .package(&site.primary, Spec::new("core", "huge", "1").size(1 << 30))
        .await?;
    // Builder would not take an empty file; a store may hold one all the same.
    let empty = factory
        .package(&site.primary, Spec::new("core", "empty", "1"))
        .await?;
    site.primary.put(&empty.key, "").await?;
    let nothing = blake2b_simd::Params::new()
        .hash_length(32)
        .hash(b"")
        .to_hex()
        .to_string();
    let client = site.primary.conn().await?;
    client
        .execute(
            "UPDATE origin_packages SET checksum = $1 WHERE ident = $2",
            &[&nothing, &empty.ident],
        )
        .await?;

    let running = site.spawn(&["sync"]);
    let pid = running.pid();
    let watched = tokio::task::spawn_blocking(move || {
        let mut peak = 0;
        while support::process::alive(pid) {
            peak = peak.max(peak_memory(pid));
            std::thread::sleep(Duration::from_millis(50));
        }
        peak
    });
    running.wait(Duration::from_secs(300)).await?.ok();
    let peak = watched.await?;
    assert!(
        peak > 0 && peak < 150 * 1024,
        "resident memory rose to {peak} KiB"
    );
    assert_eq!(checksum(&site, &huge.key).await?, Some(huge.checksum));
    assert_eq!(checksum(&site, &empty.key).await?, Some(nothing));
    let verified = site.warm_spare(&["--json", "verify"]).await.ok().json();
    assert_eq!(verified["artifacts"], 4);
    Ok(())
}

/// Its row is in the snapshot, and by the time its artifact is asked for, the primary has deleted both.
#[tokio::test(flavor = "multi_thread")]
async fn a_package_deleted_after_the_snapshot_is_recorded_as_missing_at_that_point() -> Result<()> {
    let site = site("behind").await;
    let mut factory = Factory::seeded();
    let packages = factory.fill(&site.primary, 5).await?;
    let proxy = HttpFault::start(site.primary.minio.port()).await?;
    site.write_config(&format!("peer.s3.endpoint = \"{}\"", proxy.endpoint()));
    let name = |key: &str| key.rsplit('/').next().expect("a name").to_string();
    let (held, late) = (
        name(&packages[1].key),
        factory.make(Spec::new("core", "late", "1").release("20240101000000")),
    );
    let (open_first, first) = tokio::sync::watch::channel(false);
    let (open_late, last) = tokio::sync::watch::channel(false);
    let (slow, slower) = (held.clone(), name(&late.key));
    proxy.set(move |request| {
        let path = request.uri.path();
        if path.ends_with(&slow) {
            Fault::Until(first.clone())
        } else if path.ends_with(&slower) {
            Fault::Until(last.clone())
        } else {
            Fault::Forward
        }
    });
    let asked = async |file: &str| {
        support::wait_until(
            "the artifact is asked for",
            Duration::from_secs(60),
            async || {
                if proxy.count("GET", file) > 0 {
                    Ok(())
                } else {
                    Err("not yet".into())
                }
            },
        )
        .await;
    };
    let running = site.spawn(&["sync"]);
    asked(&held).await;
    // After the first reading of the rows, before the snapshot; gone again after it.
    factory.origin(&site.primary, "core").await?;
    packages::upload(&site.primary, &late).await?;
    open_first.send_replace(true);
    asked(&name(&late.key)).await;
    delete_package(&site.primary, &late).await?;
    open_late.send_replace(true);
    let output = running.wait(Duration::from_secs(120)).await?.ok();
    assert!(output.stdout.contains("Copied 6 packages"), "{output}");
    assert!(
        output.stdout.contains(&format!("missing {}", late.key)),
        "{output}"
    );
    site.warm_spare(&["verify", "--deep"]).await.ok();
    // The next point has neither row nor record.
    let again = site.warm_spare(&["--json", "sync"]).await.ok().json();
    assert_eq!(again["packages"], 5);
    assert_eq!(
        again["artifacts"]["unavailable"].as_array().map(Vec::len),
        Some(0)
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_names_no_possible_artifact_is_recorded_by_its_package() -> Result<()> {
    let site = site("unsound").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    let client = site.primary.conn().await?;
    client.batch_execute("UPDATE origin_packages SET checksum = 'none' WHERE id = (SELECT min(id) FROM origin_packages)").await?;
    let output = site.warm_spare(&["--json", "sync"]).await.ok().json();
    assert_eq!(output["artifacts"]["unavailable"][0]["reason"], "unsound");
    for _ in 0..2 {
        let output = site
            .warm_spare(&["--json", "verify", "--deep"])
            .await
            .ok()
            .json();
        assert_eq!(output["unavailable"][0]["reason"], "unsound");
        site.warm_spare(&["sync"]).await.ok();
    }
    Ok(())
}

/// One object that the primary loses, known before or not, is recorded; it does not stop everything after it.
#[tokio::test(flavor = "multi_thread")]
async fn single_losses_on_the_primary_do_not_stop_the_spare() -> Result<()> {
    let site = site("losses").await;
    let mut factory = Factory::seeded();
    let packages = factory.fill(&site.primary, 4).await?;
    site.warm_spare(&["sync"]).await.ok();
    for (number, package) in packages[..3].iter().enumerate() {
        site.primary.delete(&package.key).await?;
        let lost = factory
            .package(
                &site.primary,
                Spec::new("core", "lost", &number.to_string()),
            )
            .await?;
        site.primary.delete(&lost.key).await?;
        let output = site.warm_spare(&["sync"]).await.ok();
        assert!(
            output.stdout.contains(&format!("missing {}", lost.key)),
            "{output}"
        );
        site.warm_spare(&["verify", "--deep"]).await.ok();
    }
    Ok(())
}
