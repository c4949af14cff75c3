//! The channel to a PostgreSQL server: the TCP connection, and a watch on the bytes that the server sends.
//!
//! The libraries that read those bytes answer every question for a password, and wait for a message of whatever length is
//! announced. The watch sees the bytes first: a password is given in clear only where nobody else can read it, and no
//! message is longer than a server ever sends.

use crate::config::{Datastore, SslMode};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};

const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);

/// Bytes. PostgreSQL itself makes none of more than 1 GiB; what the protocol adds to one is little.
const MESSAGE_MAX: u32 = (1 << 30) + (64 << 10);
/// Bytes, as long as the server has not let us in.
const MESSAGE_MAX_BEFORE_LOGIN: u32 = 64 << 10;

const AUTHENTICATION: u8 = b'R';
const AUTHENTICATION_OK: u32 = 0;
const AUTHENTICATION_CLEARTEXT: u32 = 3;

/// The words by which an error of ours is known again, where a library hands it on as text.
pub(super) const CLEARTEXT_REFUSED: &str = "the server asks for the password in clear, over a channel that is neither verified nor loopback";
pub(super) const MALFORMED: &str = "the server does not keep to the protocol";

/// Connects, and says whether the peer of the connection is this very machine.
pub(super) async fn connect(to: &Datastore) -> io::Result<(TcpStream, bool)> {
    let tcp = TcpStream::connect((to.host.as_str(), to.port)).await?;
    tcp.set_nodelay(true)?;
    // It may be silent for as long as a copy takes, and firewalls forget silent connections.
    rustix::net::sockopt::set_socket_keepalive(&tcp, true)?;
    rustix::net::sockopt::set_tcp_keepidle(&tcp, KEEPALIVE_IDLE)?;
    let loopback = tcp.peer_addr()?.ip().is_loopback();
    Ok((tcp, loopback))
}

/// Whether TLS to that server proves who it is.
pub(super) fn is_verified(to: &Datastore) -> bool {
    match to.ssl_mode {
        SslMode::VerifyFull | SslMode::VerifyCa => true,
        // As libpq: a given root certificate is checked under `require` too.
        SslMode::Require => to.ssl_root_cert.is_some(),
        SslMode::Prefer | SslMode::Disable => false,
    }
}

/// The state of the watch.
#[derive(Debug)]
enum Place {
    /// One byte comes first: the answer to the question for TLS.
    TlsAnswer,
    /// The bytes are TLS's own; those within have a watch of their own.
    Tls,
    /// Within a message's type and length.
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
pub(super) struct Watched<S> {
    io: S,
    place: Place,
    logged_in: bool,
    /// A password may be given in clear.
    private: bool,
}

impl<S> Watched<S> {
    /// `private`: nobody else can read what is sent.
    pub(super) fn new(io: S, private: bool) -> Self {
        Watched {
            io,
            place: START,
            logged_in: false,
            private,
        }
    }

    /// On this stream TLS is asked for first. Where the server has none, it goes on in clear.
    pub(super) fn before_tls(io: S, private: bool) -> Self {
        Watched {
            place: Place::TlsAnswer,
            ..Watched::new(io, private)
        }
    }

    fn see(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while let Some((first, rest)) = bytes.split_first() {
            match &mut self.place {
                Place::Tls => return Ok(()),
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
                        self.place = body(left);
                    }
                }
                Place::Body { left } => {
                    let seen = bytes.len().min(*left as usize);
                    bytes = &bytes[seen..];
                    // No more than `left`, which is 32 bits wide.
                    self.place = body(*left - seen as u32);
                }
            }
        }
        Ok(())
    }

    /// The length counts itself, and not the type.
    fn announced(&self, kind: u8, length: u32) -> io::Result<Place> {
        let most = match self.logged_in {
            true => MESSAGE_MAX,
            false => MESSAGE_MAX_BEFORE_LOGIN,
        };
        let Some(content) = length.checked_sub(4).filter(|_| length <= most) else {
            return Err(malformed(&format!(
                "a message of type {:?} announces {length} bytes; from 4 to {most} were expected",
                char::from(kind)
            )));
        };
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

fn body(left: u32) -> Place {
    match left {
        0 => START,
        left => Place::Body { left },
    }
}

pub(super) fn malformed(text: &str) -> io::Error {
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
        let seen = self.see(&buffer.filled()[before..]);
        if seen.is_err() {
            // Nobody reads what is refused.
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

/// TLS whose content is watched.
pub(super) struct WatchedTls<T> {
    pub(super) inner: T,
    pub(super) private: bool,
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
        let (opening, private) = (self.inner.connect(stream), self.private);
        Box::pin(async move { Ok(Watched::new(opening.await?, private)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, length: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind];
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    /// One byte at a time as well: a message may be cut anywhere.
    #[track_caller]
    fn refused(bytes: &[u8], private: bool) -> Option<String> {
        let whole = Watched::new((), private).see(bytes);
        let mut watched = Watched::new((), private);
        let singly = bytes.iter().try_for_each(|byte| watched.see(&[*byte]));
        let text = |result: io::Result<()>| result.err().map(|error| error.to_string());
        let (whole, singly) = (text(whole), text(singly));
        assert_eq!(whole, singly);
        whole
    }

    #[test]
    fn a_password_goes_in_clear_only_over_a_private_channel() {
        let asked = message(b'R', 8, &3_u32.to_be_bytes());
        assert_eq!(refused(&asked, false).as_deref(), Some(CLEARTEXT_REFUSED));
        assert_eq!(refused(&asked, true), None);
        // Behind a notice, and behind a request for another way.
        let mut later = message(b'N', 5, b"\0");
        later.extend(message(b'R', 12, b"\0\0\0\x05salt"));
        assert_eq!(refused(&later, false), None);
        later.extend(asked);
        assert!(refused(&later, false).is_some());
    }

    #[test]
    fn no_message_is_longer_than_a_server_sends() {
        let login = message(b'R', 8, &0_u32.to_be_bytes());
        for length in [0, 3, MESSAGE_MAX_BEFORE_LOGIN + 1, u32::MAX] {
            let text = refused(&message(b'E', length, b""), false);
            assert!(text.is_some_and(|text| text.starts_with(MALFORMED)));
        }
        for length in [0, 3, MESSAGE_MAX + 1, u32::MAX] {
            let stream = [login.clone(), message(b'd', length, b"")].concat();
            assert!(refused(&stream, false).is_some(), "{length}");
        }
        let stream = [login, message(b'd', MESSAGE_MAX, b"and so on")].concat();
        assert_eq!(refused(&stream, false), None);
    }

    #[test]
    fn a_server_without_tls_is_watched_in_clear() {
        let mut watched = Watched::before_tls((), false);
        let asked = message(b'R', 8, &3_u32.to_be_bytes());
        assert!(watched.see(&[b"N".as_slice(), &asked].concat()).is_err());
        let mut watched = Watched::before_tls((), false);
        let encrypted = [b"S".as_slice(), &asked].concat();
        assert!(watched.see(&encrypted).is_ok());
    }
}
