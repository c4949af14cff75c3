//! A stand-in for the frontend of a Builder: it reads and writes rows of a real datastore and bytes of a real bucket.
//!
//! It behaves as builder-api does where a change of roles matters: it does not start on a read-only datastore, goes on to
//! answer reads when the datastore becomes read-only, and answers 500 without a body to a write that fails.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_postgres::Client;

use super::packages::{self, Package, object_key};
use super::pair::is_writable;
use super::ports::free_port;
use super::{Cluster, Result};

/// Pause of the stand-in for the Supervisor before it starts a frontend again that did not start.
const START_AGAIN: Duration = Duration::from_secs(1);
/// A longer body is sent in pieces of this size, with a pause after each.
const PIECE_BYTES: usize = 64 << 10;
const PIECE_PAUSE: Duration = Duration::from_millis(5);
/// The header that says which side has answered.
pub const SIDE: &str = "x-side";
/// The header by which a client numbers its uploads.
pub const ATTEMPT: &str = "x-attempt";

/// The frontend and its Supervisor. Both end when this is dropped.
pub struct Front {
    port: u16,
    loaded: watch::Sender<bool>,
    running: watch::Receiver<bool>,
    shared: Arc<Shared>,
    supervisor: JoinHandle<()>,
}

struct Shared {
    cluster: Cluster,
    side: usize,
    /// Idle sessions.
    sessions: Mutex<Vec<Client>>,
    /// How often each numbered upload has come.
    uploads: Mutex<BTreeMap<String, usize>>,
}

impl Front {
    /// Loads the frontend of a cluster: it starts as soon as the datastore takes writes.
    pub fn load_on(cluster: &Cluster, side: usize) -> Result<Front> {
        let shared = Arc::new(Shared {
            cluster: cluster.clone(),
            side,
            sessions: Mutex::default(),
            uploads: Mutex::default(),
        });
        let port = free_port()?;
        let (loaded, wanted) = watch::channel(true);
        let (says, running) = watch::channel(false);
        let supervisor = tokio::spawn(supervise(port, shared.clone(), wanted, says));
        Ok(Front {
            port,
            loaded,
            running,
            shared,
            supervisor,
        })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Stops the frontend with all its connections, and loads it again.
    pub async fn restart(&self) {
        self.stop().await;
        self.start();
    }

    /// Stops the frontend with all its connections.
    pub async fn stop(&self) {
        self.loaded.send_replace(false);
        let mut running = self.running.clone();
        running.wait_for(|runs| !runs).await.ok();
    }

    pub fn start(&self) {
        self.loaded.send_replace(true);
    }

    pub async fn until_running(&self) {
        let mut running = self.running.clone();
        running.wait_for(|runs| *runs).await.ok();
    }

    /// Returns how often each numbered upload has come.
    pub fn uploads(&self) -> BTreeMap<String, usize> {
        self.shared.uploads.lock().expect("the uploads").clone()
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.supervisor.abort();
    }
}

async fn supervise(
    port: u16,
    shared: Arc<Shared>,
    mut wanted: watch::Receiver<bool>,
    says: watch::Sender<bool>,
) {
    while wanted.wait_for(|wanted| *wanted).await.is_ok() {
        // At its start builder-api runs its migrations, which write.
        if is_writable(&shared.cluster).await {
            tokio::select! {
                () = serve(port, &shared, &says) => {}
                _ = wanted.wait_for(|wanted| !wanted) => {}
            }
            shared.sessions.lock().expect("the sessions").clear();
            says.send_replace(false);
        } else {
            tokio::select! {
                () = tokio::time::sleep(START_AGAIN) => {}
                _ = wanted.wait_for(|wanted| !wanted) => {}
            }
        }
    }
}

async fn serve(port: u16, shared: &Arc<Shared>, says: &watch::Sender<bool>) {
    let Ok(listener) = TcpListener::bind(("127.0.0.1", port)).await else {
        return tokio::time::sleep(START_AGAIN).await;
    };
    says.send_replace(true);
    // All connections end with this set.
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let shared = shared.clone();
        connections.spawn(async move {
            let _ = stream.set_nodelay(true);
            let service = service_fn(move |request| {
                let shared = shared.clone();
                async move { Ok::<_, Infallible>(answer(&shared, request).await) }
            });
            // A client that ends its connection is no error.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
        while connections.try_join_next().is_some() {}
    }
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

fn reply(status: StatusCode, bytes: Bytes) -> Response<Body> {
    let mut response = Response::new(Full::new(bytes).boxed_unsync());
    *response.status_mut() = status;
    response
}

async fn answer(shared: &Arc<Shared>, request: Request<Incoming>) -> Response<Body> {
    let answered = match *request.method() {
        Method::GET | Method::HEAD => read(shared, &request).await,
        _ => write(shared, request).await,
    };
    let mut response =
        answered.unwrap_or_else(|_| reply(StatusCode::INTERNAL_SERVER_ERROR, Bytes::new()));
    let headers = response.headers_mut();
    headers.insert(SIDE, (shared.side as u64).into());
    response
}

/// Returns the ident of `/v1/depot/pkgs/ORIGIN/NAME/VERSION/RELEASE`, with or without `/download`.
fn ident(path: &str) -> Option<&str> {
    let path = path.strip_prefix("/v1/depot/pkgs/")?;
    let ident = path.strip_suffix("/download").unwrap_or(path);
    (ident.split('/').count() == 4).then_some(ident)
}

async fn read(shared: &Arc<Shared>, request: &Request<Incoming>) -> Result<Response<Body>> {
    let path = request.uri().path();
    if path == "/v1/status" {
        return Ok(reply(StatusCode::OK, Bytes::new()));
    }
    let Some(ident) = ident(path) else {
        return Ok(reply(StatusCode::NOT_FOUND, Bytes::new()));
    };
    let session = shared.session().await?;
    let sql = "SELECT target FROM origin_packages WHERE ident = $1";
    let row = session.query_opt(sql, &[&ident]).await?;
    shared.keep(session);
    let Some(row) = row else {
        return Ok(reply(StatusCode::NOT_FOUND, Bytes::new()));
    };
    if request.method() == Method::HEAD || !path.ends_with("/download") {
        return Ok(reply(StatusCode::OK, Bytes::new()));
    }
    let key = object_key(ident, row.get(0));
    let bytes = shared.cluster.get(&key).await?;
    let bytes = bytes.ok_or_else(|| format!("no object {key}"))?;
    Ok(in_pieces(bytes))
}

/// Returns a response whose body takes its time, so that it can be cut.
fn in_pieces(bytes: Bytes) -> Response<Body> {
    let length = bytes.len();
    let pieces: Vec<Bytes> = (0..length)
        .step_by(PIECE_BYTES)
        .map(|at| bytes.slice(at..length.min(at + PIECE_BYTES)))
        .collect();
    let last = pieces.len() - 1;
    let paced = futures_util::stream::iter(pieces.into_iter().enumerate()).then(
        move |(number, piece)| async move {
            if number > 0 && number < last {
                tokio::time::sleep(PIECE_PAUSE).await;
            }
            Ok(Frame::data(piece))
        },
    );
    let mut response = Response::new(StreamBody::new(paced).boxed_unsync());
    let headers = response.headers_mut();
    headers.insert("content-length", (length as u64).into());
    response
}

/// Stores an uploaded package as Builder does: the object, then the row.
async fn write(shared: &Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>> {
    if let Some(attempt) = request.headers().get(ATTEMPT) {
        let attempt = attempt.to_str()?.to_string();
        let mut uploads = shared.uploads.lock().expect("the uploads");
        *uploads.entry(attempt).or_default() += 1;
    }
    let path = request.uri().path().to_string();
    let target = request
        .uri()
        .query()
        .and_then(|q| q.strip_prefix("target="));
    let (Some(ident), Some(target)) = (ident(&path), target.map(String::from)) else {
        return Ok(reply(StatusCode::NOT_FOUND, Bytes::new()));
    };
    let bytes = request.into_body().collect().await?.to_bytes();
    let package = Package::uploaded(ident, &target, bytes);
    packages::put(&shared.cluster, &package).await?;
    let mut session = shared.session().await?;
    let work = session.transaction().await?;
    packages::insert_rows(work.client(), &package).await?;
    work.commit().await?;
    shared.keep(session);
    Ok(reply(StatusCode::CREATED, Bytes::new()))
}

impl Shared {
    /// Returns an idle session that answers, or a new one, as Builder's pool does. A session with an error is not given
    /// back.
    async fn session(&self) -> Result<Client> {
        loop {
            let idle = self.sessions.lock().expect("the sessions").pop();
            match idle {
                Some(session) => {
                    if session.simple_query("SELECT 1").await.is_ok() {
                        return Ok(session);
                    }
                }
                None => return self.cluster.conn().await,
            }
        }
    }

    fn keep(&self, session: Client) {
        self.sessions.lock().expect("the sessions").push(session);
    }
}
