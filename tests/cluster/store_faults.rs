//! What stores of others say when they are busy, full, starting, archived or not there at all: each is told apart, by its
//! status where the word is unknown.

use hyper::http::request::Parts;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::Result;
use support::between::{between, completes};
use support::http_fault::{Fault, HttpFault};
use warm_spare::cluster::{StoreError, StoreFault};
use warm_spare::replication::{Carrier, Delivery};

/// The times of the requests that the proxy saw, each answered by the fault for its number.
fn numbered(
    proxy: &HttpFault,
    fault: impl Fn(usize) -> Fault + Send + Sync + 'static,
) -> Arc<Mutex<Vec<Instant>>> {
    let times = Arc::new(Mutex::new(Vec::new()));
    let seen = times.clone();
    proxy.set(move |_| {
        let mut seen = seen.lock().expect("the times' lock");
        seen.push(Instant::now());
        fault(seen.len())
    });
    times
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_busy_is_asked_again_when_it_says() -> Result<()> {
    let between = between("busy").await?;
    for proxy in [&between.from, &between.to] {
        // More often than any other fault is tried.
        let times = numbered(proxy, |number| match number {
            1..=4 => Fault::s3_later(429, "SomebodysOwnWord", "1"),
            _ => Fault::Forward,
        });
        let asked = Instant::now();
        let delivered = between.fetch(&between.small).await?;
        assert!(matches!(delivered, Delivery::Done(_)));
        assert!(asked.elapsed() > Duration::from_secs(4));
        let times = times.lock().expect("the times' lock").clone();
        for pair in times[..5].windows(2) {
            assert!(pair[1] - pair[0] >= Duration::from_secs(1), "{times:?}");
        }
        assert_eq!(
            Carrier::Courier(Box::new(between.courier.clone())).at_once(32),
            1,
            "it gets fewer"
        );
        between.site.spare.delete(&between.small.key).await?;
    }
    // A day is too long.
    let _ = numbered(&between.from, |number| match number {
        1 => Fault::s3_later(503, "SlowDown", "86400"),
        _ => Fault::Forward,
    });
    let asked = Instant::now();
    between.fetch(&between.small).await?;
    assert!(asked.elapsed() < Duration::from_secs(10));
    // For ever it is not asked.
    between.from.set(|_| Fault::s3(429, "TooManyRequests"));
    let error = between.fetch(&between.small).await.expect_err("always");
    assert_eq!(error.fault, StoreFault::Busy, "{error}");
    assert!(error.to_string().contains("429"), "{error}");
    Ok(())
}

/// MinIO's words while it starts, and others.
#[tokio::test(flavor = "multi_thread")]
async fn what_passes_is_tried_again_by_its_status() -> Result<()> {
    let between = between("passing").await?;
    let passing = [
        (503, "XMinioServerNotInitialized"),
        (503, "XMinioIAMNotInitialized"),
        (503, "XMinioBucketMetadataNotInitialized"),
        (503, "NobodyKnowsThis"),
        (529, "NobodyKnowsThis"),
        (500, "NobodyKnowsThis"),
        (400, "RequestTimeout"),
        (400, "BadDigest"),
        (409, "ConditionalRequestConflict"),
    ];
    for (status, code) in passing {
        for proxy in [&between.from, &between.to] {
            proxy.times(1, |_| true, Fault::s3(status, code));
            let delivered = between.fetch(&between.small).await?;
            assert!(matches!(delivered, Delivery::Done(_)), "{status} {code}");
            between.site.spare.delete(&between.small.key).await?;
        }
    }
    // The answer of a completion may begin before its end is known.
    for (code, fault) in [
        ("SlowDown", None),
        ("ServiceUnavailable", None),
        ("XMinioStorageFull", Some(StoreFault::Full)),
    ] {
        let Fault::Respond(_, body) = Fault::s3(200, code) else {
            unreachable!("it is an answer")
        };
        let times = if fault.is_some() { 99 } else { 1 };
        between
            .to
            .times(times, completes, Fault::Respond(200, body));
        let delivered = between.fetch(&between.large).await;
        match fault {
            None => assert!(matches!(delivered?, Delivery::Done(_)), "{code}"),
            Some(fault) => assert_eq!(delivered.expect_err(code).fault, fault),
        }
        between.site.spare.delete(&between.large.key).await?;
    }
    Ok(())
}

/// Each word for a bound that was set.
#[tokio::test(flavor = "multi_thread")]
async fn a_quota_is_told_as_one() -> Result<()> {
    let between = between("quota").await?;
    for (status, code) in [
        (400, "XMinioAdminBucketQuotaExceeded"),
        (403, "QuotaExceeded"),
        (403, "ServiceQuotaExceededException"),
        (403, "StorageCapExceeded"),
        (507, "NobodyKnowsThis"),
    ] {
        between
            .to
            .set(move |request| match request.method == "PUT" {
                true => Fault::s3(status, code),
                false => Fault::Forward,
            });
        let error = between.fetch(&between.small).await.expect_err(code);
        assert_eq!(error.fault, StoreFault::Full, "{error}");
        let quota = error.next_step().contains("quota");
        assert_eq!(quota, code != "NobodyKnowsThis", "{}", error.next_step());
    }
    Ok(())
}

/// A portal, a proxy's page, half an answer: whatever is no artifact store's says nothing of any object.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_answer_of_a_store_is_no_answer() -> Result<()> {
    let mut between = between("pages").await?;
    let once = between.courier.peer.clone();
    between.courier.peer = once.with_limits(Duration::from_secs(2), 1);
    let store = &between.courier.peer;
    for status in [200, 404, 502, 503] {
        between.from.set(move |_| Fault::page(status));
        let unreachable = |error: StoreError| {
            assert_eq!(error.fault, StoreFault::Unreachable, "{status}: {error}");
        };
        unreachable(between.fetch(&between.small).await.expect_err("a page"));
        unreachable(store.head(&between.small.key).await.expect_err("a page"));
        unreachable(store.check_bucket().await.expect_err("a page"));
        unreachable(list(store).await.expect_err("a page"));
    }
    // Called XML, and none.
    between
        .from
        .set(|_| Fault::Respond(503, "upstream connect error".into()));
    let error = between.fetch(&between.small).await.expect_err("no XML");
    assert_eq!(error.fault, StoreFault::Unreachable, "{error}");
    // It has whatever it is asked for.
    let anything = || Fault::RespondWith(200, vec![("etag", "\"1\"")], "hello".into());
    between.from.set(move |_| anything());
    let error = store.check_bucket().await.expect_err("it has anything");
    assert_eq!(error.fault, StoreFault::Unreachable, "{error}");
    Ok(())
}

async fn list(store: &warm_spare::cluster::Store) -> Result<Vec<String>, StoreError> {
    let mut keys = Vec::new();
    let page = async |page: Vec<warm_spare::cluster::Listed>| {
        keys.extend(page.into_iter().map(|listed| listed.key));
        Ok(())
    };
    store.list("", page).await?;
    Ok(keys)
}

fn place(request: &Parts) -> Option<String> {
    let query = request.uri.query().unwrap_or_default();
    let (_, rest) = query.split_once("continuation-token=")?;
    Some(rest.split('&').next().unwrap_or_default().to_string())
}

/// Each page is tried as any request is, from its own place.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_a_listing_is_tried_again() -> Result<()> {
    let between = between("pages_again").await?;
    let spare = &between.site.spare;
    use futures_util::{StreamExt, TryStreamExt};
    let puts = futures_util::stream::iter(0..2100)
        .map(|number| async move { spare.put(&format!("many/{number:05}"), "x").await });
    puts.buffer_unordered(16).try_collect::<Vec<()>>().await?;
    let store = between.courier.local.reading();
    for fault in [
        Fault::s3(503, "SlowDown"),
        Fault::s3(500, "InternalError"),
        Fault::page(502),
        Fault::page(200),
        Fault::Drop,
        Fault::Hang,
    ] {
        let name = format!("{fault:?}");
        between.to.forget();
        between.to.times(1, |r| place(r).is_some(), fault);
        assert_eq!(list(store).await?.len(), 2100, "{name}");
        let asked = between.to.requests();
        let first = asked
            .iter()
            .filter(|(_, path)| !path.contains("continuation-token"));
        assert_eq!((asked.len(), first.count()), (4, 1), "{name}: {asked:?}");
    }
    // A page that says that more follow, and not from where: it would begin anew, for ever.
    let page = "<ListBucketResult><Name>b</Name><IsTruncated>true</IsTruncated></ListBucketResult>";
    between.to.set(move |_| Fault::Respond(200, page.into()));
    list(store).await.expect_err("no place to go on from");
    Ok(())
}

/// A bucket with a retention of its own refuses what bears no sum, on AWS.
#[tokio::test(flavor = "multi_thread")]
async fn every_upload_bears_its_sum() -> Result<()> {
    let between = between("sums").await?;
    between.to.set(|request| {
        let bears = request.headers.contains_key("content-md5");
        match request.method == "PUT" && !bears {
            true => Fault::s3(400, "InvalidRequest"),
            false => Fault::Forward,
        }
    });
    for package in [&between.small, &between.large] {
        let delivered = between.fetch(package).await?;
        assert!(matches!(delivered, Delivery::Done(_)));
        assert!(between.arrived(package).await?);
    }
    Ok(())
}

/// An upload that is gone is begun anew; a proxy that takes no request of that size is named.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_may_be_gone_or_too_large() -> Result<()> {
    let between = between("uploads").await?;
    let part = |request: &Parts| {
        let query = request.uri.query().unwrap_or_default();
        request.method == "PUT" && query.contains("partNumber=2")
    };
    between.to.times(1, part, Fault::s3(404, "NoSuchUpload"));
    let error = between.fetch(&between.large).await.expect_err("it is gone");
    assert!(error.is_transient(), "{error}");
    assert_eq!(
        between.to.count("PUT", "partNumber=2"),
        1,
        "no part is sent to it again"
    );
    let delivered = between.fetch(&between.large).await?;
    assert!(matches!(delivered, Delivery::Done(_)));
    between.to.set(|request| match request.method == "PUT" {
        true => Fault::page(413),
        false => Fault::Forward,
    });
    let error = between.fetch(&between.small).await.expect_err("a proxy");
    assert!(
        error.next_step().contains("client_max_body_size"),
        "{error}"
    );
    Ok(())
}

/// A proxy that packs answers makes ETags weak ones.
#[tokio::test(flavor = "multi_thread")]
async fn a_weak_etag_is_the_same_etag() -> Result<()> {
    let between = between("weak").await?;
    let weaken = |headers: &mut hyper::HeaderMap| {
        if let Some(etag) = headers.get("etag").and_then(|etag| etag.to_str().ok()) {
            let weak = format!("W/{etag}").parse().expect("a header's value");
            headers.insert("etag", weak);
        }
    };
    between.to.set(move |_| Fault::Headers(weaken));
    // And gives no length to HEAD.
    let lengthless = |headers: &mut hyper::HeaderMap| {
        headers.remove("content-length");
    };
    let cut = Mutex::new(true);
    between.from.set(move |request| {
        let first = std::mem::take(&mut *cut.lock().expect("the flag's lock"));
        match first && request.method == "GET" {
            true => Fault::ShortBody {
                declared: None,
                sent: 1000,
            },
            false => Fault::Headers(weaken),
        }
    });
    for package in [&between.small, &between.large] {
        let delivered = between.fetch(package).await?;
        assert!(matches!(delivered, Delivery::Done(_)));
        assert!(between.arrived(package).await?);
        // What is remembered of it is what a listing will say.
        let Delivery::Done(stored) = delivered else {
            unreachable!("it was asked")
        };
        let head = between.site.spare.s3();
        let head = head.head(&between.site.spare.bucket, &package.key).await?;
        assert_eq!(stored.etag, head.expect("it is there").etag);
        between
            .from
            .set(move |request| match request.method == "HEAD" {
                true => Fault::Headers(lengthless),
                false => Fault::Headers(weaken),
            });
        let peer = &between.courier.peer;
        let seen = peer.head(&package.key).await?.expect("it is there");
        assert_eq!(seen.bytes, package.size);
    }
    Ok(())
}
