//! The service outlives its servers: each of the four may be down, killed, paused or cut off at any time. Meanwhile the
//! service says so, and afterwards it goes on by itself.

use futures_util::future::join_all;
use serde_json::Value;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use support::proxy::{Mode, Proxy};
use support::{Factory, Result, Service, Site, Spec};

const A_WHILE: Duration = Duration::from_secs(120);
/// An answer that waits for no server: the shortest time limit on one is 10 s.
const AT_ONCE: Duration = Duration::from_secs(9);
/// Enough time in the phases `artifacts` and `tables` to strike there.
const SLOW: &str = "replication.bandwidth_limit = \"2MB/s\"";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    LocalDatastore,
    LocalStore,
    PeerDatastore,
    PeerStore,
}
use Victim::{LocalDatastore, LocalStore, PeerDatastore, PeerStore};

const ALL: [Victim; 4] = [LocalDatastore, LocalStore, PeerDatastore, PeerStore];

impl Victim {
    fn side(self) -> &'static str {
        match self {
            LocalDatastore | LocalStore => "local",
            PeerDatastore | PeerStore => "peer",
        }
    }

    fn store(self) -> &'static str {
        match self {
            LocalDatastore | PeerDatastore => "datastore",
            LocalStore | PeerStore => "s3",
        }
    }

    fn is_datastore(self) -> bool {
        self.store() == "datastore"
    }

    fn hold(self) -> String {
        format!("{}_unreachable", self.side())
    }

    fn kill9(self, site: &Site) {
        match self {
            LocalDatastore => site.spare.pg.kill9(),
            LocalStore => site.spare.minio.kill9(),
            PeerDatastore => site.primary.pg.kill9(),
            PeerStore => site.primary.minio.kill9(),
        }
    }

    async fn start_again(self, site: &Site) -> Result<()> {
        match self {
            LocalDatastore => site.spare.pg.start_again().await,
            LocalStore => site.spare.minio.start_again().await,
            PeerDatastore => site.primary.pg.start_again().await,
            PeerStore => site.primary.minio.start_again().await,
        }
    }

    fn freeze(self, site: &Site) {
        match self {
            LocalDatastore => site.spare.pg.sigstop(),
            LocalStore => site.spare.minio.sigstop(),
            PeerDatastore => site.primary.pg.sigstop(),
            PeerStore => site.primary.minio.sigstop(),
        }
    }

    fn thaw(self, site: &Site) {
        match self {
            LocalDatastore => site.spare.pg.sigcont(),
            LocalStore => site.spare.minio.sigcont(),
            PeerDatastore => site.primary.pg.sigcont(),
            PeerStore => site.primary.minio.sigcont(),
        }
    }

    fn reachable(self, status: &Value) -> &Value {
        &status[self.side()][self.store()]["reachable"]
    }

    fn metric(self) -> String {
        let (side, store) = (self.side(), self.store());
        format!("warm_spare_reachable{{side=\"{side}\",store=\"{store}\"}}")
    }
}

fn has_reason(status: &Value, code: &str) -> bool {
    let reasons = status["health"]["reasons"].as_array();
    reasons.is_some_and(|reasons| reasons.iter().any(|reason| reason["code"] == code))
}

/// What `status` says of a server that is away; that the metrics and both ways to ask for health agree, at once.
async fn is_shown(service: &Service<'_>, victim: Victim, what: &str) -> Result<Value> {
    let hold = victim.hold();
    let status = service
        .until(&format!("{what}: it is shown"), |status| {
            let held = status["hold"]["reason"] == *hold;
            let named = |kind| has_reason(status, &format!("{}_{kind}_unreachable", victim.side()));
            let told = held || named("store") || named("datastore");
            victim.reachable(status) == false && told
        })
        .await;
    agrees(service, victim, what).await?;
    Ok(status)
}

async fn agrees(service: &Service<'_>, victim: Victim, what: &str) -> Result<()> {
    let asked = Instant::now();
    assert_eq!(service.metric(&victim.metric()).await?, Some(0.0), "{what}");
    assert_eq!(
        service.metric("warm_spare_health").await?,
        Some(1.0),
        "{what}"
    );
    let health = service.get("/health").await?;
    assert_eq!(health.status, 200, "{what}: {health:?}");
    assert_eq!(health.json()["level"], 1, "{what}: {health:?}");
    let line = service.health().await;
    assert_eq!(line.code, Some(1), "{what}: {line}");
    assert!(asked.elapsed() < AT_ONCE, "{what}: {:?}", asked.elapsed());
    Ok(())
}

/// Everything is as if nothing had been.
async fn recovers(service: &Service<'_>, what: &str) -> Result<()> {
    let whole = |status: &Value| {
        status["state"] == "following"
            && status["lag"]["bytes"] == 0
            && status["hold"].is_null()
            && status["health"]["level"] == 0
            && ALL.iter().all(|victim| victim.reachable(status) == true)
    };
    service.until(&format!("{what}: it recovers"), whole).await;
    for victim in ALL {
        let metric = service.metric(&victim.metric()).await?;
        assert_eq!(metric, Some(1.0), "{what}: {victim:?}");
    }
    let line = service.health().await;
    assert_eq!(line.code, Some(0), "{what}: {line}");
    Ok(())
}

/// It ends as it should, and what it leaves is whole.
async fn ends_well(service: Service<'_>, what: &str) {
    let site = service.site;
    let output = service.stop().await;
    assert_eq!(output.code, Some(0), "{what}: {output}");
    let output = site.warm_spare(&["verify", "--deep"]).await;
    assert_eq!(output.code, Some(0), "{what}: {output}");
}

fn phase_of(line: &str) -> Option<&str> {
    Some(line.split_once("] phase ")?.1)
}

/// Something to copy, and with it time in each phase.
async fn change(site: &Site, factory: &mut Factory, version: &str) -> Result<()> {
    let spec = Spec::new("core", "more", version).size(3 << 20);
    factory.package(&site.primary, spec).await?;
    Ok(())
}

/// A primary with some packages, one of which has rows enough for a second in the phase `tables`.
async fn filled(name: &str) -> Result<(Site, Factory)> {
    let site = Site::own_servers(name).await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 4).await?;
    let heavy = Spec::new("core", "heavy", "1").manifest_size(2 << 20);
    factory.package(&site.primary, heavy).await?;
    Ok((site, factory))
}

/// Makes a change and waits until the pass that brings it is in this phase; None: no pass.
async fn reach(
    service: &mut Service<'_>,
    factory: &mut Factory,
    phase: Option<&str>,
    version: &str,
) -> Result<()> {
    let Some(phase) = phase else { return Ok(()) };
    let begins = |line: &str| phase_of(line) == Some(phase);
    // On a busy machine the rows may be copied before anybody has looked.
    for round in 0..5 {
        service.running.forget();
        let version = format!("{version}.{round}");
        change(service.site, factory, &version).await?;
        service.running.wait_for_line(begins, A_WHILE).await?;
        if phase != "tables" || rows_are_seen_on_their_way(service).await {
            return Ok(());
        }
        recovers(service, "a pass that was too fast").await?;
    }
    Err("no copy of rows was seen under way".into())
}

/// False: the phase is over.
async fn rows_are_seen_on_their_way(service: &Service<'_>) -> bool {
    let status = service
        .until("rows are copied", |status| {
            let baseline = &status["replication"]["baseline"];
            baseline.is_null()
                || baseline["done_bytes"]
                    .as_u64()
                    .is_some_and(|bytes| bytes > 0)
        })
        .await;
    !status["replication"]["baseline"].is_null()
}

/// Returns whether the strike came in its phase. Only two phases last long enough to show it.
fn struck_in(service: &Service<'_>, phase: Option<&str>) -> bool {
    if !matches!(phase, Some("artifacts" | "tables")) {
        return true;
    }
    let said = service.running.stderr();
    said.iter().rev().find_map(|line| phase_of(line)) == phase
}

/// Strikes until one strike came in its phase: on a busy machine the phase may be over before.
async fn strike(what: &str, mut attempt: impl AsyncFnMut(usize) -> Result<bool>) -> Result<()> {
    for number in 0..5 {
        if attempt(number).await? {
            return Ok(());
        }
    }
    Err(format!("{what}: each strike came too late").into())
}

fn warnings(lines: &[String]) -> Vec<&String> {
    let warns = |line: &&String| {
        line.split_once(']')
            .is_some_and(|(head, _)| head.contains("WARN"))
    };
    lines.iter().filter(warns).collect()
}

/// Each on servers of its own and all at once: most of the time is waiting.
async fn for_each<F>(victims: &[Victim], test: impl Fn(Victim) -> F) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let all = join_all(victims.iter().map(|victim| test(*victim))).await;
    all.into_iter().collect()
}

async fn down_at_the_start(victim: Victim) -> Result<()> {
    let (site, mut factory) = filled("down").await?;
    let what = format!("{victim:?} down at the first start");
    victim.kill9(&site);
    let service = Service::start(&site, "");
    let status = service.until_hold(&victim.hold()).await;
    assert_eq!(status["state"], "holding", "{what}: {status:#}");
    assert!(status["recovery_point"].is_null(), "{what}: {status:#}");
    let status = is_shown(&service, victim, &what).await?;
    let (detail, next_step) = (&status["hold"]["detail"], &status["hold"]["next_step"]);
    let named = format!("{}.{}", victim.side(), victim.store());
    assert!(
        next_step.as_str().is_some_and(|text| text.contains(&named)),
        "{what}: {detail} {next_step}"
    );
    victim.start_again(&site).await?;
    recovers(&service, &what).await?;
    let output = service.stop().await;
    assert_eq!(output.code, Some(0), "{what}: {output}");

    let what = format!("{victim:?} down at a later start");
    victim.kill9(&site);
    let service = Service::start(&site, "");
    let status = is_shown(&service, victim, &what).await?;
    if !victim.is_datastore() {
        // Nothing needs it.
        assert_eq!(status["state"], "following", "{what}: {status:#}");
        assert!(status["hold"].is_null(), "{what}: {status:#}");
    }
    victim.start_again(&site).await?;
    recovers(&service, &what).await?;
    change(&site, &mut factory, "1").await?;
    service.until_level().await;
    ends_well(service, &what).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn it_starts_without_a_server_and_begins_when_that_comes_up() -> Result<()> {
    for_each(&ALL, down_at_the_start).await
}

async fn killed(victim: Victim) -> Result<()> {
    let (site, mut factory) = filled("killed").await?;
    let mut service = Service::start(&site, SLOW);
    service.until_level().await;
    let phases = [
        "checks",
        "artifacts",
        "schema",
        "tables",
        "indexes",
        "remaining artifacts",
        "switch",
    ];
    for phase in std::iter::once(None).chain(phases.map(Some)) {
        let what = format!("{victim:?} killed in {}", phase.unwrap_or("no pass"));
        strike(&what, async |number| {
            let from = service.running.stderr().len();
            let version = format!("{}.{number}", phase.unwrap_or(""));
            reach(&mut service, &mut factory, phase, &version).await?;
            victim.kill9(&site);
            let struck = struck_in(&service, phase);
            is_shown(&service, victim, &what).await?;
            victim.start_again(&site).await?;
            recovers(&service, &what).await?;
            let said = service.running.stderr()[from..].to_vec();
            let warned = warnings(&said);
            assert!(warned.len() <= 5, "{what}: {warned:#?}");
            Ok(struck)
        })
        .await?;
    }
    ends_well(service, &format!("{victim:?} killed")).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_is_shown_and_waited_for() -> Result<()> {
    for_each(&ALL, killed).await
}

/// Stopped, a server accepts connections and answers none.
async fn paused(victim: Victim) -> Result<()> {
    let (site, mut factory) = filled("paused").await?;
    let mut service = Service::start(&site, SLOW);
    service.until_level().await;
    let copying = match victim.is_datastore() {
        true => "tables",
        false => "artifacts",
    };
    for phase in [None, Some(copying)] {
        let what = format!("{victim:?} paused in {}", phase.unwrap_or("no pass"));
        strike(&what, async |number| {
            reach(&mut service, &mut factory, phase, &format!("1.{number}")).await?;
            victim.freeze(&site);
            let struck = struck_in(&service, phase);
            let frozen = Instant::now();
            is_shown(&service, victim, &what).await?;
            let noticed = frozen.elapsed();
            println!("{what}: shown after {noticed:?}");
            // Long before the 120 s that a copy waits for the next row.
            assert!(noticed < Duration::from_secs(90), "{what}: {noticed:?}");
            victim.thaw(&site);
            recovers(&service, &what).await?;
            Ok(struck)
        })
        .await?;
    }
    ends_well(service, &format!("{victim:?} paused")).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_server_is_noticed_and_waited_for() -> Result<()> {
    for_each(&ALL, paused).await
}

/// The server lives, and the line to it is cut once, then stands still.
async fn cut_off(victim: Victim) -> Result<()> {
    let (site, mut factory) = filled("line").await?;
    let cluster = match victim.side() {
        "local" => &site.spare,
        _ => &site.primary,
    };
    let (proxy, key) = match victim.is_datastore() {
        true => (Proxy::start(cluster.pg.port()).await?, "port"),
        false => (Proxy::start(cluster.minio.port()).await?, "endpoint"),
    };
    let place = match victim.is_datastore() {
        true => proxy.port().to_string(),
        false => format!("\"http://127.0.0.1:{}\"", proxy.port()),
    };
    let (side, store) = (victim.side(), victim.store());
    let mut service = Service::start(&site, &format!("{side}.{store}.{key} = {place}\n{SLOW}"));
    service.until_level().await;
    let phase = match victim.is_datastore() {
        true => Some("tables"),
        false => Some("artifacts"),
    };

    let what = format!("{victim:?} cut off in {phase:?}");
    let errors = format!("warm_spare_errors_total{{side=\"{side}\",kind=\"datastore\"}}");
    strike(&what, async |number| {
        let before = service.metric(&errors).await?.unwrap_or(0.0);
        reach(&mut service, &mut factory, phase, &format!("1.{number}")).await?;
        proxy.cut();
        let struck = struck_in(&service, phase);
        recovers(&service, &what).await?;
        if !struck {
            return Ok(false);
        }
        let errors = service.metric(&errors).await?.unwrap_or(0.0) - before;
        match victim.is_datastore() {
            // Such a pass begins again.
            true => assert!(
                (1.0..4.0).contains(&errors),
                "{what}: {errors} errors {:#?}",
                service.running.stderr()
            ),
            // Here the one request does.
            false => assert_eq!(errors, 0.0, "{what}: {:#?}", service.running.stderr()),
        }
        Ok(true)
    })
    .await?;

    let what = format!("{victim:?} stalled in {phase:?}");
    strike(&what, async |number| {
        reach(&mut service, &mut factory, phase, &format!("2.{number}")).await?;
        proxy.set(Mode::Hold).await;
        let struck = struck_in(&service, phase);
        is_shown(&service, victim, &what).await?;
        proxy.set(Mode::Pass).await;
        recovers(&service, &what).await?;
        Ok(struck)
    })
    .await?;
    ends_well(service, &what).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_is_cut_or_stands_still_is_noticed_and_waited_for() -> Result<()> {
    for_each(&ALL, cut_off).await
}

fn keep_secret(file: &Path, text: &str) -> Result<()> {
    std::fs::write(file, text)?;
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600))?;
    Ok(())
}

/// What holds it, and that the operator is told which keys to look at.
fn names(status: &Value, detail: &str, keys: &[&str]) {
    let told = |field: &str| status["hold"][field].as_str().unwrap_or("").to_string();
    let (why, next_step) = (told("detail"), told("next_step"));
    assert!(why.contains(detail), "{detail}: {status:#}");
    let named = keys.iter().all(|key| next_step.contains(key));
    assert!(named, "{keys:?}: {next_step}");
}

/// Secrets in files are rotated without our being told.
#[tokio::test(flavor = "multi_thread")]
async fn secrets_that_change_are_waited_for() -> Result<()> {
    let (site, mut factory) = filled("secrets").await?;
    let file = |name: &str| site.dir.path().join(name);
    let password = file("password");
    keep_secret(&password, site.primary.pg.password())?;
    let stores = [
        (PeerStore, file("peer-key"), &site.primary.minio),
        (LocalStore, file("local-key"), &site.spare.minio),
    ];
    let mut extra =
        format!("peer.datastore.password = \"\"\npeer.datastore.password_file = {password:?}\n");
    for (victim, file, minio) in &stores {
        keep_secret(file, minio.secret_key())?;
        let side = victim.side();
        extra += &format!("{side}.s3.secret_key = \"\"\n{side}.s3.secret_key_file = {file:?}\n");
    }
    let service = Service::start(&site, &extra);
    recovers(&service, "the right secrets").await?;

    let what = "the peer's password was changed";
    let admin = site.primary.conn().await?;
    let set = async |word: &str| {
        let sql = format!("ALTER ROLE hab PASSWORD '{word}'");
        admin.batch_execute(&sql).await
    };
    set("another").await?;
    let status = is_shown(&service, PeerDatastore, what).await?;
    let keys = [
        "peer.datastore.user",
        "peer.datastore.password",
        "password_file",
    ];
    names(&status, "authentication", &keys);
    keep_secret(&password, "another")?;
    recovers(&service, what).await?;
    keep_secret(&password, site.primary.pg.password())?;
    set(site.primary.pg.password()).await?;

    for (number, (victim, file, minio)) in stores.iter().enumerate() {
        let what = format!("{victim:?}: another key");
        recovers(&service, &what).await?;
        keep_secret(file, "no-such-key-at-all")?;
        let status = is_shown(&service, *victim, &what).await?;
        assert!(status["hold"].is_null(), "{what}: {status:#}");
        change(&site, &mut factory, &number.to_string()).await?;
        let status = service.until_hold(&victim.hold()).await;
        names(
            &status,
            "signature we calculated does not match",
            &[&format!("{}.s3.secret_key", victim.side())],
        );
        agrees(&service, *victim, &what).await?;
        keep_secret(file, minio.secret_key())?;
        recovers(&service, &what).await?;
    }
    ends_well(service, "secrets").await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_is_missing_is_waited_for() -> Result<()> {
    let (site, _) = filled("bucket").await?;
    let there = site.primary.minio.data_dir().join(&site.primary.bucket);
    let away = site.primary.minio.data_dir().with_file_name("away");
    std::fs::rename(&there, &away)?;
    let service = Service::start(&site, "");
    let status = service.until_hold("peer_unreachable").await;
    names(&status, &site.primary.bucket, &["peer.s3.bucket_name"]);
    agrees(&service, PeerStore, "no bucket at the start").await?;
    std::fs::rename(&away, &there)?;
    recovers(&service, "the bucket is made").await?;
    std::fs::rename(&there, &away)?;
    let status = is_shown(&service, PeerStore, "no bucket any more").await?;
    assert!(status["hold"].is_null(), "nothing needs it: {status:#}");
    std::fs::rename(&away, &there)?;
    recovers(&service, "the bucket is back").await?;
    ends_well(service, "bucket").await;
    Ok(())
}

/// A small file system; unmounted when dropped.
struct Small(tempfile::TempDir);

impl Small {
    fn mount(megabytes: u32) -> Result<Option<Self>> {
        let dir = support::process::server_dir("small-")?;
        let options = format!("size={megabytes}M,mode=0755");
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "warm-spare-tests"]);
        let mounted = mount.arg(dir.path()).output();
        Ok(mounted
            .is_ok_and(|output| output.status.success())
            .then(|| Small(dir)))
    }

    /// A file that leaves room for small things only.
    fn fill(&self, leave: u64) -> Result<PathBuf> {
        let free = rustix::fs::statvfs(self.0.path())?;
        let file = self.0.path().join("ballast");
        let bytes = (free.f_bavail * free.f_frsize).saturating_sub(leave);
        match std::fs::write(&file, vec![1; usize::try_from(bytes)?]) {
            // A copy under way has taken some of the room in the meantime.
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {
                let ballast = std::fs::OpenOptions::new().write(true).open(&file)?;
                let bytes = ballast.metadata()?.len().saturating_sub(leave);
                ballast.set_len(bytes)?;
            }
            written => written?,
        }
        Ok(file)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg("--lazy")
            .arg(self.0.path())
            .status();
    }
}

async fn is_full(service: &Service<'_>, words: &str, next: &str) -> Result<()> {
    let status = service
        .until(words, |status| {
            let detail = status["hold"]["detail"].as_str().unwrap_or_default();
            status["hold"]["reason"] == "disk_full" && detail.contains(words)
        })
        .await;
    names(&status, words, &[next]);
    assert_eq!(status["health"]["level"], 2, "{status:#}");
    assert_eq!(service.health().await.code, Some(2));
    assert!(!status["recovery_point"].is_null(), "{status:#}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_waited_for() -> Result<()> {
    let Some(small) = Small::mount(200)? else {
        support::skip("no file system can be mounted here");
        return Ok(());
    };
    let (site, mut factory) = filled("full").await?;
    let place = small.0.path().join("space");
    std::fs::create_dir(&place)?;
    let server = std::fs::metadata(site.spare.pg.data_dir())?;
    std::os::unix::fs::chown(&place, Some(server.uid()), Some(server.gid()))?;
    let admin = site.spare.pg.conn("postgres").await?;
    // What we make is made of this template, and so lies where it lies.
    let sql = format!("CREATE TABLESPACE small LOCATION '{}'", place.display());
    admin.batch_execute(&sql).await?;
    admin
        .batch_execute("ALTER DATABASE template0 SET TABLESPACE small")
        .await?;
    let mut service = Service::start(&site, SLOW);
    recovers(&service, "room enough").await?;

    // What is not yet written has its room already.
    admin.batch_execute("CHECKPOINT").await?;
    let ballast = small.fill(14 << 20)?;
    service.running.forget();
    let from = service.running.stderr().len();
    let rows = "UPDATE origin_packages SET manifest = \
                (SELECT string_agg(md5(n::text), ' ') FROM generate_series(1, 100000) n)";
    site.primary.conn().await?.batch_execute(rows).await?;
    change(&site, &mut factory, "1").await?;
    is_full(
        &service,
        "one more copy of the primary's database",
        "make room",
    )
    .await?;
    let begins = |line: &str| phase_of(line) == Some("tables");
    let said = &service.running.stderr()[from..];
    assert!(!said.iter().any(|line| begins(line)), "{said:#?}");

    // A new configuration is tried at once.
    std::fs::remove_file(ballast)?;
    service.reconfigure(&format!("{SLOW}\nreplication.interval = \"2s\""));
    service.running.wait_for_line(begins, A_WHILE).await?;
    let ballast = small.fill(1 << 20)?;
    is_full(&service, "No space left", "local datastore's disk").await?;
    std::fs::remove_file(ballast)?;
    service.reconfigure(SLOW);
    recovers(&service, "room again").await?;
    ends_well(service, "disk full").await;
    Ok(())
}

/// A primary that is away for long is told once, with its return, and is not run against.
async fn told_once(victim: Victim) -> Result<()> {
    let (site, mut factory) = filled("quiet").await?;
    let package = factory
        .package(&site.primary, Spec::new("core", "waits", "1"))
        .await?;
    let service = Service::start(&site, "");
    recovers(&service, "quiet").await?;
    let from = service.running.stderr().len();
    let kind = if victim.is_datastore() {
        "datastore"
    } else {
        "store"
    };
    let (tries, least) = if victim.is_datastore() {
        (5, 15)
    } else {
        (2, 16)
    };
    let errors = format!("warm_spare_errors_total{{side=\"peer\",kind=\"{kind}\"}}");
    assert_eq!(service.metric(&errors).await?, None);
    victim.kill9(&site);
    let began = Instant::now();
    if !victim.is_datastore() {
        support::packages::promote(&site.primary, &package, "stable").await?;
    }
    support::wait_until("it has failed some times", A_WHILE, async || {
        let failed = service.metric(&errors).await?.unwrap_or(0.0);
        let enough = failed >= f64::from(tries);
        enough
            .then_some(())
            .ok_or_else(|| format!("{failed}").into())
    })
    .await;
    let took = began.elapsed();
    assert!(
        took >= Duration::from_secs(least),
        "{victim:?}: {tries} tries in {took:?}"
    );
    let said = service.running.stderr()[from..].to_vec();
    println!(
        "{victim:?}: {tries} tries in {took:?}: {:#?}",
        warnings(&said)
    );
    assert!(
        (1..=4).contains(&warnings(&said).len()),
        "{victim:?}: {said:#?}"
    );
    victim.start_again(&site).await?;
    recovers(&service, "quiet").await?;
    let said = service.running.stderr()[from..].to_vec();
    let returned: Vec<_> = said
        .iter()
        .filter(|line| line.contains("works again, after"))
        .collect();
    assert_eq!(returned.len(), 1, "{victim:?}: {said:#?}");
    ends_well(service, "quiet").await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_away_is_told_once_and_not_run_against() -> Result<()> {
    for_each(&[PeerDatastore, PeerStore], told_once).await
}
