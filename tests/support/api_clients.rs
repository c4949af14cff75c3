//! A client that writes to Builder's own API behind a balancer, and one that reads, without a pause between two requests
//! but a short one. Each notes what it got, and when.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinSet;

use super::visitors::ask;

const PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug, Default)]
struct Seen {
    accepted: Vec<Instant>,
    refused: usize,
    reads: usize,
    /// Every answer that is neither.
    odd: Vec<String>,
}

/// The clients end when this is dropped.
pub struct ApiClients {
    seen: Arc<Mutex<Seen>>,
    _clients: JoinSet<()>,
}

impl ApiClients {
    /// `token`: of an owner of origin `core`. `ident`: of a package that is there.
    pub fn start(port: u16, token: &str, ident: &str) -> ApiClients {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let mut clients = JoinSet::new();
        clients.spawn(write(port, format!("Bearer {token}"), seen.clone()));
        clients.spawn(read(port, format!("/v1/depot/pkgs/{ident}"), seen.clone()));
        ApiClients {
            seen,
            _clients: clients,
        }
    }

    /// Returns the number of accepted writes.
    pub fn accepted(&self) -> usize {
        self.seen.lock().expect("what was seen").accepted.len()
    }

    /// Returns what the clients have seen, for people, with the longest times without an accepted write, each with the
    /// time since `began` at which it ended.
    pub fn report(&self, began: Instant) -> String {
        let seen = self.seen.lock().expect("what was seen");
        let pairs = seen.accepted.iter().zip(seen.accepted.iter().skip(1));
        let mut gaps: Vec<(Duration, Duration)> = pairs
            .map(|(one, next)| (*next - *one, *next - began))
            .collect();
        gaps.sort();
        let longest: Vec<String> = gaps
            .iter()
            .rev()
            .take(4)
            .map(|(gap, at)| format!("{gap:.2?} at {at:.0?}"))
            .collect();
        let odd = seen.odd.iter().take(3).collect::<Vec<_>>();
        format!(
            "writes accepted {}, 503 {}; reads {}; other answers {} {odd:?}; longest without an accepted write: {}",
            seen.accepted.len(),
            seen.refused,
            seen.reads,
            seen.odd.len(),
            longest.join(", ")
        )
    }
}

/// Makes one channel after the other.
async fn write(port: u16, bearer: String, seen: Arc<Mutex<Seen>>) {
    for number in 0.. {
        let path = format!("/v1/depot/channels/core/written{number}");
        let headers = [("authorization", bearer.as_str())];
        let answer = ask(port, "POST", &path, &headers, Bytes::new()).await;
        let ended = Instant::now();
        {
            let mut seen = seen.lock().expect("what was seen");
            match answer {
                Ok(answer) if answer.status == 201 => seen.accepted.push(ended),
                Ok(answer) if answer.status == 503 => seen.refused += 1,
                Ok(answer) => seen.odd.push(format!("POST: {}", answer.status)),
                Err(error) => seen.odd.push(format!("POST: {error}")),
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn read(port: u16, path: String, seen: Arc<Mutex<Seen>>) {
    loop {
        let answer = ask(port, "GET", &path, &[], Bytes::new()).await;
        {
            let mut seen = seen.lock().expect("what was seen");
            match answer {
                Ok(answer) if answer.status == 200 => seen.reads += 1,
                Ok(answer) => seen.odd.push(format!("GET: {}", answer.status)),
                Err(error) => seen.odd.push(format!("GET: {error}")),
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}
