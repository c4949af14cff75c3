//! Builds the two sides of the configuration from values that were checked one by one.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::builder::BuilderApi;
use super::endpoint::parse_endpoint;
use super::secret::{open, open_private};
use super::values::{Source, Values, builder_key};
use super::{
    Backend, ConfigError, Datastore, Proxy, S3, Secret, SecretSource, Side, SslMode, archive,
};

const DATASTORE_PASSWORD_SOURCE: &str = "builder-datastore pwfile";

/// Builds the near side, after [`Values::complete_near`]. `pwfile` is the password file of
/// builder-datastore, which may be absent.
pub(super) fn near(
    values: &Values,
    builder: Option<&BuilderApi>,
    pwfile: &Path,
) -> Result<Side, ConfigError> {
    let side = values.near();
    let reader = Reader {
        values,
        builder,
        side,
    };
    let bucket_name = values.required(&reader.key("s3.bucket_name"));
    let mut datastore = reader.datastore()?;
    if datastore.password.is_none() && exists(pwfile) {
        let password = SecretSource::File(pwfile.to_path_buf());
        password.read(&reader.key("datastore.password"))?;
        datastore.password = Some(password);
        if datastore.source == Source::Default.name() {
            datastore.source = DATASTORE_PASSWORD_SOURCE;
        }
    }
    let s3 = reader.s3("s3.", bucket_name)?;
    Ok(Side { datastore, s3 })
}

/// Builds the other side. Without a bucket name of its own it uses the name of the near bucket.
pub(super) fn far(values: &Values, side: &'static str, near: &Side) -> Result<Side, ConfigError> {
    let reader = Reader {
        values,
        builder: None,
        side,
    };
    let bucket_name = values.text(&reader.key("s3.bucket_name"));
    let bucket_name = bucket_name.unwrap_or(&near.s3.bucket_name);
    Ok(Side {
        datastore: reader.datastore()?,
        s3: reader.s3("s3.", Ok(bucket_name))?,
    })
}

/// Returns the peer of a cluster that has none. Nobody can reach it, and it holds no secret: its host
/// is empty, and no server has a name in the domain `invalid` (RFC 6761).
pub(super) fn nobody() -> Side {
    let no_secret = || SecretSource::Inline(Secret::new(""));
    let source = Source::Default.name();
    Side {
        datastore: Datastore {
            host: String::new(),
            port: 5432,
            user: "hab".to_string(),
            database: "builder".to_string(),
            password: None,
            ssl_mode: SslMode::Prefer,
            ssl_root_cert: None,
            ssl_cert: None,
            ssl_key: None,
            source,
        },
        s3: S3 {
            backend: Backend::Minio,
            endpoint: "http://no-peer.invalid:9".to_string(),
            region: String::new(),
            bucket_name: String::new(),
            key_id: no_secret(),
            secret_key: no_secret(),
            ca_file: None,
            proxy: None,
            source,
        },
    }
}

/// Returns false only if the file certainly does not exist. If it cannot be examined, the later
/// read reports the error.
fn exists(path: &Path) -> bool {
    !std::fs::metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

/// Builds the store of the lease. None: the lease is in the shared bucket.
pub(super) fn lease(values: &Values) -> Result<Option<S3>, ConfigError> {
    const ENDPOINT: &str = "artifacts.lease.endpoint";
    let names = [
        "bucket_name",
        "key_id",
        "key_id_file",
        "secret_key",
        "secret_key_file",
    ];
    let is_set = |name: &&str| values.text(&format!("artifacts.lease.{name}")).is_some();
    if values.text(ENDPOINT).is_none() {
        return match names.iter().find(|name| is_set(name)) {
            None => Ok(None),
            Some(name) => Err(ConfigError::key(
                format!("artifacts.lease.{name}"),
                format!("is set without {ENDPOINT}: set both or neither"),
            )),
        };
    }
    let reader = Reader {
        values,
        builder: None,
        side: "artifacts",
    };
    let bucket_name = values.required("artifacts.lease.bucket_name");
    reader.s3("lease.", bucket_name).map(Some)
}

/// Builds the store of an archive from the values of one place.
pub(super) fn archive(values: &Values) -> Result<S3, ConfigError> {
    let reader = Reader {
        values,
        builder: None,
        side: archive::TABLE,
    };
    reader.s3("", values.required("archive.bucket_name"))
}

/// Reads the proxy of the key. An error names the key or its counterpart for a file.
pub(super) fn read_proxy(source: &SecretSource, key: &str) -> Result<Proxy, ConfigError> {
    let key = match source {
        SecretSource::File(_) => format!("{key}_file"),
        _ => key.to_string(),
    };
    let url = source.read(&key)?;
    Proxy::parse(url.expose()).map_err(|problem| match source {
        SecretSource::File(path) => ConfigError::key(key, format!("{}: {problem}", path.display())),
        _ => ConfigError::key(key, problem),
    })
}

struct Reader<'a> {
    values: &'a Values,
    builder: Option<&'a BuilderApi>,
    side: &'static str,
}

impl Reader<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.side)
    }

    fn datastore(&self) -> Result<Datastore, ConfigError> {
        let required = |name| self.values.required(&self.key(name)).map(str::to_string);
        let (ssl_cert, ssl_key) = self.client_certificate()?;
        Ok(Datastore {
            host: required("datastore.host")?,
            port: self.values.int(&self.key("datastore.port"))?,
            user: required("datastore.user")?,
            database: required("datastore.database")?,
            password: self.secret("datastore.password")?,
            ssl_mode: self.ssl_mode(),
            ssl_root_cert: self.readable("datastore.ssl_root_cert")?,
            ssl_cert,
            ssl_key,
            source: self.source("datastore.host"),
        })
    }

    /// Reads the keys of a store. `block` begins their names within the side, such as `s3.`.
    fn s3(&self, block: &str, bucket_name: Result<&str, ConfigError>) -> Result<S3, ConfigError> {
        let name = |key: &str| format!("{block}{key}");
        let backend = match self.values.text(&self.key(&name("backend"))) {
            Some("aws") => Backend::Aws,
            _ => Backend::Minio,
        };
        let key = self.key(&name("endpoint"));
        let endpoint = parse_endpoint(backend, self.values.required(&key)?)
            .map_err(|problem| ConfigError::key(key, problem))?;
        let required = |key: &str| {
            self.secret(&name(key))?
                .ok_or_else(|| self.values.missing(&self.key(&name(key))))
        };
        Ok(S3 {
            backend,
            endpoint: endpoint.url,
            region: endpoint.region,
            bucket_name: bucket_name?.to_string(),
            key_id: required("key_id")?,
            secret_key: required("secret_key")?,
            ca_file: self.readable(&name("ca_file"))?,
            proxy: self.proxy(&name("proxy"))?,
            source: self.source(&name("endpoint")),
        })
    }

    fn source(&self, name: &str) -> &'static str {
        self.values
            .source(&self.key(name))
            .unwrap_or(Source::Default)
            .name()
    }

    fn ssl_mode(&self) -> SslMode {
        match self.values.text(&self.key("datastore.ssl_mode")) {
            Some("disable") => SslMode::Disable,
            Some("require") => SslMode::Require,
            Some("verify-ca") => SslMode::VerifyCa,
            Some("verify-full") => SslMode::VerifyFull,
            _ => SslMode::Prefer,
        }
    }

    /// Reads the client certificate and its key. One is of no use without the other.
    fn client_certificate(&self) -> Result<(Option<PathBuf>, Option<PathBuf>), ConfigError> {
        let (cert_key, key_key) = (
            self.key("datastore.ssl_cert"),
            self.key("datastore.ssl_key"),
        );
        let certificate = self.readable("datastore.ssl_cert")?;
        let key = self.values.text(&key_key).map(PathBuf::from);
        if let Some(path) = &key {
            open_private(&key_key, path)?;
        }
        match (&certificate, &key) {
            (Some(_), None) => Err(ConfigError::key(
                cert_key,
                format!("is set without {key_key}: set both or neither"),
            )),
            (None, Some(_)) => Err(ConfigError::key(
                key_key,
                format!("is set without {cert_key}: set both or neither"),
            )),
            _ => Ok((certificate, key)),
        }
    }

    /// Returns the path of a file that must exist and be readable now. Each connection reads it
    /// again.
    fn readable(&self, name: &str) -> Result<Option<PathBuf>, ConfigError> {
        let key = self.key(name);
        let Some(path) = self.values.text(&key).map(PathBuf::from) else {
            return Ok(None);
        };
        open(&key, &path)?;
        Ok(Some(path))
    }

    /// Returns the secret of the key, or of the file that its counterpart names. The file is read
    /// once to check it.
    fn secret(&self, name: &str) -> Result<Option<SecretSource>, ConfigError> {
        let key = self.key(name);
        let file_key = format!("{key}_file");
        match (self.values.text(&key), self.values.text(&file_key)) {
            (Some(_), Some(_)) => Err(ConfigError::key(
                key,
                format!("is set, and {file_key} is set too: remove one of them"),
            )),
            (None, Some(path)) => {
                let source = SecretSource::File(PathBuf::from(path));
                source.read(&file_key)?;
                Ok(Some(source))
            }
            (Some(text), None) => {
                Ok(Some(self.builders(&key).unwrap_or_else(|| {
                    SecretSource::Inline(Secret::new(text))
                })))
            }
            (None, None) => Ok(None),
        }
    }

    /// Returns the source of the proxy's URL. The URL is read and checked once.
    fn proxy(&self, name: &str) -> Result<Option<SecretSource>, ConfigError> {
        let source = self.secret(name)?;
        if let Some(source) = &source {
            read_proxy(source, &self.key(name))?;
        }
        Ok(source)
    }

    /// Returns the source of a secret that comes from builder-api's file.
    fn builders(&self, key: &str) -> Option<SecretSource> {
        let builder = self
            .builder
            .filter(|_| self.values.source(key) == Some(Source::BuilderApi))?;
        Some(SecretSource::BuilderApi {
            file: builder.path().to_path_buf(),
            key: builder_key(key, self.values.near())?.to_string(),
        })
    }
}
