//! Settings of a bucket that an operator makes: versions, a lock, a quota, MinIO's own replication.

use super::{Cluster, Minio, Result};
use bytes::Bytes;
use minio::s3::client::Method;
use minio::s3::creds::StaticProvider;
use minio::s3::http::BaseUrl;
use minio::s3::multimap_ext::Multimap;
use minio::s3::segmented_bytes::SegmentedBytes;
use minio::s3::types::{Region, S3Request};
use minio::s3::{MinioClient, MinioClientBuilder};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use std::sync::Arc;

/// Makes each change of an object a version of its own from now on.
pub async fn keep_versions(cluster: &Cluster) -> Result<()> {
    let rule = "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>";
    let path = format!("/{}", cluster.bucket);
    put(
        &cluster.minio,
        &path,
        &[("versioning", "")],
        &[],
        rule.into(),
    )
    .await?;
    Ok(())
}

/// Makes a bucket whose versions nobody can delete for a day, except a user who may bypass that.
pub async fn locked_bucket(minio: &Minio, bucket: &str) -> Result<()> {
    let path = format!("/{bucket}");
    let locked = [("x-amz-bucket-object-lock-enabled", "true")];
    put(minio, &path, &[], &locked, Bytes::new()).await?;
    let rule = "<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled><Rule><DefaultRetention>\
                <Mode>GOVERNANCE</Mode><Days>1</Days></DefaultRetention></Rule></ObjectLockConfiguration>";
    put(minio, &path, &[("object-lock", "")], &[], rule.into()).await?;
    Ok(())
}

/// Sets MinIO's own limit on a bucket.
pub async fn set_quota(cluster: &Cluster, bytes: u64) -> Result<()> {
    let quota = serde_json::json!({ "quota": bytes, "size": bytes, "quotatype": "hard" });
    let path = "/minio/admin/v3/set-bucket-quota";
    let query = [("bucket", cluster.bucket.as_str())];
    put(&cluster.minio, path, &query, &[], quota.to_string().into()).await?;
    Ok(())
}

/// Does the same as `mc replicate add`: MinIO itself copies objects with this prefix from one
/// bucket to the other.
pub async fn replicate(from: &Cluster, to: &Cluster, prefix: &str) -> Result<()> {
    let target = serde_json::json!({
        "sourcebucket": from.bucket,
        "targetbucket": to.bucket,
        "endpoint": format!("127.0.0.1:{}", to.minio.port()),
        "credentials": { "accessKey": to.minio.access_key(), "secretKey": to.minio.secret_key() },
        "secure": false,
        "type": "replication",
        "api": "s3v4",
        "replicationSync": true,
    });
    let sealed = seal(from.minio.secret_key(), target.to_string().as_bytes())?;
    let path = "/minio/admin/v3/set-remote-target";
    let query = [("bucket", from.bucket.as_str()), ("type", "replication")];
    let arn = put(&from.minio, path, &query, &[], sealed.into()).await?;
    let arn: String = serde_json::from_slice(&arn)?;
    let rule = format!(
        "<ReplicationConfiguration><Role></Role><Rule><ID>r</ID><Status>Enabled</Status><Priority>1</Priority>\
         <DeleteMarkerReplication><Status>Disabled</Status></DeleteMarkerReplication>\
         <DeleteReplication><Status>Disabled</Status></DeleteReplication>\
         <Destination><Bucket>{arn}</Bucket></Destination><Filter><Prefix>{prefix}</Prefix></Filter></Rule>\
         </ReplicationConfiguration>"
    );
    let path = format!("/{}", from.bucket);
    let query = [("replication", "")];
    put(&from.minio, &path, &query, &[], rule.into()).await?;
    Ok(())
}

/// Removes objects with all their versions, without replicating that.
pub fn lose(cluster: &Cluster, key: &str) -> Result<()> {
    let object = cluster.minio.data_dir().join(&cluster.bucket).join(key);
    Ok(std::fs::remove_dir_all(object)?)
}

/// Encrypts secrets in the form that MinIO's administration accepts: salt, kind, nonce, and one
/// sealed piece, whose further data are the seal of nothing.
fn seal(password: &str, text: &[u8]) -> Result<Vec<u8>> {
    const PBKDF2_AES_GCM: u8 = 2;
    let (salt, half): ([u8; 32], [u8; 8]) = rand::random();
    let mut key = [0; 32];
    let rounds = std::num::NonZeroU32::new(8192).expect("not zero");
    let how = ring::pbkdf2::PBKDF2_HMAC_SHA256;
    ring::pbkdf2::derive(how, rounds, &salt, password.as_bytes(), &mut key);
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).map_err(|e| e.to_string())?);
    let nonce = |number: u32| {
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&half);
        nonce[8..].copy_from_slice(&number.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    };
    let refused = |e: ring::error::Unspecified| e.to_string();
    let mut nothing = Vec::new();
    key.seal_in_place_append_tag(nonce(0), Aad::empty(), &mut nothing)
        .map_err(refused)?;
    let mut further = vec![0x80];
    further.extend_from_slice(&nothing);
    let mut piece = text.to_vec();
    key.seal_in_place_append_tag(nonce(1), Aad::from(&further), &mut piece)
        .map_err(refused)?;
    let mut sealed = salt.to_vec();
    sealed.push(PBKDF2_AES_GCM);
    sealed.extend_from_slice(&half);
    sealed.extend_from_slice(&piece);
    Ok(sealed)
}

/// Sends a signed request to any path.
async fn put(
    minio: &Minio,
    path: &str,
    query: &[(&str, &str)],
    headers: &[(&str, &str)],
    body: Bytes,
) -> Result<Bytes> {
    let mut url: BaseUrl = minio.endpoint().parse()?;
    url.region = Region::new("us-east-1")?;
    let client: MinioClient = MinioClientBuilder::new(url)
        .provider(Some(StaticProvider::new(
            minio.access_key(),
            minio.secret_key(),
            None,
        )))
        .build()?;
    let map = |pairs: &[(&str, &str)]| {
        let mut map = Multimap::new();
        for (name, value) in pairs {
            map.insert(name.to_string(), value.to_string());
        }
        map
    };
    let mut request = S3Request::builder()
        .client(client)
        .method(Method::PUT)
        .custom_path(path.to_string())
        .query_params(map(query))
        .headers(map(headers))
        .body(Arc::new(SegmentedBytes::from(body)))
        .build();
    Ok(request.execute().await?.bytes().await?)
}
