//! Messages of the replication protocol on one connection.

use super::{Arrived, TextRows};
use crate::cluster::postgres::cancelling::Cancelling;
use crate::cluster::postgres::channel::{self, Heard, Watched};
use crate::cluster::postgres::{datastore, login, tls};
use crate::config::{Datastore, SslMode};
use crate::domain::{Lsn, Side};
use bytes::{Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::{backend, frontend};
use rustls::pki_types::ServerName;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_postgres::error::SqlState;
use tokio_rustls::TlsConnector;

pub(super) const READ_BYTES: usize = 64 * 1024;
/// Messages shorter than this are copied out of the buffer, so that it can be used again.
pub(super) const COPIED_MESSAGE_BYTES: usize = 4096;
const COPY_BOTH: u8 = b'W';

pub(in crate::cluster) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

pub(in crate::cluster) enum Trouble {
    Wire(io::Error),
    /// The server's own words.
    Refused {
        state: SqlState,
        text: String,
    },
    Authentication(String),
    Tls(String),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Trouble::Wire(error)
    }
}

pub(super) struct Wire {
    pub(super) io: Box<dyn Io>,
    pub(super) buffer: BytesMut,
    /// Time at which bytes came last. A message may take minutes to arrive.
    pub(super) heard: Heard,
    pub(super) cancelling: Cancelling,
}

impl Wire {
    pub(super) async fn open(side: Side, to: &Datastore) -> Result<Wire, Trouble> {
        let (io, heard) = connect(side, to).await?;
        let mut wire = Wire {
            io,
            buffer: BytesMut::with_capacity(READ_BYTES),
            heard,
            cancelling: Cancelling {
                side,
                to: Arc::new(to.clone()),
                process: 0,
                secret: 0,
            },
        };
        let options = format!(
            "{} -c search_path={} -c default_transaction_read_only=off{}",
            datastore::SESSION_OPTIONS,
            datastore::search_path(&to.database),
            // A server without room for an ordinary session may have room for this one.
            login::silence(side, to, &to.database)
                .await
                .unwrap_or_default()
        );
        let parameters = [
            ("user", to.user.as_str()),
            ("database", to.database.as_str()),
            ("replication", "database"),
            ("application_name", "warm-spare"),
            ("client_encoding", "UTF8"),
            ("options", options.as_str()),
        ];
        let mut out = BytesMut::new();
        frontend::startup_message(parameters, &mut out)?;
        wire.send(&out).await?;
        wire.authenticate(side, to).await?;
        loop {
            match wire.message().await? {
                backend::Message::ReadyForQuery(_) => return Ok(wire),
                backend::Message::ErrorResponse(body) => return Err(refused(&body)),
                backend::Message::BackendKeyData(body) => {
                    wire.cancelling.process = body.process_id();
                    wire.cancelling.secret = body.secret_key();
                }
                _ => {}
            }
        }
    }

    async fn authenticate(&mut self, side: Side, to: &Datastore) -> Result<(), Trouble> {
        let password = || -> Result<Vec<u8>, Trouble> {
            let Some(source) = &to.password else {
                let text = "the server asks for a password and none is configured";
                return Err(Trouble::Authentication(text.into()));
            };
            let secret = source
                .read(&format!("{side}.datastore.password"))
                .map_err(|e| Trouble::Authentication(e.to_string()))?;
            Ok(secret.expose().as_bytes().to_vec())
        };
        let mut scram: Option<sasl::ScramSha256> = None;
        let bad = |what: &str| Trouble::Authentication(format!("the server {what}"));
        loop {
            let mut out = BytesMut::new();
            match self.message().await? {
                backend::Message::AuthenticationOk => return Ok(()),
                backend::Message::AuthenticationCleartextPassword => {
                    frontend::password_message(&password()?, &mut out)?;
                }
                backend::Message::AuthenticationMd5Password(body) => {
                    let hash = md5_hash(to.user.as_bytes(), &password()?, body.salt());
                    frontend::password_message(hash.as_bytes(), &mut out)?;
                }
                backend::Message::AuthenticationSasl(body) => {
                    let plain = body
                        .mechanisms()
                        .any(|mechanism| Ok(mechanism == sasl::SCRAM_SHA_256))?;
                    if !plain {
                        return Err(bad("offers no SCRAM-SHA-256"));
                    }
                    let begun =
                        sasl::ScramSha256::new(&password()?, sasl::ChannelBinding::unsupported());
                    frontend::sasl_initial_response(
                        sasl::SCRAM_SHA_256,
                        begun.message(),
                        &mut out,
                    )?;
                    scram = Some(begun);
                }
                backend::Message::AuthenticationSaslContinue(body) => {
                    let begun = scram
                        .as_mut()
                        .ok_or_else(|| bad("continues a SCRAM exchange that was not begun"))?;
                    begun.update(body.data())?;
                    frontend::sasl_response(begun.message(), &mut out)?;
                }
                backend::Message::AuthenticationSaslFinal(body) => {
                    let begun = scram
                        .as_mut()
                        .ok_or_else(|| bad("ends a SCRAM exchange that was not begun"))?;
                    begun.finish(body.data())?;
                }
                backend::Message::ErrorResponse(body) => return Err(refused(&body)),
                backend::Message::NoticeResponse(_) => {}
                _ => return Err(bad("asks for a way to authenticate that is not supported")),
            }
            self.send(&out).await?;
        }
    }

    pub(super) async fn query(&mut self, sql: &str) -> Result<TextRows, Trouble> {
        let mut out = BytesMut::new();
        frontend::query(sql, &mut out)?;
        self.send(&out).await?;
        self.rest().await
    }

    /// Reads the rest of an answer.
    pub(super) async fn rest(&mut self) -> Result<TextRows, Trouble> {
        let (mut rows, mut failed) = (Vec::new(), None);
        loop {
            match self.message().await? {
                backend::Message::DataRow(body) => rows.push(text_row(&body)?),
                backend::Message::ErrorResponse(body) => failed = Some(refused(&body)),
                backend::Message::ReadyForQuery(_) => break,
                _ => {}
            }
        }
        failed.map_or(Ok(rows), Err)
    }

    pub(super) async fn start(&mut self, sql: &str) -> Result<(), Trouble> {
        let mut out = BytesMut::new();
        frontend::query(sql, &mut out)?;
        self.send(&out).await?;
        loop {
            // The one message that the library does not know.
            if self.buffer.first() == Some(&COPY_BOTH) && self.whole()? {
                let length = self.length();
                drop(self.buffer.split_to(length));
                return Ok(());
            }
            if self.buffer.first() == Some(&COPY_BOTH) || self.buffer.is_empty() {
                self.read().await?;
                continue;
            }
            match self.message().await? {
                backend::Message::ErrorResponse(body) => return Err(refused(&body)),
                backend::Message::ReadyForQuery(_) => {
                    let error = io::Error::new(io::ErrorKind::InvalidData, "no stream was begun");
                    return Err(error.into());
                }
                _ => {}
            }
        }
    }

    pub(super) async fn arrived(&mut self) -> Result<Arrived, Trouble> {
        loop {
            if let Some(arrived) = self.take_arrived()? {
                return Ok(arrived);
            }
            self.read().await?;
        }
    }

    pub(super) fn take_arrived(&mut self) -> Result<Option<Arrived>, Trouble> {
        let odd = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_string());
        loop {
            let body = match backend::Message::parse(&mut self.buffer)? {
                None => return Ok(None),
                Some(backend::Message::CopyData(body)) => body.into_bytes(),
                Some(backend::Message::ErrorResponse(body)) => return Err(refused(&body)),
                Some(backend::Message::CopyDone) => {
                    return Err(odd("the server ended the stream").into());
                }
                Some(_) => continue,
            };
            let position = |at: usize| {
                let bytes = body.get(at..at + 8)?;
                Some(Lsn(u64::from_be_bytes(bytes.try_into().ok()?)))
            };
            return match body.first() {
                Some(b'w') if body.len() >= 25 => Ok(Some(Arrived::Data {
                    end: position(9).unwrap_or_default(),
                    bytes: match body.len() {
                        // A slice of the buffer would keep the whole buffer in memory.
                        ..COPIED_MESSAGE_BYTES => Bytes::copy_from_slice(&body[25..]),
                        _ => body.slice(25..),
                    },
                })),
                Some(b'k') if body.len() >= 18 => Ok(Some(Arrived::Keepalive {
                    end: position(1).unwrap_or_default(),
                    reply: body[17] == 1,
                })),
                _ => Err(odd("the stream has a message of an unknown kind").into()),
            };
        }
    }

    pub(super) async fn message(&mut self) -> Result<backend::Message, Trouble> {
        loop {
            if let Some(message) = backend::Message::parse(&mut self.buffer)? {
                return Ok(message);
            }
            self.read().await?;
        }
    }

    /// Only adds to the buffer, so that it may be dropped at any time.
    pub(super) async fn read(&mut self) -> Result<(), io::Error> {
        self.buffer.reserve(READ_BYTES);
        if self.io.read_buf(&mut self.buffer).await? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the server closed the connection",
            ));
        }
        Ok(())
    }

    pub(super) fn length(&self) -> usize {
        let bytes = self.buffer.get(1..5).and_then(|b| b.try_into().ok());
        bytes.map_or(usize::MAX, |bytes| u32::from_be_bytes(bytes) as usize + 1)
    }

    pub(super) fn whole(&self) -> Result<bool, io::Error> {
        Ok(self.buffer.len() >= 5 && self.buffer.len() >= self.length())
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<(), io::Error> {
        self.io.write_all(bytes).await?;
        self.io.flush().await
    }
}

fn text_row(body: &backend::DataRowBody) -> Result<Vec<Option<String>>, io::Error> {
    body.ranges()
        .map(|range| {
            Ok(range.map(|range| String::from_utf8_lossy(&body.buffer()[range]).into_owned()))
        })
        .collect()
}

fn refused(body: &backend::ErrorResponseBody) -> Trouble {
    let (mut state, mut text, mut detail) = (String::new(), String::new(), None);
    let mut fields = body.fields();
    while let Ok(Some(field)) = fields.next() {
        let value = String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            b'C' => state = value,
            b'M' => text = value,
            b'D' => detail = Some(value),
            _ => {}
        }
    }
    if let Some(detail) = detail {
        text = format!("{text} ({detail})");
    }
    Trouble::Refused {
        state: SqlState::from_code(&state),
        text,
    }
}

pub(in crate::cluster) async fn connect(
    side: Side,
    to: &Datastore,
) -> Result<(Box<dyn Io>, Heard), Trouble> {
    let (mut tcp, loopback) = channel::connect(to).await?;
    if to.ssl_mode == SslMode::Disable {
        return Ok(watched(tcp, loopback));
    }
    let mut out = BytesMut::new();
    frontend::ssl_request(&mut out);
    tcp.write_all(&out).await?;
    let answer = tcp.read_u8().await?;
    if answer == b'E' {
        return Err(Trouble::Wire(io::Error::other(channel::NO_PROCESS)));
    }
    let accepted = answer == b'S';
    if !accepted && to.ssl_mode == SslMode::Prefer {
        return Ok(watched(tcp, loopback));
    }
    if !accepted {
        return Err(Trouble::Tls("server does not support TLS".into()));
    }
    let mut config = tls::client_config(side, to).map_err(|error| Trouble::Tls(error.text))?;
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    let name = ServerName::try_from(to.host.clone()).map_err(|e| Trouble::Tls(e.to_string()))?;
    let stream = TlsConnector::from(Arc::new(config))
        .connect(name, tcp)
        .await?;
    let private = loopback || channel::is_verified(to);
    Ok(watched(stream, private))
}

pub(super) fn watched(io: impl Io + 'static, private: bool) -> (Box<dyn Io>, Heard) {
    let watched = Watched::new(io, private);
    let heard = watched.heard();
    (Box::new(watched), heard)
}
