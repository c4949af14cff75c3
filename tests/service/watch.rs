//! What is seen from outside: HTTP, metrics, the log.

use serde_json::Value;
use std::collections::BTreeMap;
use support::service::{SOON, get, request};
use support::{Factory, Result, Service, Spec, site};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test(flavor = "multi_thread")]
async fn every_path_answers_as_documented() -> Result<()> {
    let site = site("paths").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    let service = Service::start(&site, "");
    service.until_level().await;
    let port = service.port;
    let health = get(port, "/health").await?;
    assert_eq!(
        (health.status, health.kind.as_str()),
        (200, "application/json")
    );
    assert_eq!(health.json()["status"], "OK");
    assert_eq!(health.json()["level"], 0);
    let status = get(port, "/status").await?;
    assert_eq!(
        (status.status, status.kind.as_str()),
        (200, "application/json")
    );
    assert_eq!(status.json()["format"], 1);
    assert_eq!(get(port, "/spare").await?.status, 200);
    assert_eq!(get(port, "/primary").await?.status, 503);
    assert_eq!(get(port, "/").await?.status, 404);
    assert_eq!(request(port, "POST", "/status").await?.status, 405);
    assert_eq!(request(port, "HEAD", "/health").await?.status, 405);
    let shown = site.warm_spare(&["status", "--json"]).await.ok().json();
    assert_eq!(shown["state"], "following");
    let line = site.warm_spare(&["--json", "health"]).await.ok().json();
    assert_eq!(line["level"], 0);
    Ok(())
}

/// Clients that connect and say nothing take no place from those that ask.
#[tokio::test(flavor = "multi_thread")]
async fn silent_clients_are_nobodys_trouble() -> Result<()> {
    let site = site("silent").await;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = Service::start(&site, "");
    service.until_level().await;
    let mut silent = Vec::new();
    for _ in 0..60 {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", service.port)).await?;
        stream.write_all(b"GET /status HT").await?;
        silent.push(stream);
    }
    assert_eq!(get(service.port, "/health").await?.status, 200);
    // They are shown out.
    for stream in &mut silent {
        let mut rest = Vec::new();
        tokio::time::timeout(SOON, stream.read_to_end(&mut rest)).await??;
    }
    assert_eq!(get(service.port, "/health").await?.status, 200);
    Ok(())
}

/// By name and labels, as a scraper reads them.
fn samples(page: &str) -> BTreeMap<String, f64> {
    let parsed = openmetrics_parser::openmetrics::parse_openmetrics(page);
    parsed.unwrap_or_else(|error| panic!("{error}\n{page}"));
    let mut found = BTreeMap::new();
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').expect("a value");
        let value = value
            .parse()
            .unwrap_or_else(|error| panic!("{line}: {error}"));
        assert!(
            found.insert(name.to_string(), value).is_none(),
            "twice: {name}"
        );
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_valid_in_every_state() -> Result<()> {
    let site = site("metrics").await;
    let mut factory = Factory::seeded();
    let made = factory.fill(&site.primary, 6).await?;
    site.primary.delete(&made[0].key).await?;
    let service = Service::start(&site, "role = \"keep\"");
    service.until_hold("role_unset").await;
    let page = service.get("/metrics").await?;
    assert!(
        page.kind.starts_with("application/openmetrics-text"),
        "{}",
        page.kind
    );
    let nothing = samples(&page.text);
    // Unknown is absent, never 0.
    for unknown in [
        "lag_seconds",
        "recovery_point_timestamp_seconds",
        "verify_differences",
        "epoch",
    ] {
        assert!(
            !nothing.contains_key(&format!("warm_spare_{unknown}")),
            "{unknown}: {nothing:?}"
        );
    }
    assert_eq!(nothing["warm_spare_state{state=\"holding\"}"], 1.0);

    service.reconfigure("[replication]\ngate_grace = \"1s\"");
    let status = service.until_level().await;
    assert_eq!(status["artifacts"]["missing_on_primary"], 1, "{status:#}");
    assert_eq!(status["artifacts"]["examples"][0]["key"], made[0].key);
    assert_eq!(status["health"]["reasons"][0]["code"], "missing_on_primary");
    let level = samples(&service.get("/metrics").await?.text);
    for (name, value) in [
        ("active", 1.0),
        ("health", 1.0),
        ("state{state=\"following\"}", 1.0),
        ("state{state=\"holding\"}", 0.0),
        ("role{role=\"spare\"}", 1.0),
        ("epoch", 1.0),
        ("lag_bytes", 0.0),
        ("config_valid", 1.0),
        ("reachable{side=\"peer\",store=\"s3\"}", 1.0),
        ("reachable{side=\"local\",store=\"datastore\"}", 1.0),
        ("fenced{side=\"local\"}", 1.0),
        ("fenced{side=\"peer\"}", 0.0),
        ("artifacts{state=\"missing_on_primary\"}", 1.0),
        ("artifacts{state=\"staged\"}", 0.0),
        ("artifacts_copied_total", 5.0),
        ("baselines_total{result=\"done\"}", 1.0),
        ("transactions_applied_total", 0.0),
        ("generations_bytes", 0.0),
    ] {
        assert_eq!(
            level.get(&format!("warm_spare_{name}")),
            Some(&value),
            "{name}: {level:#?}"
        );
    }
    assert!(level["warm_spare_lag_seconds"] < 60.0);
    assert!(level["warm_spare_artifact_bytes_copied_total"] > 0.0);
    let version = format!(
        "warm_spare_build_info{{version=\"{}\"}}",
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(level.get(&version), Some(&1.0));

    // What the primary lacked is tried again, and is here when it is there.
    service.reconfigure("[replication]\nretry_missing = \"1s\"");
    site.primary.put(&made[0].key, made[0].bytes()).await?;
    let status = service
        .until("it is brought", |status| {
            status["artifacts"]["missing_on_primary"] == 0
        })
        .await;
    assert_eq!(status["health"]["level"], 0, "{status:#}");
    service.stop().await;
    site.warm_spare(&["verify", "--deep"]).await.ok();
    Ok(())
}

/// One document a line, with the side named; and only a few of them.
#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_json_if_asked_and_short() -> Result<()> {
    let site = site("log").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let extra = "log_format = \"json\"\nlog_level = \"info\"\n[peer.datastore]\nport = 1";
    let service = Service::start(&site, extra);
    service.until_hold("peer_unreachable").await;
    service.reconfigure("log_format = \"json\"\nlog_level = \"info\"");
    service.until_level().await;
    for number in 0..3 {
        let before = service.status().await?["recovery_point"]["lsn"].clone();
        factory
            .package(
                &site.primary,
                Spec::new("core", "more", &number.to_string()),
            )
            .await?;
        service
            .until("copied", |status| status["recovery_point"]["lsn"] != before)
            .await;
    }
    let output = service.stop().await;
    let lines: Vec<Value> = output
        .stderr
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    let failed = lines
        .iter()
        .filter(|line| line["level"] == "warn")
        .collect::<Vec<_>>();
    assert_eq!(failed.len(), 1, "one failure, one line: {lines:#?}");
    assert_eq!(failed[0]["side"], "peer");
    assert!(
        failed[0]["time"]
            .as_str()
            .is_some_and(|time| time.ends_with('Z'))
    );
    assert!(lines.len() < 25, "{lines:#?}");
    Ok(())
}

/// Somebody else has the port: it works all the same, says so, and takes the port when it is free.
#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_is_waited_for() -> Result<()> {
    let site = site("port").await;
    Factory::seeded().fill(&site.primary, 1).await?;
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = taken.local_addr()?.port();
    let mut service = Service::start(&site, &format!("[http]\nport = {port}"));
    service.port = port;
    service
        .running
        .wait_for_line(|line| line.contains("cannot listen on"), SOON)
        .await?;
    service
        .running
        .wait_for_line(|line| line.ends_with("phase switch"), SOON)
        .await?;
    drop(taken);
    service.until_level().await;
    Ok(())
}
