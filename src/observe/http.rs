//! The HTTP interface, which is read-only. A slow or broken client does not affect other clients.

use super::state::ServiceState;
use super::view::ServiceView;
use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Time limit of a request, and of a whole connection.
const REQUEST_LIMIT: Duration = Duration::from_secs(2);
const CONNECTION_LIMIT: Duration = Duration::from_secs(60);
/// Maximum number of connections at once.
const MAX_CONNECTIONS: usize = 256;
/// Pause after a failure to accept a connection (for example without free file descriptors).
const ACCEPT_RETRY_AFTER: Duration = Duration::from_millis(200);

/// Answers requests until it is dropped. All connections end with it.
pub async fn serve(listener: TcpListener, view: ServiceView) -> Infallible {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        // Removes ended connections, so that the set does not grow.
        while connections.try_join_next().is_some() {}
        let Ok(permit) = room.clone().acquire_owned().await else {
            continue;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let view = view.clone();
                connections.spawn(async move {
                    converse(stream, view).await;
                    drop(permit);
                });
            }
            Err(error) => {
                log::debug!("http: {error}");
                tokio::time::sleep(ACCEPT_RETRY_AFTER).await;
            }
        }
    }
}

async fn converse(stream: TcpStream, view: ServiceView) {
    let service = service_fn(move |request| {
        let view = view.clone();
        async move { Ok::<_, Infallible>(answer(&request, &view).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_LIMIT)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_LIMIT, connection).await {
        log::debug!("http: {error}");
    }
}

async fn answer(request: &Request<Incoming>, view: &ServiceView) -> Response<Full<Bytes>> {
    if request.method() != Method::GET {
        let mut refused = text(StatusCode::METHOD_NOT_ALLOWED, "GET only\n");
        refused
            .headers_mut()
            .insert(ALLOW, http::HeaderValue::from_static("GET"));
        return refused;
    }
    match request.uri().path() {
        "/health" => health(view),
        "/status" => reply(StatusCode::OK, JSON, view.status().to_string()),
        "/metrics" => match view.metrics() {
            Ok(page) => reply(StatusCode::OK, OPENMETRICS, page),
            Err(_) => text(
                StatusCode::INTERNAL_SERVER_ERROR,
                "cannot write the metrics\n",
            ),
        },
        "/primary" => role(&view.state_after_a_look().await, Asked::Primary),
        "/spare" => role(&view.state_after_a_look().await, Asked::Spare),
        _ => text(
            StatusCode::NOT_FOUND,
            "/health, /status, /metrics, /primary, /spare\n",
        ),
    }
}

fn health(view: &ServiceView) -> Response<Full<Bytes>> {
    let (health, state) = (view.health(), view.state());
    let body = json!({
        "format": 1,
        "status": health.level.to_string(),
        "level": health.level.code(),
        "line": health.line(&state, view.now()),
        "reasons": health.reasons.iter()
            .map(|reason| json!({ "code": reason.code, "text": reason.text })).collect::<Vec<_>>(),
    });
    reply(health.level.http_status(), JSON, body.to_string())
}

#[derive(Clone, Copy)]
enum Asked {
    Primary,
    Spare,
}

/// Answers 200 or 503, for load balancers: whether clients of a primary, or readers of a spare, may
/// be sent to this cluster.
fn role(state: &ServiceState, asked: Asked) -> Response<Full<Bytes>> {
    let is = match asked {
        Asked::Primary => state.serves(),
        // A spare is at a point of the primary's history, whatever its current hold.
        Asked::Spare => state.can_be_read(),
    };
    let status = if is {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let role = state.cluster.role.map_or("none", Into::into);
    reply(
        status,
        JSON,
        json!({ "format": 1, "role": role, "state": state.name().into_str() }).to_string(),
    )
}

const JSON: &str = "application/json";
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PLAIN: &str = "text/plain; charset=utf-8";

fn text(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    reply(status, PLAIN, body.to_string())
}

fn reply(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, http::HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, http::HeaderValue::from_static("no-store"));
    response
}
