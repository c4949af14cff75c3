//! An HTTP proxy as companies have one before the internet: it takes whole URLs and CONNECT, asks
//! for a user and a password, and alone knows where the servers are.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HOST, PROXY_AUTHORIZATION};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use super::Result;
use super::proxy::background;
use super::tls::Certificates;

/// The treatment of each request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conduct {
    Carry,
    /// Answers with this status and a page of its own.
    Refuse(u16),
    /// Closes the connection without an answer.
    Close,
    /// Gives no answer ever.
    Silent,
}

/// The proxy ends when this is dropped, with all its connections.
pub struct ForwardProxy {
    port: u16,
    is_tls: bool,
    shared: Arc<Shared>,
    listener: JoinHandle<()>,
}

struct Shared {
    /// Ports on loopback by the names that only this proxy knows.
    routes: HashMap<String, u16>,
    conduct: Mutex<Conduct>,
    /// The accepted value of `Proxy-Authorization`.
    authorization: String,
    /// Method and target of each request that was carried.
    carried: Mutex<Vec<String>>,
    /// Number of requests without the right user and password.
    turned_away: Mutex<usize>,
}

impl ForwardProxy {
    pub const USER: &str = "dc2";
    pub const PASSWORD: &str = "p@ss:w/rd";

    /// Starts a proxy on loopback that speaks plain HTTP. `routes`: names, and the ports on
    /// loopback to which they lead.
    pub async fn start(routes: &[(&str, u16)]) -> Result<Self> {
        Self::start_on(routes, None).await
    }

    /// Starts a proxy that speaks TLS.
    pub async fn sealed(routes: &[(&str, u16)], made: &Certificates) -> Result<Self> {
        Self::start_on(routes, Some(made)).await
    }

    async fn start_on(routes: &[(&str, u16)], made: Option<&Certificates>) -> Result<Self> {
        let pair = STANDARD.encode(format!("{}:{}", Self::USER, Self::PASSWORD));
        let shared = Arc::new(Shared {
            routes: routes.iter().map(|(n, p)| (n.to_string(), *p)).collect(),
            conduct: Mutex::new(Conduct::Carry),
            authorization: format!("Basic {pair}"),
            carried: Mutex::default(),
            turned_away: Mutex::default(),
        });
        let tls = made.map(acceptor).transpose()?;
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let (port, is_tls) = (listener.local_addr()?.port(), tls.is_some());
        let serving = shared.clone();
        let listener = background().spawn(async move {
            let listener = TcpListener::from_std(listener).expect("it is a listener");
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (shared, tls) = (serving.clone(), tls.clone());
                connections.spawn(async move {
                    match tls {
                        None => serve(stream, shared).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, shared).await;
                            }
                        }
                    }
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self {
            port,
            is_tls,
            shared,
            listener,
        })
    }

    /// Returns its URL without user and password.
    pub fn address(&self) -> String {
        let scheme = if self.is_tls { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    /// Returns its URL with the right user and password, percent-encoded.
    pub fn url(&self) -> String {
        self.url_with("p%40ss%3Aw%2Frd")
    }

    pub fn url_with(&self, password: &str) -> String {
        let user = format!("://{}:{password}@", Self::USER);
        self.address().replace("://", &user)
    }

    pub fn set(&self, conduct: Conduct) {
        *self.shared.conduct.lock().expect("its lock") = conduct;
    }

    /// Method and target of each request that was carried.
    pub fn carried(&self) -> Vec<String> {
        self.shared.carried.lock().expect("its lock").clone()
    }

    /// Number of requests without the right user and password.
    pub fn turned_away(&self) -> usize {
        *self.shared.turned_away.lock().expect("its lock")
    }
}

impl Drop for ForwardProxy {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

fn acceptor(made: &Certificates) -> Result<TlsAcceptor> {
    let chain = CertificateDer::pem_slice_iter(made.certificate.as_bytes());
    let key = PrivateKeyDer::from_pem_slice(made.key.as_bytes())?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain.collect::<Result<Vec<_>, _>>()?, key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

type Body = UnsyncBoxBody<Bytes, hyper::Error>;

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, shared: Arc<Shared>) {
    let service = service_fn(move |request| answer(request, shared.clone()));
    // An error here is the requested conduct, or a client that disconnected.
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await;
}

async fn answer(request: Request<Incoming>, shared: Arc<Shared>) -> Result<Response<Body>> {
    let conduct = *shared.conduct.lock().expect("its lock");
    match conduct {
        Conduct::Carry => {}
        Conduct::Refuse(status) => return page(status),
        Conduct::Close => return Err("closed, as asked".into()),
        Conduct::Silent => std::future::pending().await,
    }
    let given = request.headers().get(PROXY_AUTHORIZATION);
    if given.is_none_or(|given| given.as_bytes() != shared.authorization.as_bytes()) {
        *shared.turned_away.lock().expect("its lock") += 1;
        return page(407);
    }
    let Some(authority) = request.uri().authority().cloned() else {
        // It was not sent as to a proxy.
        return page(400);
    };
    let Some(port) = shared.routes.get(authority.host()).copied() else {
        return page(502);
    };
    let line = format!("{} {}", request.method(), request.uri());
    shared.carried.lock().expect("its lock").push(line);
    if request.method() == Method::CONNECT {
        tunnel(request, port).await
    } else {
        forward(request, authority.as_str(), port).await
    }
}

async fn tunnel(request: Request<Incoming>, port: u16) -> Result<Response<Body>> {
    let mut server = TcpStream::connect(("127.0.0.1", port)).await?;
    tokio::spawn(async move {
        if let Ok(client) = hyper::upgrade::on(request).await {
            let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut server).await;
        }
    });
    Ok(Response::new(nothing()))
}

async fn forward(
    mut request: Request<Incoming>,
    authority: &str,
    port: u16,
) -> Result<Response<Body>> {
    // A proxy takes the host from the URL, whatever the header says.
    request.headers_mut().insert(HOST, authority.parse()?);
    request.headers_mut().remove(PROXY_AUTHORIZATION);
    let path = request.uri().path_and_query().map_or("/", |p| p.as_str());
    *request.uri_mut() = path.parse()?;
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender
        .send_request(request)
        .await?
        .map(|body| body.boxed_unsync()))
}

fn nothing() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

fn page(status: u16) -> Result<Response<Body>> {
    let text = Bytes::from_static(b"<html><body>the proxy's own page</body></html>");
    let body = http_body_util::Full::new(text).map_err(|never| match never {});
    let mut response = Response::new(body.boxed_unsync());
    *response.status_mut() = StatusCode::from_u16(status)?;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, "text/html".parse()?);
    Ok(response)
}
