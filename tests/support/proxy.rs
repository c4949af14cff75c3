//! A TCP proxy on loopback whose connections can be held, refused and cut at run time.

use std::collections::VecDeque;
use std::future::pending;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Result;

/// Delay of every piece of up to 64 KiB on a slow line.
const SLOW_PIECE: Duration = Duration::from_millis(25);

/// Maximum number of bytes that are on their way on a far line, in one direction of a connection.
const FAR_BYTES: usize = 64 << 20;

/// Time of a byte at 1 Mbit/s.
const NARROW_BYTE: Duration = Duration::from_micros(8);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Pass,
    /// The port is closed: new connections are refused, existing ones go on.
    Refuse,
    /// Everything is accepted and nothing is forwarded, on existing connections too, including
    /// their end.
    Hold,
    /// Every piece is delayed, in both directions.
    Slow,
    /// A line of 1 Mbit/s.
    Narrow,
    /// Everything takes this time in each direction, and nothing waits for the bytes before it. The
    /// opening of a connection takes it twice.
    Far(Duration),
}

/// The proxy ends when this is dropped.
pub struct Proxy {
    port: u16,
    control: watch::Sender<Control>,
    counts: Arc<Counts>,
}

#[derive(Debug, Clone, Copy)]
struct Control {
    mode: Mode,
    /// A connection older than the newest cut is closed.
    cuts: u64,
    /// A connection older than the newest freeze forwards nothing more.
    freezes: u64,
    /// The mode that the listener has taken up.
    listening: bool,
}

#[derive(Default)]
struct Counts {
    connections: AtomicU64,
    to_server: AtomicU64,
    to_client: AtomicU64,
    /// One for each connection, in the order in which they were accepted.
    turns: Mutex<Vec<Arc<Turns>>>,
}

/// The turns of one connection, as its client sees them.
struct Turns {
    /// 0: the server has not accepted it yet.
    port: AtomicU16,
    number: AtomicU64,
    /// True: the next bytes of the client begin another turn.
    answered: AtomicBool,
}

impl Proxy {
    /// Starts a proxy in front of `127.0.0.1:port`.
    pub async fn start(port: u16) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?.into_std()?;
        let mine = listener.local_addr()?.port();
        let (control, _) = watch::channel(Control {
            mode: Mode::Pass,
            cuts: 0,
            freezes: 0,
            listening: true,
        });
        let counts = Arc::new(Counts::default());
        let (weak, count) = (control.subscribe(), counts.clone());
        let ears = control.clone();
        background().spawn(async move {
            let listener = TcpListener::from_std(listener).expect("it is a listener");
            listen(listener, mine, port, weak, ears, count).await;
        });
        Ok(Self {
            port: mine,
            control,
            counts,
        })
    }

    /// Returns the configuration with which the peer's datastore is reached through it, after
    /// `extra`.
    pub fn to_peer(&self, extra: &str) -> String {
        format!("{extra}\n[peer.datastore]\nport = {}", self.port())
    }

    /// Loses the line: existing connections are cut, and new ones are refused.
    pub async fn lose(&self) {
        self.set(Mode::Refuse).await;
        self.cut();
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sets the mode. Returns when it applies to new connections too.
    pub async fn set(&self, mode: Mode) {
        self.control.send_modify(|control| control.mode = mode);
        let settled = |control: &Control| control.listening == (control.mode != Mode::Refuse);
        let mut changes = self.control.subscribe();
        let waited = tokio::time::timeout(super::SERVER_DEADLINE, changes.wait_for(settled)).await;
        assert!(
            waited.is_ok(),
            "the proxy's port was taken by somebody else"
        );
    }

    /// Closes all existing connections.
    pub fn cut(&self) {
        self.control.send_modify(|control| control.cuts += 1);
    }

    /// Stops all existing connections: nothing comes through any more, not even their end. New ones
    /// are forwarded.
    pub fn freeze(&self) {
        self.control.send_modify(|control| control.freezes += 1);
    }

    /// Returns the number of connections accepted until now.
    pub fn connections(&self) -> u64 {
        self.counts.connections.load(Ordering::Relaxed)
    }

    /// Returns the bytes forwarded until now: (to the server, to the client).
    pub fn bytes(&self) -> (u64, u64) {
        let to_server = self.counts.to_server.load(Ordering::Relaxed);
        (to_server, self.counts.to_client.load(Ordering::Relaxed))
    }

    /// Returns the turns of each connection until now, in the order in which they were accepted,
    /// each with the port from which the server sees it. The client begins a turn when it sends for the first time, and when it sends after bytes of
    /// the server have come to it: a client that waits for each answer needs as many round trips.
    pub fn turns(&self) -> Vec<(u16, u64)> {
        let all = self.counts.turns.lock().expect("no holder panics");
        let turns = all.iter().map(|turns| {
            let port = turns.port.load(Ordering::Relaxed);
            (port, turns.number.load(Ordering::Relaxed))
        });
        turns.collect()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // The listener holds a sender as well, so the end must be announced.
        self.control.send_modify(|control| control.cuts = u64::MAX);
    }
}

/// Returns the runtime of the proxies: a test that blocks its own runtime must not stop the line
/// that it tests.
pub(super) fn background() -> tokio::runtime::Handle {
    static RUNTIME: std::sync::OnceLock<tokio::runtime::Runtime> = std::sync::OnceLock::new();
    let make = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime")
    };
    RUNTIME.get_or_init(make).handle().clone()
}

async fn listen(
    listener: TcpListener,
    mine: u16,
    server: u16,
    mut control: watch::Receiver<Control>,
    ears: watch::Sender<Control>,
    counts: Arc<Counts>,
) {
    let mut listener = Some(listener);
    loop {
        let now = *control.borrow_and_update();
        if now.cuts == u64::MAX {
            return;
        }
        if now.mode == Mode::Refuse {
            if let Some(listener) = listener.take() {
                // Closing is not enough: a child that is being started just now has a copy until it
                // runs its own program.
                let _ = rustix::net::shutdown(&listener, rustix::net::Shutdown::Both);
            }
        } else if listener.is_none() {
            listener = TcpListener::bind(("127.0.0.1", mine)).await.ok();
        }
        if now.listening != listener.is_some() {
            let listening = listener.is_some();
            ears.send_modify(|control| control.listening = listening);
        }
        let lost = listener.is_none() && now.mode != Mode::Refuse;
        let accept = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None if lost => {
                    // Another program has the port; try again.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    Err(std::io::ErrorKind::AddrInUse.into())
                }
                None => pending().await,
            }
        };
        tokio::select! {
            accepted = accept => if let Ok((client, _)) = accepted {
                counts.connections.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(serve(client, server, control.clone(), counts.clone()));
            },
            _ = control.changed() => {}
        }
    }
}

async fn serve(
    client: TcpStream,
    server: u16,
    mut control: watch::Receiver<Control>,
    counts: Arc<Counts>,
) {
    let (born, warm) = (control.borrow().cuts, control.borrow().freezes);
    let (pump, mut cut, mut frozen) = (control.clone(), control.clone(), control.clone());
    let turns = counts.new_line();
    let forward = async {
        if control
            .wait_for(|control| control.mode != Mode::Hold)
            .await
            .is_err()
        {
            return;
        }
        let mode = control.borrow().mode;
        if let Mode::Far(time) = mode {
            // The kernel has accepted it already.
            tokio::time::sleep(2 * time).await;
        }
        let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else {
            return;
        };
        if let Ok(address) = server.local_addr() {
            turns.port.store(address.port(), Ordering::Relaxed);
        }
        let _ = client.set_nodelay(true);
        let _ = server.set_nodelay(true);
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        let (of_client, of_server) = (Way::ToServer(&turns), Way::ToClient(&turns));
        tokio::join!(
            copy(
                from_client,
                to_server,
                pump.clone(),
                of_client,
                &counts.to_server
            ),
            copy(from_server, to_client, pump, of_server, &counts.to_client)
        );
    };
    tokio::pin!(forward);
    tokio::select! {
        () = &mut forward => return,
        _ = cut.wait_for(|control| control.cuts > born) => return,
        _ = frozen.wait_for(|control| control.freezes > warm) => {}
    }
    let _ = cut.wait_for(|control| control.cuts > born).await;
}

impl Counts {
    fn new_line(&self) -> Arc<Turns> {
        let turns = Arc::new(Turns {
            port: AtomicU16::new(0),
            number: AtomicU64::new(0),
            answered: AtomicBool::new(true),
        });
        let mut all = self.turns.lock().expect("no holder panics");
        all.push(turns.clone());
        turns
    }
}

/// A direction, with the turns that its bytes begin or end.
enum Way<'a> {
    ToServer(&'a Turns),
    ToClient(&'a Turns),
}

impl Way<'_> {
    fn came(&self) {
        if let Way::ToServer(turns) = self
            && turns.answered.swap(false, Ordering::Relaxed)
        {
            turns.number.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Notes that bytes are about to arrive.
    fn arrive(&self) {
        if let Way::ToClient(turns) = self {
            turns.answered.store(true, Ordering::Relaxed);
        }
    }
}

async fn copy(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    mut control: watch::Receiver<Control>,
    way: Way<'_>,
    count: &AtomicU64,
) {
    let mut buffer = vec![0; 64 << 10];
    // The pieces on a far line, with the time at which each arrives. An empty one is the end.
    let mut under_way: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let (mut bytes_under_way, mut ended) = (0, false);
    loop {
        let is_far = matches!(control.borrow().mode, Mode::Far(_));
        let reads = !ended && bytes_under_way < FAR_BYTES && (is_far || under_way.is_empty());
        let due = under_way.front().map(|(due, _)| *due);
        let arrival = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => pending().await,
            }
        };
        let piece = tokio::select! {
            read = from.read(&mut buffer), if reads => {
                let read = read.unwrap_or_default();
                ended = read == 0;
                if !ended {
                    way.came();
                }
                if let Mode::Far(time) = control.borrow().mode {
                    bytes_under_way += read;
                    under_way.push_back((Instant::now() + time, buffer[..read].to_vec()));
                    continue;
                }
                let takes = match control.borrow().mode {
                    Mode::Slow => SLOW_PIECE,
                    Mode::Narrow => NARROW_BYTE * read as u32,
                    _ => Duration::ZERO,
                };
                tokio::time::sleep(takes).await;
                buffer[..read].to_vec()
            },
            () = arrival => {
                let (_, piece) = under_way.pop_front().expect("it has arrived");
                bytes_under_way -= piece.len();
                piece
            },
        };
        let held = control.wait_for(|control| control.mode != Mode::Hold);
        if held.await.is_err() {
            return;
        }
        if piece.is_empty() {
            let _ = to.shutdown().await;
            return;
        }
        way.arrive();
        if to.write_all(&piece).await.is_err() {
            return;
        }
        count.fetch_add(piece.len() as u64, Ordering::Relaxed);
    }
}
