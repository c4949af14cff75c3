//! An HTTP/1.1 proxy that sees every request and may answer it itself, or damage the answer.
//!
//! Headers are passed on unchanged, Host too, so that signatures of requests stay valid.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::{BodyExt, BodyStream, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_LENGTH, HeaderMap, TRANSFER_ENCODING};
use hyper::http::request::Parts;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Result;
use super::proxy::background;

/// The treatment of one request.
#[derive(Debug, Clone)]
pub enum Fault {
    Forward,
    /// The server never sees it.
    Respond(u16, Bytes),
    /// The same with headers of its own; `content-type` among them takes the place of XML's.
    RespondWith(u16, Vec<(&'static str, &'static str)>, Bytes),
    /// The server's answer with other headers.
    Headers(fn(&mut HeaderMap)),
    /// The server carries out the request, and the client gets this answer.
    ForwardThenRespond(u16, Bytes),
    /// The server carries out the request, and the client sees the connection closed.
    ForwardThenDrop,
    /// The server's answer, declared with this length (None: the true one), and cut off after `sent` bytes.
    ShortBody {
        declared: Option<u64>,
        sent: u64,
    },
    /// The server's answer with the byte at this position inverted.
    Corrupt(u64),
    /// Forwarded after a while.
    Delay(Duration),
    /// Forwarded once the test says so.
    Until(watch::Receiver<bool>),
    /// No answer ever.
    Hang,
    /// The connection is closed.
    Drop,
}

impl Fault {
    /// Returns an error in S3's form.
    pub fn s3(status: u16, code: &str) -> Self {
        Self::Respond(status, error_body(code))
    }

    /// Returns the same with the time after which to try again.
    pub fn s3_later(status: u16, code: &str, retry_after: &'static str) -> Self {
        Self::RespondWith(status, vec![("retry-after", retry_after)], error_body(code))
    }

    /// Returns a page as a proxy or a portal writes it.
    pub fn page(status: u16) -> Self {
        let page = "<html><body><p>Please log in<br></body></html>";
        Self::RespondWith(status, vec![("content-type", "text/html")], page.into())
    }
}

fn error_body(code: &str) -> Bytes {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{code}</Code><Message>made by a test</Message></Error>"
    );
    body.into()
}

type Handler = Arc<dyn Fn(&Parts) -> Fault + Send + Sync>;

/// The proxy ends when this is dropped.
pub struct HttpFault {
    port: u16,
    shared: Arc<Shared>,
    listener: JoinHandle<()>,
}

struct Shared {
    server: u16,
    handler: Mutex<Handler>,
    /// Method, path and query of every request so far.
    seen: Mutex<Vec<(String, String)>>,
}

impl HttpFault {
    /// In front of plain HTTP on `127.0.0.1:port`; forwards everything at first.
    pub async fn start(port: u16) -> Result<Self> {
        let shared = Arc::new(Shared {
            server: port,
            handler: Mutex::new(Arc::new(|_| Fault::Forward)),
            seen: Mutex::default(),
        });
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let serving = shared.clone();
        let listener = background().spawn(async move {
            let listener = TcpListener::from_std(listener).expect("it is a listener");
            // All connections end with this task.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, serving.clone()));
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self {
            port,
            shared,
            listener,
        })
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sets the handler for every request from now on.
    pub fn set(&self, handler: impl Fn(&Parts) -> Fault + Send + Sync + 'static) {
        *self.shared.handler.lock().expect("the handler's lock") = Arc::new(handler);
    }

    /// Sets the fault for the first `times` requests that `which` accepts; all others are
    /// forwarded.
    pub fn times(
        &self,
        times: usize,
        which: impl Fn(&Parts) -> bool + Send + Sync + 'static,
        fault: Fault,
    ) {
        let left = Mutex::new(times);
        self.set(move |request| {
            let mut left = left.lock().expect("the count's lock");
            if *left > 0 && which(request) {
                *left -= 1;
                return fault.clone();
            }
            Fault::Forward
        });
    }

    /// Method, path and query of every request so far.
    pub fn requests(&self) -> Vec<(String, String)> {
        self.shared.seen.lock().expect("the log's lock").clone()
    }

    /// How many requests of this method had `part` in their path.
    pub fn count(&self, method: &str, part: &str) -> usize {
        let fits = |(m, path): &&(String, String)| m == method && path.contains(part);
        self.requests().iter().filter(fits).count()
    }

    /// Forgets the requests so far.
    pub fn forget(&self) {
        self.shared.seen.lock().expect("the log's lock").clear();
    }
}

impl Drop for HttpFault {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

type Body = UnsyncBoxBody<Bytes, super::Error>;

async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request| answer(request, shared.clone()));
    // An error here is the requested fault, or a client that disconnected.
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// A client whose request is cut off by an early answer may never see that answer.
async fn read_whole(body: Incoming) -> Result<()> {
    body.collect().await?;
    Ok(())
}

async fn answer(request: Request<Incoming>, shared: Arc<Shared>) -> Result<Response<Body>> {
    let (parts, body) = request.into_parts();
    let line = (parts.method.to_string(), parts.uri.to_string());
    shared.seen.lock().expect("the log's lock").push(line);
    let handler = shared.handler.lock().expect("the handler's lock").clone();
    let fault = handler(&parts);
    let forward = |body| forward(Request::from_parts(parts.clone(), body), shared.server);
    match fault {
        Fault::Respond(status, text) => {
            read_whole(body).await?;
            respond(status, text)
        }
        Fault::RespondWith(status, headers, text) => {
            read_whole(body).await?;
            let mut response = respond(status, text)?;
            for (name, value) in headers {
                response.headers_mut().insert(name, value.parse()?);
            }
            Ok(response)
        }
        Fault::Forward => Ok(forward(body).await?.map(whole)),
        Fault::Headers(change) => {
            let mut response = forward(body).await?;
            change(response.headers_mut());
            Ok(response.map(whole))
        }
        Fault::ForwardThenRespond(status, text) => {
            forward(body).await?.into_body().collect().await?;
            respond(status, text)
        }
        Fault::ForwardThenDrop => {
            forward(body).await?.into_body().collect().await?;
            Err("dropped, as asked".into())
        }
        Fault::ShortBody { declared, sent } => {
            let mut response = forward(body).await?;
            if let Some(declared) = declared {
                response
                    .headers_mut()
                    .insert(CONTENT_LENGTH, declared.into());
                response.headers_mut().remove(TRANSFER_ENCODING);
            }
            Ok(response.map(|body| cut_off(body, sent)))
        }
        Fault::Corrupt(place) => Ok(forward(body).await?.map(|body| corrupt(body, place))),
        Fault::Delay(time) => {
            tokio::time::sleep(time).await;
            Ok(forward(body).await?.map(whole))
        }
        Fault::Until(mut open) => {
            // After the end of a test everything is forwarded.
            let _ = open.wait_for(|open| *open).await;
            Ok(forward(body).await?.map(whole))
        }
        Fault::Hang => std::future::pending().await,
        Fault::Drop => Err("dropped, as asked".into()),
    }
}

fn respond(status: u16, text: Bytes) -> Result<Response<Body>> {
    let body = Full::new(text).map_err(|never: Infallible| match never {});
    Ok(Response::builder()
        .status(status)
        .header("content-type", "application/xml")
        .body(body.boxed_unsync())?)
}

async fn forward(request: Request<Incoming>, server: u16) -> Result<Response<Incoming>> {
    let stream = TcpStream::connect(("127.0.0.1", server)).await?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender.send_request(request).await?)
}

fn whole(body: Incoming) -> Body {
    body.map_err(Into::into).boxed_unsync()
}

fn data(body: Incoming) -> impl futures_util::Stream<Item = Result<Bytes>> {
    BodyStream::new(body).filter_map(async |frame| match frame {
        Ok(frame) => frame.into_data().ok().map(Ok),
        Err(error) => Some(Err(error.into())),
    })
}

/// An error after the last byte closes the connection, whatever length was declared.
fn cut_off(body: Incoming, sent: u64) -> Body {
    let mut left = sent as usize;
    let chunks = data(body)
        .map(move |chunk| {
            let mut chunk = chunk?;
            chunk.truncate(left);
            left -= chunk.len();
            if chunk.is_empty() {
                return Err("cut off, as asked".into());
            }
            Ok(Frame::data(chunk))
        })
        .chain(futures_util::stream::once(async {
            // The sent bytes must reach the client before the connection is closed.
            tokio::time::sleep(Duration::from_millis(20)).await;
            Err("cut off, as asked".into())
        }));
    StreamBody::new(chunks).boxed_unsync()
}

fn corrupt(body: Incoming, place: u64) -> Body {
    let mut offset = 0;
    let chunks = data(body).map(move |chunk| {
        let mut bytes = chunk?.to_vec();
        let here = place.checked_sub(offset).map(|at| at as usize);
        if let Some(byte) = here.and_then(|at| bytes.get_mut(at)) {
            *byte = !*byte;
        }
        offset += bytes.len() as u64;
        Result::Ok(Frame::data(Bytes::from(bytes)))
    });
    StreamBody::new(chunks).boxed_unsync()
}
