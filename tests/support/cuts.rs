//! Cuts two sites off from each other and from their one bucket, at random, and has the other one
//! take over. At no moment do both accept writes, and the takeovers that must succeed do.
//!
//! The oracle looks at the writes of plain clients alone, on one monotonic clock. Only the
//! operator, who is also played here, reads what the services say.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rustix::process::Signal;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio_postgres::Client;

use super::follow::until_following;
use super::http_fault::{Fault, HttpFault};
use super::pair::{Pair, is_writable};
use super::proxy::{Mode, Proxy};
use super::service::SOON;
use super::{Cluster, Result, Service, wait_until};

/// Life of the lease. It is short, so that a round is.
const TTL: Duration = Duration::from_secs(2);
/// Pause between two rows of one client.
const PAUSE: Duration = Duration::from_millis(20);
/// One row of so many has an object beside it.
const OBJECT_EVERY: u64 = 10;
/// Maximum time for a takeover to end in one way or the other: the wait for an answer, and the time
/// limits of a store that does not answer.
const ENDS_LIMIT: Duration = Duration::from_secs(180);

/// The two sites: A is site 0.
const NAMES: [&str; 2] = ["A", "B"];

/// A fault of one round. *Old* is the acting primary, *new* the cluster that is to take over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Cut {
    /// The new site does not reach the old datastore.
    NewToOld,
    /// The old site does not reach the new datastore.
    OldToNew,
    /// Neither reaches the other.
    Sites,
    /// The line between the sites is silent.
    SitesSilent,
    /// The old site does not reach the store.
    OldFromStore,
    /// The new site does not reach the store.
    NewFromStore,
    /// Requests to the store have their effect, and every second answer is lost.
    AnswersLost,
    /// The store answers the old site after 30 s.
    SlowForOld,
    /// The old service is killed, and the sites do not reach each other.
    OldKilled,
    /// The old service is frozen for three lives of a lease, and the sites do not reach each other.
    OldFrozen,
}

const CUTS: [Cut; 10] = [
    Cut::NewToOld,
    Cut::OldToNew,
    Cut::Sites,
    Cut::SitesSilent,
    Cut::OldFromStore,
    Cut::NewFromStore,
    Cut::AnswersLost,
    Cut::SlowForOld,
    Cut::OldKilled,
    Cut::OldFrozen,
];

/// The required end of a takeover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Must {
    Succeed,
    /// Hold, until an operator consents.
    Wait,
    Either,
}

/// A write that a client was told to have succeeded.
#[derive(Debug, Clone, Copy)]
struct Write {
    site: usize,
    began: Instant,
    ended: Instant,
}

/// The number of rounds by their cut and end.
pub type Kinds = BTreeMap<String, usize>;

struct Clients {
    stop: Arc<AtomicBool>,
    writes: Arc<Mutex<Vec<Write>>>,
    tasks: JoinSet<()>,
}

impl Clients {
    /// Starts two clients at each site: one keeps its session, the other makes a new one each time.
    fn start(sites: [&Cluster; 2]) -> Clients {
        let stop = Arc::new(AtomicBool::new(false));
        let writes = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = JoinSet::new();
        for (site, cluster) in sites.into_iter().enumerate() {
            for keeps in [true, false] {
                let (cluster, stop, writes) = (cluster.clone(), stop.clone(), writes.clone());
                tasks.spawn(async move {
                    let mut session: Option<Client> = None;
                    let mut row = 0_u64;
                    while !stop.load(Ordering::Relaxed) {
                        tokio::time::sleep(PAUSE).await;
                        let client = match session.take() {
                            Some(client) if keeps => client,
                            _ => match cluster.conn().await {
                                Ok(client) => client,
                                Err(_) => continue,
                            },
                        };
                        row += 1;
                        let name = format!("{}-{keeps}-{row}", NAMES[site]);
                        let began = Instant::now();
                        let sql = "INSERT INTO accounts (name, email) VALUES ($1, $1)";
                        if client.execute(sql, &[&name]).await.is_ok() {
                            let ended = Instant::now();
                            let write = Write { site, began, ended };
                            writes.lock().expect("its lock").push(write);
                            if row.is_multiple_of(OBJECT_EVERY) {
                                let key = format!("written/{name}");
                                let _ = cluster.put(&key, name).await;
                            }
                            session = Some(client);
                        } else if !client.is_closed() {
                            // A pool keeps a session whose transaction was refused.
                            session = Some(client);
                        }
                    }
                });
            }
        }
        Clients {
            stop,
            writes,
            tasks,
        }
    }

    /// Returns the writes since then, in the order in which they were acknowledged.
    fn since(&self, then: Instant) -> Vec<Write> {
        let writes = self.writes.lock().expect("its lock");
        let mut found: Vec<Write> = writes.iter().filter(|w| w.ended >= then).copied().collect();
        found.sort_by_key(|write| write.ended);
        found
    }

    async fn until_written(&self, site: usize, what: &str) {
        let then = Instant::now();
        wait_until(what, SOON, || async {
            let found = self.since(then).iter().filter(|w| w.site == site).count();
            match found {
                0..3 => Err(format!("{found} writes at site {}", NAMES[site]).into()),
                _ => Ok(()),
            }
        })
        .await;
    }

    async fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Returns the violation of a round in which only `new` may take over: a write at the old site began
/// after one at the new site was acknowledged.
fn two_writers(writes: &[Write], new: usize) -> Option<String> {
    let first = writes.iter().find(|write| write.site == new)?;
    let late = writes
        .iter()
        .find(|write| write.site != new && write.began > first.ended)?;
    Some(format!(
        "site {} acknowledged a write, and {:?} later a write at site {} began and was acknowledged",
        NAMES[new],
        late.began - first.ended,
        NAMES[late.site]
    ))
}

/// The lines of one site.
struct Lines {
    /// To the other site's datastore.
    peer: Proxy,
    store: HttpFault,
}

struct World<'a> {
    pair: &'a Pair,
    lines: [Lines; 2],
    services: [Option<Service<'a>>; 2],
    isolated: &'static str,
}

impl<'a> World<'a> {
    /// Returns the configuration of one site.
    fn config(&self, site: usize, role: &str) -> String {
        let lines = &self.lines[site];
        let store = lines.store.endpoint();
        format!(
            "{role}\nsite = \"{}\"\n[artifacts]\nmode = \"shared\"\nlease_ttl = \"{}s\"\nisolated = \"{}\"\n\
             [local.s3]\nendpoint = \"{store}\"\n[peer.s3]\nendpoint = \"{store}\"\n[peer.datastore]\nport = {}\n\
             [takeover]\nfence_retry = \"1s\"",
            NAMES[site],
            TTL.as_secs(),
            self.isolated,
            lines.peer.port()
        )
    }

    fn site(&self, site: usize) -> &'a super::Site {
        match site {
            0 => &self.pair.back,
            _ => &self.pair.there,
        }
    }

    fn service(&self, site: usize) -> &Service<'a> {
        self.services[site].as_ref().expect("it runs")
    }

    /// Starts or reconfigures the service of a site.
    fn set(&mut self, site: usize, role: &str) {
        let config = self.config(site, role);
        match &self.services[site] {
            Some(service) => service.reconfigure(&config),
            None => self.services[site] = Some(Service::start(self.site(site), &config)),
        }
    }

    async fn strike(&mut self, cut: Cut, old: usize) -> Result<()> {
        let new = 1 - old;
        match cut {
            Cut::NewToOld => self.lines[new].peer.lose().await,
            Cut::OldToNew => self.lines[old].peer.lose().await,
            Cut::Sites | Cut::OldKilled | Cut::OldFrozen => {
                self.lines[new].peer.lose().await;
                self.lines[old].peer.lose().await;
            }
            Cut::SitesSilent => {
                self.lines[new].peer.set(Mode::Hold).await;
                self.lines[old].peer.set(Mode::Hold).await;
            }
            Cut::OldFromStore => self.lines[old].store.set(|_| Fault::Drop),
            Cut::NewFromStore => self.lines[new].store.set(|_| Fault::Drop),
            Cut::AnswersLost => {
                for lines in &self.lines {
                    let turn = AtomicBool::new(false);
                    lines
                        .store
                        .set(move |_| match turn.fetch_xor(true, Ordering::Relaxed) {
                            true => Fault::ForwardThenDrop,
                            false => Fault::Forward,
                        });
                }
            }
            Cut::SlowForOld => {
                let delay = Duration::from_secs(30);
                self.lines[old].store.set(move |_| Fault::Delay(delay));
            }
        }
        match cut {
            Cut::OldKilled => {
                self.service(old).running.signal(Signal::KILL);
                self.services[old] = None;
            }
            Cut::OldFrozen => self.service(old).running.sigstop(),
            _ => {}
        }
        Ok(())
    }

    async fn heal(&mut self) {
        for lines in &self.lines {
            lines.store.set(|_| Fault::Forward);
            lines.peer.set(Mode::Pass).await;
            // Nothing of a silent line may arrive late.
            lines.peer.cut();
        }
    }
}

fn must(cut: Cut, also: Option<Cut>, promise: &str) -> Must {
    let cuts = [Some(cut), also];
    let has = |of: Cut| cuts.contains(&Some(of));
    let is_hidden = has(Cut::NewToOld)
        || has(Cut::Sites)
        || has(Cut::SitesSilent)
        || has(Cut::OldKilled)
        || has(Cut::OldFrozen);
    let is_dumb = has(Cut::OldKilled) || has(Cut::OldFrozen);
    let is_slow = has(Cut::OldFromStore) || has(Cut::SlowForOld);
    if has(Cut::NewFromStore) {
        return Must::Wait;
    }
    if has(Cut::AnswersLost) {
        return Must::Either;
    }
    match (is_hidden, is_dumb, is_slow) {
        // The old datastore is fenced through the other line.
        (false, ..) => Must::Succeed,
        (true, true, _) => Must::Wait,
        (true, false, true) if promise == "fence" => Must::Succeed,
        (true, false, true) => Must::Wait,
        (true, false, false) => Must::Succeed,
    }
}

/// Runs that number of rounds on one pair of sites. Returns what happened how often.
pub async fn trial(seed: u64, rounds: usize, talks: bool) -> Result<Kinds> {
    let mut random = StdRng::seed_from_u64(seed);
    let pair = Pair::of_one_bucket(&format!("cuts_{seed}")).await?;
    let (a, b) = (pair.there.primary.clone(), pair.there.spare.clone());
    let store = a.minio.port();
    let lines = [
        Lines {
            peer: Proxy::start(b.pg.port()).await?,
            store: HttpFault::start(store).await?,
        },
        Lines {
            peer: Proxy::start(a.pg.port()).await?,
            store: HttpFault::start(store).await?,
        },
    ];
    let mut world = World {
        pair: &pair,
        lines,
        services: [None, None],
        isolated: "go_on",
    };
    world.set(0, "role = \"primary\"");
    until_permitted(world.service(0)).await;
    world.set(1, "role = \"spare\"");
    until_following(world.service(1)).await;
    let clients = Clients::start([&a, &b]);
    let mut kinds = Kinds::new();
    let mut old = 0;
    for round in 1..=rounds {
        let cut = *CUTS.choose(&mut random).expect("there are some");
        let also = random
            .random_bool(0.3)
            .then(|| *CUTS.choose(&mut random).expect("there are some"));
        // A dead or frozen holder keeps no promise, so it makes none here.
        let dumb = |cut: Cut| matches!(cut, Cut::OldKilled | Cut::OldFrozen);
        let promises = !dumb(cut) && !also.is_some_and(dumb) && random.random_bool(0.5);
        world.isolated = if promises { "fence" } else { "go_on" };
        let head_start = Duration::from_millis(random.random_range(0..2500));
        let case = format!(
            "seed {seed}, round {round}: {cut:?} {also:?}, the holder promises {}, at {}",
            world.isolated, NAMES[old]
        );
        let (taken, what) = one_round(&mut world, &clients, old, (cut, also), head_start, &case)
            .await
            .map_err(|error| format!("{case}: {error}"))?;
        if talks {
            println!("{case}: {what}");
        }
        *kinds.entry(format!("{cut:?} {what}")).or_default() += 1;
        if taken {
            old = 1 - old;
        }
    }
    clients.end().await;
    Ok(kinds)
}

async fn until_permitted(service: &Service<'_>) -> Value {
    service
        .until("the lease is granted", |status| {
            status["lease"]["permitted"] == true
        })
        .await
}

/// Runs one cut, one takeover, and the heal. Returns whether the new site took over, and in words
/// what happened.
async fn one_round(
    world: &mut World<'_>,
    clients: &Clients,
    old: usize,
    (cut, also): (Cut, Option<Cut>),
    head_start: Duration,
    case: &str,
) -> Result<(bool, String)> {
    let new = 1 - old;
    let clusters = [&world.pair.there.primary, &world.pair.there.spare];
    world.set(old, "role = \"primary\"");
    let promise = world.isolated;
    world
        .service(old)
        .until("the promise is written", |status| {
            status["lease"]["isolated"] == promise && status["lease"]["permitted"] == true
        })
        .await;
    until_following(world.service(new)).await;
    clients.until_written(old, "the primary is at work").await;
    let status = world.service(new).status().await?;
    let epoch = status["role"]["next_epoch"].as_i64().ok_or("no epoch")?;
    let began = Instant::now();
    world.strike(cut, old).await?;
    let dumb = |cut| matches!(cut, Cut::OldKilled | Cut::OldFrozen);
    if let Some(also) = also.filter(|also| *also != cut)
        && !(dumb(also) && dumb(cut))
    {
        world.strike(also, old).await?;
    }
    tokio::time::sleep(head_start).await;
    world.set(new, &format!("role = \"primary\"\nforce_epoch = {epoch}"));
    let ended = until_ended(world.service(new), epoch, must(cut, also, promise)).await?;
    let mut taken = ended == "taken";
    if !taken && is_writable(clusters[new]).await {
        return Err(format!(
            "site {} waits for a consent, and accepts writes",
            NAMES[new]
        )
        .into());
    }
    // A frozen holder wakes after three lives of the lease, and whatever it does is seen.
    tokio::time::sleep((TTL * 3).saturating_sub(began.elapsed())).await;
    if let Some(service) = &world.services[old] {
        service.running.sigcont();
    }
    tokio::time::sleep(TTL).await;
    if !taken {
        // The wish is withdrawn. A holder that has woken up may have answered before that.
        world.set(new, "role = \"spare\"");
        world.heal().await;
        world
            .service(new)
            .until("the wish is withdrawn", |status| {
                // A takeover that is being undone holds, and a new primary is one.
                let is_over = status["hold"].is_null() && status["state"] == "following";
                let was_faster = status["role"]["actual"] == "primary";
                status["role"]["wanted"] == "spare" && (is_over || was_faster)
            })
            .await;
        // The status is older than the commit of a promotion.
        taken = is_on_record_as_primary(clusters[new]).await?;
    }
    let writes = clients.since(began);
    if !taken && let Some(write) = writes.iter().find(|write| write.site == new) {
        return Err(format!("site {} was not promoted, and took {write:?}", NAMES[new]).into());
    }
    if let Some(violation) = two_writers(&writes, new) {
        return Err(violation.into());
    }
    world.heal().await;
    if taken {
        clients
            .until_written(new, &format!("{case}: the new primary is at work"))
            .await;
        world.set(new, "role = \"primary\"");
        world.set(old, "role = \"spare\"");
        let service = world.service(old);
        service
            .until("it came back", |status| status["role"]["actual"] == "spare")
            .await;
        // The new primary may fence it once more, which ends the session of the verb.
        let site = world.site(old);
        wait_until("it is prepared", SOON, || async {
            let output = site.warm_spare(&["prepare"]).await;
            match output.code {
                Some(0) => Ok(()),
                _ => Err(output.to_string().into()),
            }
        })
        .await;
        until_following(world.service(old)).await;
    } else {
        world.set(old, "role = \"primary\"");
        until_permitted(world.service(old)).await;
        until_following(world.service(new)).await;
        clients
            .until_written(old, &format!("{case}: the old primary is at work"))
            .await;
    }
    // In the whole round there was no moment with two writers.
    if let Some(violation) = two_writers(&clients.since(began), new) {
        return Err(violation.into());
    }
    let fenced = if taken { old } else { new };
    if is_writable(clusters[fenced]).await {
        return Err(format!("site {} is a spare, and accepts writes", NAMES[fenced]).into());
    }
    let late = taken && ended != "taken";
    Ok((
        taken,
        if late {
            format!("{ended}, then taken")
        } else {
            ended
        },
    ))
}

async fn is_on_record_as_primary(cluster: &Cluster) -> Result<bool> {
    let state = cluster.pg.conn("warm_spare").await?;
    let row = state
        .query_one(
            "SELECT role IS NOT DISTINCT FROM 'primary' FROM cluster",
            &[],
        )
        .await?;
    Ok(row.get(0))
}

/// Waits until the takeover has succeeded, or holds for an operator.
async fn until_ended(service: &Service<'_>, epoch: i64, must: Must) -> Result<String> {
    let began = Instant::now();
    let mut last = Value::Null;
    while began.elapsed() < ENDS_LIMIT {
        let status = service.status().await.unwrap_or_default();
        if status["state"] == "primary" && status["role"]["epoch"] == epoch {
            return match must {
                Must::Wait => Err(format!("it was promoted, and must not: {status:#}").into()),
                _ => Ok("taken".into()),
            };
        }
        let reason = status["hold"]["reason"].as_str().unwrap_or_default();
        let waits = ["lease_unanswered", "lease_held"].contains(&reason);
        if waits && must != Must::Succeed {
            return Ok(reason.to_string());
        }
        last = status;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let said = service.running.last_said(25).join("\n");
    Err(format!("the takeover came to no end ({must:?}): {last:#}\n{said}").into())
}
