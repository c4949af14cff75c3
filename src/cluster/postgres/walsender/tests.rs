//! Unit tests of `walsender.rs`.

use super::wire::{COPIED_MESSAGE_BYTES, READ_BYTES};
use super::*;
use crate::cluster::postgres::cancelling::Cancelling;
use crate::cluster::postgres::channel::Heard;
use crate::config::SslMode;
use std::sync::Arc;
use tokio::io::AsyncWriteExt;

/// A stream whose server is the other end of the pipe.
fn stream() -> (WalStream, tokio::io::DuplexStream) {
    let (ours, theirs) = tokio::io::duplex(4 * READ_BYTES);
    let to = Datastore {
        host: "localhost".into(),
        port: 5432,
        user: "hab".into(),
        database: "builder".into(),
        password: None,
        ssl_mode: SslMode::Disable,
        ssl_root_cert: None,
        ssl_cert: None,
        ssl_key: None,
        source: "configuration",
    };
    let origin = ErrorOrigin {
        side: Side::Peer,
        address: to.address(),
    };
    let wire = Wire {
        io: Box::new(ours),
        buffer: BytesMut::with_capacity(READ_BYTES),
        heard: Heard::now(),
        cancelling: Cancelling {
            side: Side::Peer,
            to: Arc::new(to),
            process: 0,
            secret: 0,
        },
    };
    (WalStream { wire, origin }, theirs)
}

fn message(length: usize) -> Vec<u8> {
    let mut message = vec![b'd'];
    message.extend((4 + 25 + length as u32).to_be_bytes());
    message.push(b'w');
    message.extend([0; 24]);
    message.extend(vec![b'x'; length]);
    message
}

/// Returns the bytes that messages of this length keep in memory, for each byte of theirs; each
/// message was read by itself.
async fn kept(length: usize, number: usize) -> f64 {
    let (mut stream, mut server) = stream();
    let mut frames = Vec::new();
    for _ in 0..number {
        let sent = server.write_all(&message(length)).await;
        sent.expect("the pipe takes it");
        match stream.next().await {
            Ok(Arrived::Data { bytes, .. }) => frames.push(bytes),
            _ => panic!("no data"),
        }
    }
    drop(stream);
    let held = |frame: Bytes| {
        assert_eq!(frame.len(), length);
        // Nobody else holds the message: its capacity is the memory that it keeps.
        frame.try_into_mut().expect("its only holder").capacity()
    };
    let held: usize = frames.into_iter().map(held).sum();
    held as f64 / (length * number) as f64
}

/// Messages may wait for days at the gate, and the spool counts only their own bytes.
#[tokio::test]
async fn messages_that_come_one_by_one_keep_little_more_than_their_bytes() {
    for length in [60, 1000, COPIED_MESSAGE_BYTES - 26] {
        let kept = kept(length, 500).await;
        assert!(kept < 1.1, "{kept} bytes for each of {length}");
    }
}
