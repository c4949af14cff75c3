//! Keeps the HTTP interface open. If its address is taken, it tries again and logs the failure.

use super::configuration::address_file;
use super::failure_tracker::{FailureTracker, Pace};
use super::{Configs, StatusWriter, next};
use crate::config::{Http, http_of};
use crate::domain::ErrorCode;
use crate::observe::serve;
use std::convert::Infallible;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;
use tokio::net::TcpListener;

/// Interval between two tries to listen.
const RETRY_AFTER: Duration = Duration::from_secs(2);

pub(super) async fn keep_open(
    writer: &StatusWriter,
    mut configs: Configs,
    path: &Path,
    data: &Path,
) -> Infallible {
    let first = configs
        .borrow_and_update()
        .as_ref()
        .map(|config| config.http);
    let Some(http) = first else {
        // Without a good configuration the service listens where clients look for it, until there
        // is a good one.
        tokio::select! {
            never = open(writer, http_of(path), data) => match never {},
            http = first_of(&mut configs) => return open(writer, http, data).await,
        }
    };
    open(writer, http, data).await
}

async fn first_of(configs: &mut Configs) -> Http {
    loop {
        next(configs).await;
        if let Some(config) = configs.borrow_and_update().as_ref() {
            return config.http;
        }
    }
}

async fn open(writer: &StatusWriter, http: Http, data: &Path) -> Infallible {
    let address = SocketAddr::new(http.listen, http.port);
    let mut failures = FailureTracker::new("http: listens");
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                failures.over(writer.now());
                if let Err(error) = write_address(address, data) {
                    log::warn!(
                        "http: cannot write {}: {error}",
                        address_file(data).display()
                    );
                }
                log::info!("http: listening on {address}");
                return serve(listener, writer.view()).await;
            }
            Err(error) => {
                let text = format!("http: cannot listen on {address}: {error}");
                failures.failed(writer.now(), ErrorCode::Http, &text, Pace::Passing);
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }
}

/// Writes the address for `status` and `health` on this machine, which find the service by it,
/// whatever the configuration says later.
fn write_address(address: SocketAddr, data: &Path) -> std::io::Result<()> {
    let reachable = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    std::fs::create_dir_all(data)?;
    let mut file = tempfile::NamedTempFile::new_in(data)?;
    writeln!(file, "{}", SocketAddr::new(reachable, address.port()))?;
    file.persist(address_file(data))
        .map_err(|error| error.error)?;
    Ok(())
}
