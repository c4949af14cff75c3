//! What is due when, through a day of simulated time on real servers; verification and repair.

use chrono::{DateTime, TimeDelta, Timelike, Utc};
use rand::{Rng, SeedableRng};
use serde_json::Value;
use std::collections::BTreeSet;
use support::ports::free_port;
use support::service::{SOON, get};
use support::{Factory, Result, Site, Spec, seed, site, wait_until};
use tokio::sync::mpsc;
use warm_spare::cluster::LocalCluster;
use warm_spare::domain::EventKind;
use warm_spare::observe::{Clock, Simulation};
use warm_spare::service::{self, Start};

/// Looks every ten minutes, passes every four hours, a verification at three.
const DAY: &str = r#"
    log_level = "error"
    [replication]
    interval = "10m"
    schedule = "0 */4 * * *"
    lag_warn = "10m"
    rpo = "5h"
    [verify]
    schedule = "0 3 * * *"
"#;

struct Day<'a> {
    site: &'a Site,
    simulation: Simulation,
    port: u16,
    factory: Factory,
    /// Hours since the start at which something is uploaded, the next one first.
    uploads: BTreeSet<i64>,
    start: DateTime<Utc>,
}

/// A moment at which the service sleeps: what it says of itself.
struct Moment {
    now: DateTime<Utc>,
    status: Value,
}

impl Moment {
    fn lsn(&self) -> &Value {
        &self.status["recovery_point"]["lsn"]
    }

    fn lag(&self) -> f64 {
        self.status["lag"]["seconds"].as_f64().expect("a lag")
    }
}

impl Day<'_> {
    /// Lets time pass until the status is so.
    async fn until(&mut self, what: &str, so: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = Value::Null;
        for _ in 0..500 {
            last = self.next().await?.status;
            if so(&last) {
                return Ok(last);
            }
        }
        Err(format!(
            "{what}: not after {} of simulated time: {last:#}",
            self.simulation.now() - self.start
        )
        .into())
    }

    /// Lets the service do what is due next, and looks at it when it sleeps again.
    async fn next(&mut self) -> Result<Moment> {
        self.simulation.asleep().await;
        let upload = self.uploads.first().copied();
        if let Some(hour) = upload
            && self.simulation.now() >= self.start + TimeDelta::hours(hour)
        {
            self.uploads.remove(&hour);
            let spec = Spec::new("core", "daily", &hour.to_string());
            self.factory.package(&self.site.primary, spec).await?;
        }
        self.simulation.to_next_wake().await;
        self.simulation.asleep().await;
        // A verification works beside the looks; simulated hours would pass meanwhile.
        let status = wait_until("the verification ends", SOON, || async {
            let status = get(self.port, "/status").await?.json();
            match status["verification"]["running"] == true {
                true => Err("it runs".into()),
                false => Ok(status),
            }
        })
        .await;
        Ok(Moment {
            now: self.simulation.now(),
            status,
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_of_looks_passes_and_a_verification() -> Result<()> {
    let site = site("day").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 5).await?;
    let mut random = rand::rngs::StdRng::seed_from_u64(seed());
    // The last pass of the day comes 21 hours and a half after its start.
    let uploads = (0..5).map(|_| random.random_range(1..22)).collect();
    simulate(&site, factory, DAY, uploads, through).await
}

/// Runs the service in this process, on a clock that `drive` moves.
async fn simulate<'a>(
    site: &'a Site,
    factory: Factory,
    configuration: &str,
    uploads: BTreeSet<i64>,
    drive: impl AsyncFnOnce(Day<'a>) -> Result<()>,
) -> Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let port = free_port()?;
    let config = site.write_config(&format!("{configuration}\n[http]\nport = {port}"));
    let start: DateTime<Utc> = "2026-03-28T10:00:30Z".parse()?;
    let (clock, simulation) = Clock::simulated(start);
    let (_wish, reload) = mpsc::channel(1);
    let running = Box::pin(service::run(Start {
        data: site.dir.path().join("data"),
        config,
        clock,
        reload,
    }));
    let day = Day {
        site,
        simulation,
        port,
        factory,
        uploads,
        start,
    };
    tokio::select! {
        never = running => match never {},
        done = drive(day) => done,
    }
}

async fn through(mut day: Day<'_>) -> Result<()> {
    let mut before = day.next().await?;
    assert_eq!(before.status["state"], "following", "{:#}", before.status);
    let (mut passes, mut moments, mut waited) = (Vec::new(), 0, 0);
    let mut complete = before.now;
    let wanted = day.uploads.len();
    while day.simulation.now() < day.start + TimeDelta::hours(25) {
        let moment = day.next().await?;
        moments += 1;
        let status = &moment.status;
        assert_eq!(status["state"], "following", "{status:#}");
        if moment.lsn() != before.lsn() {
            passes.push(moment.now);
            let at = (moment.now.hour() % 4, moment.now.minute());
            assert_eq!(
                at,
                (0, 0),
                "a pass at another time than the schedule's: {status:#}"
            );
        }
        if status["lag"]["bytes"] == 0 {
            complete = moment.now;
            assert!(
                moment.lag() < 2.0,
                "nothing waits, so it was complete just now: {status:#}"
            );
        } else {
            waited += 1;
            // True while something waits, too: since the last look that found nothing.
            let since = (moment.now - complete).as_seconds_f64();
            assert!((moment.lag() - since).abs() < 2.0, "{since} s: {status:#}");
        }
        before = moment;
    }
    assert!(moments >= 144, "{moments} looks in 25 hours");
    assert!(waited > 0, "an upload waits for the schedule");
    assert!(
        !passes.is_empty() && passes.len() <= wanted,
        "{passes:?} for {wanted} uploads"
    );
    assert!(day.uploads.is_empty());
    let verification = &before.status["verification"];
    assert_eq!(verification["differences"], 0, "{:#}", before.status);
    let at: DateTime<Utc> = verification["time"].as_str().expect("a time").parse()?;
    assert_eq!(at.date_naive().to_string(), "2026-03-29");
    assert!((3..6).contains(&at.hour()), "{at}");
    let rows = day.site.spare.conn().await?;
    let sql = "SELECT count(*) FROM origin_packages";
    let found: i64 = rows.query_one(sql, &[]).await?.get(0);
    assert_eq!(found, 5 + wanted as i64);
    let state = day.site.spare.pg.conn("warm_spare").await?;
    let sql = "SELECT count(*) FROM verification";
    assert_eq!(
        state.query_one(sql, &[]).await?.get::<_, i64>(0),
        1,
        "once a day"
    );
    Ok(())
}

/// Looks every ten seconds, a verification every minute.
const MINUTES: &str = r#"
    log_level = "error"
    [replication]
    interval = "10s"
    [verify]
    schedule = "* * * * *"
    deep = true
"#;

/// What a verification finds is told, and made good.
#[tokio::test(flavor = "multi_thread")]
async fn differences_are_told_and_mended() -> Result<()> {
    let site = site("mended").await;
    let mut factory = Factory::seeded();
    let made = factory.fill(&site.primary, 4).await?;
    simulate(
        &site,
        factory,
        MINUTES,
        BTreeSet::new(),
        async |mut day: Day<'_>| {
            let status = day
                .until("verified", |status| {
                    status["verification"]["differences"] == 0
                })
                .await?;
            assert_eq!(status["verification"]["deep"], true, "{status:#}");

            // Somebody deletes an object here, and writes into rows past the fence.
            site.spare.delete(&made[0].key).await?;
            let vandal = site.spare.conn().await?;
            vandal
                .batch_execute("SET default_transaction_read_only = off")
                .await?;
            vandal
                .batch_execute("UPDATE origin_packages SET owner_id = 666")
                .await?;
            drop(vandal);
            day.until("found", |status| told(status, "differences, for example"))
                .await?;
            let mended = |status: &Value| {
                status["verification"]["differences"] == 0 && status["health"]["level"] == 0
            };
            let status = day.until("mended", mended).await?;
            assert_eq!(status["state"], "following", "{status:#}");
            assert!(site.spare.get(&made[0].key).await?.is_some());
            let rows = site.spare.conn().await?;
            let sql = "SELECT count(*) FROM origin_packages WHERE owner_id = 666";
            assert_eq!(rows.query_one(sql, &[]).await?.get::<_, i64>(0), 0);
            Ok(())
        },
    )
    .await?;
    site.warm_spare(&["verify", "--deep"]).await.ok();
    Ok(())
}

fn told(status: &Value, text: &str) -> bool {
    let events = status["events"].as_array().cloned().unwrap_or_default();
    events.iter().any(|event| {
        event["text"]
            .as_str()
            .is_some_and(|said| said.contains(text))
    })
}

/// The history is bounded, and says a thing that stands only once.
#[tokio::test(flavor = "multi_thread")]
async fn the_history_is_bounded() -> Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let site = site("history").await;
    let config = warm_spare::config::load(&site.write_config(""))?;
    let state = LocalCluster::of(&config).state().await?;
    for number in 0..1100 {
        state
            .event(EventKind::Artifacts, &format!("event {number}"), "CHG-1")
            .await?;
    }
    for _ in 0..5 {
        state.event(EventKind::Fuse, "stands", "CHG-1").await?;
    }
    let client = site.spare.pg.conn("warm_spare").await?;
    let kept: i64 = client
        .query_one("SELECT count(*) FROM event", &[])
        .await?
        .get(0);
    assert!(kept <= 1000, "{kept}");
    let sql = "SELECT count(*) FROM event WHERE text = 'stands'";
    assert_eq!(client.query_one(sql, &[]).await?.get::<_, i64>(0), 1);
    let last = state.events(2).await?;
    assert_eq!(
        (last[0].text.as_str(), last[1].text.as_str()),
        ("event 1099", "stands")
    );
    Ok(())
}
