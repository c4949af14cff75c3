//! An artifact store behind an HTTP proxy. Only the proxy knows where the store is, so nothing can go past it.

use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use support::between::config;
use support::follow::bytes_of;
use support::forward_proxy::{Conduct, ForwardProxy};
use support::http_fault::{Fault, HttpFault};
use support::tls::certificates;
use support::{Cluster, Factory, Minio, Output, Package, Result, Service, Site, Spec, site};
use warm_spare::cluster::{Store, StoreError, StoreFault};
use warm_spare::config::{S3, Secret, SecretSource};
use warm_spare::domain::Side;

/// A few packages, one of them of several parts.
async fn fill(site: &Site) -> Result<Vec<Package>> {
    let mut factory = Factory::seeded();
    let mut made = factory.fill(&site.primary, 4).await?;
    let large = Spec::new("core", "large", "1").size(20 << 20);
    made.push(factory.package(&site.primary, large).await?);
    Ok(made)
}

async fn assert_copied(site: &Site, made: &[Package]) -> Result<()> {
    for package in made {
        let here = bytes_of(site, &package.key).await?;
        assert_eq!(here.as_deref(), Some(package.checksum.as_str()));
    }
    Ok(())
}

/// Neither the output nor the kept configuration holds the proxy's password in any form.
fn assert_no_password(output: &Output) {
    for secret in ["p@ss", "p%40ss", "dc2:", "ZGMyOn"] {
        assert!(!output.to_string().contains(secret), "{output}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_copy_between_two_stores_behind_a_proxy() -> Result<()> {
    let site = site("proxied").await;
    let made = fill(&site).await?;
    let (there, here) = (site.primary.minio.port(), site.spare.minio.port());
    let proxy = ForwardProxy::start(&[("there.test", there), ("here.test", here)]).await?;
    let endpoints =
        "peer.s3.endpoint = \"http://there.test:9000\"\nlocal.s3.endpoint = \"http://here.test\"\n";
    // The end `test` is of no server anywhere.
    for name in ["there.test:9000", "here.test:80"] {
        assert!(tokio::net::lookup_host(name).await.is_err(), "{name}");
    }
    let file = site.dir.path().join("proxy");
    support::site::write_secret(&file, &proxy.url())?;
    site.write_config(&format!(
        "log_level = \"trace\"\n{endpoints}peer.s3.proxy = \"{}\"\nlocal.s3.proxy_file = \"{}\"",
        proxy.url(),
        file.display()
    ));
    let output = site.warm_spare(&["check-config"]).await.ok();
    assert_no_password(&output);
    let named = output.stdout.matches(&proxy.address()).count();
    assert_eq!(named, 2, "{output}");
    for verb in [&["sync"][..], &["verify", "--deep"], &["preflight"]] {
        let output = site.warm_spare(verb).await.ok();
        assert_no_password(&output);
    }
    assert_copied(&site, &made).await?;
    let carried = proxy.carried();
    let carries = |method: &str, start: &str| {
        let line = format!("{method} {start}");
        carried.iter().any(|carried| carried.starts_with(&line))
    };
    assert!(carries("GET", "http://there.test:9000/"), "{carried:?}");
    // The port of the scheme is in no signed request.
    assert!(carries("PUT", "http://here.test/"), "{carried:?}");
    assert!(!carries("PUT", "http://there.test"), "{carried:?}");
    assert!(carried.iter().any(|line| line.contains("partNumber=")));
    assert_eq!(proxy.turned_away(), 0);
    Ok(())
}

/// A store that speaks TLS, under the name `store.test`.
async fn sealed(name: &str) -> Result<(Site, support::tls::Certificates, String)> {
    let made = certificates(&["store.test", "127.0.0.1"])?;
    let mut site = site(name).await;
    let minio = Minio::builder().ssl(&made.certificate, &made.key);
    let minio = Arc::new(minio.start().await?);
    site.primary = Cluster::new(site.primary.pg.clone(), minio, "sealed").await?;
    let authority = site.dir.path().join("authority.pem");
    std::fs::write(&authority, &made.authority)?;
    let ca_file = format!("peer.s3.ca_file = \"{}\"\n", authority.display());
    Ok((site, made, ca_file))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_copy_through_a_tunnel_is_encrypted_to_its_end() -> Result<()> {
    let (site, certificates, ca_file) = sealed("tunnelled").await?;
    let made = fill(&site).await?;
    let port = site.primary.minio.port();
    let routes = [("store.test", port), ("other.test", port)];
    let plain = ForwardProxy::start(&routes).await?;
    let encrypted = ForwardProxy::sealed(&routes, &certificates).await?;
    for (proxy, verb) in [
        (&plain, &["sync"][..]),
        (&encrypted, &["sync", "--baseline"]),
    ] {
        let through = format!("{ca_file}peer.s3.proxy = \"{}\"\n", proxy.url());
        let endpoint = "peer.s3.endpoint = \"https://store.test:9443\"";
        site.write_config(&format!("{through}{endpoint}"));
        assert_no_password(&site.warm_spare(verb).await.ok());
        site.warm_spare(&["verify", "--deep"]).await.ok();
        assert_copied(&site, &made).await?;
        let carried = proxy.carried();
        assert!(!carried.is_empty());
        for line in carried {
            assert_eq!(line, "CONNECT store.test:9443");
        }
        // The certificate is of another name: the proxy may lead anywhere.
        let endpoint = "peer.s3.endpoint = \"https://other.test:9443\"";
        site.write_config(&format!("{through}{endpoint}"));
        let output = site.warm_spare(&["check-config", "--connect"]).await;
        assert_eq!(output.code, Some(3), "{output}");
        for words in [
            "peer artifact store https://other.test:9443 through the proxy",
            "for another host name",
            "peer.s3.ca_file",
        ] {
            assert!(output.stderr.contains(words), "{output}");
        }
    }
    Ok(())
}

const STORES: [&str; 2] = ["http://store.test:9000", "https://store.test:9443"];

fn proxied(site: &Site, endpoint: &str, proxy: String) -> S3 {
    S3 {
        proxy: Some(SecretSource::Inline(Secret::new(proxy))),
        ..config(&site.primary, endpoint.into())
    }
}

/// Asks for the bucket, and for an object by HEAD, without trying again. Both fail in the same way.
async fn refused(to: &S3, patience: Duration) -> StoreError {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let store = Store::open(Side::Peer, to).expect("it is prepared");
    let store = store.with_limits(patience, 1);
    let asked = store.head("any").await.expect_err("the proxy");
    let error = store.check_bucket().await.expect_err("the proxy");
    assert_eq!(
        asked.text.replace("HEAD http", "GET http"),
        error.text,
        "{endpoint}",
        endpoint = to.endpoint
    );
    let shown = format!("{error} {error:?} {}", error.next_step());
    for secret in ["p@ss", "p%40ss", "dc2", "ZGMyOn"] {
        assert!(!shown.contains(secret), "{shown}");
    }
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_does_not_carry_is_named_with_what_it_did() -> Result<()> {
    let site = site("refusing_proxy").await;
    let proxy = ForwardProxy::start(&[("store.test", site.primary.minio.port())]).await?;
    let second = Duration::from_secs(1);
    for endpoint in STORES {
        let to = proxied(&site, endpoint, proxy.url());
        let named = format!(
            "peer artifact store {endpoint} through the proxy {}: ",
            proxy.address()
        );
        let is = |error: &StoreError, fault: StoreFault, seen: &str, step: &str| {
            assert_eq!(error.fault, fault, "{error}");
            assert!(error.to_string().starts_with(&named), "{error}");
            assert!(error.text.contains(seen), "{error}");
            let next = error.next_step();
            assert!(next.contains(step), "{next}");
            assert!(next.contains("peer.s3.proxy"), "{next}");
        };
        use StoreFault::{ProxyRefused, Unreachable};
        let wrong = proxied(&site, endpoint, proxy.url_with("p%40ss"));
        let error = refused(&wrong, second).await;
        is(&error, ProxyRefused, "HTTP status 407", "the password");
        let none = proxied(&site, endpoint, proxy.address());
        let error = refused(&none, second).await;
        is(&error, ProxyRefused, "HTTP status 407", "the password");
        for (conduct, fault, seen, step) in [
            (
                Conduct::Refuse(401),
                ProxyRefused,
                "HTTP status 401",
                "the password",
            ),
            (
                Conduct::Refuse(403),
                ProxyRefused,
                "HTTP status 403",
                "let the proxy carry",
            ),
            (
                Conduct::Refuse(500),
                Unreachable,
                "HTTP status 500",
                "reaches the server",
            ),
            (
                Conduct::Refuse(502),
                Unreachable,
                "HTTP status 502",
                "reaches the server",
            ),
            (
                Conduct::Close,
                Unreachable,
                "connection closed",
                "the proxy runs",
            ),
            (
                Conduct::Silent,
                Unreachable,
                "no answer for",
                "the proxy runs",
            ),
        ] {
            proxy.set(conduct);
            let patience = match conduct {
                Conduct::Silent => Duration::from_millis(200),
                _ => second,
            };
            is(&refused(&to, patience).await, fault, seen, step);
        }
        proxy.set(Conduct::Carry);
    }
    let down = proxy.address();
    let to = STORES.map(|endpoint| proxied(&site, endpoint, proxy.url()));
    drop(proxy);
    for to in to {
        let error = support::wait_until("the proxy's end", second, async || {
            let error = refused(&to, second).await;
            match error.text.contains("refused") {
                true => Ok(error),
                false => Err(error.to_string().into()),
            }
        })
        .await;
        assert_eq!(error.fault, StoreFault::Unreachable);
        assert!(error.text.contains("connecting to the proxy"), "{error}");
        assert!(error.to_string().contains(&down), "{error}");
    }
    Ok(())
}

/// A header of the store does not make its answer a fault of the proxy, and a redirection does not lead past the proxy.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_cannot_lead_past_the_proxy() -> Result<()> {
    let site = site("leading_past").await;
    site.primary.put("any", "thing").await?;
    let store = HttpFault::start(site.primary.minio.port()).await?;
    let elsewhere = HttpFault::start(site.primary.minio.port()).await?;
    let proxy = ForwardProxy::start(&[("store.test", store.port())]).await?;
    let to = proxied(&site, STORES[0], proxy.url());
    let _ = rustls::crypto::ring::default_provider().install_default();
    let peer = Store::open(Side::Peer, &to)?.with_limits(Duration::from_secs(2), 1);
    assert!(peer.head("any").await?.is_some());
    store.set(|_| {
        let header = ("x-warm-spare-proxy-fault", "refused by the store");
        let body = Bytes::from_static(b"<Error><Code>AccessDenied</Code></Error>");
        Fault::RespondWith(403, vec![header], body)
    });
    let error = peer.check_bucket().await.expect_err("a denial");
    assert_eq!(error.fault, StoreFault::Denied, "{error}");
    // The S3 library would follow this redirection by itself.
    let location: &'static str = Box::leak(format!("{}/x", elsewhere.endpoint()).into_boxed_str());
    store.set(move |_| Fault::RespondWith(307, vec![("location", location)], Bytes::new()));
    peer.check_bucket().await.expect_err("a redirection");
    peer.head("any").await.expect_err("a redirection");
    assert_eq!(elsewhere.requests(), []);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_takes_another_proxy_without_a_restart() -> Result<()> {
    let site = site("other_proxy").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let routes = [("store.test", site.primary.minio.port())];
    let (first, second) =
        tokio::try_join!(ForwardProxy::start(&routes), ForwardProxy::start(&routes))?;
    let through = |proxy: &ForwardProxy| {
        format!(
            "peer.s3.endpoint = \"http://store.test:9000\"\npeer.s3.proxy = \"{}\"\n\
             [replication]\nmode = \"snapshot\"\ninterval = \"200ms\"",
            proxy.url()
        )
    };
    let service = Service::start(&site, &through(&first));
    service.until_level().await;
    assert_eq!(second.carried(), [""; 0]);
    service.reconfigure(&through(&second));
    drop(first);
    let late = factory
        .package(&site.primary, Spec::new("core", "late", "1"))
        .await?;
    support::wait_until(
        "the copy",
        support::SERVER_DEADLINE,
        async || match bytes_of(&site, &late.key).await? {
            Some(checksum) if checksum == late.checksum => Ok(()),
            found => Err(format!("{found:?}").into()),
        },
    )
    .await;
    let carried = second.carried();
    assert!(
        carried.iter().any(|line| line.contains("late")),
        "{carried:?}"
    );
    let status = service.status().await?.to_string();
    assert!(
        !status.contains("p%40ss") && !status.contains("p@ss"),
        "{status}"
    );
    let output = service.stop().await;
    assert_no_password(&output);
    let kept = std::fs::read_to_string(site.dir.path().join("data/last-good.toml"))?;
    assert!(
        kept.contains("proxy_file") && !kept.contains("p%40ss"),
        "{kept}"
    );
    Ok(())
}
