//! A courier between two buckets, each behind a proxy in which a test can cause faults.

use super::http_fault::HttpFault;
use super::{Cluster, Factory, Package, Result, Site, Spec, site};
use std::time::Duration;
use warm_spare::cluster::{ByteBudget, LocalStore, Store, StoreError, Throttle};
use warm_spare::config::{Backend, S3, Secret, SecretSource};
use warm_spare::domain::Side;
use warm_spare::package::Checksum;
use warm_spare::replication::{Courier, Delivery};

pub fn config(cluster: &Cluster, endpoint: String) -> S3 {
    S3 {
        backend: Backend::Minio,
        endpoint,
        region: "minio_s3".into(),
        bucket_name: cluster.bucket.clone(),
        key_id: SecretSource::Inline(Secret::new(cluster.minio.access_key())),
        secret_key: SecretSource::Inline(Secret::new(cluster.minio.secret_key())),
        ca_file: None,
        proxy: None,
        source: "test",
    }
}

/// A courier between two buckets, each behind a proxy in which a test can cause faults.
pub struct Between {
    pub site: Site,
    pub from: HttpFault,
    pub to: HttpFault,
    pub courier: Courier,
    pub small: Package,
    /// A package of three parts.
    pub large: Package,
}

pub async fn between(name: &str) -> Result<Between> {
    let site = site(name).await;
    let mut factory = Factory::seeded();
    let small = factory
        .package(&site.primary, Spec::new("core", "small", "1").size(50_000))
        .await?;
    let large = factory
        .package(
            &site.primary,
            Spec::new("core", "large", "1").size(20 << 20),
        )
        .await?;
    let from = HttpFault::start(site.primary.minio.port()).await?;
    let to = HttpFault::start(site.spare.minio.port()).await?;
    // rustls needs a chosen provider before the first client is made; `main` does the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let patience = Duration::from_secs(2);
    let courier = Courier {
        peer: Store::open(Side::Peer, &config(&site.primary, from.endpoint()))?
            .with_limits(patience, 4),
        local: LocalStore::open(&config(&site.spare, to.endpoint()))?.with_limits(patience, 4),
        budget: ByteBudget::new(64 << 20),
        throttle: Throttle::new(None),
    };
    Ok(Between {
        site,
        from,
        to,
        courier,
        small,
        large,
    })
}

impl Between {
    pub async fn fetch(&self, package: &Package) -> Result<Delivery, StoreError> {
        let checksum: Checksum = package.checksum.parse().expect("a checksum");
        self.courier
            .fetch(&package.key, &package.key, &checksum)
            .await
    }

    pub async fn arrived(&self, package: &Package) -> Result<bool> {
        let found = self
            .site
            .spare
            .s3()
            .checksum(&self.site.spare.bucket, &package.key)
            .await?;
        match found {
            None => Ok(false),
            Some(found) if found == package.checksum => Ok(true),
            Some(found) => panic!("wrong bytes became visible: {found}"),
        }
    }
}

/// Returns whether the request completes an upload in parts.
pub fn completes(request: &hyper::http::request::Parts) -> bool {
    let query = request.uri.query().unwrap_or_default();
    request.method == "POST" && query.contains("uploadId")
}
