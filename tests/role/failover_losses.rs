//! A link or a store is lost at a step of a failover, and again at one of the failback: the failover is done all the same,
//! the old primary comes back, and what was lost is told to the row.

use std::collections::BTreeMap;

use support::follow::{followed, until_equal, until_following};
use support::pair::{
    self, Pair, STORES, forced, is_writable, lost, until_primary, until_settled, write,
};
use support::proxy::{Mode, Proxy};
use support::{Result, Service, Site};

const FAILOVER: [&str; 5] = ["preflight", "fence", "drain", "sequences", "promote"];
const FAILBACK: [&str; 5] = ["peer", "fence", "divergence", "release", "role"];

/// What is lost for a while.
enum Loss<'a> {
    Store(&'static str),
    /// The way to the primary's datastore.
    Link(&'a Proxy),
}

impl Loss<'_> {
    async fn strike(&self, site: &Site) {
        match self {
            Loss::Store(store) => pair::kill(site, store),
            Loss::Link(line) => {
                line.lose().await;
            }
        }
    }

    async fn heal(&self, site: &Site) -> Result<()> {
        match self {
            Loss::Store(store) => pair::start_again(site, store).await?,
            Loss::Link(line) => line.set(Mode::Pass).await,
        }
        Ok(())
    }

    /// Whether the spare itself cannot go on until it is healed.
    fn is_our_own(&self) -> bool {
        matches!(self, Loss::Store("spare.pg" | "spare.s3"))
    }

    fn name(&self) -> &str {
        match self {
            Loss::Store(store) => store,
            Loss::Link(_) => "link",
        }
    }
}

/// One of the two ways round, and what its spare's configuration says beside the role.
struct Way<'a> {
    site: &'a Site,
    extra: String,
}

impl Way<'_> {
    fn with(&self, wish: &str) -> String {
        // By itself the old primary is looked for every 5 s.
        format!("{wish}\ntakeover.fence_retry = \"500ms\"\n{}", self.extra)
    }
}

/// Whether the row that was written before it is lost.
async fn fail_over<'a>(
    way: &'a Way<'a>,
    epoch: i64,
    step: &str,
    loss: &Loss<'_>,
) -> Result<(Service<'a>, bool)> {
    let site = way.site;
    let row = format!("{} at failover.{step} of {epoch}", loss.name());
    write(&site.primary, &row).await?;
    let wish = way.with(&forced(epoch));
    let (service, halt) = Service::halting(site, &wish, &format!("failover.{step}"));
    halt.reached().await;
    loss.strike(site).await;
    halt.go();
    if loss.is_our_own() {
        service
            .until("it is done, or waits", |status| {
                status["state"] == "primary" || !status["hold"].is_null()
            })
            .await;
        loss.heal(site).await?;
        // It would try again by itself, but not so soon.
        let again = format!("{}\nchange = \"go on\"", forced(epoch));
        service.reconfigure(&way.with(&again));
    }
    until_primary(&service, epoch).await;
    if !loss.is_our_own() {
        loss.heal(site).await?;
    }
    until_settled(&service).await;
    assert!(!is_writable(&site.primary).await, "{row}");
    write(&site.spare, &format!("after {row}")).await?;
    let wanted = BTreeMap::from([(row.clone(), 0)]);
    let lost = !lost(&site.spare, &wanted).await?.is_empty();
    println!("{row}: done, {}", if lost { "lost" } else { "kept" });
    Ok((service, lost))
}

async fn fail_back(way: &Way<'_>, step: &str, loss: &Loss<'_>, lost: bool) -> Result<()> {
    let site = way.site;
    let what = format!("{} at failback.{step}", loss.name());
    site.write_config("");
    support::follow::prepare(site).await;
    let (service, halt) = Service::halting(site, &way.extra, &format!("failback.{step}"));
    halt.reached().await;
    loss.strike(site).await;
    halt.go();
    service
        .until("it goes on, or waits", |status| {
            status["role"]["actual"] == "spare" || !status["hold"].is_null()
        })
        .await;
    assert!(!is_writable(&site.spare).await, "{what}");
    loss.heal(site).await?;
    until_following(&service).await;
    until_equal(site).await?;
    assert!(is_writable(&site.primary).await, "{what}");
    let found = site.warm_spare(&["divergence", "--json"]).await;
    assert_eq!(found.code, Some(i32::from(lost)), "{what}: {found}");
    let found = found.json();
    assert_eq!(
        found["divergence"]["rows"],
        i32::from(lost),
        "{what}: {found:#}"
    );
    assert_eq!(found["divergence"]["exact"], true, "{what}: {found:#}");
    println!("{what}: it follows");
    service.stop().await.ok();
    Ok(())
}

/// There by a failover, the roles turned by the failback, and so on.
async fn to_and_fro(ways: [Way<'_>; 2], losses: &[[Loss<'_>; 2]]) -> Result<()> {
    followed(ways[0].site, &ways[0].extra)
        .await?
        .stop()
        .await
        .ok();
    let steps = FAILOVER.into_iter().zip(FAILBACK).cycle();
    let each = losses
        .iter()
        .flat_map(|pair| std::iter::repeat_n(pair, FAILOVER.len()));
    let cases = support::every_other(each.zip(steps));
    for (turn, (loss, (over, back))) in cases.into_iter().enumerate() {
        let (way, other) = (&ways[turn % 2], &ways[1 - turn % 2]);
        let epoch = turn as i64 + 2;
        let (service, lost) = fail_over(way, epoch, over, &loss[turn % 2]).await?;
        fail_back(other, back, &loss[1 - turn % 2], lost).await?;
        service.stop().await.ok();
    }
    Ok(())
}

#[tokio::test]
async fn each_store_is_lost_at_each_step_of_a_failover_and_of_a_failback() -> Result<()> {
    let pair = Pair::of_own_stores("losses_forced").await?;
    let way = |site| Way {
        site,
        extra: String::new(),
    };
    let losses = STORES.map(|store| [Loss::Store(store), Loss::Store(store)]);
    to_and_fro([way(&pair.there), way(&pair.back)], &losses).await
}

#[tokio::test]
async fn the_link_is_cut_at_each_step_of_a_failover_and_of_a_failback() -> Result<()> {
    let pair = Pair::start("losses_forced_link").await?;
    let there = Proxy::start(pair.there.primary.pg.port()).await?;
    let back = Proxy::start(pair.back.primary.pg.port()).await?;
    let way = |site, line: &Proxy| Way {
        site,
        extra: line.to_peer(""),
    };
    let ways = [way(&pair.there, &there), way(&pair.back, &back)];
    to_and_fro(ways, &[[Loss::Link(&there), Loss::Link(&back)]]).await
}
