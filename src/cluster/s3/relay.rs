//! Carries the requests to an artifact store through an HTTP proxy.
//!
//! The S3 library knows no proxy but those of the environment, and takes no HTTP client of ours. So
//! its client sends the requests to a relay on loopback, signed for the store's own host, and the
//! relay sends them through the proxy. TLS is between the relay and the store: the proxy sees
//! nothing of it. docs/decisions/016-relay-for-a-proxy.md has the reasons.

use super::probe::unpredictable;
use super::store_error::StoreFault;
use crate::config::{self, Proxy};
use bytes::Bytes;
use http::header::{
    CONNECTION, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION, PROXY_AUTHORIZATION, USER_AGENT,
};
use http::{Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::{Either, Empty};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use upstream::Upstream;

mod tls;
mod upstream;

/// Header by which the relay reports a fault of the way to the store. It never leaves this process.
const FAULT_HEADER: &str = "x-warm-spare-proxy-fault";
/// Maximum bytes of a buffer of one connection of the client. Bodies are not gathered.
const BUFFER_BYTES: usize = 64 << 10;
/// Pause after a connection could not be accepted: no file descriptor is free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A fault between this process and the store, which is not the store's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cluster) struct ProxyFault {
    pub fault: StoreFault,
    pub text: String,
}

impl ProxyFault {
    fn unreachable(text: String) -> ProxyFault {
        ProxyFault {
            fault: StoreFault::Unreachable,
            text,
        }
    }

    /// Returns the fault of an answer with this status. `who`: who gave it, in words. `asked`: the
    /// request in words.
    fn of_status(who: &str, asked: &str, status: StatusCode) -> ProxyFault {
        // A proxy that does not reach the store answers 404 or a 5xx.
        let passes = status.is_server_error()
            || matches!(
                status,
                StatusCode::NOT_FOUND | StatusCode::TOO_MANY_REQUESTS
            );
        ProxyFault {
            fault: match passes {
                true => StoreFault::Unreachable,
                false => StoreFault::ProxyRefused,
            },
            text: format!("{who} answers {asked} with HTTP status {}", status.as_u16()),
        }
    }

    /// Reads the fault in an answer of the relay.
    pub(super) fn read(headers: &HeaderMap) -> Option<ProxyFault> {
        let (word, text) = headers.get(FAULT_HEADER)?.to_str().ok()?.split_once(' ')?;
        let fault = match word {
            "refused" => StoreFault::ProxyRefused,
            "tls" => StoreFault::Tls,
            _ => StoreFault::Unreachable,
        };
        let text = text.to_string();
        Some(ProxyFault { fault, text })
    }

    fn answer(&self) -> Response<Body> {
        let word = match self.fault {
            StoreFault::ProxyRefused => "refused",
            StoreFault::Tls => "tls",
            _ => "unreachable",
        };
        let visible = |c: char| match c {
            ' '..='~' => c,
            _ => '?',
        };
        let text: String = self.text.chars().map(visible).collect();
        let mut answer = empty(StatusCode::BAD_GATEWAY);
        if let Ok(value) = HeaderValue::from_str(&format!("{word} {text}")) {
            answer.headers_mut().insert(FAULT_HEADER, value);
        }
        answer
    }
}

type Body = Either<Incoming, Empty<Bytes>>;

fn empty(status: StatusCode) -> Response<Body> {
    let mut answer = Response::new(Either::Right(Empty::new()));
    *answer.status_mut() = status;
    answer
}

/// The listener on loopback. It ends when this is dropped, with all its connections.
pub(super) struct Relay {
    port: u16,
    way: Arc<Way>,
    _listener: JoinSet<()>,
}

/// The way to one store.
struct Way {
    proxy: Proxy,
    authorization: Option<HeaderValue>,
    /// True: the store speaks TLS, and the proxy makes a tunnel to it.
    is_tunnel: bool,
    /// Host of the store, without brackets.
    host: String,
    port: u16,
    /// Host and port of the store as in the header `Host`, for which requests are signed: without
    /// the scheme's own port.
    authority: String,
    tls: Arc<ClientConfig>,
    /// A word that only our client knows: other processes can connect to the relay too, and must
    /// not use the proxy's password.
    pass: String,
}

impl Relay {
    /// Starts a relay to the store. Nothing is sent before the first request.
    pub(super) fn start(to: &config::S3, proxy: Proxy) -> Result<Relay, ProxyFault> {
        let fault = |fault, text: String| ProxyFault { fault, text };
        let unexpected = |text| fault(StoreFault::Unexpected, text);
        let uri: Uri = to.endpoint.parse().map_err(|error| {
            unexpected(format!("the endpoint {} is no URL: {error}", to.endpoint))
        })?;
        let is_tunnel = uri.scheme_str() == Some("https");
        let own_port = if is_tunnel { 443 } else { 80 };
        let host = uri.host().unwrap_or_default();
        let port = uri.port_u16().unwrap_or(own_port);
        let authorization = match &proxy.authorization {
            None => None,
            Some(secret) => {
                let mut value = HeaderValue::from_str(secret.expose())
                    .map_err(|_| unexpected("the proxy's password fits no header".into()))?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        let way = Arc::new(Way {
            authorization,
            is_tunnel,
            host: host.trim_matches(['[', ']']).to_string(),
            port,
            authority: match port == own_port {
                true => host.to_string(),
                false => format!("{host}:{port}"),
            },
            tls: tls::config(to.ca_file.as_deref()).map_err(|text| fault(StoreFault::Tls, text))?,
            pass: format!("{:016x}{:016x}", unpredictable(), unpredictable()),
            proxy,
        });
        let local = |error| unexpected(format!("cannot listen on loopback: {error}"));
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).map_err(local)?;
        listener.set_nonblocking(true).map_err(local)?;
        let port = listener.local_addr().map_err(local)?.port();
        let listener = TcpListener::from_std(listener).map_err(local)?;
        let mut task = JoinSet::new();
        task.spawn(listen(listener, way.clone()));
        Ok(Relay {
            port,
            way,
            _listener: task,
        })
    }

    /// Returns the URL to which the S3 client sends its requests.
    pub(super) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Returns the header `Host` of the store.
    pub(super) fn authority(&self) -> &str {
        &self.way.authority
    }

    /// Returns the name and the version of the program that the S3 client has to send.
    pub(super) fn app_info(&self) -> (String, String) {
        ("relay".into(), self.way.pass.clone())
    }

    /// Returns the proxy's URL for people, without user and password.
    pub(super) fn proxy(&self) -> String {
        self.way.proxy.address()
    }
}

async fn listen(listener: TcpListener, way: Arc<Way>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(serve(stream, way.clone()));
                }
                Err(error) => {
                    log::debug!("relay to {}: {error}", way.authority);
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Serves one connection of the client, over at most one connection to the proxy at a time.
async fn serve(stream: TcpStream, way: Arc<Way>) {
    let _ = stream.set_nodelay(true);
    let upstream = Arc::new(Upstream::new(way.clone()));
    let service = service_fn(move |request| {
        let (way, upstream) = (way.clone(), upstream.clone());
        async move {
            let answered = answer(request, &way, &upstream).await;
            Ok::<_, Infallible>(answered.unwrap_or_else(|fault| fault.answer()))
        }
    });
    // The client sees each error of its connection itself.
    let _ = hyper::server::conn::http1::Builder::new()
        .max_buf_size(BUFFER_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn answer(
    mut request: Request<Incoming>,
    way: &Way,
    upstream: &Upstream,
) -> Result<Response<Body>, ProxyFault> {
    let Some(client) = way.client_of(request.headers()) else {
        return Ok(empty(StatusCode::FORBIDDEN));
    };
    request.headers_mut().insert(USER_AGENT, client);
    *request.uri_mut() = way.target(request.uri())?;
    if let (false, Some(value)) = (way.is_tunnel, &way.authorization) {
        request
            .headers_mut()
            .insert(PROXY_AUTHORIZATION, value.clone());
    }
    let method = request.method().clone();
    let mut answer = upstream.send(request).await?;
    if let Some(fault) = way.refusal(&method, &answer) {
        return Err(fault);
    }
    *answer.version_mut() = Version::HTTP_11;
    let headers = answer.headers_mut();
    headers.remove(FAULT_HEADER);
    headers.remove(CONNECTION);
    // The client would follow it past the proxy.
    headers.remove(LOCATION);
    Ok(answer.map(Either::Left))
}

impl Way {
    /// Returns the header `User-Agent` as the store shall see it. None: the request is not of our
    /// client.
    fn client_of(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let client = headers.get(USER_AGENT)?.to_str().ok()?;
        let client = client.strip_suffix(&self.pass)?.strip_suffix(" relay/")?;
        HeaderValue::from_str(client).ok()
    }

    /// Returns the target as the next server has to see it: without a tunnel the proxy needs the
    /// whole URL.
    fn target(&self, asked: &Uri) -> Result<Uri, ProxyFault> {
        let path = asked.path_and_query().map_or("/", |path| path.as_str());
        let target = match self.is_tunnel {
            true => path.parse(),
            false => format!("http://{}{path}", self.authority).parse(),
        };
        target.map_err(|error| ProxyFault {
            fault: StoreFault::Unexpected,
            text: format!("the request's path makes no URL: {error}"),
        })
    }

    /// Returns the fault if the proxy itself answers a request outside of a tunnel. Within a tunnel
    /// it cannot.
    fn refusal<T>(&self, method: &Method, answer: &Response<T>) -> Option<ProxyFault> {
        if self.is_tunnel {
            return None;
        }
        let asked = format!("{method} http://{}", self.authority);
        let status = answer.status();
        if status == StatusCode::PROXY_AUTHENTICATION_REQUIRED {
            return Some(ProxyFault::of_status("the proxy", &asked, status));
        }
        // A store's own answer is XML.
        let kind = answer.headers().get(CONTENT_TYPE);
        let is_page = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/"));
        // A store that starts, or another server before it, may have a page too.
        let is_refusal = matches!(status.as_u16(), 401 | 403 | 405 | 500 | 502..=504);
        (is_page && is_refusal)
            .then(|| ProxyFault::of_status("the proxy or a server behind it", &asked, status))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[test]
    fn a_fault_comes_back_as_it_was() {
        for fault in [
            StoreFault::Unreachable,
            StoreFault::ProxyRefused,
            StoreFault::Tls,
        ] {
            let text = "the proxy said: no".to_string();
            let fault = ProxyFault { fault, text };
            assert_eq!(ProxyFault::read(fault.answer().headers()), Some(fault));
        }
        let odd = ProxyFault::unreachable("grün\r\nx: y".into());
        let read = ProxyFault::read(odd.answer().headers()).expect("a fault");
        assert_eq!(read.text, "gr?n??x: y");
    }

    fn store(proxy_port: u16) -> (config::S3, Proxy) {
        let secret = || config::SecretSource::Inline(config::Secret::new("secret"));
        let proxy = format!("http://user:hunter2@127.0.0.1:{proxy_port}");
        let store = config::S3 {
            backend: config::Backend::Minio,
            endpoint: "http://store.test:80".into(),
            region: "minio_s3".into(),
            bucket_name: "bucket".into(),
            key_id: secret(),
            secret_key: secret(),
            ca_file: None,
            proxy: None,
            source: "test",
        };
        (store, Proxy::parse(&proxy).expect("a proxy"))
    }

    /// Sends a request to the relay, and returns the connection.
    async fn ask(relay: &Relay, client: &str) -> TcpStream {
        let mut line = TcpStream::connect(("127.0.0.1", relay.port))
            .await
            .expect("the relay listens");
        let request = format!(
            "GET /b/k?x HTTP/1.1\r\nHost: {}\r\nUser-Agent: {client}\r\n\r\n",
            relay.authority()
        );
        line.write_all(request.as_bytes()).await.expect("it reads");
        line
    }

    #[tokio::test]
    async fn a_request_of_another_process_is_not_carried() {
        let proxy = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let (to, its) = store(proxy.local_addr().expect("an address").port());
        let relay = Relay::start(&to, its).expect("it starts");
        for client in ["curl/8", "x relay/", "x relay/0000000000000000"] {
            let mut answer = vec![0; 12];
            let mut line = ask(&relay, client).await;
            let read = line.read_exact(&mut answer);
            let read = tokio::time::timeout(Duration::from_secs(10), read).await;
            read.expect("it was carried").expect("an answer");
            assert_eq!(answer, b"HTTP/1.1 403");
        }
        let (name, pass) = relay.app_info();
        let _line = ask(&relay, &format!("x {name}/{pass}")).await;
        // The first connection to the proxy is of the first request with the pass.
        let (mut carried, _) = proxy.accept().await.expect("a connection");
        let mut request = String::new();
        while !request.ends_with("\r\n\r\n") {
            request.push(carried.read_u8().await.expect("a byte").into());
        }
        assert!(request.starts_with("GET http://store.test/b/k?x HTTP/1.1\r\n"));
        let request = request.to_lowercase();
        assert!(request.contains("\r\nhost: store.test\r\n"), "{request}");
        assert!(request.contains("\r\nuser-agent: x\r\n"), "{request}");
        assert!(!request.contains(&pass), "{request}");
        let header = "\r\nproxy-authorization: basic ";
        assert_eq!(request.matches(header).count(), 1, "{request}");
    }

    #[tokio::test]
    async fn it_ends_with_its_store() {
        let (to, its) = store(9);
        let relay = Relay::start(&to, its).expect("it starts");
        let (name, pass) = relay.app_info();
        let mut line = ask(&relay, &format!("x {name}/{pass}")).await;
        drop(relay);
        let mut rest = Vec::new();
        // An end or a reset, and not a wait.
        let end = line.read_to_end(&mut rest);
        let ended = tokio::time::timeout(Duration::from_secs(10), end).await;
        assert!(ended.is_ok(), "the connection is still open");
    }

    #[test]
    fn a_proxy_refuses_or_does_not_reach_the_store() {
        let of = |status| {
            let status = StatusCode::from_u16(status).expect("a status");
            ProxyFault::of_status("the proxy", "CONNECT store:443", status).fault
        };
        for status in [400, 401, 403, 405, 407] {
            assert_eq!(of(status), StoreFault::ProxyRefused, "{status}");
        }
        for status in [404, 429, 500, 502, 503, 504] {
            assert_eq!(of(status), StoreFault::Unreachable, "{status}");
        }
    }
}
