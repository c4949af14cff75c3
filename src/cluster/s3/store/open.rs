//! Opens the client of a store, through an HTTP proxy if one is set.

use super::wire::Wire;
use super::{MAX_TRIES, Pace, REPLY_TIMEOUT, Store};
use crate::cluster::error_text;
use crate::cluster::s3::relay::Relay;
use crate::cluster::s3::store_error::{StoreError, StoreFault};
use crate::config;
use crate::domain::Side;
use minio::s3::client::MinioClientBuilder;
use minio::s3::creds::StaticProvider;
use minio::s3::http::BaseUrl;
use minio::s3::types::{BucketName, Region};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

impl Store {
    /// Prepares a client; nothing is sent. Keys, certificates and the proxy are read now, so that a
    /// rotation needs only a new client.
    pub fn open(side: Side, to: &config::S3) -> Result<Store, StoreError> {
        let fail = |fault: StoreFault, text: String| StoreError {
            side,
            endpoint: to.endpoint.clone(),
            proxy: None,
            doing: "preparing the client".into(),
            fault,
            text,
            wait: None,
        };
        let unexpected =
            |e: &dyn std::error::Error| fail(StoreFault::Unexpected, error_text::chain(e));
        let secret = |source: &config::SecretSource, key: &str| {
            source
                .read(&format!("{side}.s3.{key}"))
                .map_err(|e| fail(StoreFault::Denied, e.to_string()))
        };
        let (key_id, secret_key) = (
            secret(&to.key_id, "key_id")?,
            secret(&to.secret_key, "secret_key")?,
        );
        let proxy = to
            .read_proxy(&format!("{side}.s3.proxy"))
            .map_err(|e| fail(StoreFault::ProxyRefused, e.to_string()))?;
        let relay = proxy
            .map(|proxy| Relay::start(to, proxy).map(Arc::new))
            .transpose()
            .map_err(|error| fail(error.fault, error.text))?;
        let url = relay.as_ref().map(|relay| relay.url());
        let url = url.as_ref().unwrap_or(&to.endpoint);
        let mut url: BaseUrl = url.parse().map_err(|e| unexpected(&e))?;
        url.region = Region::new(&to.region).map_err(|e| unexpected(&e))?;
        let artifactory = Arc::new(AtomicBool::new(false));
        let wire = Wire {
            artifactory: artifactory.clone(),
            host: relay.as_ref().map(|relay| relay.authority().to_string()),
        };
        let client = MinioClientBuilder::new(url)
            .provider(Some(StaticProvider::new(
                key_id.expose(),
                secret_key.expose(),
                None,
            )))
            .ssl_cert_file(to.ca_file.as_deref())
            .app_info(relay.as_ref().map(|relay| relay.app_info()))
            .hook(Arc::new(wire))
            .build()
            .map_err(|e| {
                fail(
                    StoreFault::Tls,
                    format!("{}: {}", ca_file_of(to), error_text::chain(&e)),
                )
            })?;
        Ok(Store {
            side,
            endpoint: to.endpoint.clone(),
            client,
            bucket: BucketName::new(&to.bucket_name).map_err(|e| unexpected(&e))?,
            patience: REPLY_TIMEOUT,
            tries: MAX_TRIES,
            artifactory,
            pace: Pace::default(),
            relay,
        })
    }
}

fn ca_file_of(to: &config::S3) -> String {
    match &to.ca_file {
        Some(path) => path.display().to_string(),
        None => "the system's certificate authorities".into(),
    }
}
