//! The service outlives its servers: each of the four may be down, killed, paused or cut off at any time. Meanwhile the
//! service says so, and afterwards it goes on by itself.

mod support;

use futures_util::future::join_all;
use serde_json::Value;
use std::time::{Duration, Instant};
use support::proxy::{Mode, Proxy};
use support::{Factory, Result, Service, Site, Spec};

const A_WHILE: Duration = Duration::from_secs(120);
/// An answer that waits for no server.
const AT_ONCE: Duration = Duration::from_secs(3);
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
            let told = held || has_reason(status, &format!("{}_store_unreachable", victim.side()));
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
    service.running.forget();
    change(service.site, factory, version).await?;
    let begins = |line: &str| phase_of(line) == Some(phase);
    service.running.wait_for_line(begins, A_WHILE).await?;
    Ok(())
}

/// The strike came where it was meant to. The switch is over too soon to say so.
fn struck_in(service: &Service<'_>, phase: Option<&str>, what: &str) {
    if let Some(phase @ ("artifacts" | "tables")) = phase {
        let said = service.running.stderr();
        let last = said.iter().rev().find_map(|line| phase_of(line));
        assert_eq!(last, Some(phase), "{what}: the strike came too late");
    }
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
    for phase in [None, Some("artifacts"), Some("tables"), Some("switch")] {
        let what = format!("{victim:?} killed in {}", phase.unwrap_or("no pass"));
        let from = service.running.stderr().len();
        reach(&mut service, &mut factory, phase, phase.unwrap_or("")).await?;
        victim.kill9(&site);
        struck_in(&service, phase, &what);
        is_shown(&service, victim, &what).await?;
        victim.start_again(&site).await?;
        recovers(&service, &what).await?;
        let said = service.running.stderr()[from..].to_vec();
        let warned = warnings(&said);
        assert!(warned.len() <= 5, "{what}: {warned:#?}");
    }
    ends_well(service, &format!("{victim:?} killed")).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_datastore_is_shown_and_waited_for() -> Result<()> {
    for_each(&[LocalDatastore, PeerDatastore], killed).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_artifact_store_is_shown_and_waited_for() -> Result<()> {
    for_each(&[LocalStore, PeerStore], killed).await
}
