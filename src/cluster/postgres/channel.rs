//! The channel to a PostgreSQL server: the TCP connection, and a watch on the bytes that the server
//! sends.
//!
//! The libraries that read those bytes answer every question for a password, and wait for a message
//! of any announced length. The watch sees the bytes first. A password is sent in clear only where
//! nobody else can read it, and no message may be longer than a server ever sends.

use crate::config::{Datastore, SslMode};
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};
use tokio_postgres::types::Type;

/// The keepalive times that the server is given too: after half a minute it is known that a machine
/// is gone.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_COUNT: u32 = 3;

/// Bytes. PostgreSQL itself makes no message of more than 1 GiB; the protocol adds little to that.
const MESSAGE_MAX: u32 = (1 << 30) + (64 << 10);
/// Bytes, before the login is complete.
const MESSAGE_MAX_BEFORE_LOGIN: u32 = 64 << 10;

const AUTHENTICATION: u8 = b'R';
const COLUMNS: u8 = b'T';
const PARAMETERS: u8 = b't';
/// Bytes. A row has 1664 columns at most, with names of 63 bytes.
const DESCRIPTION_MAX: u32 = 256 << 10;
const AUTHENTICATION_OK: u32 = 0;
const AUTHENTICATION_CLEARTEXT: u32 = 3;
const AUTHENTICATION_SASL_CONTINUE: u32 = 11;
/// Maximum rounds of hashing that a server may ask for. PostgreSQL's default is 4096; four thousand
/// million would take hours of one core.
const SCRAM_ROUNDS_MAX: u64 = 1_000_000;

/// The texts by which our own error is recognised where a library passes it on as text.
pub(in crate::cluster) const CLEARTEXT_REFUSED: &str = "the server asks for the password in clear, over a channel that is neither verified nor loopback";
/// Before a session begins, a server that cannot start a process for it answers in a special form
/// without a length.
pub(in crate::cluster) const NO_PROCESS: &str =
    "the server cannot start a process for a session: it is out of memory or processes";
pub(in crate::cluster) const MALFORMED: &str = "the server does not keep to the protocol";

/// Connects. Returns whether the connection's peer is this machine.
pub(in crate::cluster) async fn connect(to: &Datastore) -> io::Result<(TcpStream, bool)> {
    let tcp = first_that_accepts(to).await?;
    tcp.set_nodelay(true)?;
    // The connection may be silent as long as a copy takes, and firewalls forget silent
    // connections.
    rustix::net::sockopt::set_socket_keepalive(&tcp, true)?;
    rustix::net::sockopt::set_tcp_keepidle(&tcp, KEEPALIVE_IDLE)?;
    rustix::net::sockopt::set_tcp_keepintvl(&tcp, KEEPALIVE_INTERVAL)?;
    rustix::net::sockopt::set_tcp_keepcnt(&tcp, KEEPALIVE_COUNT)?;
    let loopback = tcp.peer_addr()?.ip().is_loopback();
    Ok((tcp, loopback))
}

/// Connects to the first address that accepts. All addresses of the name are tried at once, so that
/// a filtered one does not block the others.
async fn first_that_accepts(to: &Datastore) -> io::Result<TcpStream> {
    let mut tries = JoinSet::new();
    for address in tokio::net::lookup_host((to.host.as_str(), to.port)).await? {
        tries.spawn(TcpStream::connect(address));
    }
    let mut refused = None;
    while let Some(tried) = tries.join_next().await {
        match tried {
            Ok(Ok(tcp)) => return Ok(tcp),
            Ok(Err(error)) => refused = Some(error),
            Err(_) => {}
        }
    }
    Err(refused.unwrap_or_else(|| io::ErrorKind::HostUnreachable.into()))
}

/// Returns whether the address is a loopback address. Only the text is read; no name is resolved.
pub(crate) fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Returns whether TLS proves the identity of the server.
pub(crate) fn is_verified(to: &Datastore) -> bool {
    match to.ssl_mode {
        SslMode::VerifyFull | SslMode::VerifyCa => true,
        // libpq does the same: a given root certificate is checked under `require` too.
        SslMode::Require => to.ssl_root_cert.is_some(),
        SslMode::Prefer | SslMode::Disable => false,
    }
}

/// Time at which a server's bytes came last. A row may take minutes to arrive.
#[derive(Debug, Clone)]
pub(in crate::cluster) struct Heard {
    since: Instant,
    /// Milliseconds after `since`.
    last: Arc<AtomicU64>,
}

impl Heard {
    pub(in crate::cluster) fn now() -> Heard {
        Heard {
            since: Instant::now(),
            last: Arc::default(),
        }
    }

    pub(in crate::cluster) fn again(&self) {
        let milliseconds = self.since.elapsed().as_millis();
        self.last.store(milliseconds as u64, Ordering::Relaxed);
    }

    pub(in crate::cluster) fn elapsed(&self) -> Duration {
        let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
        self.since.elapsed().saturating_sub(last)
    }
}

/// The state of the watch.
#[derive(Debug)]
enum Place {
    /// Before one byte: the answer to the question for TLS.
    TlsAnswer,
    /// The bytes are TLS's own; the content has its own watch.
    Tls,
    /// Within the type and length of a message.
    Header {
        bytes: [u8; 5],
        count: usize,
    },
    /// Within the first four bytes of an authentication message.
    Authentication {
        bytes: [u8; 4],
        count: usize,
        left: u32,
    },
    /// Within the description of columns or parameters.
    Types {
        kind: u8,
        bytes: Vec<u8>,
        left: u32,
    },
    /// Within a server's message during SCRAM. It is short, because the login is not complete.
    Scram {
        text: Vec<u8>,
        left: u32,
    },
    Body {
        left: u32,
    },
}

const START: Place = Place::Header {
    bytes: [0; 5],
    count: 0,
};

/// A stream whose server is watched.
#[derive(Debug)]
pub(in crate::cluster) struct Watched<S> {
    io: S,
    place: Place,
    logged_in: bool,
    /// True: a password may be sent in clear.
    private: bool,
    /// True: only known types are allowed. The client asks the server about each type that it does
    /// not know, and about the types in that answer, without end.
    known_types_only: bool,
    heard: Heard,
}

impl<S> Watched<S> {
    pub(in crate::cluster) fn heard(&self) -> Heard {
        self.heard.clone()
    }

    /// Makes a watched stream. `private`: nobody else can read the sent bytes.
    pub(in crate::cluster) fn new(io: S, private: bool) -> Self {
        Watched {
            io,
            place: START,
            logged_in: false,
            private,
            known_types_only: false,
            heard: Heard::now(),
        }
    }

    /// Allows PostgreSQL's own types, and no other type of the peer.
    pub(in crate::cluster) fn with_known_types_only(mut self, only: bool) -> Self {
        self.known_types_only = only;
        self
    }

    /// Makes a stream on which TLS is requested first. If the server has no TLS, it goes on in
    /// clear.
    pub(in crate::cluster) fn before_tls(io: S, private: bool) -> Self {
        Watched {
            place: Place::TlsAnswer,
            ..Watched::new(io, private)
        }
    }

    fn see(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while let Some((first, rest)) = bytes.split_first() {
            match &mut self.place {
                Place::Tls => return Ok(()),
                Place::TlsAnswer if *first == b'E' => return Err(io::Error::other(NO_PROCESS)),
                Place::TlsAnswer => {
                    self.place = if *first == b'S' { Place::Tls } else { START };
                    bytes = rest;
                }
                Place::Header { bytes: head, count } => {
                    head[*count] = *first;
                    *count += 1;
                    bytes = rest;
                    if *count == head.len() {
                        let (kind, length) = (
                            head[0],
                            u32::from_be_bytes([head[1], head[2], head[3], head[4]]),
                        );
                        self.place = self.announced(kind, length)?;
                    }
                }
                Place::Authentication {
                    bytes: code,
                    count,
                    left,
                } => {
                    code[*count] = *first;
                    *count += 1;
                    bytes = rest;
                    if *count == code.len() {
                        let (code, left) = (u32::from_be_bytes(*code), *left);
                        self.asked(code)?;
                        self.place = match (code, left) {
                            (AUTHENTICATION_SASL_CONTINUE, 1..) => Place::Scram {
                                text: Vec::new(),
                                left,
                            },
                            (_, left) => body(left),
                        };
                    }
                }
                Place::Types {
                    kind,
                    bytes: description,
                    left,
                } => {
                    let seen = bytes.len().min(*left as usize);
                    description.extend_from_slice(&bytes[..seen]);
                    *left -= seen as u32;
                    bytes = &bytes[seen..];
                    if *left == 0 {
                        known_types(*kind, description)?;
                        self.place = START;
                    }
                }
                Place::Scram { text, left } => {
                    text.push(*first);
                    *left -= 1;
                    bytes = rest;
                    if *left == 0 {
                        few_rounds(text)?;
                        self.place = START;
                    }
                }
                Place::Body { left } => {
                    let seen = bytes.len().min(*left as usize);
                    bytes = &bytes[seen..];
                    // The number is no more than `left`, which is 32 bits wide.
                    self.place = body(*left - seen as u32);
                }
            }
        }
        Ok(())
    }

    /// Checks an announced length, which counts itself but not the type.
    fn announced(&self, kind: u8, length: u32) -> io::Result<Place> {
        let most = match self.logged_in {
            true => MESSAGE_MAX,
            false => MESSAGE_MAX_BEFORE_LOGIN,
        };
        let is_text = length
            .to_be_bytes()
            .iter()
            .all(|byte| byte.is_ascii_graphic() || *byte == b' ');
        if !self.logged_in && kind == b'E' && is_text {
            return Err(io::Error::other(NO_PROCESS));
        }
        let Some(content) = length.checked_sub(4).filter(|_| length <= most) else {
            return Err(malformed(&format!(
                "a message of type {:?} announces {length} bytes; from 4 to {most} were expected",
                char::from(kind)
            )));
        };
        if self.known_types_only && matches!(kind, COLUMNS | PARAMETERS) && content > 0 {
            if content > DESCRIPTION_MAX {
                return Err(malformed("it describes more columns than a row can have"));
            }
            return Ok(Place::Types {
                kind,
                bytes: Vec::new(),
                left: content,
            });
        }
        if kind != AUTHENTICATION {
            return Ok(body(content));
        }
        match content.checked_sub(4) {
            Some(left) => Ok(Place::Authentication {
                bytes: [0; 4],
                count: 0,
                left,
            }),
            None => Err(malformed("an authentication message without a code")),
        }
    }

    fn asked(&mut self, code: u32) -> io::Result<()> {
        match code {
            AUTHENTICATION_OK => self.logged_in = true,
            AUTHENTICATION_CLEARTEXT if !self.private => {
                return Err(io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    CLEARTEXT_REFUSED,
                ));
            }
            _ => {}
        }
        Ok(())
    }
}

/// Checks that every described type is one that the client knows without asking.
fn known_types(kind: u8, description: &[u8]) -> io::Result<()> {
    let cut = || malformed("a description of columns or parameters is cut off");
    let word = |bytes: &[u8]| bytes.first_chunk().map(|word| u32::from_be_bytes(*word));
    let (count, mut rest) = description.split_first_chunk::<2>().ok_or_else(cut)?;
    for _ in 0..u16::from_be_bytes(*count) {
        if kind == COLUMNS {
            let name = rest.iter().position(|byte| *byte == 0).ok_or_else(cut)?;
            // After the name: its table, and the column's number there.
            rest = rest.get(name + 1 + 6..).ok_or_else(cut)?;
        }
        let oid = word(rest).ok_or_else(cut)?;
        if Type::from_oid(oid).is_none() {
            return Err(malformed(&format!(
                "an answer has a column of type {oid}, and none of its own types was asked for"
            )));
        }
        let rest_of_column = if kind == COLUMNS { 4 + 8 } else { 4 };
        rest = rest.get(rest_of_column..).ok_or_else(cut)?;
    }
    Ok(())
}

/// Refuses a SCRAM message `r=…,s=…,i=4096` whose number of rounds (`i`) is too high.
fn few_rounds(text: &[u8]) -> io::Result<()> {
    let text = String::from_utf8_lossy(text);
    let rounds = text.split(',').find_map(|part| part.strip_prefix("i="));
    let Some(rounds) = rounds else { return Ok(()) };
    match rounds.parse::<u64>() {
        Ok(count) if count <= SCRAM_ROUNDS_MAX => Ok(()),
        _ => Err(malformed(&format!(
            "it asks for {rounds} rounds of SCRAM; at most {SCRAM_ROUNDS_MAX} were expected"
        ))),
    }
}

fn body(left: u32) -> Place {
    match left {
        0 => START,
        left => Place::Body { left },
    }
}

pub(in crate::cluster) fn malformed(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{MALFORMED}: {text}"))
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(context, buffer))?;
        self.heard.again();
        let seen = self.see(&buffer.filled()[before..]);
        if seen.is_err() {
            // Refused bytes are not passed on.
            buffer.set_filled(before);
        }
        Poll::Ready(seen)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

impl<S: TlsStream + Unpin> TlsStream for Watched<S> {
    fn channel_binding(&self) -> ChannelBinding {
        self.io.channel_binding()
    }
}

/// TLS with a watch on its content.
pub(in crate::cluster) struct WatchedTls<T> {
    pub(in crate::cluster) inner: T,
    pub(in crate::cluster) private: bool,
    pub(in crate::cluster) known_types_only: bool,
}

impl<S, T> TlsConnect<S> for WatchedTls<T>
where
    T: TlsConnect<S>,
    T::Future: Send + 'static,
{
    type Stream = Watched<T::Stream>;
    type Error = T::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Stream, T::Error>> + Send>>;

    fn connect(self, stream: S) -> Self::Future {
        let (private, known_types_only) = (self.private, self.known_types_only);
        let opening = self.inner.connect(stream);
        Box::pin(async move {
            let watched = Watched::new(opening.await?, private);
            Ok(watched.with_known_types_only(known_types_only))
        })
    }
}

#[cfg(test)]
mod tests;
