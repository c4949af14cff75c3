//! Only the line from the primary's site to the spare's is open: one process pushes from the
//! primary's site, and another one waits at the spare's.

use serde_json::Value;
use support::builder_keys::BuilderKey;
use support::follow::{prepare, until_equal, until_following};
use support::pair::{
    PROMOTE, Pair, Writers, forced, is_writable, lost, returning, until_primary, until_read_only,
    until_settled, until_writable, write,
};
use support::ports::free_port;
use support::proxy::{Mode, Proxy};
use support::{Factory, Result, Service, Site, seed};

/// A pair of sites with a process of ours at each, both for the same spare.
struct Sites {
    pair: Pair,
    /// The same two clusters, for the process at the spare's site.
    there: Site,
}

impl Sites {
    async fn start(name: &str) -> Result<Sites> {
        let pair = Pair::of_own_stores(name).await?;
        let there = pair.back.turned()?;
        Ok(Sites { pair, there })
    }

    fn pusher(&self, more: &str) -> Service<'_> {
        Service::start(&self.pair.there, &pushing(more))
    }

    fn standby(&self, more: &str) -> Result<Service<'_>> {
        Ok(Service::start(&self.there, &waiting(more)?))
    }
}

/// Returns the configuration of a process that pushes.
fn pushing(more: &str) -> String {
    format!("site = \"dc1\"\n{more}\n[replication]\ndirection = \"push\"")
}

/// Returns the configuration of the process at the spare's site, to which the primary's servers do
/// not answer.
fn waiting(more: &str) -> Result<String> {
    let closed = free_port()?;
    Ok(format!(
        "site = \"dc2\"\n{more}\n[peer.datastore]\nport = {closed}\n[peer.s3]\nendpoint = \"http://127.0.0.1:{closed}\""
    ))
}

async fn until_standby(service: &Service<'_>) -> Value {
    service
        .until("it waits, and knows the other process", |status| {
            status["state"] == "standby" && status["counterpart"]["direction"] == "push"
        })
        .await
}

async fn until_told(service: &Service<'_>) -> Value {
    service
        .until("it knows the process at the spare's site", |status| {
            status["counterpart"]["site"] == "dc2"
        })
        .await
}

async fn verified_deep(site: &Site) -> Result<()> {
    let output = site.warm_spare(&["verify", "--deep", "--json"]).await.ok();
    let differences = output.json()["differences"].clone();
    assert_eq!(differences.as_array().map(Vec::len), Some(0), "{output}");
    Ok(())
}

fn codes(status: &Value) -> String {
    status["health"]["reasons"].to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn from_the_first_copy_to_the_way_back() -> Result<()> {
    let sites = Sites::start("push_life").await?;
    let (site, mut factory) = (
        &sites.pair.there,
        Factory::new(seed() + 7).with_keys_of(seed()),
    );
    let standby = sites.standby("role = \"keep\"")?;
    standby.until_hold("role_unset").await;
    // It stands by during the first copy too, when this cluster has no role on record yet.
    let (pusher, halt) = Service::halting(site, &pushing(""), "baseline.tables");
    halt.reached().await;
    until_standby(&standby).await;
    halt.go();
    until_following(&pusher).await;
    until_told(&pusher).await;
    factory.fill(&site.primary, 4).await?;
    until_equal(site).await?;
    let status = pusher.status().await?;
    assert_eq!(status["health"]["level"], 0, "{status:#}");

    // The pusher is killed: the process at the spare's site takes the lock, and says who is gone.
    pusher.running.kill9()?;
    let status = standby
        .until("it works, and misses the other one", |status| {
            status["active"] == true && codes(status).contains("no_pusher")
        })
        .await;
    assert_eq!(status["role"]["actual"], "spare", "{status:#}");

    // The pusher comes back, and gets the lock again.
    factory.fill(&site.primary, 3).await?;
    let pusher = sites.pusher("");
    until_following(&pusher).await;
    until_standby(&standby).await;
    until_equal(site).await?;
    verified_deep(site).await?;

    // A planned handover under load, once both ask for it.
    let writers = Writers::start([&site.primary, &site.spare], 2);
    writers.until_written(0, 50).await;
    standby.reconfigure(&waiting("role = \"spare\"")?);
    let told = |status: &Value| status["counterpart"]["wanted"] == "spare";
    pusher.until("the other role is told", told).await;
    pusher.reconfigure(&pushing(PROMOTE));
    pusher.until_hold("wishes_differ").await;
    assert!(is_writable(&site.primary).await);
    standby.reconfigure(&waiting("role = \"keep\"")?);
    until_primary(&pusher, 2).await;
    writers.until_written(1, 50).await;
    until_settled(&pusher).await;
    let acknowledged = writers.stop().await;
    assert_eq!(lost(&site.spare, &acknowledged).await?, [""; 0]);

    // Clients at the new primary's site ask the process there.
    standby
        .until("the new primary serves", |status| {
            status["role"]["actual"] == "primary"
        })
        .await;
    support::wait_until(
        "its own site's clients are let in",
        support::service::SOON,
        || async {
            let answer = standby.get("/primary").await?;
            (answer.status == 200)
                .then_some(())
                .ok_or_else(|| format!("{}", answer.status).into())
        },
    )
    .await;

    // The way back is an ordinary copy over the same open line, by the process at the old primary.
    pusher.stop().await.ok();
    let back = returning(&sites.pair.back, "").await;
    until_following(&back).await;
    factory.fill(&sites.pair.back.primary, 4).await?;
    until_equal(&sites.pair.back).await?;
    verified_deep(&sites.pair.back).await?;
    back.reconfigure(PROMOTE);
    until_primary(&back, 3).await;
    until_settled(&back).await;
    back.stop().await.ok();

    // And again: the process at the primary's site feeds the spare, which returns.
    let pusher = sites.pusher("");
    let is_spare = |status: &Value| status["role"]["actual"] == "spare";
    pusher.until("it is the spare again", is_spare).await;
    prepare(site).await;
    until_following(&pusher).await;
    factory.fill(&site.primary, 2).await?;
    until_equal(site).await?;
    verified_deep(site).await?;
    Ok(())
}

/// The primary's site lives, and nobody at the spare's site can know. A forced takeover there ends
/// the pusher's work; the pusher fences the old primary afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn a_forced_takeover_goes_before_a_living_pusher() -> Result<()> {
    let sites = Sites::start("push_forced").await?;
    let site = &sites.pair.there;
    let pusher = sites.pusher("");
    until_following(&pusher).await;
    let standby = sites.standby("")?;
    until_standby(&standby).await;
    standby.reconfigure(&waiting(&forced(2))?);
    // It is the primary, whichever process has the lock by now.
    until_writable(&site.spare).await;
    until_read_only(&site.primary).await;
    pusher
        .until("the pusher works again", |status| {
            status["active"] == true && status["role"]["actual"] == "primary"
        })
        .await;
    pusher.until_hold("wishes_differ").await;
    write(&site.spare, "after").await?;
    assert!(is_writable(&site.spare).await);
    Ok(())
}

/// The spare's node has Builder's keys, the disk and the Supervisor. Its results are in the pusher's
/// preflight; the same files at the pusher's node are the primary's.
#[tokio::test(flavor = "multi_thread")]
async fn the_spare_s_node_tells_what_only_it_can_see() -> Result<()> {
    let sites = Sites::start("push_told").await?;
    let pusher = sites.pusher("");
    until_following(&pusher).await;
    let status = pusher
        .until("nobody waits at the spare's site", |status| {
            codes(status).contains("no_standby")
        })
        .await;
    assert_eq!(status["counterpart"], Value::Null, "{status:#}");
    let check = |status: &Value, name: &str| {
        let checks = status["checks"].as_array().cloned();
        let found = checks.unwrap_or_default();
        let found = found.into_iter().find(|check| check["name"] == name);
        found.unwrap_or_default()
    };
    let checks = preflight(&sites.pair.there).await?;
    for name in ["builder_keys", "supervisor", "standby"] {
        assert_eq!(check(&checks, name)["result"], "warn", "{checks:#}");
    }
    assert!(
        check(&checks, "disk")["reason"]
            .to_string()
            .contains("not known"),
        "{checks:#}"
    );

    let keys = tempfile::tempdir()?;
    let standby = sites.standby(&format!("[local]\nbuilder_keys_dir = {:?}", keys.path()))?;
    until_told(&pusher).await;
    let checks = preflight(&sites.pair.there).await?;
    // The directory is empty.
    let found = check(&checks, "builder_keys");
    assert_eq!(found["result"], "refuse", "{checks:#}");
    for word in [keys.path().to_str().unwrap_or_default(), "at dc2"] {
        assert!(found["reason"].to_string().contains(word), "{checks:#}");
    }
    assert_eq!(check(&checks, "standby")["result"], "ok", "{checks:#}");
    let disk = check(&checks, "disk");
    assert!(disk["reason"].to_string().contains(" free of "), "{disk:#}");

    let key = BuilderKey::new("20300101000000");
    key.seal_all(&sites.pair.there.primary).await?;
    key.write(keys.path())?;
    support::wait_until("the key is told", support::service::SOON, || async {
        let found = check(&preflight(&sites.pair.there).await?, "builder_keys");
        let good = found["result"] == "ok" && found["reason"].to_string().contains("bldr-2030");
        good.then_some(()).ok_or_else(|| found.to_string().into())
    })
    .await;
    standby.stop().await.ok();
    Ok(())
}

/// The line is cut in silence. The server at the spare's site keeps the pusher's session; the process
/// there ends it and works. When the line is back, the pusher gets the lock again, and nothing of its
/// old session is committed.
#[tokio::test(flavor = "multi_thread")]
async fn a_cut_line_frees_the_lock() -> Result<()> {
    let sites = Sites::start("push_cut").await?;
    let (site, mut factory) = (
        &sites.pair.there,
        Factory::new(seed() + 9).with_keys_of(seed()),
    );
    let line = Proxy::start(site.spare.pg.port()).await?;
    let far = format!("[local.datastore]\nport = {}", line.port());
    let pusher = Service::start(site, &pushing(&far));
    until_following(&pusher).await;
    let standby = sites.standby("")?;
    until_standby(&standby).await;

    line.set(Mode::Hold).await;
    line.freeze();
    factory.fill(&site.primary, 5).await?;
    standby
        .until("it works", |status| status["active"] == true)
        .await;
    line.set(Mode::Pass).await;
    until_following(&pusher).await;
    until_standby(&standby).await;
    until_equal(site).await?;
    verified_deep(site).await?;
    Ok(())
}

async fn preflight(site: &Site) -> Result<Value> {
    let output = site
        .warm_spare(&["--json", "preflight", "--for", "planned"])
        .await;
    Ok(serde_json::from_str(&output.stdout).map_err(|_| output.to_string())?)
}

/// The pusher is killed when the primary is fenced already. The process at the spare's site cannot
/// withdraw that fence; the next pusher gets the lock and does it.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_pusher_undoes_what_a_killed_one_began() -> Result<()> {
    let sites = Sites::start("push_undo").await?;
    let site = &sites.pair.there;
    let pusher = sites.pusher("");
    until_following(&pusher).await;
    let standby = sites.standby("role = \"keep\"")?;
    until_standby(&standby).await;
    pusher.stop().await.ok();
    let doomed = Service::doomed(site, &pushing(PROMOTE), "switchover.drain");
    doomed.dead().await?;
    assert!(!is_writable(&site.primary).await);
    let status = standby.until_hold("force_needed").await;
    let detail = status["hold"]["detail"].to_string();
    assert!(
        detail.contains("has begun a handover (step drain)"),
        "{detail}"
    );

    let pusher = sites.pusher("");
    until_writable(&site.primary).await;
    until_following(&pusher).await;
    until_standby(&standby).await;
    Ok(())
}

/// A takeover that a check refuses must not end the work of the process that pushes.
#[tokio::test(flavor = "multi_thread")]
async fn a_forced_takeover_that_is_refused_leaves_the_pusher_at_work() -> Result<()> {
    let sites = Sites::start("push_refused").await?;
    let (site, mut factory) = (
        &sites.pair.there,
        Factory::new(seed() + 11).with_keys_of(seed()),
    );
    let pusher = sites.pusher("");
    until_following(&pusher).await;
    let keys = tempfile::tempdir()?;
    let no_key = format!("[local]\nbuilder_keys_dir = {:?}", keys.path());
    let standby = sites.standby(&no_key)?;
    until_standby(&standby).await;
    standby.reconfigure(&waiting(&format!("{}\n{no_key}", forced(2)))?);
    let status = standby.until_hold("force_needed").await;
    assert!(
        status["hold"]["detail"]
            .to_string()
            .contains("builder_keys"),
        "{status:#}"
    );
    factory.fill(&site.primary, 3).await?;
    until_equal(site).await?;
    assert_eq!(pusher.status().await?["active"], true);
    assert!(is_writable(&site.primary).await);

    // Without the check nothing refuses.
    standby.reconfigure(&waiting(&forced(2))?);
    until_writable(&site.spare).await;
    Ok(())
}

/// The process at the spare's site is configured for another role while it has the lock itself. A
/// pusher that comes back must know it.
#[tokio::test(flavor = "multi_thread")]
async fn the_role_asked_for_at_the_spare_s_site_does_not_grow_old() -> Result<()> {
    let sites = Sites::start("push_told_on").await?;
    let site = &sites.pair.there;
    let pusher = sites.pusher("");
    until_following(&pusher).await;
    let standby = sites.standby("role = \"spare\"")?;
    until_standby(&standby).await;
    pusher.stop().await.ok();
    let works = |status: &Value| status["active"] == true;
    standby.until("it works", works).await;
    let state = site.spare.pg.conn("warm_spare").await?;
    let old = "UPDATE nodes SET seen = now() - interval '1 hour' WHERE direction = 'pull'";
    state.batch_execute(old).await?;
    support::wait_until("it has told again", support::service::SOON, || async {
        let sql = "SELECT FROM nodes WHERE direction = 'pull' AND seen > now() - interval '10 s'";
        let told = state.query(sql, &[]).await?;
        (!told.is_empty())
            .then_some(())
            .ok_or_else(|| "it is old".into())
    })
    .await;
    let pusher = Service::start(site, &pushing(PROMOTE));
    pusher.until_hold("wishes_differ").await;
    pusher.until("it works", works).await;
    standby
        .until("it waits", |status| status["active"] == false)
        .await;
    assert!(is_writable(&site.primary).await);
    Ok(())
}

/// The line is open for once, and the process at the spare's site is configured to take over. The
/// one that pushes is configured for another role, and its last word is fresh.
#[tokio::test(flavor = "multi_thread")]
async fn only_force_goes_before_another_role_asked_for_by_the_pusher() -> Result<()> {
    let sites = Sites::start("push_open").await?;
    let site = &sites.pair.there;
    let pusher = sites.pusher("");
    until_following(&pusher).await;
    let standby = Service::start(&sites.there, &format!("site = \"dc2\"\n{PROMOTE}"));
    standby.until_hold("wishes_differ").await;
    pusher.until_hold("wishes_differ").await;
    // Its word stays fresh, as if it lived and only its session had ended.
    let state = site.spare.pg.conn("warm_spare").await?;
    let fresh = tokio::spawn(async move {
        let sql = "UPDATE nodes SET seen = now() WHERE direction = 'push'";
        while state.batch_execute(sql).await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
    });
    pusher.running.kill9()?;
    standby
        .until("it works, and does not take over", |status| {
            status["active"] == true && status["hold"]["reason"] == "wishes_differ"
        })
        .await;
    write(&site.primary, "still the primary").await?;
    let status = standby.status().await?;
    assert_eq!(status["role"]["epoch"], 1, "{status:#}");
    standby.reconfigure(&format!("site = \"dc2\"\n{}", forced(2)));
    until_primary(&standby, 2).await;
    fresh.abort();
    Ok(())
}
