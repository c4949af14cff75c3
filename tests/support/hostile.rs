//! A server that is not PostgreSQL, or does not keep to the protocol.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::Result;

const TLS_REQUEST: u32 = 80_877_103;

/// Its behaviour when a client connects.
#[derive(Debug, Clone)]
pub enum Trick {
    /// Closes every connection at once.
    Closes,
    /// Sends these bytes in place of anything else.
    Says(Vec<u8>),
    /// Sends these bytes when TLS is requested.
    OfTls(Vec<u8>),
    /// Sends these bytes after the start-up message, and then without end.
    Repeats(Vec<u8>),
    /// Accepts every login, and answers every statement with these bytes.
    Answers(Vec<u8>),
}

/// The server ends when this is dropped.
pub struct Hostile {
    port: u16,
    _tasks: JoinSet<()>,
}

impl Hostile {
    pub async fn start(trick: Trick) -> Result<Hostile> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let port = listener.local_addr()?.port();
        let trick = Arc::new(trick);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let trick = trick.clone();
                open.spawn(async move {
                    // The client may have disconnected: that is what it should do.
                    let _ = serve(client, &trick).await;
                });
            }
        });
        Ok(Hostile {
            port,
            _tasks: tasks,
        })
    }

    /// Configuration that names it as the peer's datastore.
    pub fn as_peer(&self, extra: &str) -> String {
        format!(
            "{extra}\n[peer.datastore]\nport = {}\npassword = \"secret\"",
            self.port
        )
    }
}

async fn serve(mut client: TcpStream, trick: &Trick) -> std::io::Result<()> {
    if matches!(trick, Trick::Closes) {
        return Ok(());
    }
    loop {
        let length = client.read_u32().await?;
        let code = client.read_u32().await?;
        let mut rest = vec![0; (length as usize).saturating_sub(8).min(10_000)];
        client.read_exact(&mut rest).await?;
        match (code, trick) {
            (TLS_REQUEST, Trick::OfTls(bytes)) => client.write_all(bytes).await?,
            (TLS_REQUEST, _) => client.write_all(b"N").await?,
            _ => break,
        }
    }
    match trick {
        Trick::Closes | Trick::OfTls(_) => {}
        Trick::Says(bytes) => client.write_all(bytes).await?,
        Trick::Repeats(bytes) => loop {
            client.write_all(bytes).await?;
        },
        Trick::Answers(answer) => {
            let hello = [login(), parameter("server_version", "15.1"), ready()].concat();
            client.write_all(&hello).await?;
            loop {
                let kind = client.read_u8().await?;
                let length = client.read_u32().await?;
                let mut body = vec![0; (length as usize).saturating_sub(4)];
                client.read_exact(&mut body).await?;
                match kind {
                    // The statement before the first question.
                    b'Q' if body.starts_with(b"SELECT set_config") => {
                        client.write_all(&[done(), ready()].concat()).await?;
                    }
                    b'Q' | b'S' => client.write_all(answer).await?,
                    b'X' => return Ok(()),
                    _ => {}
                }
            }
        }
    }
    // It goes on until the client disconnects.
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await?;
    Ok(())
}

/// A message of the protocol.
pub fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    announced(kind, 4 + body.len() as u32, body)
}

/// Returns the same with another length in its header.
pub fn announced(kind: u8, length: u32, body: &[u8]) -> Vec<u8> {
    [&[kind][..], &length.to_be_bytes(), body].concat()
}

pub fn authentication(code: u32, body: &[u8]) -> Vec<u8> {
    message(b'R', &[&code.to_be_bytes()[..], body].concat())
}

pub fn login() -> Vec<u8> {
    authentication(0, b"")
}

pub fn ready() -> Vec<u8> {
    message(b'Z', b"I")
}

pub fn done() -> Vec<u8> {
    message(b'C', b"SELECT 1\0")
}

fn parameter(name: &str, value: &str) -> Vec<u8> {
    message(b'S', format!("{name}\0{value}\0").as_bytes())
}

/// Returns the answer to a prepared statement: this number of parameters of type text, and columns
/// of these types.
pub fn prepared(parameters: u16, columns: &[u32]) -> Vec<u8> {
    let mut asked = parameters.to_be_bytes().to_vec();
    for _ in 0..parameters {
        asked.extend_from_slice(&25_u32.to_be_bytes());
    }
    let mut given = (columns.len() as u16).to_be_bytes().to_vec();
    for column in columns {
        given.extend_from_slice(b"c\0");
        given.extend_from_slice(&[0; 6]);
        given.extend_from_slice(&column.to_be_bytes());
        given.extend_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]);
    }
    [
        message(b'1', b""),
        message(b't', &asked),
        message(b'T', &given),
    ]
    .concat()
}

/// One row of these values; None: NULL.
pub fn row(values: &[Option<&[u8]>]) -> Vec<u8> {
    let mut body = (values.len() as u16).to_be_bytes().to_vec();
    for value in values {
        match value {
            Some(bytes) => {
                body.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
                body.extend_from_slice(bytes);
            }
            None => body.extend_from_slice(&u32::MAX.to_be_bytes()),
        }
    }
    message(b'D', &body)
}
