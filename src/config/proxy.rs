//! The HTTP proxy through which the requests to an artifact store go.

use super::Secret;
use super::endpoint::split_url;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::percent_decode_str;

pub(super) const EXPECTED: &str =
    "the URL of an HTTP proxy such as \"http://user:password@10.0.0.7:3128\"";

/// An HTTP proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// True: the connection to the proxy itself is encrypted.
    pub tls: bool,
    pub host: String,
    pub port: u16,
    /// The value of the header `Proxy-Authorization`. None: the proxy asks for no password.
    pub authorization: Option<Secret>,
}

impl Proxy {
    /// Reads the URL of a proxy. Special characters of user and password may be percent-encoded. An
    /// error is the rest of a sentence that begins with the key, and holds nothing of the text.
    pub fn parse(text: &str) -> Result<Proxy, String> {
        let wrong = |why: &str| format!("expected {EXPECTED}, found another text: {why}");
        if text.contains(char::is_control) {
            return Err(wrong("remove line ends and control characters"));
        }
        let (scheme, rest) = text
            .split_once("://")
            .ok_or_else(|| wrong("it does not begin with http:// or https://"))?;
        // A password may hold an @ of its own.
        let (credentials, address) = match rest.rsplit_once('@') {
            Some((credentials, address)) => (Some(credentials), address),
            None => (None, rest),
        };
        let url = format!("{scheme}://{address}");
        let url = split_url(&url).map_err(wrong)?;
        // Clients differ in the port that they would take instead.
        let port = url.port.ok_or_else(|| wrong("the port is missing"))?;
        let authorization = match credentials {
            Some(credentials) => Some(basic(credentials).map_err(wrong)?),
            None => None,
        };
        Ok(Proxy {
            tls: url.scheme == "https",
            host: url.host.to_string(),
            port,
            authorization,
        })
    }

    /// Returns the proxy's URL for people, without user and password.
    pub fn address(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        match self.host.contains(':') {
            true => format!("{scheme}://[{}]:{}", self.host, self.port),
            false => format!("{scheme}://{}:{}", self.host, self.port),
        }
    }
}

/// Returns whether the URL has a user and a password in it.
pub(super) fn holds_credentials(text: &str) -> bool {
    text.contains('@')
}

/// Returns the header's value for the method `Basic`.
fn basic(credentials: &str) -> Result<Secret, &'static str> {
    let (user, password) = credentials
        .split_once(':')
        .ok_or("the password is missing between user and @")?;
    let decoded = |text| percent_decode_str(text).collect::<Vec<u8>>();
    let (user, password) = (decoded(user), decoded(password));
    if user.contains(&b':') {
        return Err("the user has a colon in it, which this method does not allow");
    }
    let pair = [user.as_slice(), b":", password.as_slice()].concat();
    Ok(Secret::new(format!("Basic {}", STANDARD.encode(pair))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(text: &str) -> Option<String> {
        let proxy = Proxy::parse(text).expect(text);
        let header = proxy.authorization?;
        let encoded = header.expose().strip_prefix("Basic ").expect("the method");
        let pair = STANDARD.decode(encoded).expect("base64");
        Some(String::from_utf8(pair).expect("UTF-8"))
    }

    #[test]
    fn an_address_has_no_credentials() {
        for (text, address) in [
            ("http://proxy:3128", "http://proxy:3128"),
            (
                "HTTPS://u:p@proxy.example.org:443/",
                "https://proxy.example.org:443",
            ),
            ("http://u:p@[2001:db8::1]:3128", "http://[2001:db8::1]:3128"),
        ] {
            let proxy = Proxy::parse(text).expect(text);
            assert_eq!(proxy.address(), address);
        }
    }

    #[test]
    fn credentials_may_hold_any_character() {
        let of = |text: &str| pair(text).expect("credentials");
        assert_eq!(pair("http://proxy:3128"), None);
        assert_eq!(of("http://user:hunter2@proxy:3128"), "user:hunter2");
        assert_eq!(of("http://user:@proxy:3128"), "user:");
        assert_eq!(
            of("http://dc2%5Cuser:p%40s%3As%25@proxy:3128"),
            "dc2\\user:p@s:s%"
        );
        assert_eq!(of("http://user:p@s/s:?#@proxy:3128"), "user:p@s/s:?#");
        assert_eq!(of("http://user:100%@proxy:3128"), "user:100%");
        assert_eq!(of("http://user:gr%C3%BCn@proxy:3128"), "user:grün");
    }

    #[test]
    fn an_error_says_why_and_repeats_nothing() {
        for (text, why) in [
            ("hunter2", "does not begin with"),
            ("hunter2:3128", "does not begin with"),
            ("socks5://u:hunter2@proxy:1080", "neither http nor https"),
            ("http://u:hunter2@proxy", "port is missing"),
            ("http://u:hunter2", "not 1-65535"),
            ("http://u:hunter2@proxy:0", "not 1-65535"),
            ("http://u:hunter2@proxy:3128/hunter2", "remove the path"),
            ("http://hunter2@proxy:3128", "password is missing"),
            ("http://u%3A:hunter2@proxy:3128", "has a colon"),
            ("http://u:hunter2@:3128", "neither a host name"),
            ("http://u:hunter2\n@proxy:3128", "line ends"),
        ] {
            let problem = Proxy::parse(text).expect_err(text);
            assert!(problem.contains(why), "{text}: {problem}");
            assert!(!problem.contains("hunter2"), "{problem}");
        }
    }

    #[test]
    fn nothing_of_the_credentials_is_printed() {
        let proxy = Proxy::parse("http://user:hunter2@proxy:3128").expect("a proxy");
        let shown = format!("{proxy:?} {}", proxy.address());
        let header = proxy.authorization.expect("credentials");
        for secret in ["user", "hunter2", header.expose()] {
            assert!(!shown.contains(secret), "{shown}");
        }
    }
}
