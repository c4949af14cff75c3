//! Several nodes of one spare: one works, and another one takes over when it ends, is frozen, or is lost.

use support::follow::until_equal;
use support::proxy::{Mode, Proxy};
use support::service::{Halt, SOON};
use support::{Factory, Result, Service, Site, Spec, site, wait_until};

#[tokio::test(flavor = "multi_thread")]
async fn one_works_and_the_others_stand_by() -> Result<()> {
    let site = site("standby").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 3).await?;
    let first = Service::start(&site, "");
    first.until_level().await;
    let second = first.beside("");
    let status = second.until_state("standby").await;
    assert_eq!(status["health"]["level"], 0, "{status:#}");
    assert_eq!(status["active"], false);
    assert!(
        status["lag"]["seconds"].is_number(),
        "it shows how the spare stands: {status:#}"
    );
    assert_eq!(second.metric("warm_spare_active").await?, Some(0.0));
    assert_eq!(first.metric("warm_spare_active").await?, Some(1.0));
    let pass = site.warm_spare(&["sync"]).await;
    assert_eq!(pass.code, Some(4), "one works at a time: {pass}");

    first.running.kill9()?;
    second.until_level().await;
    factory
        .package(&site.primary, Spec::new("core", "more", "1"))
        .await?;
    wait_until("the new package", SOON, || async {
        let rows = site.spare.conn().await?;
        let sql = "SELECT count(*) FROM origin_packages";
        match rows.query_one(sql, &[]).await?.get::<_, i64>(0) {
            4 => Ok(()),
            found => Err(format!("{found} of 4").into()),
        }
    })
    .await;
    Ok(())
}

/// A load balancer may ask any node of a site.
#[tokio::test(flavor = "multi_thread")]
async fn every_node_answers_for_the_cluster() -> Result<()> {
    let site = support::follow::prepared("every_node").await?;
    Factory::seeded().fill(&site.primary, 2).await?;
    let first = Service::start(&site, "");
    first.until_level().await;
    let second = first.beside("role = \"keep\"");
    second.until_state("standby").await;
    let answers = async |node: &Service<'_>, path: &str, wanted: u16| {
        wait_until(path, SOON, || async {
            let answer = node.get(path).await?;
            (answer.status == wanted)
                .then_some(())
                .ok_or_else(|| format!("{} {}", answer.status, answer.text).into())
        })
        .await;
    };
    for node in [&first, &second] {
        answers(node, "/spare", 200).await;
        answers(node, "/primary", 503).await;
    }
    // Either may get the lock when the promotion is done.
    first.reconfigure(support::pair::PROMOTE);
    for node in [&first, &second] {
        answers(node, "/primary", 200).await;
    }
    let (worker, waiting) = wait_until("one works, the other waits", SOON, || async {
        let states = [first.status().await?, second.status().await?];
        match [&states[0]["state"], &states[1]["state"]].map(|state| state.as_str()) {
            [Some("primary"), Some("standby")] => Ok((&first, &second)),
            [Some("standby"), Some("primary")] => Ok((&second, &first)),
            other => Err(format!("{other:?}").into()),
        }
    })
    .await;
    answers(waiting, "/primary", 200).await;

    // The database is what counts, not what was told: a server that takes no writes serves nobody.
    let fenced = "ALTER DATABASE builder SET default_transaction_read_only = on";
    worker.running.sigstop();
    site.spare
        .pg
        .conn("postgres")
        .await?
        .batch_execute(fenced)
        .await?;
    answers(waiting, "/primary", 503).await;
    Ok(())
}

/// The server process that holds the working lock, and how many statements it was seen to begin.
async fn holder(site: &Site) -> Result<Option<(i32, String)>> {
    let sql =
        "SELECT a.pid, a.query_start::text FROM pg_locks l JOIN pg_stat_activity a USING (pid)
               WHERE l.locktype = 'advisory' AND l.granted AND a.datname = 'warm_spare'";
    let found = site
        .spare
        .pg
        .conn("warm_spare")
        .await?
        .query_opt(sql, &[])
        .await?;
    Ok(found.map(|row| (row.get(0), row.get(1))))
}

async fn until_another_holds(site: &Site, than: i32) {
    wait_until("another process holds the lock", SOON, || async {
        match holder(site).await? {
            Some((pid, _)) if pid != than => Ok(()),
            found => Err(format!("{found:?}").into()),
        }
    })
    .await;
}

/// A machine that has lost its power, or its line, closes no connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_node_is_taken_over_from() -> Result<()> {
    let site = site("lost").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 3).await?;
    let line = Proxy::start(site.spare.pg.port()).await?;
    let lost = Service::start(&site, &format!("[local.datastore]\nport = {}", line.port()));
    lost.until_level().await;
    let second = lost.beside("");
    let status = second.until_state("standby").await;
    let (pid, _) = holder(&site).await?.expect("the first one holds it");
    let told = status["holder"].as_str().unwrap_or_default();
    assert!(told.contains(&pid.to_string()), "{status:#}");

    line.set(Mode::Hold).await;
    let lost_at = std::time::Instant::now();
    lost.running.kill9()?;
    second
        .until("it says that the other one is silent", |status| {
            let reasons = status["health"]["reasons"].to_string();
            reasons.contains("silent_holder") || status["active"] == true
        })
        .await;
    until_another_holds(&site, pid).await;
    println!("taken over after {} s", lost_at.elapsed().as_secs());
    factory
        .package(&site.primary, Spec::new("core", "more", "1"))
        .await?;
    until_equal(&site).await?;
    Ok(())
}

/// It lives, and finds its session ended when it wakes.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_node_is_taken_over_from_and_stands_by_then() -> Result<()> {
    let site = site("frozen").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 3).await?;
    let frozen = Service::start(&site, "");
    frozen.until_level().await;
    let second = frozen.beside("");
    second.until_state("standby").await;
    let (pid, _) = holder(&site).await?.expect("the first one holds it");
    frozen.running.sigstop();
    until_another_holds(&site, pid).await;
    second.until_level().await;
    frozen.running.sigcont();
    frozen.until_state("standby").await;
    let status = second.status().await?;
    assert_eq!(status["active"], true, "{status:#}");
    Ok(())
}

/// A copy may have nothing to say to the session of its lock for hours.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_busy_elsewhere_keeps_the_lock() -> Result<()> {
    let site = site("busy_elsewhere").await;
    Factory::seeded().fill(&site.primary, 1).await?;
    let (halt, wanted) = Halt::at("baseline.tables");
    site.write_config("");
    let environment = [("WARM_SPARE_WAIT_AT", wanted.as_str())];
    let pass = site.spawn_with(&site.config_file(), &["sync"], &environment);
    halt.reached().await;
    let (pid, mut sign) = holder(&site).await?.expect("the pass holds it");
    let second = Service::start(&site, "");
    second.until_state("standby").await;
    // More than the signs after which a silent one is ended.
    for _ in 0..9 {
        sign = wait_until("a sign of life", SOON, || async {
            match holder(&site).await? {
                Some((same, new)) if same == pid && new != sign => Ok(new),
                found => Err(format!("{found:?}, {pid} before").into()),
            }
        })
        .await;
    }
    halt.go();
    pass.wait(SOON).await?.ok();
    second.until_level().await;
    Ok(())
}
