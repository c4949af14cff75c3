//! What a store says at the gate, and what is done in our own bucket: one object that is refused holds nobody up, nothing is
//! believed that no store said, and a process that slept does no harm.

use bytes::Bytes;
use hyper::http::request::Parts;
use support::follow::{bytes_of, followed, prepared, unavailable, until_equal, until_following};
use support::http_fault::{Fault, HttpFault};
use support::packages::{delete_package, delete_rows, insert, upload};
use support::service::SOON;
use support::{Factory, Result, Service, Site, Spec, wait_until};

async fn before_the_primary(site: &Site) -> Result<HttpFault> {
    HttpFault::start(site.primary.minio.port()).await
}

fn by(fault: &HttpFault, more: &str) -> String {
    format!(
        "[peer.s3]\nendpoint = \"{}\"\n[replication]\nretry_missing = \"1s\"\n{more}",
        fault.endpoint()
    )
}

fn is_of(key: &str) -> impl Fn(&Parts) -> bool + Send + Sync + 'static {
    let key = key.to_string();
    move |request| request.uri.path().ends_with(&key)
}

async fn until_here(site: &Site, key: &str) {
    wait_until("the artifact is here", SOON, || async {
        match bytes_of(site, key).await? {
            Some(_) => Ok(()),
            None => Err("not yet".into()),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_object_that_is_refused_holds_nobody_up() -> Result<()> {
    let site = prepared("gate_refused").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 5).await?;
    let store = before_the_primary(&site).await?;
    let service = followed(&site, &by(&store, "gate_grace = \"500ms\"")).await?;
    let frozen = factory.make(Spec::new("core", "frozen", "1"));
    let refused = is_of(&frozen.key);
    store.set(move |request| match refused(request) {
        true => Fault::s3(403, "InvalidObjectState"),
        false => Fault::Forward,
    });
    upload(&site.primary, &frozen).await?;
    let next = factory
        .package(&site.primary, Spec::new("core", "next", "1"))
        .await?;
    until_equal(&site).await?;
    until_here(&site, &next.key).await;
    let status = service
        .until("it is told", |status| {
            status["artifacts"]["unreadable_on_primary"] == 1 && status["hold"].is_null()
        })
        .await;
    let reason = &status["health"]["reasons"][0];
    assert_eq!(reason["code"], "unreadable_on_primary", "{status:#}");
    assert!(
        reason["text"].to_string().contains(&frozen.key),
        "{status:#}"
    );
    assert_eq!(status["health"]["level"], 1, "{status:#}");
    assert_eq!(unavailable(&site).await?, [frozen.key.as_str()]);
    store.set(|_| Fault::Forward);
    until_here(&site, &frozen.key).await;
    service
        .until("it is over", |status| status["health"]["level"] == 0)
        .await;

    // A store that refuses everything is another matter: nothing passes.
    store.set(|_| Fault::s3(403, "AccessDenied"));
    let waits = factory
        .package(&site.primary, Spec::new("core", "waits", "1"))
        .await?;
    service.until_hold("peer_unreachable").await;
    assert_eq!(unavailable(&site).await?, [""; 0]);
    store.set(|_| Fault::Forward);
    until_here(&site, &waits.key).await;
    until_equal(&site).await?;
    Ok(())
}

/// The same of a whole copy.
#[tokio::test(flavor = "multi_thread")]
async fn one_object_that_is_refused_holds_no_copy_up() -> Result<()> {
    let site = support::site("copy_refused").await;
    let made = Factory::seeded().fill(&site.primary, 5).await?;
    let store = before_the_primary(&site).await?;
    let refused = is_of(&made[2].key);
    store.set(move |request| match refused(request) {
        true => Fault::s3(403, "AccessDenied"),
        false => Fault::Forward,
    });
    site.write_config(&by(&store, "gate_grace = \"200ms\""));
    let report = site.warm_spare(&["sync", "--json"]).await.ok().json();
    let expected = serde_json::json!([{ "key": made[2].key, "reason": "unreadable" }]);
    assert_eq!(report["artifacts"]["unavailable"], expected, "{report:#}");
    store.set(|_| Fault::Forward);
    let report = site.warm_spare(&["sync", "--json"]).await.ok().json();
    assert_eq!(
        report["artifacts"]["unavailable"],
        serde_json::json!([]),
        "{report:#}"
    );
    assert!(bytes_of(&site, &made[2].key).await?.is_some());
    // One that the store fails at for long, the first of all: the others come, and it is named.
    let mut more = Factory::new(7).fill(&site.primary, 12).await?;
    more.sort_by(|one, other| one.key.cmp(&other.key));
    let (spoilt, others) = more.split_first().expect("there are twelve");
    let first = is_of(&spoilt.key);
    store.set(move |request| match first(request) {
        true => Fault::s3(503, "SlowDownRead"),
        false => Fault::Forward,
    });
    site.write_config(&by(&store, "copies = 1"));
    let running = site.spawn(&["sync"]);
    for package in others {
        until_here(&site, &package.key).await;
    }
    let output = running.kill9()?;
    assert!(output.stderr.contains(&spoilt.key), "{output}");
    assert!(bytes_of(&site, &spoilt.key).await?.is_none());
    site.write_config(&by(&store, ""));
    // All of it refused.
    store.set(|request| match request.method == "GET" {
        true => Fault::s3(403, "AccessDenied"),
        false => Fault::Forward,
    });
    Factory::seeded()
        .package(&site.primary, Spec::new("core", "more", "1"))
        .await?;
    let output = site.warm_spare(&["sync"]).await;
    assert_eq!(output.code, Some(3), "{output}");
    Ok(())
}

/// Of 255 bytes between two slashes MinIO can hold no more, and no store more than 1024 in all. The primary's may.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_cannot_be_held_holds_nobody_up() -> Result<()> {
    let site = prepared("impossible_keys").await?;
    let mut factory = Factory::seeded();
    let made = factory.fill(&site.primary, 10).await?;
    let mut long =
        |letter: &str, bytes: usize| factory.make(Spec::new("core", &letter.repeat(bytes), "1"));
    let (held_there, nowhere, longer) = (long("a", 230), long("b", 230), long("c", 1100));
    let late = long("d", 240);
    for package in [&held_there, &nowhere, &longer] {
        insert(&site.primary, package).await?;
    }
    let store = before_the_primary(&site).await?;
    let (here, bytes) = (is_of(&held_there.key), held_there.bytes());
    store.set(move |request| match here(request) {
        true => Fault::RespondWith(200, vec![("etag", "\"1\"")], bytes.clone()),
        false => Fault::Forward,
    });
    let service = followed(&site, &by(&store, "gate_grace = \"200ms\"")).await?;
    let told = |number: u64| {
        move |status: &serde_json::Value| {
            status["artifacts"]["unstorable"] == number && status["hold"].is_null()
        }
    };
    let status = service.until("they are told", told(3)).await;
    let reason = &status["health"]["reasons"][0];
    assert_eq!(reason["code"], "unstorable", "{status:#}");
    assert!(reason["text"].to_string().contains(&held_there.key));
    let expected = [&held_there, &nowhere, &longer].map(|package| package.key.as_str());
    assert_eq!(unavailable(&site).await?, expected);
    for package in &made {
        let here = bytes_of(&site, &package.key).await?;
        assert_eq!(here.as_deref(), Some(package.checksum.as_str()));
    }
    // In the stream.
    insert(&site.primary, &late).await?;
    let behind = factory
        .package(&site.primary, Spec::new("core", "behind", "1"))
        .await?;
    until_here(&site, &behind.key).await;
    until_equal(&site).await?;
    service.until("all four are told", told(4)).await;
    // A row that goes takes what is known of it along.
    delete_rows(&site.primary.conn().await?, late.names()).await?;
    until_equal(&site).await?;
    service.until("three are left", told(3)).await;
    let verified = site.warm_spare(&["verify", "--deep"]).await;
    assert_eq!(verified.code, Some(0), "{verified}");
    Ok(())
}

/// Of two servers behind one address one is wrong: it has no such key, and the other one proves the bucket.
#[tokio::test(flavor = "multi_thread")]
async fn what_no_store_said_is_not_believed() -> Result<()> {
    let site = prepared("gate_empty_404").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 5).await?;
    let store = before_the_primary(&site).await?;
    let service = followed(&site, &by(&store, "gate_grace = \"300ms\"")).await?;
    let late = factory.make(Spec::new("core", "late", "1"));
    let (wrong, asked) = (is_of(&late.key), is_of(&late.key));
    store.set(move |request| match wrong(request) {
        true => Fault::Respond(404, Bytes::new()),
        false => Fault::Forward,
    });
    upload(&site.primary, &late).await?;
    service
        .until("it waits", |status| {
            status["replication"]["gate_waiting"] == 1 && !status["hold"].is_null()
        })
        .await;
    // Asked for so often that the grace is long over.
    store.forget();
    wait_until("it is asked for again", SOON, || async {
        match store.count("GET", &late.key) {
            3.. => Ok(()),
            found => Err(format!("{found} times").into()),
        }
    })
    .await;
    assert_eq!(unavailable(&site).await?, [""; 0]);

    // In the store's own words, and only until the bucket has proved to be the right one: it was the wrong server.
    let left = std::sync::atomic::AtomicI32::new(i32::MAX);
    let proofs = std::sync::Arc::new(std::sync::atomic::AtomicI32::new(0));
    let seen = proofs.clone();
    store.set(move |request| {
        use std::sync::atomic::Ordering::SeqCst;
        if !asked(request) {
            seen.fetch_add(1, SeqCst);
            return Fault::Forward;
        }
        let _ = left.fetch_sub(1, SeqCst);
        match seen.load(SeqCst) {
            0 => Fault::s3(404, "NoSuchKey"),
            _ => Fault::Forward,
        }
    });
    until_here(&site, &late.key).await;
    until_equal(&site).await?;
    assert_eq!(unavailable(&site).await?, [""; 0]);
    assert!(proofs.load(std::sync::atomic::Ordering::SeqCst) > 0);
    Ok(())
}

/// Asleep between its last look and the deletion, while another one takes over and brings a row that names the key again.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_sleeps_over_a_deletion_deletes_nothing_any_more() -> Result<()> {
    let site = prepared("asleep_deleting").await?;
    let made = Factory::seeded().fill(&site.primary, 4).await?;
    let settings = "[replication]\nartifact_retention = \"1s\"";
    let (first, halt) = Service::halting(&site, settings, "retention.before_delete");
    until_following(&first).await;
    delete_package(&site.primary, &made[0]).await?;
    halt.reached().await;
    let second = first.beside("[replication]\nartifact_retention = \"1h\"");
    let admin = site.spare.pg.conn("warm_spare").await?;
    let end =
        "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted
                 AND database = (SELECT oid FROM pg_database WHERE datname = 'warm_spare')";
    admin.batch_execute(end).await?;
    // Its stream is taken for dead as well.
    let end = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active";
    site.primary.conn().await?.batch_execute(end).await?;
    upload(&site.primary, &made[0]).await?;
    until_following(&second).await;
    until_equal(&site).await?;
    assert!(bytes_of(&site, &made[0].key).await?.is_some());
    halt.go();
    first
        .until("it woke up and found that it is not at work", |status| {
            status["active"] == false
        })
        .await;
    // What it was about to do it would have done first.
    let verified = site.warm_spare(&["verify", "--deep"]).await;
    assert_eq!(verified.code, Some(0), "{verified}");
    assert!(bytes_of(&site, &made[0].key).await?.is_some());
    Ok(())
}
