//! Sends one HTTP request to a program on a node: our own service, or the Supervisor.

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Maximum number of bytes of an answer.
const MAX_ANSWER_BYTES: usize = 16 << 20;

/// Sends the request and returns status and body. `address` is host and port. There is no time
/// limit here: the caller sets one.
pub async fn get(
    address: &str,
    path: &str,
) -> Result<(StatusCode, Bytes), Box<dyn std::error::Error + Send + Sync>> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let talking = tokio::spawn(connection);
    let request = Request::get(path)
        .header(http::header::HOST, address)
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES)
        .collect()
        .await?;
    talking.abort();
    Ok((status, body.to_bytes()))
}
