//! Whatever befalls the service or its four servers, the spare stands at a commit of the primary, with its artifacts; and
//! Builder on the primary never notices that it is followed.

use std::sync::Arc;
use std::time::Duration;

use support::campaign::{Plan, site, trial};
use support::history::History;
use support::oracle::{Oracle, is_fenced};
use support::transactions::DEEDS;
use support::weather::Weather;
use support::workload::{self, Workload};
use support::{Factory, Result, Site, seed, wait_until};
use tokio_postgres::Client;

/// A sample of what `scripts/campaign` does at length.
async fn sample(mode: &str, time: Duration) {
    let mut plan = Plan::new(mode, seed());
    plan.time = time;
    match trial(&plan).await {
        Ok(summary) => println!("{summary}"),
        // Its lines are to be read.
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_spare_stands_at_a_commit_whatever_befalls_a_stream() {
    sample("auto", Duration::from_secs(70)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_spare_stands_at_a_commit_whatever_befalls_a_copy() {
    sample("snapshot", Duration::from_secs(25)).await;
}

/// A pair that is level, a history with two states, and a session that the fence does not stop.
async fn level_pair() -> Result<(Site, Arc<History>, Oracle, Client)> {
    let site = site("judged").await?;
    Factory::seeded().fill(&site.primary, 4).await?;
    let history = History::start(&site.primary).await?;
    let weather = Arc::new(Weather::default());
    let oracle = Oracle::new(&history, &weather, true);
    let primary = site.primary.conn().await?;
    primary
        .batch_execute("BEGIN; UPDATE accounts SET email = 'changed' WHERE name = 'core'")
        .await?;
    history.commit(&primary, "a change").await?;
    site.warm_spare(&["sync"]).await.ok();
    let spare = site.spare.conn().await?;
    spare
        .batch_execute("SET default_transaction_read_only = off")
        .await?;
    Ok((site, history, oracle, spare))
}

#[track_caller]
fn is_violation(outcome: Result<impl std::fmt::Debug>, invariant: &str) {
    let told = outcome.expect_err("the oracle must see this").to_string();
    assert!(told.contains(invariant), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_oracle_sees_what_is_wrong_with_a_spare() -> Result<()> {
    let (site, history, mut oracle, spare) = level_pair().await?;
    let stand = oracle.check(&site).await?.expect("it can be seen");
    assert_eq!((stand.moment, stand.behind), (1, 0), "{stand:?}");
    assert!(stand.artifacts_seen);
    is_fenced(&site, &Weather::default()).await?;

    // A row that no state of the primary has.
    let other = "UPDATE accounts SET email = 'nobody''s' WHERE name = 'core'";
    spare.batch_execute(other).await?;
    is_violation(
        oracle.check(&site).await,
        "no state that the primary ever had",
    );
    // The state before, after a later one was seen.
    let earlier = "UPDATE accounts SET email = 'core@example.com' WHERE name = 'core'";
    spare.batch_execute(earlier).await?;
    let point = "SELECT lsn::text FROM warm_spare.recovery_point";
    let point: String = spare.query_one(point, &[]).await?.get(0);
    let first = history.lock().await.list[0].lsn;
    let back = format!("UPDATE warm_spare.recovery_point SET lsn = '0/0'::pg_lsn + {first}");
    spare.batch_execute(&back).await?;
    is_violation(oracle.check(&site).await, "INVARIANT 3");
    // The later state again, with the earlier one's position: its change would come twice.
    let later = "UPDATE accounts SET email = 'changed' WHERE name = 'core'";
    spare.batch_execute(later).await?;
    let behind = format!("UPDATE warm_spare.recovery_point SET lsn = '0/0'::pg_lsn + {first} - 8");
    spare.batch_execute(&behind).await?;
    is_violation(oracle.check(&site).await, "is not that commit's");
    let right = format!("UPDATE warm_spare.recovery_point SET lsn = '{point}'");
    spare.batch_execute(&right).await?;
    oracle.check(&site).await?;

    // Past a commit that it does not have: that one would never come.
    let primary = site.primary.conn().await?;
    primary
        .batch_execute("BEGIN; INSERT INTO accounts (name) VALUES ('later')")
        .await?;
    history.commit(&primary, "a later change").await?;
    oracle.check(&site).await?;
    let present = history.lock().await.list[2].lsn;
    let beyond = format!("UPDATE warm_spare.recovery_point SET lsn = '0/0'::pg_lsn + {present}");
    spare.batch_execute(&beyond).await?;
    is_violation(oracle.check(&site).await, "is not that commit's");
    spare.batch_execute(&right).await?;

    // Artifacts: gone, garbled, and excused by the list.
    let keys = site.spare.keys().await?;
    let key = keys.iter().find(|key| key.ends_with(".hart")).expect("one");
    let bytes = site.spare.get(key).await?.expect("it is there");
    site.spare.delete(key).await?;
    is_violation(oracle.check(&site).await, "not there");
    let listed = format!(
        "INSERT INTO warm_spare.unavailable (key, checksum, reason) VALUES ('{key}', '', 'missing')"
    );
    spare.batch_execute(&listed).await?;
    // The list excuses only what the primary's store has really been without.
    is_violation(oracle.check(&site).await, "always had it");
    history.note_lacking(key);
    oracle.check(&site).await?;
    let unlisted = "DELETE FROM warm_spare.unavailable";
    spare.batch_execute(unlisted).await?;
    site.spare.put(key, "other bytes").await?;
    is_violation(oracle.check(&site).await, "have not their artifacts");
    site.spare.put(key, bytes).await?;
    oracle.check(&site).await?;

    // The fence.
    site.spare.pg.set_fence(false).await?;
    is_violation(is_fenced(&site, &Weather::default()).await, "INVARIANT 6");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_workload_feels_what_is_done_to_it() -> Result<()> {
    let site = site("harmed").await?;
    workload::prepare(&site, seed(), 2).await?;
    let history = History::start(&site.primary).await?;
    let weather = Arc::new(Weather::default());
    let pause = Duration::from_millis(5);
    let mut workload = Workload::start(&site, seed(), 2, pause, &history, &weather);
    let minute = Duration::from_secs(90);
    wait_until("every kind of transaction was done", minute, async || {
        let done = workload.done();
        let missing = DEEDS.iter().find(|(deed, _)| !done.contains_key(deed));
        missing.map_or(Ok(()), |(deed, _)| Err(format!("no {deed:?}").into()))
    })
    .await;
    assert_eq!(workload.harm(), Vec::<String>::new());
    let stranger = site.primary.conn().await?;
    let felt = async |what: &str, harm: &str| {
        wait_until(what, minute, async || {
            let all = workload.harm();
            match all.iter().any(|text| text.contains(harm)) {
                true => Ok(()),
                false => Err(format!("{all:?}").into()),
            }
        })
        .await;
    };
    // The history itself reads these tables, and every hand may be waiting for it, with a lock of its own: what is asked
    // for here is not waited for without end.
    let patience = "SET lock_timeout = '1s'";
    stranger.batch_execute(patience).await?;
    // Given up in between. What is left of one that was not had is ended first.
    let lock = "ROLLBACK; BEGIN; LOCK TABLE audit_package, origins IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(3); ROLLBACK";
    wait_until("a lock", minute, async || {
        stranger.batch_execute(lock).await?;
        let all = workload.harm();
        match all.iter().any(|text| text.contains("lock timeout")) {
            true => Ok(()),
            false => Err(format!("{all:?}").into()),
        }
    })
    .await;
    let check = "ALTER TABLE audit_package ADD CHECK (channel <> 'dev') NOT VALID";
    wait_until("a constraint", minute, async || {
        Ok(stranger.batch_execute(check).await?)
    })
    .await;
    felt("a statement that fails", "check constraint").await;
    // Again and again: a hand that has no statement under way hears of it in other words, or not at all.
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
               WHERE pid <> pg_backend_pid() AND application_name = 'warm-spare-tests'";
    wait_until("an ended session", minute, async || {
        stranger.batch_execute(end).await?;
        let all = workload.harm();
        let ended = |text: &String| text.contains("terminat") || text.contains("closed");
        match all.iter().any(ended) {
            true => Ok(()),
            false => Err(format!("{all:?}").into()),
        }
    })
    .await;
    workload.stop().await;
    Ok(())
}
