//! Addresses: hosts, the URL of an S3 server, regions, names of buckets.

use std::net::Ipv6Addr;

use super::Backend;
use super::units::quoted;

/// Region for which requests to MinIO are signed. Builder uses this region, and a MinIO server that
/// is set to one region accepts no other.
const MINIO_REGION: &str = "minio_s3";

pub(super) const BUCKET_NAME: &str = "a bucket name (3-63 lower-case letters, digits, dots and hyphens; a letter or digit first and last)";

/// The address of an S3 server, and the region for which requests are signed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub url: String,
    pub region: String,
}

/// Reads `s3.endpoint`. With backend `aws` the key holds a region, as in Builder's own
/// configuration.
pub(super) fn parse_endpoint(backend: Backend, text: &str) -> Result<Endpoint, String> {
    match backend {
        Backend::Minio => Ok(Endpoint {
            url: parse_url(text)?,
            region: MINIO_REGION.to_string(),
        }),
        Backend::Aws if is_region(text) => {
            // The Chinese regions have a domain of their own.
            let domain = if text.starts_with("cn-") {
                "amazonaws.com.cn"
            } else {
                "amazonaws.com"
            };
            Ok(Endpoint {
                url: format!("https://s3.{text}.{domain}"),
                region: text.to_string(),
            })
        }
        Backend::Aws => Err(format!(
            "expected a region such as \"eu-central-1\", because the backend is aws, found {}",
            shown(text)
        )),
    }
}

/// Reads a URL: `http` or `https`, host, optional port. One closing slash is allowed and is
/// dropped.
pub(super) fn parse_url(text: &str) -> Result<String, String> {
    let Url {
        scheme, authority, ..
    } = split_url(text).map_err(|why| {
        format!(
            "expected a URL such as \"https://10.0.0.5:9000\", found {}: {why}",
            shown(text)
        )
    })?;
    Ok(format!("{scheme}://{authority}"))
}

/// Returns whether two URLs of [`parse_url`] name one server. Case does not count, and neither does a
/// port that the scheme has anyway.
pub(super) fn is_same_server(one: &str, other: &str) -> bool {
    let server = |url| {
        let Url {
            scheme, host, port, ..
        } = split_url(url).ok()?;
        let usual = if scheme == "https" { 443 } else { 80 };
        Some((host.to_ascii_lowercase(), port.unwrap_or(usual)))
    };
    one == other || server(one).is_some_and(|one| server(other) == Some(one))
}

/// The parts of a URL without user information and without a path.
pub(super) struct Url<'a> {
    /// `http` or `https`.
    pub scheme: String,
    /// Host and port as they were written.
    authority: &'a str,
    /// The host; an IPv6 address without its brackets.
    pub host: &'a str,
    pub port: Option<u16>,
}

/// Splits a URL into its parts. An error says what is wrong, and does not hold the text.
pub(super) fn split_url(text: &str) -> Result<Url<'_>, &'static str> {
    let (scheme, rest) = text
        .split_once("://")
        .ok_or("it does not begin with http:// or https://")?;
    let scheme = scheme.to_ascii_lowercase();
    if scheme != "http" && scheme != "https" {
        return Err("the scheme is neither http nor https");
    }
    if rest.contains('@') {
        return Err("remove user and password");
    }
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if authority.contains(['/', '?', '#']) {
        return Err("remove the path");
    }
    let (host, port) = split_port(authority).ok_or("the closing ] of the address is missing")?;
    if !is_host(host) || host.contains(':') != authority.starts_with('[') {
        return Err("the host is neither a host name nor an IP address");
    }
    let port = match port {
        None => None,
        Some(port) => {
            let digits = port.bytes().all(|b| b.is_ascii_digit());
            match port.parse::<u16>() {
                Ok(port @ 1..) if digits => Some(port),
                _ => return Err("the port is not 1-65535"),
            }
        }
    };
    Ok(Url {
        scheme,
        authority,
        host,
        port,
    })
}

/// Splits an authority into host and port. An IPv6 address is in brackets, so that its colons are
/// not read as the colon of a port.
fn split_port(authority: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = authority.strip_prefix('[') {
        let (host, after) = rest.split_once(']')?;
        return match after {
            "" => Some((host, None)),
            _ => Some((host, Some(after.strip_prefix(':')?))),
        };
    }
    match authority.rsplit_once(':') {
        Some((host, port)) => Some((host, Some(port))),
        None => Some((authority, None)),
    }
}

/// Returns whether the text is an IP address, or a name that a resolver may know. Underscores are
/// allowed, because container networks have them.
pub(super) fn is_host(text: &str) -> bool {
    let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let is_name = text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(name);
    is_name || text.parse::<Ipv6Addr>().is_ok()
}

fn is_region(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
}

pub(super) fn is_bucket_name(text: &str) -> bool {
    let edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    (3..=63).contains(&text.len())
        && text.chars().all(|c| edge(c) || c == '.' || c == '-')
        && text.starts_with(edge)
        && text.ends_with(edge)
        && !text.contains("..")
}

/// Returns the text for an error. A URL with user information may hold a password, so it is not
/// shown.
fn shown(text: &str) -> String {
    if text.contains('@') {
        "a URL with user information".to_string()
    } else {
        quoted(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let cases = [
            ("http://127.0.0.1:9000", "http://127.0.0.1:9000"),
            (
                "HTTPS://minio_1.example.org/",
                "https://minio_1.example.org",
            ),
            ("https://[2001:db8::1]:9000", "https://[2001:db8::1]:9000"),
            ("https://[2001:db8::1]", "https://[2001:db8::1]"),
        ];
        for (text, url) in cases {
            assert_eq!(parse_url(text).as_deref(), Ok(url));
        }
        let bad = [
            "",
            "minio",
            "minio:9000",
            "ftp://minio",
            "http://",
            "http://:9000",
            "http://minio:",
            "http://minio:0",
            "http://minio:65536",
            "http://minio:+80",
            "http://minio/bucket",
            "http://minio//",
            "http://minio?x",
            "http://minio#x",
            "http://mi nio",
            "http://[::1",
            "http://[::1]x",
            "http://[x]:1",
            "http://::1",
            "http://::1:9000",
        ];
        for text in bad {
            assert!(parse_url(text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn a_password_in_a_url_is_refused_and_not_repeated() {
        for backend in [Backend::Minio, Backend::Aws] {
            let problem = parse_endpoint(backend, "http://user:hunter2@minio:9000").unwrap_err();
            assert!(!problem.contains("hunter2"), "{problem}");
        }
    }

    #[test]
    fn endpoints() {
        let minio = parse_endpoint(Backend::Minio, "http://minio:9000").unwrap();
        assert_eq!(
            (minio.url.as_str(), minio.region.as_str()),
            ("http://minio:9000", "minio_s3")
        );
        let aws = parse_endpoint(Backend::Aws, "eu-central-1").unwrap();
        assert_eq!(
            (aws.url.as_str(), aws.region.as_str()),
            ("https://s3.eu-central-1.amazonaws.com", "eu-central-1")
        );
        let china = parse_endpoint(Backend::Aws, "cn-north-1").unwrap();
        assert_eq!(china.url, "https://s3.cn-north-1.amazonaws.com.cn");
        for bad in [
            "https://s3.eu-central-1.amazonaws.com",
            "eu_central",
            "-eu",
            "eu.central",
        ] {
            assert!(
                parse_endpoint(Backend::Aws, bad).is_err(),
                "{bad:?} was accepted"
            );
        }
    }

    #[test]
    fn hosts_and_buckets() {
        for good in ["localhost", "10.0.0.5", "db-1.example.org", "fe80::1"] {
            assert!(is_host(good), "{good:?} was refused");
        }
        for bad in [
            "",
            "-x",
            "/run/postgresql",
            "a b",
            "a,b",
            "a:5432",
            "a/b",
            "[::1]",
            "user@host",
        ] {
            assert!(!is_host(bad), "{bad:?} was accepted");
        }
        let longest = "a".repeat(63);
        for good in ["abc", "habitat-builder-artifact-store.default", &longest] {
            assert!(is_bucket_name(good), "{good:?} was refused");
        }
        let too_long = "a".repeat(64);
        for bad in ["ab", "Abc", "a_b", "a/b", ".abc", "abc-", "a..b", &too_long] {
            assert!(!is_bucket_name(bad), "{bad:?} was accepted");
        }
    }
}
