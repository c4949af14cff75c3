//! Two clusters, each of which may be the primary, a service for each, and clients that write to
//! the one that accepts writes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio_postgres::Client;

use super::follow::{logical, prepare, until_following};
use super::service::SOON;
use super::{Cluster, Factory, Result, Service, Site, postgres, wait_until};

/// `there`: A is the primary and B its spare. `back`: the other way round.
pub struct Pair {
    pub there: Site,
    pub back: Site,
}

impl Pair {
    /// Starts a pair in which either can be followed; A is prepared, and holds some packages.
    pub async fn start(name: &str) -> Result<Pair> {
        Pair::prepared(name, logical()).await
    }

    /// Does the same with a primary of those settings.
    pub async fn prepared(name: &str, primary: postgres::Builder) -> Result<Pair> {
        let pair = Pair::with(name, primary).await?;
        prepare(&pair.there).await;
        Ok(pair)
    }

    /// Starts with A as it is, with some packages.
    pub async fn with(name: &str, primary: postgres::Builder) -> Result<Pair> {
        let site = Site::builder(name).primary(primary).spare(logical());
        let there = site.start().await?;
        Factory::seeded().fill(&there.primary, 8).await?;
        Pair::of(there)
    }

    /// Does the same with a store for each, so that each can be killed by itself.
    pub async fn of_own_stores(name: &str) -> Result<Pair> {
        let site = Site::builder(name).primary(logical()).spare(logical());
        let there = site.own_stores().start().await?;
        Factory::seeded().fill(&there.primary, 3).await?;
        prepare(&there).await;
        Pair::of(there)
    }

    /// Does the same with one bucket for both, on a store of its own.
    pub async fn of_one_bucket(name: &str) -> Result<Pair> {
        let site = Site::builder(name).primary(logical()).spare(logical());
        let there = site.own_stores().one_bucket().start().await?;
        Factory::seeded().fill(&there.primary, 3).await?;
        prepare(&there).await;
        Pair::of(there)
    }

    pub fn of(there: Site) -> Result<Pair> {
        let back = there.turned()?;
        Ok(Pair { there, back })
    }
}

/// The servers that a service may lose.
pub const STORES: [&str; 4] = ["primary.pg", "spare.pg", "primary.s3", "spare.s3"];

pub fn kill(site: &Site, store: &str) {
    match store {
        "primary.pg" => site.primary.pg.kill9(),
        "spare.pg" => site.spare.pg.kill9(),
        "primary.s3" => site.primary.minio.kill9(),
        _ => site.spare.minio.kill9(),
    }
}

pub async fn start_again(site: &Site, store: &str) -> Result<()> {
    match store {
        "primary.pg" => site.primary.pg.start_again().await,
        "spare.pg" => site.spare.pg.start_again().await,
        "primary.s3" => site.primary.minio.start_again().await,
        _ => site.spare.minio.start_again().await,
    }
}

pub const PROMOTE: &str = "role = \"primary\"";

/// Returns the configuration with which an operator has this cluster promoted although its peer is
/// gone.
pub fn forced(epoch: i64) -> String {
    format!("role = \"primary\"\nforce_epoch = {epoch}")
}

/// Waits until the service is the primary of that epoch.
pub async fn until_primary(service: &Service<'_>, epoch: i64) -> Value {
    service
        .until(&format!("the primary of epoch {epoch}"), |status| {
            status["state"] == "primary" && status["role"]["epoch"] == epoch
        })
        .await
}

/// Waits until a primary is known to be the only one, and its old one fenced for good: the status
/// shows a fence that another one may have set, and that this primary sets once more.
pub async fn until_settled(service: &Service<'_>) -> Value {
    let fenced = |status: &Value| status["peer"]["fenced"] == true;
    service.until("the old primary is fenced", fenced).await;
    wait_until("the fence is final", SOON, || async {
        let state = service.site.spare.pg.conn("warm_spare").await?;
        let sql = "SELECT FROM promotion WHERE peer_fenced AND settled";
        let rows = state.query(sql, &[]).await?;
        let open = || "it is not on record".into();
        (!rows.is_empty()).then_some(()).ok_or_else(open)
    })
    .await;
    service.until("the old primary is fenced", fenced).await
}

/// Starts the old primary's own service, which comes back and follows.
pub async fn returned<'a>(back: &'a Site, extra: &str) -> Result<Service<'a>> {
    let service = returning(back, extra).await;
    until_following(&service).await;
    Ok(service)
}

/// Does the same, and returns when it has just begun.
pub async fn returning<'a>(back: &'a Site, extra: &str) -> Service<'a> {
    back.write_config("");
    prepare(back).await;
    Service::start(back, extra)
}

/// Tries to write as a plain client.
pub async fn write(cluster: &Cluster, name: &str) -> Result<()> {
    insert(&cluster.conn().await?, name).await
}

/// Returns the time at which a plain client's write succeeded; it tries again and again, with a
/// connection for each try.
pub async fn first_write(new: &Cluster, name: &str) -> Result<Instant> {
    let began = Instant::now();
    for attempt in 0.. {
        // No name is tried twice: a commit whose answer was lost would refuse it for ever.
        match write(new, &format!("{name}-{attempt}")).await {
            Ok(()) => break,
            Err(error) if began.elapsed() > SOON => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
    Ok(Instant::now())
}

async fn insert(client: &Client, name: &str) -> Result<()> {
    let sql = "INSERT INTO accounts (name, email) VALUES ($1, $1)";
    client.execute(sql, &[&name]).await?;
    Ok(())
}

pub async fn is_writable(cluster: &Cluster) -> bool {
    let Ok(client) = cluster.conn().await else {
        return false;
    };
    let sql = "BEGIN; CREATE TABLE may_i (); ROLLBACK";
    client.batch_execute(sql).await.is_ok()
}

pub async fn until_writable(cluster: &Cluster) {
    until_writes(cluster, true).await;
}

pub async fn until_read_only(cluster: &Cluster) {
    until_writes(cluster, false).await;
}

async fn until_writes(cluster: &Cluster, wanted: bool) {
    let what = format!("writes are accepted: {wanted}");
    wait_until(&what, SOON, || async {
        match is_writable(cluster).await {
            found if found == wanted => Ok(()),
            found => Err(format!("{found}").into()),
        }
    })
    .await;
}

/// Clients that write one row after the other, each acknowledged or not, and reconnect for ever: to
/// the one cluster, and when that refuses, to the other.
pub struct Writers {
    stop: Arc<AtomicBool>,
    tasks: JoinSet<()>,
    /// The side that acknowledged each row.
    acknowledged: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Writers {
    pub fn start(sides: [&Cluster; 2], number: usize) -> Writers {
        Writers::named(sides, number, "writer", Duration::from_millis(1))
    }

    /// Starts writers whose rows begin with a word of their own; `pause` is the pause between two
    /// rows of one writer.
    pub fn named(sides: [&Cluster; 2], number: usize, word: &str, pause: Duration) -> Writers {
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(Mutex::new(BTreeMap::new()));
        let mut tasks = JoinSet::new();
        for writer in 0..number {
            let sides = sides.map(Clone::clone);
            let (stop, acknowledged) = (stop.clone(), acknowledged.clone());
            let word = format!("{word}-{writer}");
            tasks.spawn(async move {
                let (mut side, mut row) = (0, 0);
                while !stop.load(Ordering::Relaxed) {
                    let Ok(client) = sides[side].conn().await else {
                        side = 1 - side;
                        tokio::time::sleep(Duration::from_millis(2)).await;
                        continue;
                    };
                    loop {
                        row += 1;
                        let name = format!("{word}-{row}");
                        if stop.load(Ordering::Relaxed) || insert(&client, &name).await.is_err() {
                            break;
                        }
                        acknowledged.lock().await.insert(name, side);
                        tokio::time::sleep(pause).await;
                    }
                    side = 1 - side;
                }
            });
        }
        Writers {
            stop,
            tasks,
            acknowledged,
        }
    }

    /// Waits until that side has acknowledged this number of further rows.
    pub async fn until_written(&self, side: usize, more: usize) {
        let count = async || {
            let acknowledged = self.acknowledged.lock().await;
            acknowledged.values().filter(|by| **by == side).count()
        };
        let before = count().await;
        wait_until("writes are acknowledged", SOON, || async {
            match count().await {
                found if found >= before + more => Ok(()),
                found => Err(format!("{found} of side {side}").into()),
            }
        })
        .await;
    }

    /// Returns every row with the side that acknowledged it.
    pub async fn stop(mut self) -> BTreeMap<String, usize> {
        self.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
        std::mem::take(&mut *self.acknowledged.lock().await)
    }
}

/// Returns the value of each sequence.
pub async fn sequences(cluster: &Cluster) -> Result<BTreeMap<String, i64>> {
    let sql = "SELECT sequencename::text, coalesce(last_value, 0) FROM pg_sequences WHERE schemaname = 'public'";
    let rows = cluster.conn().await?.query(sql, &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Returns the acknowledged rows that a cluster does not have.
pub async fn lost(
    cluster: &Cluster,
    acknowledged: &BTreeMap<String, usize>,
) -> Result<Vec<String>> {
    let names: Vec<&str> = acknowledged.keys().map(String::as_str).collect();
    let sql =
        "SELECT n FROM unnest($1::text[]) n WHERE NOT EXISTS (SELECT FROM accounts WHERE name = n)";
    let rows = super::reading(|| async {
        let client = cluster.conn().await?;
        Ok(client.query(sql, &[&names]).await?)
    });
    Ok(rows.await?.iter().map(|row| row.get(0)).collect())
}

/// Waits until a forced promotion asks about a primary that may live, and returns that status.
pub async fn until_asked(service: &Service<'_>) -> Value {
    service
        .until("it asks about a primary that may live", |status| {
            let detail = status["hold"]["detail"].as_str().unwrap_or_default();
            detail.contains("cannot be fenced")
        })
        .await
}
