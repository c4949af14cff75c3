//! Cancels a command of the replication protocol on the server if nobody waits for it any more.

use super::walsender::wire::{Trouble, connect};
use crate::config::Datastore;
use crate::domain::Side;
use bytes::BytesMut;
use postgres_protocol::message::frontend;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Maximum time to wait for the server's answer to a cancel request.
pub(in crate::cluster) const CANCELLED: Duration = Duration::from_secs(5);
/// Maximum time that a process waits for pending cancel requests when it ends.
const EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// Number of cancel requests whose threads have not ended.
static PENDING_REQUESTS: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

/// Waits, before the process ends, for the cancel requests of futures that were dropped. It must
/// not be called from a thread of the runtime.
pub fn last_words() {
    let (number, changed) = &PENDING_REQUESTS;
    let number = number.lock().expect("no holder panics");
    let waited = changed.wait_timeout_while(number, EXIT_TIMEOUT, |number| *number > 0);
    drop(waited);
}

/// The process of a session on the server, and its secret: with both the server is asked to cancel
/// the session's command.
#[derive(Clone)]
pub(in crate::cluster) struct Cancelling {
    pub side: Side,
    pub to: Arc<Datastore>,
    pub process: i32,
    pub secret: i32,
}

impl Cancelling {
    /// Requests the cancel, as a best effort: a server that does not receive it has its own limits.
    pub(crate) async fn cancel(&self) {
        let asking = async {
            let (mut io, _) = connect(self.side, &self.to).await?;
            let mut out = BytesMut::new();
            frontend::cancel_request(self.process, self.secret, &mut out);
            io.write_all(&out).await?;
            io.flush().await?;
            // The server closes the connection when it has passed the request on.
            let _ = io.read_u8().await;
            Ok::<(), Trouble>(())
        };
        if !matches!(tokio::time::timeout(CANCELLED, asking).await, Ok(Ok(()))) {
            log::debug!("{}: a command could not be cancelled", self.side);
        }
    }
}

/// A command that has no answer yet. If it is dropped, it is cancelled on the server, which may
/// wait in its lock manager and would not notice that the connection is closed.
pub(in crate::cluster) struct Unanswered(Option<Cancelling>);

impl Unanswered {
    pub(crate) fn of(cancelling: &Cancelling) -> Self {
        Unanswered(Some(cancelling.clone()))
    }

    pub(crate) fn answered(mut self) -> Cancelling {
        self.0.take().expect("it is taken once")
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        let Some(cancelling) = self.0.take() else {
            return;
        };
        // The request runs on its own thread, because the runtime may be at its end. Nobody waits
        // for it here, because this thread is the runtime's.
        let (number, changed) = &PENDING_REQUESTS;
        *number.lock().expect("no holder panics") += 1;
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            if let Ok(runtime) = runtime {
                runtime.block_on(cancelling.cancel());
            }
            *number.lock().expect("no holder panics") -= 1;
            changed.notify_all();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SslMode;
    use std::io::Read;
    use std::net::TcpListener;
    use std::time::Instant;

    /// A server that takes the request and does not pass it on keeps no thread of the runtime.
    #[test]
    fn a_dropped_command_is_cancelled_and_nobody_waits_for_it() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let to = Datastore {
            host: "127.0.0.1".into(),
            port: listener.local_addr().expect("an address").port(),
            user: String::new(),
            database: String::new(),
            password: None,
            ssl_mode: SslMode::Disable,
            ssl_root_cert: None,
            ssl_cert: None,
            ssl_key: None,
            source: "default",
        };
        let cancelling = Cancelling {
            side: Side::Peer,
            to: Arc::new(to),
            process: 7,
            secret: 9,
        };
        let begun = Instant::now();
        drop(Unanswered::of(&cancelling));
        let (mut server, _) = listener.accept().expect("it connects");
        let mut request = [0; 16];
        server.read_exact(&mut request).expect("a request");
        assert_eq!(request[8..12], 7_i32.to_be_bytes());
        // Nothing was answered yet.
        assert!(begun.elapsed() < EXIT_TIMEOUT, "{:?}", begun.elapsed());
        drop(server);
        last_words();
        assert_eq!(*PENDING_REQUESTS.0.lock().expect("no holder panics"), 0);
    }
}
