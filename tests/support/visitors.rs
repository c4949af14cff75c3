//! Clients of a Builder behind a balancer, and what each of them sees.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::HeaderMap;
use hyper_util::rt::TokioIo;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::builder_front::{ATTEMPT, SIDE};
use super::service::SOON;
use super::{Factory, Package, Result, Spec, wait_until};

/// Pause between two requests of one client.
const PAUSE: Duration = Duration::from_millis(20);
/// Time limit of one request. No client of Builder's waits for ever.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);
/// The sentence that a refused write must bear.
const SENTENCE: &str = "Builder takes no writes at this moment";
const SENTENCE_OF_HAPROXY: &str = "Builder does not answer at this moment";

/// The answer to one request.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    /// Err: the connection was cut in mid-body.
    pub body: Result<Bytes>,
}

impl Answer {
    /// The side whose frontend has answered.
    pub fn side(&self) -> Option<usize> {
        self.headers.get(SIDE)?.to_str().ok()?.parse().ok()
    }

    fn has_reason(&self) -> bool {
        let text = self.body.as_ref().map(|b| String::from_utf8_lossy(b));
        self.headers.contains_key("retry-after")
            && text.is_ok_and(|t| t.contains(SENTENCE) || t.contains(SENTENCE_OF_HAPROXY))
    }
}

/// Sends one request on a connection of its own, as `hab` does. Err: there was no answer at all.
pub async fn ask(
    port: u16,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
) -> Result<Answer> {
    let asking = async {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let talking = tokio::spawn(connection);
        let mut request = hyper::Request::builder().method(method).uri(path);
        for (name, value) in [("host", "builder.example.org")].iter().chain(headers) {
            request = request.header(*name, *value);
        }
        let response = sender.send_request(request.body(Full::new(body))?).await?;
        let (parts, mut body) = response.into_parts();
        let mut bytes = BytesMut::new();
        let whole = loop {
            match body.frame().await {
                None => break Ok(bytes.freeze()),
                Some(Ok(frame)) => {
                    bytes.extend_from_slice(&frame.into_data().unwrap_or_default());
                }
                Some(Err(error)) => break Err(error.into()),
            }
        };
        talking.abort();
        Ok(Answer {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body: whole,
        })
    };
    tokio::time::timeout(REQUEST_LIMIT, asking).await?
}

/// One request: when it was begun and ended, and the side that has answered it.
#[derive(Debug, Clone, Copy)]
pub struct Visit {
    pub begun: Instant,
    pub ended: Instant,
    pub side: usize,
}

/// Everything that the clients of one balancer have seen.
#[derive(Debug, Default, Clone)]
pub struct Seen {
    pub reads: Vec<Visit>,
    pub reads_failed: Vec<String>,
    /// Downloads that were whole, and those that were cut in mid-body.
    pub downloads: usize,
    pub cut: usize,
    pub writes: Vec<Visit>,
    /// Writes that were answered 503 with Retry-After and a sentence.
    pub refused: usize,
    pub bare_500: usize,
    /// Every other answer to a write, and no answer.
    pub odd: Vec<String>,
    /// Accepted packages by ident.
    pub accepted: BTreeMap<String, Package>,
}

/// The clients end when this is dropped.
pub struct Visitors {
    seen: Arc<Mutex<Seen>>,
    writing: watch::Sender<bool>,
    clients: JoinSet<()>,
}

struct Client {
    port: u16,
    name: String,
    seen: Arc<Mutex<Seen>>,
    /// False: nobody uploads for now.
    writing: watch::Receiver<bool>,
    rng: StdRng,
}

impl Visitors {
    /// `small` and `large`: packages that are there. The name is a part of the names of what is uploaded.
    pub fn start(port: u16, name: &str, small: &Package, large: &Package, seed: u64) -> Visitors {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (writing, wanted) = watch::channel(true);
        let mut clients = JoinSet::new();
        let client = |number: u64| Client {
            port,
            name: format!("{name}{number}"),
            seen: seen.clone(),
            writing: wanted.clone(),
            rng: StdRng::seed_from_u64(seed ^ number),
        };
        for number in 0..2 {
            clients.spawn(client(number).read_on(small.clone()));
            clients.spawn(client(10 + number).upload_on(seed));
        }
        clients.spawn(client(20).download_on(large.clone()));
        Visitors {
            seen,
            writing,
            clients,
        }
    }

    pub fn seen(&self) -> Seen {
        self.seen.lock().expect("what was seen").clone()
    }

    pub fn write(&self, wanted: bool) {
        self.writing.send_replace(wanted);
    }

    /// Waits until so many more reads and writes that began after `since` were answered by a side.
    pub async fn until_answered_by(&self, side: usize, since: Instant, least: usize) {
        let by = |visits: &[Visit]| {
            let late = visits.iter().rev().take_while(|visit| visit.begun > since);
            late.filter(|visit| visit.side == side).count()
        };
        wait_until("clients are answered by a side", SOON, || async {
            let seen = self.seen.lock().expect("what was seen");
            let found = (by(&seen.reads), by(&seen.writes));
            match found.0.min(found.1) {
                enough if enough >= least => Ok(()),
                _ => {
                    let odd = (&seen.reads_failed, &seen.odd, seen.refused, seen.bare_500);
                    Err(format!("{found:?} by side {side}, {odd:?}").into())
                }
            }
        })
        .await;
    }

    pub async fn stop(mut self) -> Seen {
        self.clients.shutdown().await;
        self.seen()
    }
}

impl Client {
    fn note(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen.lock().expect("what was seen"));
    }

    async fn pause(&mut self) {
        tokio::time::sleep(PAUSE.mul_f64(self.rng.random_range(0.5..1.5))).await;
    }

    /// Notes a read of a package that is there.
    async fn read(&self, method: &str, package: &Package, path: &str) {
        let begun = Instant::now();
        let answer = ask(self.port, method, path, &[], Bytes::new()).await;
        let ended = Instant::now();
        self.note(|seen| match answer {
            Ok(answer) if answer.status == 200 => {
                let side = answer.side().unwrap_or(usize::MAX);
                seen.reads.push(Visit { begun, ended, side });
                match answer.body {
                    Err(_) => seen.cut += 1,
                    Ok(bytes) if path.ends_with("/download") && method == "GET" => {
                        seen.downloads += 1;
                        if super::packages::blake2b()
                            .update(&bytes)
                            .finalize()
                            .to_hex()
                            .as_str()
                            != package.checksum
                        {
                            seen.reads_failed.push(format!("{path}: other bytes"));
                        }
                    }
                    Ok(_) => {}
                }
            }
            Ok(answer) => seen.reads_failed.push(format!(
                "{method} {path}: {} by side {:?}",
                answer.status,
                answer.side()
            )),
            Err(error) => seen.reads_failed.push(format!("{method} {path}: {error}")),
        });
    }

    async fn read_on(mut self, package: Package) {
        let path = format!("/v1/depot/pkgs/{}", package.ident);
        loop {
            let (method, path) = match self.rng.random_range(0..3) {
                0 => ("HEAD", path.clone()),
                1 => ("GET", path.clone()),
                _ => ("GET", format!("{path}/download")),
            };
            self.read(method, &package, &path).await;
            self.pause().await;
        }
    }

    async fn download_on(mut self, package: Package) {
        let path = format!("/v1/depot/pkgs/{}/download", package.ident);
        loop {
            self.read("GET", &package, &path).await;
            self.pause().await;
        }
    }

    async fn upload_on(mut self, seed: u64) {
        let mut factory = Factory::new(seed).with_keys_of(super::seed());
        for number in 0.. {
            if self.writing.wait_for(|wanted| *wanted).await.is_err() {
                return;
            }
            let package = factory.make(Spec::new("core", &self.name, &number.to_string()));
            if self.upload(&package).await {
                // A client reads its own write.
                let path = format!("/v1/depot/pkgs/{}", package.ident);
                self.read("GET", &package, &path).await;
                let ident = package.ident.clone();
                self.note(|seen| drop(seen.accepted.insert(ident, package)));
            }
            self.pause().await;
        }
    }

    /// Returns whether it was accepted.
    async fn upload(&self, package: &Package) -> bool {
        let path = format!("/v1/depot/pkgs/{}?target={}", package.ident, package.target);
        let attempt = [(ATTEMPT, package.ident.as_str())];
        let begun = Instant::now();
        let answer = ask(self.port, "POST", &path, &attempt, package.bytes()).await;
        let ended = Instant::now();
        let mut accepted = false;
        self.note(|seen| match answer {
            Ok(answer) if answer.status == 201 => {
                accepted = true;
                let side = answer.side().unwrap_or(usize::MAX);
                seen.writes.push(Visit { begun, ended, side });
            }
            Ok(answer) if answer.status == 503 && answer.has_reason() => seen.refused += 1,
            Ok(answer) if answer.status == 500 => seen.bare_500 += 1,
            Ok(answer) => seen
                .odd
                .push(format!("{} {:?}", answer.status, answer.body)),
            Err(error) => seen.odd.push(error.to_string()),
        });
        accepted
    }
}
