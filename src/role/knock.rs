//! A quick look whether a peer accepts connections.

use std::time::Duration;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Time in which a server that runs accepts a connection, over a line that loses a packet or two.
pub const KNOCK_TIMEOUT: Duration = Duration::from_millis(3500);
/// Interval between two connection attempts; the earlier ones continue.
const KNOCK_INTERVAL: Duration = Duration::from_millis(500);

/// Returns Ok if a server accepts a connection at one of the name's addresses. A refusal by all
/// addresses is an answer. Silence is tried again for as long as the caller waits.
pub async fn knock(host: &str, port: u16) -> std::io::Result<()> {
    let mut knocks = JoinSet::new();
    let mut refused = None;
    loop {
        let addresses = tokio::net::lookup_host((host, port)).await?;
        for address in addresses {
            knocks.spawn(TcpStream::connect(address));
        }
        let again = tokio::time::sleep(KNOCK_INTERVAL);
        tokio::pin!(again);
        loop {
            tokio::select! {
                knocked = knocks.join_next() => match knocked {
                    Some(Ok(Ok(_))) => return Ok(()),
                    Some(Ok(Err(error))) => refused = Some(error),
                    Some(Err(_)) => {}
                    None => {
                        let nobody = || std::io::ErrorKind::HostUnreachable.into();
                        return Err(refused.unwrap_or_else(nobody));
                    }
                },
                () = &mut again => break,
            }
        }
    }
}
