//! The service's configuration: read again on SIGHUP, refused with the field's name, the last good one kept.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rustix::process::Signal;
use support::service::SOON;
use support::{Factory, Result, Service, Spec, seed, site, wait_until};

#[tokio::test(flavor = "multi_thread")]
async fn a_good_one_takes_effect_and_a_bad_one_is_refused() -> Result<()> {
    let site = site("hup").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    let service = Service::start(&site, "site = \"one\"");
    service.until_level().await;
    service.reconfigure("site = \"two\"\nchange = \"CHG-2\"");
    let status = service
        .until("the new name", |status| status["site"] == "two")
        .await;
    let events = status["events"].as_array().cloned().unwrap_or_default();
    let told = events
        .iter()
        .any(|event| event["kind"] == "config" && event["change"] == "CHG-2");
    assert!(told, "{status:#}");

    service.reconfigure("site = \"three\"\n[replication]\ncopies = \"many\"");
    let status = service
        .until("refused", |status| status["config"]["valid"] == false)
        .await;
    assert_eq!(status["site"], "two", "the last good one stays in force");
    assert!(
        status["config"]["errors"][0]
            .as_str()
            .unwrap_or_default()
            .starts_with("replication.copies: ")
    );
    assert_eq!(status["health"]["level"], 1, "{status:#}");
    assert_eq!(status["health"]["reasons"][0]["code"], "config_refused");
    assert_eq!(service.metric("warm_spare_config_valid").await?, Some(0.0));
    let line = service.health().await;
    assert_eq!(line.code, Some(1), "{line}");
    assert!(line.stdout.contains("replication.copies"), "{line}");
    let shown = site.warm_spare(&["status"]).await.ok();
    assert!(shown.stdout.contains("replication.copies"), "{shown}");

    // Over a restart too; and what is not even TOML is no worse.
    service.write_raw("this is = no [TOML");
    service
        .until("the other error", |status| {
            status["config"]["errors"][0]
                .as_str()
                .is_some_and(|text| text.contains("line 1"))
        })
        .await;
    service.running.terminate();
    let service = service.start_again();
    let status = service.until_level().await;
    assert_eq!(
        (&status["site"], &status["config"]["valid"]),
        (&"two".into(), &false.into())
    );
    assert_eq!(status["health"]["level"], 1, "{status:#}");

    service.reconfigure("site = \"four\"");
    let status = service
        .until("good again", |status| status["config"]["valid"] == true)
        .await;
    assert_eq!(status["site"], "four");
    service
        .until("healthy", |status| status["health"]["level"] == 0)
        .await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_any_good_one_it_stays_up_and_says_so() -> Result<()> {
    let site = site("nothing_good").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    let mut service = Service::start(&site, "rolle = \"spare\"");
    let line = service
        .running
        .wait_for_line(|line| line.contains("refused"), SOON)
        .await?;
    assert!(
        line.contains("rolle: unknown key; did you mean role?"),
        "{line}"
    );
    service
        .running
        .wait_for_line(
            |line| line.contains("no good configuration exists yet"),
            SOON,
        )
        .await?;
    service.running.signal(Signal::HUP);
    service.reconfigure("");
    service.until_level().await;
    Ok(())
}

/// The service is loaded first, and is told of the other cluster afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_peer_it_waits_for_one() -> Result<()> {
    let site = site("no_peer").await;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = Service::start(&site, "rolle = \"spare\"");
    service.until_hold("config").await;
    let mut whole: toml::Table = std::fs::read_to_string(site.config_file())?.parse()?;
    whole.remove("rolle");
    let mut peerless = whole.clone();
    peerless.remove("peer");
    service.write_raw(&peerless.to_string());
    let status = service.until_hold("peer_unset").await;
    assert_eq!(status["config"]["valid"], true, "{status:#}");
    assert_eq!(status["health"]["level"], 1, "{status:#}");
    let step = status["hold"]["next_step"].to_string();
    assert!(step.contains("peer.datastore.host") && step.contains("peer.s3.endpoint"));
    let refused = site.warm_spare(&["sync"]).await;
    assert_eq!(refused.code, Some(2), "{refused}");
    assert!(
        refused.stderr.contains("peer.datastore.host: not set"),
        "{refused}"
    );

    // One that is wrong is an error all the same.
    service.write_raw(&format!("paused = 7\n{peerless}"));
    service.until_hold("config").await;
    service.write_raw(&peerless.to_string());
    service.until_hold("peer_unset").await;
    service.write_raw(&whole.to_string());
    service.until_level().await;

    // Once there was a peer, a configuration without one is refused, and the old one stays.
    service.write_raw(&peerless.to_string());
    let status = service
        .until("refused", |status| status["config"]["valid"] == false)
        .await;
    assert!(status["hold"].is_null(), "{status:#}");
    service.running.terminate();
    let service = service.start_again();
    let status = service.until_level().await;
    assert_eq!(status["config"]["valid"], false, "{status:#}");
    Ok(())
}

/// A spare that has lost its data directory and its peer is no new service: nobody follows, and nobody
/// keeps the fence.
#[tokio::test(flavor = "multi_thread")]
async fn a_spare_on_record_without_a_peer_is_an_alarm() -> Result<()> {
    let site = site("no_peer_left").await;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = Service::start(&site, "");
    service.until_level().await;
    service.running.terminate();
    std::fs::remove_dir_all(site.dir.path().join("data"))?;
    let whole: toml::Table = std::fs::read_to_string(site.config_file())?.parse()?;
    let mut peerless = whole.clone();
    peerless.remove("peer");
    std::fs::write(site.config_file(), peerless.to_string())?;
    let service = service.start_again();
    let status = service.until_hold("config").await;
    assert_eq!(status["health"]["level"], 2, "{status:#}");
    let detail = status["hold"]["detail"].to_string();
    assert!(
        detail.contains("on record as spare, of epoch 1"),
        "{status:#}"
    );
    service.write_raw(&whole.to_string());
    service.until_level().await;
    Ok(())
}

/// Secrets are kept by path, and nobody else can read them.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_is_private() -> Result<()> {
    let site = site("kept").await;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = Service::start(&site, "");
    service.until_level().await;
    let data = site.dir.path().join("data");
    let kept = std::fs::read_to_string(data.join("last-good.toml"))?;
    assert!(!kept.contains(site.primary.pg.password()), "{kept}");
    for file in ["last-good.toml", "secrets/peer.datastore.password"] {
        let mode = std::fs::metadata(data.join(file))?.permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{file}");
    }
    Ok(())
}

/// Replication goes on through a thousand of them: it is neither stopped nor slowed to nothing, and nothing is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_changes_of_configuration_during_replication() -> Result<()> {
    let site = site("thousand").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 20).await?;
    let mut service = Service::start(&site, "");
    // Before that the signal ends any process; the run hook has it ignored until then.
    service
        .running
        .wait_for_line(|line| line.contains("started"), SOON)
        .await?;
    let mut random = rand::rngs::StdRng::seed_from_u64(seed());
    let mut uploaded = 20;
    for number in 0..1000 {
        match number % 4 {
            0 => service.reconfigure(&format!("change = \"{number}\"")),
            1 => service.write_raw(&format!("[replication]\njobs = \"{number}\"")),
            2 => service.reconfigure(&format!("[replication]\ncopies = {}", 1 + number % 12)),
            _ => service.write_raw("[[["),
        }
        if number % 50 == 0 {
            let spec = Spec::new("core", "during", &number.to_string())
                .size(random.random_range(1..200_000));
            factory.package(&site.primary, spec).await?;
            uploaded += 1;
        }
        // As an operator's tools would: not all in one millisecond, where the system would make them one.
        tokio::time::sleep(Duration::from_millis(random.random_range(1..15))).await;
    }
    // Alive, still able to tell good from bad, and level in the end.
    service.write_raw("role = 7");
    service
        .until("refused", |status| status["config"]["valid"] == false)
        .await;
    service.reconfigure("change = \"last\"");
    service
        .until("accepted", |status| status["config"]["valid"] == true)
        .await;
    wait_until("all packages are here", SOON, || async {
        let rows = site.spare.conn().await?;
        let sql = "SELECT count(*) FROM origin_packages";
        match rows.query_one(sql, &[]).await?.get::<_, i64>(0) {
            found if found == uploaded => Ok(()),
            found => Err(format!("{found} of {uploaded}").into()),
        }
    })
    .await;
    service.until_level().await;
    let counted = service
        .metric("warm_spare_baselines_total{result=\"done\"}")
        .await?;
    assert!(counted.is_some_and(|done| done >= 1.0), "{counted:?}");
    let output = service.stop().await;
    assert_eq!(output.code, Some(0), "{output}");
    site.warm_spare(&["verify", "--deep"]).await.ok();
    Ok(())
}

/// An operator who wants the link now does not wait for the pass to end, nor does the pass begin again.
#[tokio::test(flavor = "multi_thread")]
async fn a_rate_is_changed_under_way() -> Result<()> {
    let site = site("rate").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    factory
        .package(
            &site.primary,
            Spec::new("core", "large", "1").size(30 << 20),
        )
        .await?;
    let mut service = Service::start(&site, "[replication]\nbandwidth_limit = \"20KB/s\"");
    service
        .running
        .wait_for_line(|line| line.ends_with("phase artifacts"), SOON)
        .await?;
    // At the first rate it would take 25 minutes.
    service.reconfigure("[replication]\nbandwidth_limit = \"500MB/s\"");
    service.until_level().await;
    assert_eq!(
        service
            .metric("warm_spare_baselines_total{result=\"given_up\"}")
            .await?,
        None
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_stops_applying_and_nothing_else() -> Result<()> {
    let site = site("pause").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 3).await?;
    let service = Service::start(&site, "");
    let before = service.until_level().await;
    service.reconfigure("paused = true");
    let status = service.until_hold("paused").await;
    assert_eq!(status["health"]["level"], 1, "{status:#}");
    factory
        .package(&site.primary, Spec::new("core", "more", "1"))
        .await?;
    let status = service
        .until("what waits is known", |status| {
            status["lag"]["bytes"].as_u64() > Some(0)
        })
        .await;
    assert_eq!(
        status["recovery_point"]["lsn"],
        before["recovery_point"]["lsn"]
    );
    // Past rpo it is critical; in a window of maintenance it is not.
    service.reconfigure("paused = true\n[replication]\nlag_warn = \"1s\"\nrpo = \"3s\"");
    let status = service
        .until("critical", |status| status["health"]["level"] == 2)
        .await;
    assert_eq!(status["health"]["reasons"][0]["code"], "lag", "{status:#}");
    assert_eq!(service.health().await.code, Some(2));
    let soon = chrono::Utc::now() + chrono::TimeDelta::hours(1);
    let quiet = format!("quiet_until = \"{}\"", soon.to_rfc3339());
    service.reconfigure(&format!(
        "paused = true\n{quiet}\n[replication]\nlag_warn = \"1s\"\nrpo = \"3s\""
    ));
    service
        .until("quiet", |status| status["health"]["level"] == 1)
        .await;
    // A pause with an end ends by itself.
    let until = chrono::Utc::now() + chrono::TimeDelta::seconds(3);
    service.reconfigure(&format!("paused_until = \"{}\"", until.to_rfc3339()));
    let status = service.until_level().await;
    assert_ne!(
        status["recovery_point"]["lsn"],
        before["recovery_point"]["lsn"]
    );
    assert_eq!(status["hold"], serde_json::Value::Null);
    Ok(())
}

/// Another bucket or another server of the peer's: begun anew with it, without a restart.
#[tokio::test(flavor = "multi_thread")]
async fn other_servers_are_taken_at_once() -> Result<()> {
    let site = site("other_ends").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    let service = Service::start(&site, "[peer.datastore]\nport = 1");
    let status = service.until_hold("peer_unreachable").await;
    assert_eq!(
        status["peer"]["datastore"]["reachable"], false,
        "{status:#}"
    );
    service.reconfigure("");
    service.until_level().await;
    service.reconfigure("[peer.s3]\nbucket_name = \"no-such-bucket\"");
    let code = "peer_store_unreachable";
    let status = service
        .until(code, |status| {
            status["health"]["reasons"][0]["code"] == code
        })
        .await;
    assert_eq!(status["peer"]["s3"]["reachable"], false, "{status:#}");
    service.reconfigure("");
    service
        .until("healthy", |status| status["health"]["level"] == 0)
        .await;
    Ok(())
}
