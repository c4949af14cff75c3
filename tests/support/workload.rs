//! Builder at work on the primary: several connections, random transactions, and a record of
//! everything that went wrong.
//!
//! A statement may fail only because a fault of ours strikes its server. Any other failure,
//! interruption or long wait for a lock is harm done by the service, and is kept so that the test
//! fails with it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::faults::Server;
use super::history::History;
use super::transactions::{Deed, Hand};
use super::weather::Weather;
use super::{Cluster, Error, Factory, Result, Site, wait_until};

/// Time after which a wait for a lock counts as harm.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
/// Maximum time of one whole transaction, on a busy machine.
const SLOW_DEED: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Work,
    /// Finish the open transaction, and disconnect.
    Rest,
    End,
}

struct Shared {
    cluster: Cluster,
    weather: Arc<Weather>,
    harm: Mutex<Vec<String>>,
    done: Mutex<BTreeMap<Deed, u64>>,
    troubles: AtomicU64,
    resting: AtomicU64,
    longest_pause: AtomicU64,
}

pub struct Workload {
    shared: Arc<Shared>,
    wish: watch::Sender<Wish>,
    hands: Vec<JoinHandle<()>>,
}

/// Makes the origins in which the hands work. This comes before the history begins, and is done by
/// hands that the history does not know.
pub async fn prepare(site: &Site, seed: u64, hands: usize) -> Result<()> {
    let mut factory = Factory::new(seed);
    factory.origin(&site.primary, "core").await?;
    factory.origin(&site.primary, "bulk").await?;
    for number in 0..hands {
        factory.origin(&site.primary, &format!("w{number}")).await?;
    }
    Ok(())
}

impl Workload {
    /// Starts the workload. `pause`: the longest pause between two transactions of one hand.
    pub fn start(
        site: &Site,
        seed: u64,
        hands: usize,
        pause: Duration,
        history: &Arc<History>,
        weather: &Arc<Weather>,
    ) -> Self {
        let shared = Arc::new(Shared {
            cluster: site.primary.clone(),
            weather: weather.clone(),
            harm: Mutex::default(),
            done: Mutex::default(),
            troubles: AtomicU64::new(0),
            resting: AtomicU64::new(0),
            longest_pause: AtomicU64::new(pause.as_millis() as u64),
        });
        let (wish, _) = watch::channel(Wish::Work);
        let hands = (0..hands)
            .map(|number| {
                let hand = Hand::new(number, seed, &site.primary, history);
                tokio::spawn(work(hand, shared.clone(), wish.subscribe()))
            })
            .collect();
        Self {
            shared,
            wish,
            hands,
        }
    }

    /// Pauses the workload. Returns when no transaction is open and no session either.
    pub async fn rest(&self) {
        self.wish.send_replace(Wish::Rest);
        let wanted = self.hands.len() as u64;
        wait_until(
            "the workload rests",
            Duration::from_secs(150),
            async || match self.shared.resting.load(Ordering::SeqCst) {
                resting if resting == wanted => Ok(()),
                resting => Err(format!("{resting} of {wanted} rest").into()),
            },
        )
        .await;
    }

    pub fn resume(&self) {
        self.wish.send_replace(Wish::Work);
    }

    pub async fn stop(&mut self) {
        self.wish.send_replace(Wish::End);
        for hand in self.hands.drain(..) {
            hand.await.expect("no hand panics");
        }
    }

    /// Returns the harm that the service did to Builder.
    pub fn harm(&self) -> Vec<String> {
        self.shared.harm.lock().expect("the harm's lock").clone()
    }

    pub fn note_harm(&self, text: String) {
        self.shared.harm.lock().expect("the harm's lock").push(text);
    }

    /// Returns the number of transactions by kind, without those that a fault struck.
    pub fn done(&self) -> BTreeMap<Deed, u64> {
        self.shared.done.lock().expect("the counters' lock").clone()
    }

    /// Returns the number of transactions that a fault struck.
    pub fn troubles(&self) -> u64 {
        self.shared.troubles.load(Ordering::Relaxed)
    }
}

async fn work(mut hand: Hand, shared: Arc<Shared>, mut wish: watch::Receiver<Wish>) {
    let mut session: Option<Client> = None;
    loop {
        let wanted = *wish.borrow_and_update();
        match wanted {
            Wish::End => return,
            Wish::Rest => {
                if let Some(client) = session.take() {
                    hang_up(client).await;
                }
                shared.resting.fetch_add(1, Ordering::SeqCst);
                let _ = wish.wait_for(|wish| *wish != Wish::Rest).await;
                shared.resting.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            Wish::Work => {}
        }
        let began = Instant::now();
        let client = match session.take() {
            Some(client) => client,
            None => match connect(&shared.cluster).await {
                Ok(client) => client,
                Err(error) => {
                    shared.judge(&hand.name, "connecting", &error, began);
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let deed = hand.choose();
        match hand.act(&client, deed).await {
            Ok(()) => {
                *shared
                    .done
                    .lock()
                    .expect("the counters' lock")
                    .entry(deed)
                    .or_default() += 1;
                shared.mind_the_time(&hand.name, deed, began);
                session = Some(client);
            }
            // The open transaction ends with its session.
            Err(error) => {
                shared.judge(&hand.name, &format!("{deed:?}"), &error, began);
                hang_up(client).await;
            }
        }
        let pause = hand.pause(shared.longest_pause.load(Ordering::Relaxed));
        tokio::time::sleep(pause).await;
    }
}

async fn connect(cluster: &Cluster) -> Result<Client> {
    let client = cluster.conn().await?;
    let patience = format!("SET lock_timeout = {}", LOCK_PATIENCE.as_millis());
    client.batch_execute(&patience).await?;
    Ok(client)
}

/// Closes a session. Returns when the server has ended it, or soon after.
async fn hang_up(client: Client) {
    drop(client);
    tokio::time::sleep(Duration::from_millis(5)).await;
}

impl Shared {
    fn judge(&self, who: &str, what: &str, error: &Error, began: Instant) {
        let sql = error.downcast_ref::<tokio_postgres::Error>();
        let server = match sql {
            Some(_) => Server::PrimaryDatastore,
            None => Server::PrimaryStore,
        };
        // Two of the workload's own names are equal: this is nobody's fault.
        if sql.and_then(|error| error.code()) == Some(&SqlState::UNIQUE_VIOLATION) {
            return;
        }
        self.troubles.fetch_add(1, Ordering::Relaxed);
        if !self.weather.excuses(server, began) {
            let text = format!(
                "{who}: {what} failed on the primary after {:?}: {error}: {error:?}",
                began.elapsed()
            );
            self.harm.lock().expect("the harm's lock").push(text);
        }
    }

    fn mind_the_time(&self, who: &str, deed: Deed, began: Instant) {
        let took = began.elapsed();
        let struck = [Server::PrimaryDatastore, Server::PrimaryStore]
            .into_iter()
            .any(|server| self.weather.excuses(server, began));
        if took > SLOW_DEED && !struck {
            let text = format!("{who}: {deed:?} took {took:?} on the primary");
            self.harm.lock().expect("the harm's lock").push(text);
        }
    }
}
