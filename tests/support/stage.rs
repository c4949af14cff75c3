//! A pair of clusters with everything that a fault can strike, and the way in which each fault is
//! struck and undone.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::faults::Server::{self, PrimaryDatastore, PrimaryStore, SpareDatastore, SpareStore};
use super::faults::{Blow, FOLLOWING, Fault, Line};
use super::history::History;
use super::http_fault::{Fault as HttpFaultKind, HttpFault};
use super::process::alive;
use super::proxy::{Mode, Proxy};
use super::service::approval_id;
use super::weather::Weather;
use super::workload::Workload;
use super::{Cluster, Factory, Postgres, Result, Service, Site, inventory, schema_changes, slots};

/// Time after TERM at which the Supervisor kills a process that is still alive.
const SUPERVISOR_PATIENCE: Duration = Duration::from_secs(8);
/// Maximum time for the service to reach a point at which it is to be killed.
const POINT_PATIENCE: Duration = Duration::from_secs(12);
/// More packages than the 4096 requests that the gate remembers at once.
const MANY_PACKAGES: usize = 5000;
/// Maximum time for them to reach the spare before they are deleted again.
const MANY_PATIENCE: Duration = Duration::from_secs(40);

/// The proxies between the service and the servers: a TCP proxy for each line, and before each
/// store one for HTTP.
pub struct Lines {
    pub datastore: Proxy,
    pub store: Proxy,
    pub own_store: Proxy,
    primary_store: HttpFault,
    spare_store: HttpFault,
}

impl Lines {
    pub async fn start(site: &Site) -> Result<Lines> {
        let primary_store = HttpFault::start(site.primary.minio.port()).await?;
        let spare_store = HttpFault::start(site.spare.minio.port()).await?;
        Ok(Lines {
            datastore: Proxy::start(site.primary.pg.port()).await?,
            store: Proxy::start(primary_store.port()).await?,
            own_store: Proxy::start(spare_store.port()).await?,
            primary_store,
            spare_store,
        })
    }
}

/// Everything that can be struck.
pub struct Stage<'a> {
    pub site: &'a Site,
    /// None: it was killed, and not started again yet.
    pub service: Option<Service<'a>>,
    pub port: u16,
    pub history: Arc<History>,
    pub weather: Arc<Weather>,
    pub workload: Workload,
    lines: Lines,
    /// The last lines of services that are gone.
    pub said: Vec<String>,
    /// Datastores of which there is a copy, and how often that was used.
    kept: HashMap<Server, u32>,
    changes: u32,
    paused: bool,
    /// Lines of the service's configuration in addition to every test's.
    pub extra: String,
    /// The same for the other spare.
    other_extra: String,
    /// A writer that was left open on the primary.
    writer: Option<tokio_postgres::Client>,
    /// True: a clock was stepped since the spare was last level.
    pub stepped: bool,
    /// True: the point at which the service was last to be killed was reached.
    pub reached: bool,
    /// Folders of points at which services wait.
    halts: Vec<tempfile::TempDir>,
    /// The slot of the spare that the faults strike.
    pub slot: String,
    /// The other spare's service; None: it was killed, and not started again yet.
    pub other: Option<Service<'a>>,
    pub other_site: &'a Site,
}

impl<'a> Stage<'a> {
    pub fn new(
        service: Service<'a>,
        history: Arc<History>,
        weather: Arc<Weather>,
        workload: Workload,
        lines: Lines,
        (extra, other_extra): (String, String),
        (slot, other): (String, Service<'a>),
    ) -> Self {
        Self {
            site: service.site,
            port: service.port,
            service: Some(service),
            history,
            weather,
            workload,
            lines,
            said: Vec::new(),
            kept: HashMap::new(),
            changes: 0,
            paused: false,
            extra,
            other_extra,
            writer: None,
            stepped: false,
            reached: false,
            halts: Vec::new(),
            slot,
            other_site: other.site,
            other: Some(other),
        }
    }

    fn cluster(&self, server: Server) -> &'a Cluster {
        match server {
            PrimaryDatastore | PrimaryStore => &self.site.primary,
            SpareDatastore | SpareStore => &self.site.spare,
        }
    }

    fn pg(&self, server: Server) -> Arc<Postgres> {
        self.cluster(server).pg.clone()
    }

    fn line(&self, line: Line) -> &Proxy {
        match line {
            Line::Datastore => &self.lines.datastore,
            Line::Store => &self.lines.store,
            Line::OwnStore => &self.lines.own_store,
        }
    }

    /// Returns the last lines of every service, the newest last.
    pub fn log_tail(&self, lines: usize) -> Vec<String> {
        let mut said = self.said.clone();
        if let Some(service) = &self.service {
            said.extend(service.running.stderr());
        }
        if let Some(other) = &self.other {
            let last = other.running.stderr();
            let last = last.iter().rev().take(lines / 3).rev();
            said.extend(last.map(|line| format!("(other spare) {line}")));
        }
        said.split_off(said.len().saturating_sub(lines))
    }

    /// Strikes a fault. False: there is nothing that it could strike.
    pub async fn strike(&mut self, fault: Fault, rng: &mut StdRng) -> Result<bool> {
        match fault {
            Fault::ServiceKilled => {
                sleep(rng, 0, 800).await;
                self.kill_service();
            }
            Fault::ServiceKilledIn(phase) => self.kill_in(phase).await,
            Fault::ServiceKilledAt(point, count) => self.kill_at(point, count).await,
            Fault::ServicePaused => {
                self.running().sigstop();
                self.paused = true;
            }
            Fault::ServiceRestarted => return self.end_service().await,
            Fault::Struck(server, blow) => self.blow(server, blow).await?,
            Fault::SmartShutdown => return self.smart_shutdown().await,
            Fault::Cut(line) => self.line(line).cut(),
            Fault::Stalled(line) => self.line(line).set(Mode::Hold).await,
            Fault::Slow(line) => self.line(line).set(Mode::Slow).await,
            Fault::SlotDropped => return slots::drop_slot(&self.site.primary, &self.slot).await,
            Fault::SlotMadeAnew => return slots::make_anew(&self.site.primary, &self.slot).await,
            Fault::SlotAdvanced => return slots::advance(&self.site.primary, &self.slot).await,
            Fault::RolledBack(server) => return self.roll_back(server).await,
            Fault::RolledBackAndOutgrown => self.roll_back_unseen(rng).await?,
            Fault::Schema => self.change_schema(rng).await?,
            Fault::SessionEnded(server) => return self.end_session(server, rng).await,
            Fault::ServiceFrozenAt(point) => self.freeze_at(point, rng).await?,
            Fault::StoreAnswers(store, status) => self.store_answers(store, status),
            Fault::WriterLeftOpen => self.leave_a_writer(false).await?,
            Fault::PreparedLeftOpen => self.leave_a_writer(true).await?,
            Fault::Truncated => {
                self.workload.rest().await;
                self.history.settle().await?;
                let client = self.site.primary.conn().await?;
                let truncate = "TRUNCATE audit_package_group";
                client.batch_execute(truncate).await?;
                self.history.note("no groups any more").await?;
                self.workload.resume();
            }
            Fault::LogOfNothing => {
                self.workload.rest().await;
                log_of_nothing(&self.site.primary).await?;
                self.workload.resume();
            }
            Fault::ClockStepped(server, by) => {
                self.stepped = true;
                self.pg(server).set_clock(by)?;
            }
            Fault::OtherSpare(blow) => self.strike_other(blow).await?,
            Fault::ManyPackages => self.many_packages().await?,
        }
        Ok(true)
    }

    async fn strike_other(&mut self, blow: Blow) -> Result<()> {
        match blow {
            Blow::Pause => self.other_running().sigstop(),
            Blow::Kill => drop(self.take_other().running.kill9()?),
            Blow::Restart => {
                let service = self.take_other();
                service.running.terminate();
                service.running.wait(Duration::from_secs(30)).await?;
            }
        }
        Ok(())
    }

    fn other_running(&self) -> &super::Running {
        &self.other.as_ref().expect("it was started").running
    }

    pub fn take_other(&mut self) -> Service<'a> {
        self.other.take().expect("it was started")
    }

    fn mend_other(&mut self, blow: Blow) {
        match blow {
            Blow::Pause => self.other_running().sigcont(),
            Blow::Kill | Blow::Restart => {
                self.other = Some(Service::start(self.other_site, &self.other_extra))
            }
        }
    }

    /// Uploads many packages in one transaction, and deletes them in another.
    async fn many_packages(&mut self) -> Result<()> {
        self.workload.rest().await;
        self.history.settle().await?;
        let primary = &self.site.primary;
        self.changes += 1;
        let mut factory = Factory::new(u64::from(self.changes));
        let packages = factory
            .bulk_artifacts_of(primary, MANY_PACKAGES, 300, 200)
            .await?;
        self.history.note("many packages").await?;
        self.workload.resume();
        // The oracle judges whether they came, and came rightly.
        let deadline = Instant::now() + MANY_PATIENCE;
        while !self.spare_has_all(packages.len()).await.unwrap_or(false)
            && Instant::now() < deadline
        {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        self.workload.rest().await;
        self.history.settle().await?;
        let client = primary.conn().await?;
        client
            .batch_execute("DELETE FROM origin_packages WHERE origin = 'bulk'")
            .await?;
        self.history.note("all of them are gone").await?;
        for package in &packages {
            self.history.note_lacking(&package.key);
        }
        let deleting = packages.iter().map(|package| primary.delete(&package.key));
        futures_util::stream::iter(deleting)
            .buffer_unordered(8)
            .try_collect::<Vec<()>>()
            .await?;
        self.workload.resume();
        Ok(())
    }

    async fn spare_has_all(&self, packages: usize) -> Result<bool> {
        let count = "SELECT count(*) FROM origin_packages WHERE origin = 'bulk'";
        let row = self.site.spare.conn().await?.query_one(count, &[]).await?;
        Ok(row.get::<_, i64>(0) == packages as i64)
    }

    /// Waits for the duration of a fault that has one.
    pub async fn last(&self, fault: Fault, rng: &mut StdRng) {
        match fault {
            Fault::Struck(_, Blow::Restart) | Fault::Cut(_) | Fault::Schema => {}
            Fault::Stalled(_)
            | Fault::Slow(_)
            | Fault::ServicePaused
            | Fault::StoreAnswers(..)
            | Fault::WriterLeftOpen
            | Fault::PreparedLeftOpen
            | Fault::OtherSpare(_)
            | Fault::ClockStepped(..) => {
                sleep(rng, 200, 2500).await;
            }
            _ => sleep(rng, 0, 700).await,
        }
    }

    pub async fn undo(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::ServiceKilled
            | Fault::ServiceKilledIn(_)
            | Fault::ServiceKilledAt(..)
            | Fault::RolledBackAndOutgrown
            | Fault::ServiceRestarted => self.start_service(&[]),
            Fault::ServicePaused => {
                self.running().sigcont();
                self.paused = false;
            }
            Fault::Struck(server, blow) => self.mend(server, blow).await?,
            Fault::SmartShutdown => {
                self.site.primary.pg.start_again().await?;
                self.weather.end(PrimaryDatastore);
                self.history.settle().await?;
                self.workload.resume();
            }
            Fault::Stalled(line) | Fault::Slow(line) => self.line(line).set(Mode::Pass).await,
            Fault::StoreAnswers(store, _) => self.http_of(store).set(|_| HttpFaultKind::Forward),
            Fault::WriterLeftOpen => drop(self.writer.take()),
            Fault::PreparedLeftOpen => {
                let client = self.site.primary.conn().await?;
                client.batch_execute("ROLLBACK PREPARED 'left'").await?;
            }
            Fault::ClockStepped(server, _) => self.pg(server).set_clock(0)?,
            Fault::OtherSpare(blow) => self.mend_other(blow),
            _ => {}
        }
        Ok(())
    }

    fn running(&self) -> &super::Running {
        &self.service.as_ref().expect("it was started").running
    }

    /// Returns a service that should answer: it is started, and not paused.
    pub fn awake(&self) -> Option<&Service<'a>> {
        self.service.as_ref().filter(|_| !self.paused)
    }

    pub fn service_lives(&self) -> bool {
        self.service
            .as_ref()
            .is_none_or(|service| alive(service.running.pid()))
    }

    fn kill_service(&mut self) {
        if let Some(service) = self.service.take() {
            let output = service.running.kill9().expect("it ends");
            self.remember(&output.stderr);
        }
    }

    fn remember(&mut self, stderr: &str) {
        self.said.extend(stderr.lines().map(String::from));
        let much = self.said.len().saturating_sub(400);
        self.said.drain(..much);
    }

    fn start_service(&mut self, environment: &[(&str, &str)]) {
        let file = self.site.config_file();
        self.service = Some(Service {
            site: self.site,
            port: self.port,
            running: self.site.spawn_with(&file, &["run"], environment),
        });
    }

    async fn kill_in(&mut self, phase: &str) {
        let service = self.service.as_mut().expect("it was started");
        service.running.forget();
        let begins = |line: &str| line.split_once("] phase ").map(|(_, at)| at) == Some(phase);
        // If a phase is not reached because there is nothing to copy, the kill comes at another
        // moment.
        let _ = service.running.wait_for_line(begins, POINT_PATIENCE).await;
        self.kill_service();
    }

    async fn kill_at(&mut self, point: &str, count: u32) {
        self.kill_service();
        if !FOLLOWING.iter().any(|room| point.starts_with(room)) {
            // Only a copy reaches this point, and without its slot the service must make one.
            let _ = slots::drop_slot(&self.site.primary, &self.slot).await;
        }
        let at = format!("{point}:{count}");
        let idle = point.starts_with("confirm.");
        if idle {
            // Only an idle primary's log is skipped.
            self.workload.rest().await;
            let _ = log_of_nothing(&self.site.primary).await;
        }
        self.start_service(&[("WARM_SPARE_KILL_AT", if idle { point } else { &at })]);
        let patience = if idle {
            3 * POINT_PATIENCE
        } else {
            POINT_PATIENCE
        };
        let deadline = Instant::now() + patience;
        while self.service_lives() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.reached = !self.service_lives();
        if idle {
            self.workload.resume();
        }
        let told = if self.reached {
            "reached"
        } else {
            "not reached"
        };
        self.said.push(format!("-- killed at {at}: {told}"));
        self.kill_service();
    }

    /// Freezes the service at a point; it has no effect if the point is not reached.
    async fn freeze_at(&mut self, point: &str, rng: &mut StdRng) -> Result<()> {
        self.kill_service();
        if !FOLLOWING.iter().any(|room| point.starts_with(room)) {
            let _ = slots::drop_slot(&self.site.primary, &self.slot).await;
        }
        let folder = super::process::server_dir("freeze-")?;
        let wanted = format!("{point}:{}", folder.path().display());
        self.start_service(&[("WARM_SPARE_WAIT_AT", &wanted)]);
        let deadline = Instant::now() + POINT_PATIENCE;
        while !folder.path().join("reached").exists() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        sleep(rng, 100, 2500).await;
        std::fs::write(folder.path().join("go"), "")?;
        // The service reaches the point again, and waits for ever in a folder that is being
        // removed.
        self.halts.push(folder);
        Ok(())
    }

    /// Ends a session. False: there is none at this moment.
    async fn end_session(&mut self, server: Server, rng: &mut StdRng) -> Result<bool> {
        let pg = self.pg(server);
        let sessions = inventory::lasting_sessions(&pg).await?;
        match sessions.choose(rng) {
            Some(session) => inventory::end(&pg, session).await,
            None => Ok(false),
        }
    }

    fn http_of(&self, store: Server) -> &HttpFault {
        match store {
            SpareStore => &self.lines.spare_store,
            _ => &self.lines.primary_store,
        }
    }

    fn store_answers(&self, store: Server, status: u16) {
        let every = std::sync::atomic::AtomicU32::new(0);
        let (history, bucket) = (self.history.clone(), self.site.primary.bucket.clone());
        self.http_of(store).set(move |request| {
            let count = every.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            match (count % 2, status) {
                (0, _) => HttpFaultKind::Forward,
                // A balancer without a route answers like this.
                (_, 404) => HttpFaultKind::Respond(404, bytes::Bytes::new()),
                (_, 403) => {
                    // An object that the primary's store refuses may be recorded as unavailable for
                    // that.
                    let key = request.uri.path().trim_start_matches('/');
                    if let Some(key) = key.strip_prefix(&format!("{bucket}/")) {
                        history.note_lacking(key);
                    }
                    HttpFaultKind::s3(403, "AccessDenied")
                }
                (_, status) => HttpFaultKind::s3(status, "SlowDown"),
            }
        });
    }

    async fn leave_a_writer(&mut self, prepared: bool) -> Result<()> {
        let client = self.site.primary.conn().await?;
        let write = "BEGIN; UPDATE accounts SET email = email WHERE false; SELECT txid_current()";
        client.batch_execute(write).await?;
        if prepared {
            client.batch_execute("PREPARE TRANSACTION 'left'").await?;
        } else {
            self.writer = Some(client);
        }
        Ok(())
    }

    /// Acts as an operator on a hold that only an operator ends.
    pub async fn answer_hold(&self) {
        let struck = self.awake().map(|service| (service, &self.extra));
        let other = self
            .other
            .iter()
            .map(|service| (service, &self.other_extra));
        for (service, extra) in struck.into_iter().chain(other) {
            let Ok(status) = service.status().await else {
                continue;
            };
            if let Some(id) = approval_id(&status) {
                let approved = format!("{extra}approve = \"{id}\"\n");
                service.reconfigure(&approved);
            }
        }
    }

    async fn end_service(&mut self) -> Result<bool> {
        let service = self.service.take().expect("it was started");
        service.running.terminate();
        let began = Instant::now();
        let output = service.running.wait(Duration::from_secs(30)).await?;
        self.remember(&output.stderr);
        if began.elapsed() > SUPERVISOR_PATIENCE || output.code != Some(0) {
            let told = format!(
                "the service ended with {:?}, {:?} after TERM",
                output.code,
                began.elapsed()
            );
            self.workload.note_harm(told);
        }
        Ok(true)
    }

    async fn blow(&mut self, server: Server, blow: Blow) -> Result<()> {
        self.weather.begin(server);
        let cluster = self.cluster(server);
        match (server, blow) {
            (PrimaryDatastore | SpareDatastore, Blow::Kill) => cluster.pg.kill9(),
            (PrimaryDatastore | SpareDatastore, Blow::Pause) => cluster.pg.sigstop(),
            (PrimaryDatastore | SpareDatastore, Blow::Restart) => {
                self.stop_fast(server).await?;
                let uses = self.kept.entry(server).or_insert(1);
                if *uses > 0 {
                    *uses = 0;
                    cluster.pg.keep_data().await?;
                }
            }
            (_, Blow::Kill) => cluster.minio.kill9(),
            (_, Blow::Pause) => cluster.minio.sigstop(),
            (_, Blow::Restart) => cluster.minio.stop().await?,
        }
        Ok(())
    }

    async fn mend(&mut self, server: Server, blow: Blow) -> Result<()> {
        let cluster = self.cluster(server);
        match (server, blow) {
            (PrimaryDatastore | SpareDatastore, Blow::Pause) => cluster.pg.sigcont(),
            (PrimaryDatastore | SpareDatastore, _) => cluster.pg.start_again().await?,
            (_, Blow::Pause) => cluster.minio.sigcont(),
            _ => cluster.minio.start_again().await?,
        }
        self.weather.end(server);
        Ok(())
    }

    /// Stops a server. A fast shutdown waits for nobody; if it waits for us, that is harm.
    async fn stop_fast(&self, server: Server) -> Result<()> {
        let began = Instant::now();
        self.pg(server).stop_fast().await?;
        let took = began.elapsed();
        if server == PrimaryDatastore && took > SUPERVISOR_PATIENCE {
            self.workload
                .note_harm(format!("a fast shutdown of the primary took {took:?}"));
        }
        Ok(())
    }

    async fn smart_shutdown(&mut self) -> Result<bool> {
        self.workload.rest().await;
        self.history.settle().await?;
        self.history.hang_up().await;
        if !self.follows(Duration::from_secs(20)).await {
            // A copy may block it.
            self.workload.resume();
            return Ok(false);
        }
        self.weather.begin(PrimaryDatastore);
        let pg = self.pg(PrimaryDatastore);
        if pg.stop_smart(SUPERVISOR_PATIENCE).await?.is_none() {
            let told = "a smart shutdown of the primary was not over after 8 s";
            self.workload.note_harm(told.into());
        }
        Ok(true)
    }

    /// Waits until the service has applied something new, or the time is over.
    pub async fn moves_on(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut stood = None;
        while Instant::now() < deadline {
            if let Some(service) = self.awake()
                && let Ok(status) = service.status().await
                && status["state"] == "following"
            {
                let point = status["recovery_point"]["lsn"].clone();
                if *stood.get_or_insert(point.clone()) != point {
                    return;
                }
            }
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
    }

    async fn follows(&self, limit: Duration) -> bool {
        let Some(service) = &self.service else {
            return false;
        };
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if let Ok(status) = service.status().await
                && status["state"] == "following"
                && status["lag"]["bytes"] == 0
            {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
    }

    async fn roll_back(&mut self, server: Server) -> Result<bool> {
        let primary = server == PrimaryDatastore;
        if primary {
            self.workload.rest().await;
            self.history.settle().await?;
        }
        self.weather.begin(server);
        self.stop_fast(server).await?;
        let pg = self.pg(server);
        let first = !self.kept.contains_key(&server);
        match first {
            true => pg.keep_data().await?,
            false => pg.restore_data().await?,
        }
        pg.start_again().await?;
        self.weather.end(server);
        *self.kept.entry(server).or_insert(0) += u32::from(!first);
        if primary {
            if !first {
                self.history.begin_era("rolled back").await?;
            }
            self.workload.resume();
        }
        // The first time it was only a restart.
        Ok(!first)
    }

    async fn roll_back_unseen(&mut self, rng: &mut StdRng) -> Result<()> {
        let pg = self.pg(PrimaryDatastore);
        self.rest_and_stop_primary().await?;
        pg.keep_data().await?;
        self.start_primary().await?;
        self.history.settle().await?;
        self.workload.resume();
        // The spare may follow changes that will not have happened.
        sleep(rng, 300, 2500).await;
        self.kill_service();
        self.rest_and_stop_primary().await?;
        pg.restore_data().await?;
        self.start_primary().await?;
        self.kept.insert(PrimaryDatastore, 0);
        self.history.begin_era("rolled back unseen").await?;
        let client = self.site.primary.conn().await?;
        // Each segment is 16 MiB of log.
        client.batch_execute("SELECT pg_switch_wal()").await?;
        self.workload.resume();
        sleep(rng, 300, 1000).await;
        Ok(())
    }

    async fn rest_and_stop_primary(&mut self) -> Result<()> {
        self.workload.rest().await;
        self.history.settle().await?;
        self.weather.begin(PrimaryDatastore);
        self.stop_fast(PrimaryDatastore).await
    }

    async fn start_primary(&self) -> Result<()> {
        self.pg(PrimaryDatastore).start_again().await?;
        self.weather.end(PrimaryDatastore);
        Ok(())
    }

    async fn change_schema(&mut self, rng: &mut StdRng) -> Result<()> {
        self.workload.rest().await;
        self.history.settle().await?;
        self.changes += 1;
        let done = schema_changes::one(&self.site.primary, self.changes, rng).await;
        match done {
            Ok(change) => match change.rewritten {
                Some(table) => {
                    self.history
                        .note_rewritten(&change.statement, table)
                        .await?
                }
                None => self.history.note(&change.statement).await?,
            },
            Err(error) => {
                self.history
                    .note("a schema change that was not done")
                    .await?;
                self.workload
                    .note_harm(format!("a schema change failed: {error}: {error:?}"));
            }
        }
        self.workload.resume();
        Ok(())
    }
}

/// Writes more log than an idle primary may keep for us.
async fn log_of_nothing(primary: &Cluster) -> Result<()> {
    let client = primary.conn().await?;
    for _ in 0..6 {
        let message = "SELECT pg_logical_emit_message(false, 'test', 'a new segment is begun')";
        client.batch_execute(message).await?;
        client.batch_execute("SELECT pg_switch_wal()").await?;
    }
    Ok(())
}

async fn sleep(rng: &mut StdRng, least: u64, most: u64) {
    tokio::time::sleep(Duration::from_millis(rng.random_range(least..most))).await;
}
