//! Reports are proved: what a load balancer, health and preflight say was seen within seconds.

use std::time::{Duration, Instant};

use support::follow::{followed, prepared};
use support::pair::{Pair, forced, until_primary};
use support::service::SOON;
use support::{Factory, Result, Service, Site, wait_until};

async fn until_answers(service: &Service<'_>, path: &str, wanted: u16) -> Duration {
    let began = Instant::now();
    wait_until(&format!("{path}: {wanted}"), SOON, || async {
        match service.get(path).await?.status {
            found if found == wanted => Ok(()),
            found => Err(format!("{found}").into()),
        }
    })
    .await;
    began.elapsed()
}

/// For a look, its patience and the time for which it counts.
const SECONDS: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn a_balancer_is_sent_nowhere_once_the_datastore_is_gone() -> Result<()> {
    let pair = Pair::of_own_stores("reports_balancer").await?;
    let spare = followed(&pair.there, "").await?;
    let primary = Service::start(&pair.back, "role = \"primary\"");
    until_answers(&primary, "/primary", 200).await;
    until_answers(&spare, "/spare", 200).await;
    for (service, path) in [(&primary, "/spare"), (&spare, "/primary")] {
        assert_eq!(service.get(path).await?.status, 503, "{path}");
    }

    let asked = [
        (&primary, "/primary", &pair.there.primary.pg),
        (&spare, "/spare", &pair.there.spare.pg),
    ];
    for (service, path, pg) in asked {
        pg.kill9();
        let took = until_answers(service, path, 503).await;
        println!("{path} after the server was killed: 503 in {took:?}");
        assert!(took < SECONDS, "{path}: {took:?}");
        pg.start_again().await?;
        until_answers(service, path, 200).await;
        // It accepts connections, and answers nothing.
        pg.sigstop();
        let took = until_answers(service, path, 503).await;
        println!("{path} after the server fell silent: 503 in {took:?}");
        assert!(took < SECONDS, "{path}: {took:?}");
        pg.sigcont();
        until_answers(service, path, 200).await;
    }

    // By anybody's hand, and however the setting is written.
    let admin = pair.there.primary.pg.conn("postgres").await?;
    for value in ["on", "true", "1"] {
        let sql = format!("ALTER DATABASE builder SET default_transaction_read_only = {value}");
        admin.batch_execute(&sql).await?;
        until_answers(&primary, "/primary", 503).await;
        let reset = "ALTER DATABASE builder RESET default_transaction_read_only";
        admin.batch_execute(reset).await?;
        until_answers(&primary, "/primary", 200).await;
    }
    Ok(())
}

fn has_code(status: &serde_json::Value, code: &str) -> bool {
    let reasons = status["health"]["reasons"].as_array();
    reasons.is_some_and(|reasons| reasons.iter().any(|reason| reason["code"] == code))
}

/// The state database that a primary keeps which runs a service of its own.
async fn with_records(pair: &Pair) -> Result<()> {
    let service = Service::start(&pair.back, "role = \"primary\"");
    service.until_state("primary").await;
    service.stop().await.ok();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spare_of_a_fenced_primary_is_critical_and_not_handed_over() -> Result<()> {
    let pair = Pair::start("reports_fenced").await?;
    let site = &pair.there;
    with_records(&pair).await?;
    let service = followed(site, "").await?;
    service
        .until("healthy", |status| status["health"]["level"] == 0)
        .await;

    // By hand: nothing on record.
    site.primary.pg.set_fence(true).await?;
    let status = service
        .until("it is told", |status| has_code(status, "primary_read_only"))
        .await;
    assert_eq!(status["health"]["level"], 2, "{status:#}");
    let found = site.warm_spare(&["--json", "preflight"]).await.json();
    assert_check(&found, "fence", "warn", "no record says by whom");

    // By another cluster.
    let there = site.primary.pg.conn("warm_spare").await?;
    let sql = "INSERT INTO fence (epoch, by_cluster, settled, lifted) VALUES (2, 'deadbeef', true, false)";
    there.batch_execute(sql).await?;
    service
        .until("by whom is told", |status| {
            let text = status["health"]["reasons"].to_string();
            text.contains("cluster deadbeef under epoch 2")
        })
        .await;
    let found = site.warm_spare(&["--json", "preflight"]).await.json();
    assert_check(&found, "fence", "refuse", "cluster deadbeef under epoch 2");

    // By our own hand, and forgotten: withdrawn by a stream that goes on all the time.
    let id = service.status().await?["cluster_id"].clone();
    let id = id.as_str().expect("an id");
    let sql = format!("UPDATE fence SET by_cluster = '{id}', settled = false");
    there.batch_execute(&sql).await?;
    let status = service
        .until("it is withdrawn", |status| {
            !has_code(status, "primary_read_only") && status["peer"]["fenced"] == false
        })
        .await;
    assert!(
        status.to_string().contains("forgotten fence of epoch 2"),
        "{status:#}"
    );
    Ok(())
}

#[track_caller]
fn assert_check(found: &serde_json::Value, name: &str, result: &str, words: &str) {
    let checks = found["checks"].as_array().expect("checks");
    let check = checks.iter().find(|check| check["name"] == name);
    let check = check.expect("that check");
    let reason = check["reason"].as_str().unwrap_or_default();
    assert!(
        check["result"] == result && reason.contains(words),
        "{name}: {found:#}"
    );
}

async fn empty_the_bucket(site: &Site) -> Result<()> {
    for key in site.spare.keys().await? {
        if key.ends_with(".hart") {
            site.spare.delete(&key).await?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_bucket_is_red_and_is_not_promoted_without_consent() -> Result<()> {
    let site = prepared("reports_bucket").await?;
    Factory::seeded().fill(&site.primary, 30).await?;
    let service = followed(&site, "").await?;
    let found = site.warm_spare(&["--json", "preflight"]).await.json();
    assert_check(&found, "artifacts", "ok", "are in the local bucket");
    empty_the_bucket(&site).await?;
    for purpose in ["planned", "unplanned"] {
        let arguments = ["--json", "preflight", "--for", purpose];
        let output = site.warm_spare(&arguments).await;
        assert_eq!(output.code, Some(1), "{output}");
        assert_check(
            &output.json(),
            "artifacts",
            "refuse",
            "not in the local bucket",
        );
    }
    let emptied = Instant::now();
    let status = service
        .until("it is red", |status| has_code(status, "missing_here"))
        .await;
    assert!(emptied.elapsed() < Duration::from_secs(60));
    assert_eq!(status["health"]["level"], 2, "{status:#}");
    assert!(
        status["artifacts"]["missing_here"].as_u64() > Some(0),
        "{status:#}"
    );

    service.reconfigure(&forced(2));
    let status = service.until_hold("force_needed").await;
    let detail = status["hold"]["detail"].to_string();
    assert!(detail.contains("artifacts: "), "{detail}");
    let step = status["hold"]["next_step"].to_string();
    assert!(
        step.contains("fuse.approve = \\\"artifacts-2\\\""),
        "{step}"
    );
    service.reconfigure(&format!("{}\n[fuse]\napprove = \"artifacts-2\"", forced(2)));
    until_primary(&service, 2).await;
    Ok(())
}

/// A confirmation bears the time of the primary's own datastore: one of a time to come says that a clock was set back.
#[tokio::test(flavor = "multi_thread")]
async fn a_spare_that_was_complete_at_a_time_to_come_is_not_counted_as_complete() -> Result<()> {
    let pair = Pair::start("reports_clocks").await?;
    pair.there.warm_spare(&["sync"]).await.ok();
    let state = pair.there.spare.pg.conn("warm_spare").await?;
    let confirm = |age: &str| {
        format!(
            "DELETE FROM confirmation; \
             INSERT INTO confirmation (time, clock_offset) VALUES (now() + interval '{age}', 0)"
        )
    };
    state.batch_execute(&confirm("1 hour")).await?;
    let primary = Service::start(&pair.back, "role = \"primary\"");
    let status = primary
        .until("it has looked", |status| {
            status["state"] == "primary" && !has_code(status, "starting")
        })
        .await;
    assert!(has_code(&status, "no_spare"), "{status:#}");
    assert!(
        status.to_string().contains("at a time in the future"),
        "{status:#}"
    );
    state.batch_execute(&confirm("0 s")).await?;
    primary
        .until("it is followed", |status| status["health"]["level"] == 0)
        .await;
    Ok(())
}
