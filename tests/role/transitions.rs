//! Killed at every step of a transition, it goes on or is undone, and never leaves both clusters read-only or both writable.

use std::collections::BTreeMap;

use support::follow::{followed, until_equal, until_following};
use support::pair::{
    PROMOTE, Pair, forced, is_writable, lost, returned, until_primary, until_settled,
    until_writable, write,
};
use support::{Postgres, Result, Service, Site};

const SWITCHOVER: &[&str] = &[
    "switchover.preflight",
    "switchover.fence",
    "fence.recorded",
    "switchover.drain",
    "switchover.compare",
    "switchover.sequences",
    "switchover.promote",
    "promote.before_commit",
];

async fn never_both(site: &Site, when: &str) {
    let both = is_writable(&site.primary).await && is_writable(&site.spare).await;
    assert!(!both, "both are writable: {when}");
}

/// Killed at each of these and once more behind the commit, and then let go on.
async fn carried_through<'a>(site: &'a Site, points: &[&str]) -> Result<Service<'a>> {
    for point in points.iter().chain(&["promote.after_commit"]) {
        Service::doomed(site, PROMOTE, point).dead().await?;
        never_both(site, point).await;
    }
    let service = Service::start(site, PROMOTE);
    until_primary(&service, 2).await;
    until_settled(&service).await;
    never_both(site, "at the end").await;
    Ok(service)
}

#[tokio::test]
async fn a_switchover_killed_at_each_step_is_carried_through() -> Result<()> {
    let pair = Pair::start("transitions_forward").await?;
    let site = &pair.there;
    followed(site, "").await?.stop().await.ok();
    write(&site.primary, "before").await?;
    let service = carried_through(site, SWITCHOVER).await?;
    write(&site.spare, "after").await?;
    let back = returned(&pair.back, "").await?;
    until_equal(&pair.back).await?;
    back.stop().await.ok();
    service.stop().await.ok();
    Ok(())
}

#[tokio::test]
async fn a_switchover_killed_at_each_step_is_undone_when_it_is_not_asked_for_any_more() -> Result<()>
{
    let pair = Pair::start("transitions_undone").await?;
    let site = &pair.there;
    followed(site, "").await?.stop().await.ok();
    for point in SWITCHOVER {
        Service::doomed(site, PROMOTE, point).dead().await?;
        let service = Service::start(site, "");
        until_writable(&site.primary).await;
        assert!(!is_writable(&site.spare).await, "{point}");
        write(&site.primary, point).await?;
        until_following(&service).await;
        until_equal(site).await?;
        service.stop().await.ok();
    }
    // Killed while it is undone.
    Service::doomed(site, PROMOTE, "switchover.drain")
        .dead()
        .await?;
    Service::doomed(site, "", "undo.begin").dead().await?;
    let service = Service::start(site, "");
    until_following(&service).await;
    write(&site.primary, "at last").await?;
    until_equal(site).await?;
    service.stop().await.ok();
    Ok(())
}

#[tokio::test]
async fn a_failover_and_a_failback_killed_at_each_step_are_carried_through() -> Result<()> {
    let pair = Pair::start("transitions_forced").await?;
    let site = &pair.there;
    followed(site, "").await?.stop().await.ok();
    write(&site.primary, "lost").await?;
    site.primary.pg.kill9();
    let points = [
        "failover.preflight",
        "failover.fence",
        "failover.sequences",
        "failover.promote",
        "promote.before_commit",
        "promote.after_commit",
    ];
    for point in points {
        Service::doomed(site, &forced(2), point).dead().await?;
    }
    let service = Service::start(site, &forced(2));
    until_primary(&service, 2).await;
    write(&site.spare, "kept").await?;
    site.primary.pg.start_again().await?;
    until_settled(&service).await;
    never_both(site, "the old one is here again").await;
    pair.back.write_config("");
    support::follow::prepare(&pair.back).await;
    for point in [
        "failback.peer",
        "failback.fence",
        "failback.divergence",
        "failback.release",
        "failback.role",
        "baseline.tables",
        "switch.before_commit",
    ] {
        Service::doomed(&pair.back, "", point).dead().await?;
        never_both(site, point).await;
    }
    let back = returned(&pair.back, "").await?;
    until_equal(&pair.back).await?;
    let diverged = pair.back.warm_spare(&["divergence", "--json"]).await;
    assert_eq!(diverged.code, Some(1), "{diverged}");
    let found = diverged.json();
    assert_eq!(found["divergence"]["exact"], true, "{found:#}");
    assert_eq!(found["divergence"]["rows"], 1, "{found:#}");
    back.stop().await.ok();
    service.stop().await.ok();
    Ok(())
}

/// The last copy is made behind the fence, and may be killed within.
#[tokio::test]
async fn by_snapshots_a_switchover_killed_at_each_step_is_undone_or_carried_through() -> Result<()>
{
    let pair = Pair::with("transitions_snapshot", Postgres::builder()).await?;
    let site = &pair.there;
    let service = Service::start(site, "");
    service.until_level().await;
    service.stop().await.ok();
    let copying = [
        "baseline.tables",
        "switch.before_commit",
        "switch.after_commit",
    ];
    let points = [SWITCHOVER, &copying].concat();
    let mut written = BTreeMap::new();
    for point in &points {
        write(&site.primary, point).await?;
        written.insert(point.to_string(), 0);
        Service::doomed(site, PROMOTE, point).dead().await?;
        never_both(site, point).await;
        let service = Service::start(site, "");
        until_writable(&site.primary).await;
        assert!(!is_writable(&site.spare).await, "{point}");
        until_equal(site).await?;
        service.stop().await.ok();
    }
    let point = "after the last undoing";
    write(&site.primary, point).await?;
    written.insert(point.to_string(), 0);
    let service = carried_through(site, &points).await?;
    assert_eq!(lost(&site.spare, &written).await?, [""; 0]);
    service.stop().await.ok();
    Ok(())
}
