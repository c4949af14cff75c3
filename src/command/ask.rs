//! Asking the running service over HTTP, for `status` and `health`.

use crate::config;
use crate::observe;
use crate::service::address_file;
use http::StatusCode;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

pub struct Answer {
    pub status: StatusCode,
    pub body: serde_json::Value,
}

/// Nobody answered, and at which address.
#[derive(Debug, thiserror::Error)]
#[error("no warm-spare service answers at {address}: {text}")]
pub struct NoAnswer {
    address: SocketAddr,
    text: String,
}

pub async fn ask(config: &Path, path: &str, limit: Duration) -> Result<Answer, NoAnswer> {
    let address = address(config);
    let text = match tokio::time::timeout(limit, get(address, path)).await {
        Ok(Ok(answer)) => return Ok(answer),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("nothing within {}", humantime::format_duration(limit)),
    };
    Err(NoAnswer { address, text })
}

/// Where the service said it listens; else where the configuration, or the last good one, would have it.
fn address(path: &Path) -> SocketAddr {
    let data = config::data_dir(path);
    let told = std::fs::read_to_string(address_file(&data)).ok();
    if let Some(told) = told.and_then(|text| text.trim().parse().ok()) {
        return told;
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
    let stranger = "what listens there is no warm-spare";
    let body: serde_json::Value = serde_json::from_slice(&body).map_err(|_| stranger)?;
    if body["format"] != 1 {
        return Err(stranger.into());
    }
    Ok(Answer { status, body })
}
