//! Our slot on the primary: none is left behind by a copy that came to nothing or needs none, and one that somebody else
//! made is never dropped.

use support::follow::{
    audit, copies, followed, gaps, lasting_slots, prepared, tamper, until_closed, until_equal,
    until_following,
};
use support::packages::{delete_rows, promote};
use support::proxy::{Mode, Proxy};
use support::{Factory, Result, Service, Site};

const MADE: &str = "made_by_hand";
const THROUGH_MADE: &str = "[replication]\nslot = \"made_by_hand\"\n";

async fn make_by_hand(site: &Site) -> Result<()> {
    let sql = "SELECT pg_create_logical_replication_slot($1::text, 'pgoutput')";
    site.primary.conn().await?.execute(sql, &[&MADE]).await?;
    Ok(())
}

/// Else the rolling comparison may find a provoked gap before the stream does.
const NOT_COMPARED: &str = "[verify]\nrolling = 0\n";

/// The spare lacks a row that the primary goes on to change, which only a new copy makes good.
async fn provoke_gap(site: &Site, number: usize) -> Result<()> {
    tamper(site, "TRUNCATE accounts CASCADE").await?;
    let sql = format!("UPDATE accounts SET email = 'changed {number}'");
    Ok(site.primary.conn().await?.batch_execute(&sql).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_that_come_to_nothing_and_snapshots_leave_no_slot() -> Result<()> {
    let site = prepared("slots_none").await?;
    let mut factory = Factory::seeded();
    let made = factory.fill(&site.primary, 12).await?;
    Service::doomed(&site, "", "slot.after_copy").dead().await?;
    assert_eq!(lasting_slots(&site).await?.len(), 1, "it was killed there");
    let snapshots = "[replication]\nmode = \"snapshot\"";
    let service = Service::start(&site, snapshots);
    service.until_level().await;
    assert_eq!(lasting_slots(&site).await?, Vec::<String>::new());
    service.stop().await.ok();

    // Refused by the fuse, which judges after the slot was made to last.
    let fuse = "[fuse]\nmax_percent = 10\nmin_count = 5\n";
    let client = site.primary.conn().await?;
    for package in &made[..8] {
        delete_rows(&client, package.names()).await?;
    }
    let service = Service::start(&site, fuse);
    service.until_hold("fuse").await;
    assert_eq!(lasting_slots(&site).await?, Vec::<String>::new());
    service.reconfigure("");
    until_following(&service).await;
    until_equal(&site).await?;
    assert_eq!(lasting_slots(&site).await?.len(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_made_by_hand_is_gone_over_to_and_never_dropped() -> Result<()> {
    let site = prepared("slots_made").await?;
    let made = Factory::seeded().fill(&site.primary, 3).await?;
    let service = followed(&site, "").await?;
    let ours = lasting_slots(&site).await?;
    assert_eq!(ours.len(), 1);
    make_by_hand(&site).await?;
    service.reconfigure(&format!("{THROUGH_MADE}{NOT_COMPARED}"));
    until_closed(&service, "must be used instead of", 1).await?;
    let ours_is_gone = "ours is dropped, for nobody reads it";
    assert_eq!(lasting_slots(&site).await?, [MADE], "{ours_is_gone}");
    let before = copies(&service).await?;
    promote(&site.primary, &made[0], "stable").await?;
    until_equal(&site).await?;
    assert_eq!(copies(&service).await?, before, "it is followed");

    // Whatever makes the service give a slot up leaves this one.
    provoke_gap(&site, 1).await?;
    until_closed(&service, "changed 0 rows", before).await?;
    assert_eq!(lasting_slots(&site).await?, [MADE], "after a gap");
    service.reconfigure("[replication]\nmode = \"snapshot\"\nslot = \"made_by_hand\"\n");
    service
        .until("snapshots", |status| {
            status["replication"]["mode"] == "snapshot"
        })
        .await;
    audit(&site, "by a copy").await?;
    until_equal(&site).await?;
    assert_eq!(lasting_slots(&site).await?, [MADE], "after a copy");
    service.reconfigure("");
    until_following(&service).await;
    let all = lasting_slots(&site).await?;
    assert_eq!(all, [vec![MADE.to_string()], ours].concat(), "and back");
    service.stop().await.ok();
    site.warm_spare(&["release"]).await.ok();
    assert_eq!(lasting_slots(&site).await?, [MADE], "after a release");
    Ok(())
}

/// A copy that was refused does not drop it either.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_refused_leaves_a_slot_made_by_hand() -> Result<()> {
    let site = prepared("slots_refused").await?;
    let made = Factory::seeded().fill(&site.primary, 12).await?;
    make_by_hand(&site).await?;
    let fuse = format!("{THROUGH_MADE}[fuse]\nmax_percent = 10\nmin_count = 5\n");
    followed(&site, &fuse).await?.stop().await.ok();
    let client = site.primary.conn().await?;
    for package in &made[..8] {
        delete_rows(&client, package.names()).await?;
    }
    // Past what the spare has: nothing joins, and a whole copy is made, which the fuse refuses.
    let advance = "SELECT pg_replication_slot_advance($1::text, pg_current_wal_lsn())";
    client.execute(advance, &[&MADE]).await?;
    let service = Service::start(&site, &fuse);
    service.until_hold("fuse").await;
    assert_eq!(lasting_slots(&site).await?, [MADE]);
    assert_eq!(gaps(&service.status().await?).len(), 1);
    Ok(())
}

/// One gap is closed at once. Those that come again and again would be copies without end.
#[tokio::test(flavor = "multi_thread")]
async fn gaps_that_come_again_and_again_are_paced() -> Result<()> {
    let site = prepared("slots_paced").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let mut service = followed(&site, NOT_COMPARED).await?;
    for number in 1..=6 {
        let said = service.running.stderr();
        let paced = said.iter().any(|line| line.contains("recent gaps"));
        assert!(!paced, "before gap {number}: {said:#?}");
        provoke_gap(&site, number).await?;
        until_closed(&service, "changed 0 rows", number as u64).await?;
    }
    service
        .running
        .wait_for_line(
            |line| line.contains("6 recent gaps; the next copy waits"),
            support::service::SOON,
        )
        .await?;
    Ok(())
}

/// A holder that was asleep has lost the lock, and is about to drop the slot. The next holder goes on
/// from that slot, which nobody reads yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_former_holder_drops_no_slot() -> Result<()> {
    let site = prepared("slots_former").await?;
    Factory::seeded().fill(&site.primary, 3).await?;
    let (asleep, halt) = Service::halting(&site, "", "slot.before_drop");
    until_following(&asleep).await;
    let line = Proxy::start(site.primary.pg.port()).await?;
    line.lose().await;
    let next = asleep.beside(&line.to_peer(""));
    next.until_state("standby").await;
    asleep.reconfigure("[replication]\nmode = \"snapshot\"");
    halt.reached().await;
    let admin = site.spare.pg.conn("warm_spare").await?;
    let end = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted \
               AND database = (SELECT oid FROM pg_database WHERE datname = 'warm_spare')";
    admin.batch_execute(end).await?;
    next.until("it works", |status| status["active"] == true)
        .await;
    halt.go();
    asleep.until_state("standby").await;
    assert_eq!(lasting_slots(&site).await?.len(), 1);
    line.set(Mode::Pass).await;
    until_following(&next).await;
    audit(&site, "after").await?;
    until_equal(&site).await?;
    assert_eq!(copies(&next).await?, 0, "no new baseline");
    Ok(())
}
