//! Asks the running service over HTTP. The verbs `status` and `health` use it.

use crate::config;
use crate::observe;
use crate::service::address_file;
use http::StatusCode;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

pub(super) struct Answer {
    pub status: StatusCode,
    pub body: serde_json::Value,
}

/// No service answered. The error names the address that was asked.
#[derive(Debug, thiserror::Error)]
#[error("no warm-spare service answers at {address}: {text}")]
pub(super) struct NoAnswer {
    address: SocketAddr,
    text: String,
}

pub(super) async fn ask(config: &Path, path: &str, limit: Duration) -> Result<Answer, NoAnswer> {
    let address = address(config);
    let text = match tokio::time::timeout(limit, get(address, path)).await {
        Ok(Ok(answer)) => return Ok(answer),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {}", humantime::format_duration(limit)),
    };
    Err(NoAnswer { address, text })
}

/// Returns the address to ask. The sources in their order: the file in which the service recorded
/// its address, the configuration, the last good configuration, and the readable values of a
/// refused configuration.
fn address(path: &Path) -> SocketAddr {
    let data = config::data_dir(path);
    let recorded = std::fs::read_to_string(address_file(&data)).ok();
    if let Some(recorded) = recorded.and_then(|text| text.trim().parse().ok()) {
        return recorded;
    }
    let kept = || config::load_kept(&data).ok().flatten();
    let http = config::load(path)
        .ok()
        .or_else(kept)
        .map(|config| config.http);
    let http = http.unwrap_or_else(|| config::http_of(path));
    SocketAddr::new(http.listen, http.port)
}

async fn get(
    address: SocketAddr,
    path: &str,
) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
    let (status, body) = observe::get(&address.to_string(), path).await?;
    let not_warm_spare = "the program on that port is not warm-spare";
    let body: serde_json::Value = serde_json::from_slice(&body).map_err(|_| not_warm_spare)?;
    if body["format"] != 1 {
        return Err(not_warm_spare.into());
    }
    Ok(Answer { status, body })
}
