//! A command of the replication protocol that is not waited for any more is cancelled on the server.

use super::Side;
use super::walsender::{Trouble, connect};
use crate::config::Datastore;
use bytes::BytesMut;
use postgres_protocol::message::frontend;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// For the answer to a request to cancel.
pub(super) const CANCELLED: Duration = Duration::from_secs(5);
/// A request to cancel from a future that was dropped is waited for so long: the process may be about to end.
const LAST_WORD: Duration = Duration::from_secs(2);

/// By which the server is asked to give up what it does for a session: its process there, and the secret of it.
#[derive(Clone)]
pub(super) struct Cancelling {
    pub side: Side,
    pub to: Arc<Datastore>,
    pub process: i32,
    pub secret: i32,
}

impl Cancelling {
    /// Best effort: a server that does not hear it has its own bounds.
    pub async fn cancel(&self) {
        let asking = async {
            let mut io = connect(self.side, &self.to).await?;
            let mut out = BytesMut::new();
            frontend::cancel_request(self.process, self.secret, &mut out);
            io.write_all(&out).await?;
            io.flush().await?;
            // It closes the connection when the request is passed on.
            let _ = io.read_u8().await;
            Ok::<(), Trouble>(())
        };
        if !matches!(tokio::time::timeout(CANCELLED, asking).await, Ok(Ok(()))) {
            log::debug!("{}: a command could not be cancelled", self.side);
        }
    }
}

/// A command that has no answer yet. Dropped, it is cancelled on the server, which may wait in its lock manager and would
/// not notice that the connection is closed.
pub(super) struct Unanswered(Option<Cancelling>);

impl Unanswered {
    pub fn of(cancelling: &Cancelling) -> Self {
        Unanswered(Some(cancelling.clone()))
    }

    pub fn answered(mut self) -> Cancelling {
        self.0.take().expect("it is taken once")
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        let Some(cancelling) = self.0.take() else {
            return;
        };
        // On a thread of its own, for the runtime may be at its end.
        let (done, heard) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            if let Ok(runtime) = runtime {
                runtime.block_on(cancelling.cancel());
            }
            let _ = done.send(());
        });
        let _ = heard.recv_timeout(LAST_WORD);
    }
}
