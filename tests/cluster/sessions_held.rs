//! Every session of ours may be ended while a copy, the catching up or a verification is under way, on either server: the
//! next upload arrives all the same, and nothing of ours is left on the primary.

use std::time::{Duration, Instant};
use support::follow::{followed, logical, prepare, until_read};
use support::http_fault::{Fault, HttpFault};
use support::inventory::{self, Session, all_sessions, until_nothing_is_held};
use support::packages::{insert, put};
use support::service::{Halt, SOON};
use support::{Factory, Package, Postgres, Result, Service, Site, Spec, slots, wait_until};
use tokio::sync::watch;
use tokio_postgres::Client;

/// What we hold on the primary is let go within so long.
const LIMIT: Duration = Duration::from_secs(30);

/// No upload needs this table.
const TABLE: &str = "license_keys";

/// What is under way when a session is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    /// A copy waits for an artifact, before its snapshot.
    Artifacts,
    /// The snapshot is there, and no row was read.
    Snapshot,
    /// The rows of a table come slowly.
    Rows,
    /// The lasting slot was made, and nobody reads it yet.
    BeforeCatchUp,
    /// The stream goes into the incoming database, and its gate waits for an artifact.
    CatchUp,
    /// The nightly comparison and the rolling one wait for a lock.
    Verification,
}

impl Work {
    /// After so long an upload must be here, whatever was ended.
    fn limit(self) -> Duration {
        match self {
            // The stream goes all the time.
            Work::Verification => Duration::from_secs(15),
            _ => Duration::from_secs(30),
        }
    }
}

/// A service in the middle of its work, which goes on when it is let go.
struct Held<'a> {
    service: Service<'a>,
    lock: Option<Client>,
    /// The package is uploaded already, and its artifact is kept back.
    store: Option<watch::Sender<bool>>,
    halt: Option<Halt>,
}

struct Stage {
    site: Site,
    factory: Factory,
    /// In front of the primary's store.
    store: HttpFault,
}

impl Stage {
    async fn new(name: &str) -> Result<Stage> {
        let site = Site::builder(name).primary(logical()).start().await?;
        prepare(&site).await;
        let mut factory = Factory::seeded();
        factory.fill(&site.primary, 1).await?;
        let rows = "INSERT INTO audit_package (operation, trigger, requester_id, requester_name, origin, channel, package_ident)
                    SELECT 'promote', 'hab_client', 1, 'me', 'core', 'stable', repeat(n::text, 400)
                    FROM generate_series(1000, 3500) n";
        site.primary.conn().await?.batch_execute(rows).await?;
        let store = HttpFault::start(site.primary.minio.port()).await?;
        Ok(Stage {
            site,
            factory,
            store,
        })
    }

    fn start(&self, extra: &str) -> Service<'_> {
        Service::start(&self.site, &self.configuration(extra))
    }

    fn configuration(&self, extra: &str) -> String {
        format!(
            "[peer.s3]\nendpoint = \"{}\"\n{extra}",
            self.store.endpoint()
        )
    }

    async fn lock(&self) -> Result<Client> {
        let client = self.site.primary.conn().await?;
        let sql = format!("BEGIN; LOCK TABLE {TABLE} IN ACCESS EXCLUSIVE MODE");
        client.batch_execute(&sql).await?;
        Ok(client)
    }

    /// The store answers for this package's artifact when the sender says so, or is gone.
    fn keep_back(&self, package: &Package) -> watch::Sender<bool> {
        let (sender, open) = watch::channel(false);
        let key = package.key.clone();
        self.store.forget();
        self.store.set(move |request| {
            match request.method == "GET" && request.uri.path().contains(&key) {
                true => Fault::Until(open.clone()),
                false => Fault::Forward,
            }
        });
        sender
    }

    async fn until_asked_for(&self, package: &Package) {
        wait_until("the artifact is asked for", SOON, || async {
            match self.store.count("GET", &package.key) {
                0 => Err("not yet".into()),
                _ => Ok(()),
            }
        })
        .await;
    }

    async fn begin(&self, work: Work, package: &Package) -> Result<Held<'_>> {
        let site = &self.site;
        let primary = &site.primary.pg;
        let (mut lock, mut store) = (None, None);
        put(&site.primary, package).await?;
        let service = match work {
            Work::Artifacts => {
                store = Some(self.keep_back(package));
                insert(&site.primary, package).await?;
                let service = self.start("");
                self.until_asked_for(package).await;
                service
            }
            Work::Rows => {
                let slow = "[replication]\njobs = 1\nbandwidth_limit = \"60KB/s\"\n";
                let service = self.start(slow);
                let copies = "state = 'active' AND query LIKE 'COPY%audit_package%'";
                until_sessions(primary, 1, copies).await;
                service
            }
            Work::Snapshot | Work::BeforeCatchUp | Work::CatchUp => {
                let point = match work {
                    Work::Snapshot => "baseline.snapshot",
                    _ => "catch_up.begin",
                };
                let configuration = self.configuration("");
                let (service, halt) = Service::halting(site, &configuration, point);
                halt.reached().await;
                if work == Work::CatchUp {
                    store = Some(self.keep_back(package));
                    insert(&site.primary, package).await?;
                    halt.go();
                    self.until_asked_for(package).await;
                }
                return Ok(Held {
                    service,
                    lock,
                    store,
                    halt: Some(halt),
                });
            }
            Work::Verification => {
                // The last one was long ago.
                let state = site.spare.pg.conn("warm_spare").await?;
                let sql = "INSERT INTO verification (time, deep, differences, lsn)
                           SELECT now() - interval '1 hour', false, 0, lsn FROM copied";
                state.execute(sql, &[]).await?;
                let rolling = "[verify]\nrolling = 100\n";
                let service = self.start(rolling);
                until_read(site).await;
                lock = Some(self.lock().await?);
                let nightly = format!("{rolling}schedule = \"* * * * *\"\n");
                service.reconfigure(&self.configuration(&nightly));
                let waits = format!("wait_event_type = 'Lock' AND query LIKE 'COPY%{TABLE}%'");
                until_sessions(primary, 2, &waits).await;
                service
            }
        };
        Ok(Held {
            service,
            lock,
            store,
            halt: None,
        })
    }
}

impl Held<'_> {
    /// What it waited for is there.
    fn let_go(&mut self, stage: &Stage, work: Work) {
        (self.lock, self.store) = (None, None);
        if let Some(halt) = &self.halt {
            halt.go();
        }
        if work == Work::Rows {
            self.service.reconfigure(&stage.configuration(""));
        }
    }
}

/// Waits until so many sessions of ours on the server are in this state.
async fn until_sessions(server: &Postgres, number: usize, state: &str) {
    let what = format!("{number} sessions with {state}");
    let sql =
        format!("SELECT FROM pg_stat_activity WHERE application_name = 'warm-spare' AND {state}");
    let client = server.conn("postgres").await.expect("it answers");
    wait_until(&what, SOON, || async {
        match client.query(&sql, &[]).await?.len() {
            found if found >= number => Ok(()),
            found => Err(format!("{found}").into()),
        }
    })
    .await;
}

/// Here and there, the sessions that are still there a moment later.
async fn lasting(site: &Site) -> Result<[Vec<Session>; 2]> {
    let all = async || -> Result<[Vec<Session>; 2]> {
        let (here, there) = (&site.spare.pg, &site.primary.pg);
        Ok([all_sessions(here).await?, all_sessions(there).await?])
    };
    let before = all().await?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut after = all().await?;
    for (after, before) in after.iter_mut().zip(&before) {
        after.retain(|session| before.iter().any(|other| other.pid == session.pid));
    }
    Ok(after)
}

async fn until_here(
    site: &Site,
    package: &Package,
    service: &Service<'_>,
    (what, limit): (&str, Duration),
) {
    wait_until(what, limit, || async {
        let sql = "SELECT FROM origin_packages WHERE ident = $1";
        let asked = async || -> Result<bool> {
            let client = site.spare.conn().await?;
            Ok(!client.query(sql, &[&package.ident]).await?.is_empty())
        };
        if asked().await.unwrap_or_default() {
            return Ok(());
        }
        // Each question is a session of its own, for the database is renamed meanwhile.
        tokio::time::sleep(Duration::from_millis(150)).await;
        Err(format!("it is not here\n{}", service.running.stderr().join("\n")).into())
    })
    .await;
}

/// Every other session here, and then there, in one state of the work, which is brought about anew each time.
async fn end_each(stage: &mut Stage, work: Work) -> Result<[usize; 2]> {
    let (first, step) = support::share_of_cases();
    let mut ended = [first; 2];
    loop {
        let name = format!("{work:?}").to_lowercase();
        let version = ended.map(|number| number.to_string()).join(".");
        let package = stage.factory.make(Spec::new("core", &name, &version));
        let stage = &*stage;
        let site = &stage.site;
        let mut held = stage.begin(work, &package).await?;
        let found = lasting(site).await?;
        let Some(side) = (0..2).find(|side| ended[*side] < found[*side].len()) else {
            return Ok(ended);
        };
        let session = &found[side][ended[side]];
        let began = Instant::now();
        inventory::end([&site.spare.pg, &site.primary.pg][side], session).await?;
        ended[side] += step;
        if held.store.is_none() {
            insert(&site.primary, &package).await?;
        }
        held.let_go(stage, work);
        let side = ["here", "there"][side];
        let what = format!("{work:?}, {side}: {} {}", session.database, session.did);
        until_here(site, &package, &held.service, (&what, work.limit())).await;
        println!("{:.1?} after the end of {what}", began.elapsed());
        until_read(site).await;
        until_nothing_is_held(&site.primary.pg, LIMIT).await;
        held.service.stop().await.ok();
        if work != Work::Verification {
            // The next one begins with a copy.
            slots::drop_slot(&site.primary, slots::ANY).await?;
        }
        if (0..2).all(|side| ended[side] >= found[side].len()) {
            return Ok(ended);
        }
    }
}

async fn matrix(name: &str, works: &[Work]) -> Result<()> {
    let mut stage = Stage::new(name).await?;
    for work in works {
        let began = Instant::now();
        if *work == Work::Verification {
            followed(&stage.site, "").await?.stop().await.ok();
        }
        let [here, there] = end_each(&mut stage, *work).await?;
        println!(
            "{work:?}: {here} sessions here, {there} there, in {:.0?}",
            began.elapsed()
        );
        assert!(here > 1, "{here}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn whichever_session_is_ended_during_a_copy_the_next_upload_arrives() -> Result<()> {
    matrix("held_copy", &[Work::Artifacts, Work::Snapshot, Work::Rows]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn whichever_session_is_ended_during_the_catching_up_the_next_upload_arrives() -> Result<()> {
    matrix("held_catch_up", &[Work::BeforeCatchUp, Work::CatchUp]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn whichever_session_is_ended_during_a_verification_the_next_upload_arrives() -> Result<()> {
    matrix("held_verify", &[Work::Verification]).await
}
