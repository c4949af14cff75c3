//! Only the line from the primary's site to the spare's is open: one process pushes from the
//! primary's site, and another one waits at the spare's.

use serde_json::Value;
use support::follow::{until_equal, until_following};
use support::pair::{
    PROMOTE, Pair, Writers, forced, is_writable, lost, returning, until_primary, until_read_only,
    until_settled, until_writable, write,
};
use support::ports::free_port;
use support::{Factory, Result, Service, Site, seed};

const PUSH: &str = "site = \"dc1\"\n[replication]\ndirection = \"push\"";

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
    format!("{more}\n{PUSH}")
}

/// Returns the configuration of the process at the spare's site, to which the primary's servers do
/// not answer.
fn waiting(more: &str) -> Result<String> {
    let closed = free_port()?;
    Ok(format!(
        "{more}\nsite = \"dc2\"\n[peer.datastore]\nport = {closed}\n[peer.s3]\nendpoint = \"http://127.0.0.1:{closed}\""
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
    let pusher = sites.pusher("");
    until_following(&pusher).await;
    let standby = sites.standby("")?;
    until_standby(&standby).await;
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
