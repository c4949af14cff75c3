//! A look whether a server accepts connections.

use std::time::Duration;
use tokio::net::{TcpStream, ToSocketAddrs};

/// Returns whether a server accepts a connection there within the limit.
pub async fn accepts_connections(address: impl ToSocketAddrs, limit: Duration) -> bool {
    let connecting = tokio::time::timeout(limit, TcpStream::connect(address));
    matches!(connecting.await, Ok(Ok(_)))
}
