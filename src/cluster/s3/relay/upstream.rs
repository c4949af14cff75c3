//! A connection from the relay to the store: through a tunnel of the proxy to a store that speaks
//! TLS, otherwise to the proxy itself.

use super::{ProxyFault, Way};
use crate::cluster::error_text;
use crate::cluster::s3::store_error::StoreFault;
use bytes::Bytes;
use http::header::{HOST, PROXY_AUTHORIZATION};
use http::{Method, Request, Response};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

/// Maximum time until a connection through the proxy is ready for a request. It is shorter than the
/// time that the store's answer may take, so that the error can name the proxy.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

trait Line: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Line for T {}

/// The connection for the requests of one connection of the client.
pub(super) struct Upstream {
    way: Arc<Way>,
    open: Mutex<Option<Open>>,
}

/// An open connection, and the task that drives it. The task ends when this is dropped.
struct Open {
    sender: SendRequest<Incoming>,
    _driver: JoinSet<()>,
}

impl Upstream {
    pub(super) fn new(way: Arc<Way>) -> Upstream {
        Upstream {
            way,
            open: Mutex::new(None),
        }
    }

    /// Sends a request, over the open connection if there is one. The client sends one request at a
    /// time.
    pub(super) async fn send(
        &self,
        mut request: Request<Incoming>,
    ) -> Result<Response<Incoming>, ProxyFault> {
        let mut place = self.open.lock().await;
        let broken = |error: &hyper::Error| {
            let text = error_text::chain(error);
            ProxyFault::unreachable(format!("the connection through the proxy broke: {text}"))
        };
        if let Some(mut open) = place.take()
            && open.sender.ready().await.is_ok()
        {
            match open.sender.try_send_request(request).await {
                Ok(answer) => {
                    *place = Some(open);
                    return Ok(answer);
                }
                // The other end closed a connection that was idle. Nothing was sent.
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(broken(error.error())),
                },
            }
        }
        let mut open = self.way.open().await?;
        let answer = open.sender.send_request(request).await;
        let answer = answer.map_err(|error| broken(&error))?;
        *place = Some(open);
        Ok(answer)
    }
}

impl Way {
    async fn open(&self) -> Result<Open, ProxyFault> {
        let until = Instant::now() + CONNECT_TIMEOUT;
        let mut line = self.dial(until).await?;
        if self.is_tunnel {
            line = self.tunnel(line, until).await?;
            line = self.secure(line, &self.host, "the server", until).await?;
        }
        let (sender, connection) = handshake(TokioIo::new(line))
            .await
            .map_err(|error| ProxyFault::unreachable(error_text::chain(&error)))?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            // The sender sees each error of the connection itself.
            let _ = connection.await;
        });
        Ok(Open {
            sender,
            _driver: driver,
        })
    }

    async fn dial(&self, until: Instant) -> Result<Box<dyn Line>, ProxyFault> {
        let proxy = &self.proxy;
        let dialled = TcpStream::connect((proxy.host.as_str(), proxy.port));
        let doing = "connecting to the proxy";
        let stream = in_time(doing, until, dialled).await?;
        let stream = stream.map_err(|error| failed(doing, &error))?;
        let _ = stream.set_nodelay(true);
        match proxy.tls {
            true => {
                self.secure(Box::new(stream), &proxy.host, "the proxy", until)
                    .await
            }
            false => Ok(Box::new(stream)),
        }
    }

    /// Asks the proxy for a tunnel to the store.
    async fn tunnel(
        &self,
        line: Box<dyn Line>,
        until: Instant,
    ) -> Result<Box<dyn Line>, ProxyFault> {
        let host = match self.host.contains(':') {
            true => format!("[{}]", self.host),
            false => self.host.clone(),
        };
        let target = format!("{host}:{}", self.port);
        let doing = format!("asking the proxy for a tunnel (CONNECT {target})");
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .uri(&target)
            .header(HOST, &target);
        if let Some(value) = &self.authorization {
            request = request.header(PROXY_AUTHORIZATION, value);
        }
        let request = request
            .body(Empty::<Bytes>::new())
            .map_err(|error| failed(&doing, &error))?;
        let asked = async {
            let (mut sender, connection) = handshake(TokioIo::new(line)).await?;
            // It ends with this call, or with the connection's change into a tunnel.
            let mut driver = JoinSet::new();
            driver.spawn(async move {
                let _ = connection.with_upgrades().await;
            });
            let answer = sender.send_request(request).await?;
            match answer.status() {
                status if status.is_success() => Ok(Ok(hyper::upgrade::on(answer).await?)),
                status => Ok(Err(status)),
            }
        };
        let asked: Result<_, hyper::Error> = in_time(&doing, until, asked).await?;
        match asked.map_err(|error| failed(&doing, &error))? {
            Ok(tunnel) => Ok(Box::new(TokioIo::new(tunnel))),
            Err(status) => Err(ProxyFault::of_status(
                "the proxy",
                &format!("CONNECT {target}"),
                status,
            )),
        }
    }

    /// Begins TLS. `whose`: the other end in words.
    async fn secure(
        &self,
        line: Box<dyn Line>,
        host: &str,
        whose: &str,
        until: Instant,
    ) -> Result<Box<dyn Line>, ProxyFault> {
        let doing = format!("TLS with {whose}");
        let name = ServerName::try_from(host.to_string()).map_err(|error| ProxyFault {
            fault: StoreFault::Tls,
            text: format!("{doing}: {host} is no name that a certificate can have: {error}"),
        })?;
        let connected = TlsConnector::from(self.tls.clone()).connect(name, line);
        match in_time(&doing, until, connected).await? {
            Ok(line) => Ok(Box::new(line)),
            Err(error) => {
                let text = error_text::chain(&error);
                match error_text::explain(&text) {
                    Some(reason) => Err(ProxyFault {
                        fault: StoreFault::Tls,
                        text: format!("{doing}: {reason}"),
                    }),
                    None => Err(failed(&doing, &error)),
                }
            }
        }
    }
}

fn failed(doing: &str, error: &dyn std::error::Error) -> ProxyFault {
    ProxyFault::unreachable(format!("{doing}: {}", error_text::chain(error)))
}

async fn in_time<T>(
    doing: &str,
    until: Instant,
    request: impl Future<Output = T>,
) -> Result<T, ProxyFault> {
    timeout_at(until, request).await.map_err(|_| {
        let limit = CONNECT_TIMEOUT.as_secs();
        ProxyFault::unreachable(format!("{doing}: no answer for {limit} s"))
    })
}
