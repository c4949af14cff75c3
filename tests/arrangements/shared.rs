//! One bucket for both sites: a lease in it says which cluster takes live traffic.

use crate::unproven::until_unproven;
use serde_json::Value;
use support::bucket_rules::keep_versions;
use support::follow::{events, unavailable, until_equal, until_following};
use support::http_fault::{Fault, HttpFault};
use support::packages::{self, delete_package};
use support::pair::{
    PROMOTE, Pair, Writers, forced, is_writable, lost, returning, until_primary, until_read_only,
    until_settled, until_writable, write,
};
use support::proxy::{Mode, Proxy};
use support::service::until_conflict;
use support::{Cluster, Factory, Result, Service, Site, Spec, seed};

pub(crate) const SHARED: &str = "[artifacts]\nmode = \"shared\"\nlease_ttl = \"2s\"";
const LEASE: &str = ".warm-spare/lease.json";

/// Returns the configuration of an acting primary in this mode.
fn holder(more: &str) -> String {
    format!("role = \"primary\"\n{SHARED}\n{more}")
}

pub(crate) fn another(number: u64) -> Factory {
    Factory::new(seed() + number).with_keys_of(seed())
}

async fn lease(cluster: &Cluster) -> Result<Value> {
    let body = cluster.get(LEASE).await?.ok_or("there is no lease")?;
    Ok(serde_json::from_slice(&body)?)
}

/// Returns the keys of ours beside the lease, and keys that were written twice.
pub(crate) async fn written_by_us(cluster: &Cluster) -> Result<Vec<String>> {
    let versions = cluster.s3().list_versions(&cluster.bucket, "").await?;
    let ours = versions
        .iter()
        .filter(|key| key.contains(".warm-spare/") && !key.contains(LEASE));
    let mut found: Vec<String> = ours.cloned().collect();
    for key in cluster.keys().await? {
        let twice = versions.iter().filter(|other| other.contains(&key)).count() > 1;
        if twice && !key.starts_with(LEASE) {
            found.push(format!("twice: {key}"));
        }
    }
    Ok(found)
}

async fn until_held<'a>(service: &Service<'a>) -> Value {
    service
        .until("the lease is ours", |status| {
            status["lease"]["permitted"] == true
        })
        .await
}

/// Starts the service of the first primary, and waits until it holds the lease.
pub(crate) async fn acting<'a>(pair: &'a Pair, more: &str) -> Service<'a> {
    let service = Service::start(&pair.back, &holder(more));
    until_held(&service).await;
    service
}

/// A time of a status, or of a lease, in whole seconds.
fn seconds(time: &Value) -> &str {
    time.as_str().and_then(|time| time.get(..19)).unwrap_or("")
}

async fn until_consent(service: &Service<'_>) -> String {
    let status = service.until_hold("lease_unanswered").await;
    let step = status["hold"]["next_step"].as_str().unwrap_or_default();
    let (_, rest) = step
        .split_once("takeover.force_lease = \"")
        .unwrap_or_else(|| panic!("no consent in {status:#}"));
    rest.split('"').next().unwrap_or_default().to_string()
}

pub(crate) async fn verified_deep(site: &Site) -> Result<()> {
    let output = site.warm_spare(&["verify", "--deep", "--json"]).await.ok();
    let differences = output.json()["differences"].clone();
    assert_eq!(differences.as_array().map(Vec::len), Some(0), "{output}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn from_the_first_copy_to_the_way_back() -> Result<()> {
    let pair = Pair::of_one_bucket("shared_life").await?;
    keep_versions(&pair.there.primary).await?;
    let (site, mut factory) = (&pair.there, another(7));
    let service = Service::start(site, SHARED);
    service.until_hold("not_prepared").await;
    let old = acting(&pair, "").await;
    until_following(&service).await;
    factory.fill(&site.primary, 5).await?;
    until_equal(site).await?;

    // Killed at work.
    service.running.kill9()?;
    factory.fill(&site.primary, 4).await?;
    let service = Service::start(site, SHARED);
    until_following(&service).await;
    until_equal(site).await?;
    verified_deep(site).await?;
    let status = until_unproven(&service, 0).await;
    assert_eq!(status["lease"]["epoch"], 1, "{status:#}");
    assert_eq!(status["health"]["level"], 0, "{status:#}");

    // A planned handover under load.
    let writers = Writers::start([&site.primary, &site.spare], 2);
    writers.until_written(0, 50).await;
    service.reconfigure(&format!("{PROMOTE}\n{SHARED}"));
    until_primary(&service, 2).await;
    writers.until_written(1, 50).await;
    until_settled(&service).await;
    let acknowledged = writers.stop().await;
    assert_eq!(lost(&site.spare, &acknowledged).await?, [""; 0]);
    until_held(&service).await;
    assert_eq!(lease(&site.primary).await?["epoch"], 2);
    old.stop().await.ok();

    // The way back, and a forced takeover by the old primary: the new one is killed.
    let back = returning(&pair.back, SHARED).await;
    until_following(&back).await;
    factory.fill(&pair.back.primary, 4).await?;
    until_equal(&pair.back).await?;
    service.running.kill9()?;
    pair.back.primary.pg.kill9();
    back.reconfigure(&format!("{}\n{SHARED}", forced(3)));
    // Nobody answers, and nothing was promised: an operator must say that the site is lost.
    let nonce = until_consent(&back).await;
    assert!(!is_writable(&pair.back.spare).await);
    back.reconfigure(&format!(
        "{}\n{SHARED}\n[takeover]\nforce_lease = \"{nonce}\"",
        forced(3)
    ));
    let status = until_primary(&back, 3).await;
    let told = events(&status, "promotion").join("; ");
    assert!(
        told.contains("overridden by takeover.force_lease"),
        "{told}"
    );
    until_held(&back).await;
    assert_eq!(written_by_us(&site.primary).await?, [""; 0]);
    back.stop().await.ok();
    Ok(())
}

/// The two sites do not see each other, and both see the bucket.
#[tokio::test(flavor = "multi_thread")]
async fn two_sites_that_are_cut_off_hand_over_by_the_lease() -> Result<()> {
    let pair = Pair::of_one_bucket("shared_cut").await?;
    let (site, link) = (
        &pair.there,
        Proxy::start(pair.there.primary.pg.port()).await?,
    );
    let old = acting(&pair, "").await;
    let service = Service::start(site, &link.to_peer(SHARED));
    until_following(&service).await;
    write(&site.primary, "before the cut").await?;
    until_equal(site).await?;
    link.lose().await;
    // The old primary does not see the new one either.
    old.reconfigure(&holder("[peer.datastore]\nport = 1"));
    service.reconfigure(&link.to_peer(&format!("{}\n{SHARED}", forced(2))));
    let status = until_primary(&service, 2).await;
    let told = events(&status, "promotion").join("; ");
    assert!(told.contains("its holder is fenced"), "{told}");
    assert!(!is_writable(&site.primary).await);
    assert!(is_writable(&site.spare).await);
    old.until("the old primary is fenced", |status| {
        status["state"] == "fenced" && status["local"]["fenced"] == true
    })
    .await;
    // A new process of the old primary finds the fence, and keeps it.
    old.running.kill9()?;
    let old = Service::start(&pair.back, &holder("[peer.datastore]\nport = 1"));
    old.until("still fenced", |status| status["state"] == "fenced")
        .await;
    assert!(!is_writable(&site.primary).await);
    old.stop().await.ok();
    service.stop().await.ok();
    Ok(())
}

/// A takeover that is called off while it waits gives the lease back, and the holder lifts the fence
/// that it had set for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_takeover_that_is_called_off_gives_the_lease_back() -> Result<()> {
    let pair = Pair::of_one_bucket("shared_off").await?;
    let (site, link) = (
        &pair.there,
        Proxy::start(pair.there.primary.pg.port()).await?,
    );
    let old = acting(&pair, "").await;
    for point in ["lease.asked", "lease.taken"] {
        let service = Service::start(site, &link.to_peer(SHARED));
        until_following(&service).await;
        service.stop().await.ok();
        link.lose().await;
        let asked = link.to_peer(&format!("{}\n{SHARED}", forced(2)));
        Service::doomed(site, &asked, point).dead().await?;
        until_read_only(&site.primary).await;
        link.set(Mode::Pass).await;
        let service = Service::start(site, &link.to_peer(SHARED));
        until_writable(&site.primary).await;
        until_following(&service).await;
        let found = lease(&site.primary).await?;
        assert_eq!(found["epoch"], 1, "{point}: {found:#}");
        assert_eq!(found["state"], "held", "{point}: {found:#}");
        assert!(!is_writable(&site.spare).await, "{point}");
        service.stop().await.ok();
    }
    old.stop().await.ok();
    Ok(())
}

/// A holder that can renew the lease no more keeps its promise.
#[tokio::test(flavor = "multi_thread")]
async fn an_isolated_holder_does_what_it_promised() -> Result<()> {
    let pair = Pair::of_one_bucket("shared_alone").await?;
    let site = &pair.there;
    let (link, to_store) = (
        Proxy::start(site.primary.pg.port()).await?,
        Proxy::start(site.primary.minio.port()).await?,
    );
    let through = |promise: &str| {
        format!(
            "{}\n{promise}\n[local.s3]\nendpoint = \"http://127.0.0.1:{}\"\n[peer.datastore]\nport = {}",
            holder(""),
            to_store.port(),
            1
        )
    };
    // It goes on, and is critical.
    let old = Service::start(&pair.back, &through(""));
    until_held(&old).await;
    let service = Service::start(site, &link.to_peer(SHARED));
    until_following(&service).await;
    to_store.lose().await;
    let status = old
        .until("the lease has run out", |status| {
            status["lease"]["permitted"] == false || status["health"]["level"] == 2
        })
        .await;
    let codes = status["health"]["reasons"].to_string();
    assert!(codes.contains("lease_expired"), "{status:#}");
    assert!(is_writable(&site.primary).await);
    to_store.set(Mode::Pass).await;
    until_held(&old).await;

    // It promised to fence itself.
    old.reconfigure(&through("isolated = \"fence\""));
    old.until("the promise is written", |status| {
        status["lease"]["isolated"] == "fence"
    })
    .await;
    to_store.lose().await;
    until_read_only(&site.primary).await;
    let status = old
        .until("it says so", |status| {
            let reasons = status["health"]["reasons"].to_string();
            reasons.contains("has fenced itself")
        })
        .await;
    let reasons = status["health"]["reasons"].to_string();
    assert!(!reasons.contains("set role ="), "{status:#}");
    to_store.set(Mode::Pass).await;
    until_writable(&site.primary).await;
    until_following(&service).await;

    // Then a takeover needs no consent to the lease, but waits.
    to_store.lose().await;
    link.lose().await;
    service.reconfigure(&link.to_peer(&format!("{}\n{SHARED}", forced(2))));
    let status = until_primary(&service, 2).await;
    let told = events(&status, "promotion").join("; ");
    assert!(told.contains("by the promise of its holder"), "{told}");
    assert!(!is_writable(&site.primary).await);
    // The old primary learns by the lease that it was replaced.
    to_store.set(Mode::Pass).await;
    old.until("replaced", |status| {
        status["state"] == "fenced" && status["lease"]["epoch"] == 2
    })
    .await;
    assert!(!is_writable(&site.primary).await);
    old.stop().await.ok();
    service.stop().await.ok();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_lease_is_refused_and_left_alone() -> Result<()> {
    // Two buckets.
    let two = Pair::of_own_stores("shared_two").await?;
    let old = acting(&two, "").await;
    let service = Service::start(&two.there, SHARED);
    until_conflict(&service, &["two buckets"]).await;
    assert_eq!(two.there.spare.keys().await?, [""; 0]);
    service.stop().await.ok();
    old.stop().await.ok();

    // A store that does not honour conditions.
    let pair = Pair::of_one_bucket("shared_bad").await?;
    let site = &pair.there;
    let lying = HttpFault::start(site.primary.minio.port()).await?;
    lying.set(|request| match request.uri.path().contains(".proof-") {
        true if request.method == "PUT" => {
            Fault::RespondWith(200, vec![("etag", "\"1\"")], "".into())
        }
        _ => Fault::Forward,
    });
    let liar = format!("[local.s3]\nendpoint = \"{}\"", lying.endpoint());
    let old = Service::start(&pair.back, &holder(&liar));
    old.until("the store is not trusted", |status| {
        let trouble = status["lease"]["trouble"].as_str().unwrap_or_default();
        trouble.contains("does not honour conditional writes")
    })
    .await;
    assert!(lease(&site.primary).await.is_err(), "nothing was written");
    old.stop().await.ok();

    // A file of garbage, and an old copy of the lease.
    let old = acting(&pair, "").await;
    let service = Service::start(site, SHARED);
    until_following(&service).await;
    let good = site.primary.get(LEASE).await?.ok_or("there is a lease")?;
    let first: Value = serde_json::from_slice(&good)?;
    // Both have to know a later one: the spare may still show one before this.
    for one in [&old, &service] {
        one.until("a later lease", |status| {
            seconds(&status["lease"]["written_at"]) > seconds(&first["written_at"])
        })
        .await;
    }
    for (bad, words) in [
        (b"not a lease".to_vec(), "is no lease"),
        (good.to_vec(), "set back"),
    ] {
        site.primary.put(LEASE, bad.clone()).await?;
        for one in [&old, &service] {
            let status = one
                .until(words, |status| {
                    let trouble = status["lease"]["trouble"].as_str().unwrap_or_default();
                    trouble.contains(words)
                })
                .await;
            assert!(status["health"]["level"].as_u64() > Some(0), "{status:#}");
        }
        let found = site.primary.get(LEASE).await?.unwrap_or_default();
        assert_eq!(found, bad, "nobody writes over it");
    }
    assert!(is_writable(&site.primary).await);
    service.stop().await.ok();
    old.stop().await.ok();
    Ok(())
}

/// A few random cuts; `scripts/campaign 50 1 shared` makes more.
#[tokio::test(flavor = "multi_thread")]
async fn at_no_moment_do_two_sites_accept_writes() -> Result<()> {
    let kinds = support::cuts::trial(seed(), 3, true).await?;
    println!("{kinds:#?}");
    Ok(())
}

/// The primary deletes an object of the shared bucket, and is lost before its deletion of the row
/// comes here: the takeover lists the package.
#[tokio::test(flavor = "multi_thread")]
async fn a_takeover_lists_what_the_primary_took_away() -> Result<()> {
    let pair = Pair::of_one_bucket("shared_gone").await?;
    let (site, mut factory) = (&pair.there, another(11));
    let old = acting(&pair, "").await;
    let service = Service::start(site, SHARED);
    until_following(&service).await;
    let made = factory.fill(&site.primary, 3).await?;
    until_equal(site).await?;
    service.reconfigure(&format!("paused = true\n{SHARED}"));
    service.until_hold("paused").await;
    delete_package(&site.primary, &made[0]).await?;
    old.running.kill9()?;
    site.primary.pg.kill9();
    // The check of a sample asks for a consent of its own.
    let approved = format!("{}\n{SHARED}\n[fuse]\napprove = \"artifacts-2\"", forced(2));
    service.reconfigure(&approved);
    let nonce = until_consent(&service).await;
    service.reconfigure(&format!(
        "{approved}\n[takeover]\nforce_lease = \"{nonce}\""
    ));
    let status = until_primary(&service, 2).await;
    assert_eq!(unavailable(site).await?, [made[0].key.clone()]);
    let told = events(&status, "artifacts").join("; ");
    assert!(told.contains(&made[0].key), "{told}");
    service.stop().await.ok();
    Ok(())
}

/// A lease that is lost is made again by consent; one that a dead takeover left is given back.
#[tokio::test(flavor = "multi_thread")]
async fn there_is_a_way_out_of_each_lease() -> Result<()> {
    let pair = Pair::of_one_bucket("shared_out").await?;
    let site = &pair.there;
    // The primary does not see its spare, which would tell it that nobody takes over.
    let alone = |more: &str| {
        format!(
            "{}\n[peer.datastore]\nport = 1\n[takeover]\n{more}",
            holder("isolated = \"fence\"")
        )
    };
    let old = Service::start(&pair.back, &alone(""));
    until_held(&old).await;
    let service = Service::start(site, SHARED);
    until_following(&service).await;
    // A question that nobody has any more, as a late write leaves it.
    let mut asks = lease(&site.primary).await?;
    let asker = service.status().await?["cluster_id"].clone();
    asks["number"] = (asks["number"].as_u64().unwrap_or_default() + 1000).into();
    asks["state"] = "asked".into();
    asks["asked_by"] = serde_json::json!({ "cluster": asker, "epoch": 2 });
    site.primary.put(LEASE, asks.to_string()).await?;
    service
        .until("it was given back", |status| {
            let told = events(status, "fence").join("; ");
            told.contains("it was given back")
        })
        .await;
    until_writable(&site.primary).await;
    until_held(&old).await;

    // The lease is gone: the primary keeps its promise, until an operator consents to a new one.
    site.primary.delete(LEASE).await?;
    until_read_only(&site.primary).await;
    let nonce = nonce_of(&old).await;
    old.reconfigure(&alone(&format!("force_lease = \"{nonce}\"")));
    until_held(&old).await;
    until_writable(&site.primary).await;

    // Another mode: the own fence goes with it.
    site.primary.delete(LEASE).await?;
    until_read_only(&site.primary).await;
    let other = "role = \"primary\"\n[peer.datastore]\nport = 1\n[takeover]";
    old.reconfigure(other);
    let nonce = nonce_of(&old).await;
    assert!(
        !is_writable(&site.primary).await,
        "others rely on its promise"
    );
    old.reconfigure(&format!("{other}\nforce_lease = \"{nonce}\""));
    until_writable(&site.primary).await;
    service.stop().await.ok();
    old.stop().await.ok();
    Ok(())
}

/// Returns the nonce for a consent, which the trouble with the lease names.
async fn nonce_of(service: &Service<'_>) -> String {
    let words = "takeover.force_lease = \"";
    let status = service
        .until("a nonce", |status| {
            let trouble = status["lease"]["trouble"].as_str().unwrap_or_default();
            trouble.contains(words)
        })
        .await;
    let trouble = status["lease"]["trouble"].as_str().unwrap_or_default();
    let (_, rest) = trouble.split_once(words).unwrap_or_default();
    rest.split('"').next().unwrap_or_default().to_string()
}

/// The holder is killed between the record of its fence and the end of the older sessions.
#[tokio::test(flavor = "multi_thread")]
async fn a_fence_that_was_only_recorded_is_enforced() -> Result<()> {
    let pair = Pair::of_one_bucket("shared_half").await?;
    let (site, link) = (
        &pair.there,
        Proxy::start(pair.there.primary.pg.port()).await?,
    );
    let alone = holder("[peer.datastore]\nport = 1");
    let old = Service::doomed(&pair.back, &alone, "lease.fence_recorded");
    until_held(&old).await;
    let service = Service::start(site, &link.to_peer(SHARED));
    until_following(&service).await;
    let pool = site.primary.conn().await?;
    let insert = "INSERT INTO accounts (name, email) VALUES ('pool', 'pool')";
    link.lose().await;
    service.reconfigure(&link.to_peer(&format!("{}\n{SHARED}", forced(2))));
    old.dead().await?;
    let old = Service::start(&pair.back, &alone);
    until_primary(&service, 2).await;
    assert!(
        pool.execute(insert, &[]).await.is_err(),
        "an old session writes"
    );
    old.stop().await.ok();
    service.stop().await.ok();
    Ok(())
}

/// The time in the lease is for people. A holder whose clock is ten minutes ahead, or ten minutes
/// behind the spare's, gives the lease as any other does.
#[tokio::test(flavor = "multi_thread")]
async fn a_lease_with_another_time_is_handed_over() -> Result<()> {
    const AHEAD: u64 = 600;
    for is_holder_ahead in [true, false] {
        let pair = Pair::of_one_bucket("shared_time").await?;
        let (site, link) = (
            &pair.there,
            Proxy::start(pair.there.primary.pg.port()).await?,
        );
        let (old, old_time) =
            Service::with_own_time(&pair.back, &holder("[peer.datastore]\nport = 1"))?;
        until_held(&old).await;
        let (service, time) = Service::with_own_time(site, &link.to_peer(SHARED))?;
        until_following(&service).await;
        match is_holder_ahead {
            true => old_time.pass(AHEAD)?,
            false => time.pass(AHEAD)?,
        }
        service
            .until("a lease with another time", |status| {
                let written = time_of(&status["lease"]["written_at"]);
                let now = time_of(&status["time"]);
                let off = written.zip(now).map(|(written, now)| written - now);
                off.is_some_and(|off| off.num_minutes().abs() >= 9)
            })
            .await;
        link.lose().await;
        service.reconfigure(&link.to_peer(&format!("{}\n{SHARED}", forced(2))));
        let status = until_primary(&service, 2).await;
        let told = events(&status, "promotion").join("; ");
        assert!(told.contains("its holder is fenced"), "{told}");
        assert!(!is_writable(&site.primary).await);
        assert!(is_writable(&site.spare).await);
        old.stop().await.ok();
        service.stop().await.ok();
    }
    Ok(())
}

fn time_of(value: &Value) -> Option<chrono::DateTime<chrono::FixedOffset>> {
    chrono::DateTime::parse_from_rfc3339(value.as_str()?).ok()
}

/// The object of a new row is read within `replication.bandwidth_limit`, as a copied one is.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_object_is_read_within_the_bandwidth() -> Result<()> {
    let pair = Pair::of_one_bucket("shared_bandwidth").await?;
    let (site, mut factory) = (&pair.there, another(17));
    let service = Service::start(site, SHARED);
    service.until_hold("not_prepared").await;
    let _old = acting(&pair, "").await;
    until_following(&service).await;
    service.reconfigure(&format!(
        "{SHARED}\n[replication]\nbandwidth_limit = \"100B/s\""
    ));
    let package = factory.make(Spec::new("core", "slow", "1").size(1 << 20));
    packages::put(&site.primary, &package).await?;
    packages::insert(&site.primary, &package).await?;
    service
        .until("the row waits until its object is read", |status| {
            status["replication"]["gate_waiting"].as_u64() >= Some(1)
        })
        .await;
    service.reconfigure(SHARED);
    until_equal(site).await
}
