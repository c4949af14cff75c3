//! No byte is believed that was not checked: each silent loss of the S3 library, and each fault of a server.

use bytes::Bytes;
use std::time::Duration;
use support::between::{between, completes, config};
use support::http_fault::Fault;
use support::proxy::{Mode, Proxy};
use support::{Factory, Result, site};
use warm_spare::cluster::{Expected, LocalStore, StoreError, StoreFault};
use warm_spare::package::Checksum;
use warm_spare::replication::{Courier, Delivery};

#[tokio::test(flavor = "multi_thread")]
async fn a_body_cut_short_is_asked_for_again_and_never_stored_short() -> Result<()> {
    let between = between("short").await?;
    for package in [&between.small, &between.large] {
        // Once: the rest is fetched.
        between.from.times(
            1,
            |r| r.method == "GET",
            Fault::ShortBody {
                declared: None,
                sent: 1000,
            },
        );
        assert!(matches!(between.fetch(package).await?, Delivery::Done(_)));
        assert!(between.arrived(package).await?);
        between.site.spare.delete(&package.key).await?;
        // Always: an error, and nothing visible.
        between.from.set(|r| {
            if r.method == "GET" {
                Fault::ShortBody {
                    declared: None,
                    sent: 1000,
                }
            } else {
                Fault::Forward
            }
        });
        let error = between
            .fetch(package)
            .await
            .expect_err("a body that is always short");
        assert_eq!(error.fault, StoreFault::Unreachable, "{error}");
        assert!(!between.arrived(package).await?);
        between.from.set(|_| Fault::Forward);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_another_length_or_content_is_damaged() -> Result<()> {
    let between = between("damaged").await?;
    for package in [&between.small, &between.large] {
        // The server declares less than it has, and sends that: complete for HTTP, not for the checksum.
        between.from.set(|r| {
            if r.method == "GET" {
                Fault::ShortBody {
                    declared: Some(1000),
                    sent: 1000,
                }
            } else {
                Fault::Forward
            }
        });
        assert!(matches!(
            between.fetch(package).await?,
            Delivery::Damaged(_)
        ));
        between.from.set(|r| {
            if r.method == "GET" {
                Fault::Corrupt(777)
            } else {
                Fault::Forward
            }
        });
        assert!(matches!(
            between.fetch(package).await?,
            Delivery::Damaged(_)
        ));
        assert!(!between.arrived(package).await?);
        // Wrong once is tried again.
        between
            .from
            .times(1, |r| r.method == "GET", Fault::Corrupt(777));
        assert!(matches!(between.fetch(package).await?, Delivery::Done(_)));
        assert!(between.arrived(package).await?);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_with_an_error_in_its_body_is_no_success() -> Result<()> {
    let between = between("complete").await?;
    let error =
        "<?xml version=\"1.0\"?><Error><Code>InternalError</Code><Message>later</Message></Error>";
    // The server did nothing and says so in the body of a 200.
    between.to.set(move |r| {
        if completes(r) {
            Fault::Respond(200, error.into())
        } else {
            Fault::Forward
        }
    });
    let failed = between
        .fetch(&between.large)
        .await
        .expect_err("an error in a 200");
    assert!(failed.to_string().contains("InternalError"), "{failed}");
    assert!(!between.arrived(&between.large).await?);
    // The server did it, and the answer was lost: read back, and believed only then.
    between.to.set(|_| Fault::Forward);
    between.to.times(1, completes, Fault::ForwardThenDrop);
    assert!(matches!(
        between.fetch(&between.large).await?,
        Delivery::Done(_)
    ));
    assert!(between.arrived(&between.large).await?);
    between.site.spare.delete(&between.large.key).await?;
    // Once, then it is well: tried again.
    between
        .to
        .times(1, completes, Fault::Respond(200, error.into()));
    assert!(matches!(
        between.fetch(&between.large).await?,
        Delivery::Done(_)
    ));
    assert!(between.arrived(&between.large).await?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_answers_is_given_up_and_one_503_is_not_the_end() -> Result<()> {
    let between = between("hang").await?;
    for proxy in [&between.from, &between.to] {
        proxy.set(|_| Fault::Hang);
        let error = between
            .fetch(&between.small)
            .await
            .expect_err("no answer ever");
        assert_eq!(error.fault, StoreFault::Unreachable, "{error}");
        assert!(error.to_string().contains("no answer for 2 s"), "{error}");
        proxy.set(|_| Fault::Forward);
        for package in [&between.small, &between.large] {
            for (status, code) in [
                (503, "SlowDown"),
                (500, "InternalError"),
                (429, "TooManyRequests"),
            ] {
                proxy.times(1, |_| true, Fault::s3(status, code));
                let delivered = between.fetch(package).await;
                assert!(matches!(delivered?, Delivery::Done(_)), "one {status}");
                assert!(between.arrived(package).await?);
                between.site.spare.delete(&package.key).await?;
            }
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_served_bucket_without_the_key_is_missing() -> Result<()> {
    let between = between("missing").await?;
    between.site.primary.delete(&between.small.key).await?;
    assert!(matches!(
        between.fetch(&between.small).await?,
        Delivery::Missing
    ));
    for (status, code, fault) in [
        (403, "AccessDenied", StoreFault::Denied),
        (404, "NoSuchBucket", StoreFault::NoBucket),
        (500, "InternalError", StoreFault::Unreachable),
        (507, "XMinioStorageFull", StoreFault::Full),
    ] {
        between.from.set(move |_| Fault::s3(status, code));
        let error = between.fetch(&between.small).await.expect_err(code);
        assert_eq!(error.fault, fault, "{error}");
    }
    between
        .from
        .set(|_| Fault::Respond(502, Bytes::from_static(b"<html>a proxy's own page</html>")));
    let error = between
        .fetch(&between.small)
        .await
        .expect_err("a proxy's page");
    assert_eq!(error.fault, StoreFault::Unreachable, "{error}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listing_of_many_pages_is_whole_or_an_error() -> Result<()> {
    let between = between("listing").await?;
    let site = &between.site;
    let puts = futures_util::stream::iter(0..2500).map(|number| {
        let key = format!("many/{number:05} ~+%25&<é>");
        async move { site.spare.put(&key, "x").await }
    });
    use futures_util::{StreamExt, TryStreamExt};
    puts.buffer_unordered(16).try_collect::<Vec<()>>().await?;
    let list = async || -> Result<Vec<String>, StoreError> {
        let mut keys = Vec::new();
        let reading = between.courier.local.reading();
        reading
            .list("many/", async |page| {
                keys.extend(page.into_iter().map(|listed| listed.key));
                Ok(())
            })
            .await?;
        Ok(keys)
    };
    let keys = list().await?;
    assert_eq!(keys.len(), 2500);
    assert_eq!(keys[7], "many/00007 ~+%25&<é>");
    // The second page fails: no partial answer.
    between.to.set(|r| {
        if r.uri
            .query()
            .unwrap_or_default()
            .contains("continuation-token")
        {
            Fault::s3(403, "AccessDenied")
        } else {
            Fault::Forward
        }
    });
    list().await.expect_err("the second page was refused");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn artifactory_is_recognised() -> Result<()> {
    // What an Artifactory server puts on every answer; a whole one cannot be had for a test.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let answer = "HTTP/1.1 404 Not Found\r\nX-Artifactory-Id: a\r\nContent-Type: application/json\r\n\
                          Content-Length: 2\r\nConnection: close\r\n\r\n{}";
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    let site = site("artifactory").await;
    Factory::seeded().fill(&site.primary, 2).await?;
    site.write_config(&format!("peer.s3.endpoint = \"http://127.0.0.1:{port}\""));
    let output = site.warm_spare(&["sync"]).await;
    assert_eq!(output.code, Some(3), "{output}");
    assert!(output.stderr.contains("Artifactory"), "{output}");
    Ok(())
}

/// A proxy without a route answers 404 with nothing in it, and the library makes "no such key" of that.
#[tokio::test(flavor = "multi_thread")]
async fn a_404_without_a_body_says_nothing_of_the_object() -> Result<()> {
    let between = between("empty404").await?;
    between.from.set(|_| Fault::Respond(404, Bytes::new()));
    let error = between.fetch(&between.small).await.expect_err("no answer");
    assert_eq!(error.fault, StoreFault::Unreachable, "{error}");
    let key = &between.small.key;
    let asked = between.courier.peer.head(key).await;
    assert_eq!(asked.expect_err("no answer").fault, StoreFault::Unreachable);
    // Of two servers behind one address one is wrong: what HEAD seems to say is asked by GET.
    let is_head = |r: &hyper::http::request::Parts| r.method == "HEAD";
    between.from.set(move |r| match is_head(r) {
        true => Fault::Respond(404, Bytes::new()),
        false => Fault::Forward,
    });
    assert!(between.courier.peer.head(key).await?.is_some());
    between
        .from
        .times(1, |_| true, Fault::Respond(404, Bytes::new()));
    assert!(matches!(
        between.fetch(&between.small).await?,
        Delivery::Done(_)
    ));
    // Of the bucket likewise.
    between.from.set(|_| Fault::Respond(404, Bytes::new()));
    let error = between.courier.peer.check_bucket().await;
    assert_eq!(error.expect_err("no answer").fault, StoreFault::Unreachable);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_is_waited_for_as_long_as_the_line_carries_it() -> Result<()> {
    let between = between("slow_line").await?;
    let line = Proxy::start(between.site.spare.minio.port()).await?;
    let endpoint = format!("http://127.0.0.1:{}", line.port());
    // A busy machine may keep a server from its work for much of a second.
    let patience = Duration::from_secs(1);
    let local = LocalStore::open(&config(&between.site.spare, endpoint))?.with_limits(patience, 2);
    let courier = Courier {
        local,
        ..between.courier.clone()
    };
    line.set(Mode::Slow).await;
    for package in [&between.small, &between.large] {
        let checksum: Checksum = package.checksum.parse().expect("a checksum");
        let began = std::time::Instant::now();
        let fetched = courier.fetch(&package.key, &package.key, &checksum).await?;
        println!("{} bytes in {:?}", package.size, began.elapsed());
        assert!(matches!(fetched, Delivery::Done(_)));
        assert!(between.arrived(package).await?);
        between.site.spare.delete(&package.key).await?;
    }
    // One that carries nothing at all is not waited for.
    line.set(Mode::Hold).await;
    let began = std::time::Instant::now();
    let checksum: Checksum = between.small.checksum.parse().expect("a checksum");
    let error = courier
        .fetch(&between.small.key, &between.small.key, &checksum)
        .await
        .expect_err("a line that is held");
    assert_eq!(error.fault, StoreFault::Unreachable, "{error}");
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    Ok(())
}

/// A process that slept between its look and its request changes nothing that somebody else has written since.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_meanwhile_is_not_overwritten() -> Result<()> {
    let between = between("meanwhile").await?;
    let store = &between.courier.local;
    for package in [&between.small, &between.large] {
        let key = &package.key;
        let checksum: Checksum = package.checksum.parse().expect("a checksum");
        let expecting = async |expected: &Expected| {
            let courier = &between.courier;
            courier.fetch_as_found(key, key, &checksum, expected).await
        };
        between.site.spare.put(key, "of another one").await?;
        let error = expecting(&Expected::Nothing)
            .await
            .expect_err("it is there");
        assert_eq!(error.fault, StoreFault::Unreachable, "{error}");
        let found = store.reading().head(key).await?.expect("it is there");
        between.site.spare.put(key, "of another one, later").await?;
        let seen = Expected::Etag(found.etag);
        expecting(&seen).await.expect_err("it was written since");
        let there = between.site.spare.get(key).await?.expect("it is there");
        assert_eq!(there, "of another one, later");
        let found = store.reading().head(key).await?;
        let seen = Expected::as_found(found.as_ref());
        assert!(matches!(expecting(&seen).await?, Delivery::Done(_)));
        assert!(between.arrived(package).await?);
        // An answer that is lost has the request come again, and it finds its own bytes.
        between.site.spare.delete(key).await?;
        let writes = |r: &hyper::http::request::Parts| {
            r.method == "PUT" && r.headers.contains_key("if-none-match") || completes(r)
        };
        between.to.times(1, writes, Fault::ForwardThenDrop);
        let delivered = expecting(&Expected::Nothing).await?;
        assert!(matches!(delivered, Delivery::Done(_)));
        assert!(between.arrived(package).await?);
        between.to.set(|_| Fault::Forward);
    }
    Ok(())
}
