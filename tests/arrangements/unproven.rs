//! A first copy over a shared bucket: presence lets the rows in, and the bytes are hashed afterwards.

use crate::shared::{SHARED, acting, another, verified_deep, written_by_us};
use serde_json::Value;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use support::bucket_rules::keep_versions;
use support::follow::{bytes_of, copies, unavailable, until_copied, until_equal, until_following};
use support::http_fault::{Fault, HttpFault};
use support::packages::{Package, delete_package};
use support::pair::{Pair, write};
use support::service::SOON;
use support::{Result, Service, Site, wait_until};
use tokio::sync::watch;

const PATIENCE: &str = "[replication]\ngate_grace = \"300ms\"\nretry_missing = \"1s\"";

/// The store, as the spare reaches it. It holds back the bodies of objects until the test lets them
/// go.
struct Reads {
    proxy: HttpFault,
    /// Keys whose whole object was asked for.
    asked: Arc<Mutex<BTreeSet<String>>>,
    held: watch::Sender<bool>,
}

impl Reads {
    /// Lets the first `free` whole objects pass, and holds back all others.
    async fn hold(site: &Site, free: usize) -> Result<Reads> {
        let reads = Reads {
            proxy: HttpFault::start(site.primary.minio.port()).await?,
            asked: Arc::default(),
            held: watch::Sender::new(false),
        };
        reads.hold_after(free);
        Ok(reads)
    }

    fn hold_after(&self, free: usize) {
        self.held.send_replace(false);
        let (asked, held) = (self.asked.clone(), self.held.subscribe());
        asked.lock().expect("the list's lock").clear();
        self.proxy.set(move |request| {
            let key = request.uri.path().split_once('/').map(|(_, path)| path);
            let key = key.and_then(|path| path.split_once('/').map(|(_, key)| key));
            // The gate of the stream asks for the first byte before.
            let whole = request.method == "GET" && !request.headers.contains_key("range");
            let Some(key) = key.filter(|key| whole && key.ends_with(".hart")) else {
                return Fault::Forward;
            };
            let mut asked = asked.lock().expect("the list's lock");
            asked.insert(key.to_string());
            match asked.len() <= free {
                true => Fault::Forward,
                false => Fault::Until(held.clone()),
            }
        });
    }

    fn go(&self) {
        self.held.send_replace(true);
    }

    fn asked(&self) -> BTreeSet<String> {
        self.asked.lock().expect("the list's lock").clone()
    }

    async fn until_asked(&self, key: &str) {
        wait_until("the object is read", SOON, || async {
            match self.asked().contains(key) {
                true => Ok(()),
                false => Err(format!("{:?}", self.asked()).into()),
            }
        })
        .await;
    }

    /// Returns the configuration of a spare behind it.
    fn configured(&self, more: &str) -> String {
        let endpoint = self.proxy.endpoint();
        format!("{SHARED}\n{more}\n[local.s3]\nendpoint = \"{endpoint}\"")
    }
}

/// Waits until so many artifacts are not hashed yet.
pub(crate) async fn until_unproven(service: &Service<'_>, number: u64) -> Value {
    service
        .until(&format!("{number} unproven artifacts"), |status| {
            status["artifacts"]["unproven"] == number
        })
        .await
}

fn codes(status: &Value) -> String {
    status["health"]["reasons"].to_string()
}

/// Returns the result and the reason of the check of artifacts.
async fn checked(site: &Site, purpose: &str) -> (String, String) {
    let arguments = ["--json", "preflight", "--for", purpose];
    let found = site.warm_spare(&arguments).await.json();
    let checks = found["checks"].as_array().cloned().unwrap_or_default();
    let check = checks.iter().find(|check| check["name"] == "artifacts");
    let text = |name: &str| match check {
        Some(check) => check[name].as_str().unwrap_or_default().to_string(),
        None => String::new(),
    };
    (text("result"), text("reason"))
}

/// Returns the keys that are recorded as hashed.
async fn proven(site: &Site) -> Result<BTreeSet<String>> {
    let state = site.spare.pg.conn("warm_spare").await?;
    let sql = "SELECT key FROM artifact WHERE state = 'good'";
    let rows = state.query(sql, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

async fn has_row(site: &Site, package: &Package) -> Result<bool> {
    let sql = "SELECT FROM origin_packages WHERE checksum = $1";
    let rows = site.spare.conn().await?;
    Ok(!rows.query(sql, &[&package.checksum]).await?.is_empty())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_copy_waits_for_no_bytes_and_a_kill_loses_no_proof() -> Result<()> {
    let pair = Pair::of_one_bucket("unproven_first").await?;
    keep_versions(&pair.there.primary).await?;
    let (site, mut factory) = (&pair.there, another(21));
    factory.fill(&site.primary, 5).await?;
    let old = acting(&pair, "").await;
    let reads = Reads::hold(site, 2).await?;
    let service = Service::start(site, &reads.configured(""));
    until_following(&service).await;
    let status = until_unproven(&service, 6).await;
    assert_eq!(status["state"], "following", "{status:#}");
    assert_eq!(status["health"]["level"], 1, "{status:#}");
    assert!(codes(&status).contains("2 of 8 are done"), "{status:#}");
    let sample = "warm_spare_artifacts{state=\"unproven\"}";
    assert_eq!(service.metric(sample).await?, Some(6.0));
    for purpose in ["planned", "unplanned"] {
        let (result, reason) = checked(site, purpose).await;
        assert_eq!(result, "warn", "{reason}");
        assert!(reason.contains("6 artifacts"), "{reason}");
    }

    // A new row waits until its object is read.
    let new = factory.fill(&site.primary, 1).await?.remove(0);
    reads.until_asked(&new.key).await;
    assert!(!has_row(site, &new).await?);

    // Killed in the middle: what is proven is not read again.
    service.running.kill9()?;
    let before = proven(site).await?;
    assert_eq!(before.len(), 2);
    reads.hold_after(1);
    let service = Service::start(site, &reads.configured(""));
    wait_until(
        "one more is read, and the next one is asked for",
        SOON,
        || async {
            match reads.asked().len() {
                found if found > 1 => Ok(()),
                found => Err(format!("{found}").into()),
            }
        },
    )
    .await;
    reads.go();
    until_equal(site).await?;
    until_unproven(&service, 0).await;
    assert!(reads.asked().is_disjoint(&before), "{:?}", reads.asked());
    let status = until_following(&service).await;
    assert!(!codes(&status).contains("unproven"), "{status:#}");
    assert_eq!(checked(site, "planned").await.0, "ok");
    verified_deep(site).await?;
    assert_eq!(written_by_us(&site.primary).await?, [""; 0]);
    service.stop().await.ok();
    old.stop().await.ok();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_among_the_old_ones_is_listed() -> Result<()> {
    let pair = Pair::of_one_bucket("unproven_wrong").await?;
    let (site, mut factory) = (&pair.there, another(22));
    let made = factory.fill(&site.primary, 3).await?;
    let (damaged, gone) = (&made[0], &made[1]);
    site.primary.put(&damaged.key, "other bytes").await?;
    let old = acting(&pair, "").await;
    let reads = Reads::hold(site, 0).await?;
    let service = Service::start(site, &reads.configured(PATIENCE));
    until_following(&service).await;
    until_unproven(&service, 6).await;
    site.primary.delete(&gone.key).await?;
    reads.go();
    let status = service
        .until("both are listed", |status| {
            let artifacts = &status["artifacts"];
            artifacts["damaged_on_primary"] == 1 && artifacts["missing_on_primary"] == 1
        })
        .await;
    assert!(codes(&status).contains("damaged_on_primary"), "{status:#}");
    until_unproven(&service, 0).await;
    let mut listed = vec![damaged.key.clone(), gone.key.clone()];
    listed.sort();
    assert_eq!(unavailable(site).await?, listed);
    assert_eq!(
        site.primary.get(&damaged.key).await?.unwrap_or_default(),
        "other bytes"
    );

    // The stream knows of the records: one goes with its row.
    delete_package(&site.primary, damaged).await?;
    service
        .until("its row is gone", |status| {
            status["artifacts"]["damaged_on_primary"] == 0
        })
        .await;
    // The other one comes back.
    site.primary.put(&gone.key, gone.bytes()).await?;
    service
        .until("it is back", |status| {
            status["artifacts"]["missing_on_primary"] == 0
        })
        .await;
    assert_eq!(unavailable(site).await?, [""; 0]);
    assert_eq!(
        bytes_of(site, &gone.key).await?,
        Some(gone.checksum.clone())
    );
    verified_deep(site).await?;
    service.stop().await.ok();
    old.stop().await.ok();
    Ok(())
}

/// Where full copies are made again and again, each hashes the artifacts of new rows.
#[tokio::test(flavor = "multi_thread")]
async fn a_later_full_copy_hashes_new_rows_first() -> Result<()> {
    let pair = Pair::of_one_bucket("unproven_snapshot").await?;
    let (site, mut factory) = (&pair.there, another(23));
    let old = acting(&pair, "").await;
    let reads = Reads::hold(site, 3).await?;
    let snapshots = reads.configured("[replication]\nmode = \"snapshot\"");
    let service = Service::start(site, &snapshots);
    until_equal(site).await?;
    until_unproven(&service, 0).await;
    let new = factory.fill(&site.primary, 1).await?.remove(0);
    reads.until_asked(&new.key).await;
    assert!(!has_row(site, &new).await?);
    reads.go();
    until_equal(site).await?;
    until_unproven(&service, 0).await;
    assert!(proven(site).await?.contains(&new.key));
    // An object that was overwritten, under a row that is here already: the copy does not read it.
    service.stop().await.ok();
    reads.hold_after(0);
    site.primary.put(&new.key, "other bytes").await?;
    site.warm_spare(&["sync", "--baseline"]).await.ok();
    assert_eq!(reads.asked(), BTreeSet::new());
    let service = Service::start(
        site,
        &reads.configured(&format!("{PATIENCE}\nmode = \"snapshot\"")),
    );
    reads.until_asked(&new.key).await;
    reads.go();
    service
        .until("it is listed", |status| {
            status["artifacts"]["damaged_on_primary"] == 1
        })
        .await;
    until_unproven(&service, 0).await;
    // A further copy does not let it in by its presence: nothing would list it for an hour.
    let patient = "[replication]\ngate_grace = \"1h\"\nmode = \"snapshot\"";
    service.reconfigure(&reads.configured(patient));
    for number in 0..2 {
        write(&site.primary, &format!("change {number}")).await?;
        until_copied(&service, copies(&service).await?).await;
    }
    let status = service.status().await?;
    assert_eq!(status["artifacts"]["damaged_on_primary"], 1, "{status:#}");
    verified_deep(site).await?;
    service.stop().await.ok();
    old.stop().await.ok();
    Ok(())
}
