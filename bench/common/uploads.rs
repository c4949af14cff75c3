//! Uploads to a primary that is followed, and the time until their rows are on the spare.

use futures_util::{StreamExt, TryStreamExt};
use std::collections::HashMap;
use std::time::{Duration, Instant};
use support::{Factory, Postgres, Result, Service, Site, Spec, packages};
use tokio_postgres::Client;

use super::median;

/// Uploads a second, and the bytes of each.
const RATE: u64 = 50;
const HANDS: usize = 8;
pub(crate) const ARTIFACT: u64 = 100 * 1024;

/// From the return of COMMIT on the primary to the row's being seen on the spare, in ms.
pub(crate) struct Lag {
    /// Uploads a second.
    pub rate: f64,
    pub p50: f64,
    pub p99: f64,
    pub worst: f64,
}

/// The tests' servers do not wait for their disks; an operator's do.
pub(crate) fn durable() -> support::postgres::Builder {
    Postgres::builder().setting("fsync", "on")
}

/// Starts a service with these lines of configuration.
pub(crate) async fn follow<'a>(site: &'a Site, extra: &str) -> Service<'a> {
    let service = Service::start(site, &format!("log_level = \"warn\"\n{extra}"));
    service
        .until("following", |status| {
            status["replication"]["mode"] == "stream" && status["lag"]["bytes"] == 0
        })
        .await;
    service
}

pub(crate) async fn latency(site: &Site, factory: &mut Factory, uploads: u64) -> Result<Lag> {
    let mut made = Vec::new();
    for number in 0..uploads {
        let spec = Spec::new("bench", "upload", &format!("1.0.{number}")).size(ARTIFACT);
        made.push(factory.make(spec));
    }
    factory.origin(&site.primary, "bench").await?;
    let (seen_to, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let watching = tokio::spawn(watch(site.spare.conn().await?, uploads, seen_to));
    let pace = tokio::time::interval(Duration::from_micros(1_000_000 / RATE));
    let began = Instant::now();
    // One after the other would wait for the stores, and be slower than the rate.
    let begun = futures_util::stream::unfold((made.iter(), pace), async |(mut rest, mut pace)| {
        pace.tick().await;
        Some((rest.next()?, (rest, pace)))
    });
    let uploads_done = begun.map(|package| async move {
        packages::put(&site.primary, package).await?;
        packages::insert(&site.primary, package).await?;
        Ok::<_, support::Error>((package.ident.clone(), Instant::now()))
    });
    let committed: HashMap<String, Instant> =
        uploads_done.buffer_unordered(HANDS).try_collect().await?;
    let rate = uploads as f64 / began.elapsed().as_secs_f64();
    let mut took = Vec::new();
    while let Some((ident, at)) = seen.recv().await {
        let Some(committed) = committed.get(&ident) else {
            return Err(format!("{ident} came from nowhere").into());
        };
        took.push(Instant::saturating_duration_since(&at, *committed).as_secs_f64() * 1e3);
    }
    watching.await??;
    let p50 = median(&mut took);
    Ok(Lag {
        rate,
        p50,
        p99: took[took.len() * 99 / 100],
        worst: took[took.len() - 1],
    })
}

async fn watch(
    spare: Client,
    uploads: u64,
    seen: tokio::sync::mpsc::UnboundedSender<(String, Instant)>,
) -> Result<()> {
    let sql = "SELECT ident FROM origin_packages WHERE origin = 'bench' AND name = 'upload'";
    let statement = spare.prepare(sql).await?;
    let mut known = std::collections::HashSet::new();
    while (known.len() as u64) < uploads {
        let rows = spare.query(&statement, &[]).await?;
        let at = Instant::now();
        for row in &rows {
            let ident: String = row.get(0);
            if known.insert(ident.clone()) {
                seen.send((ident, at))?;
            }
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}
