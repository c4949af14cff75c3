//! PostgreSQL of a provider on either side, on the stand-in of `support::managed`.

use serde_json::Value;
use support::follow::{
    copies, events, lasting_slots, logical, prepare, until_equal, until_following,
};
use support::managed::{Managed, Provider, Visitor};
use support::pair::{PROMOTE, Pair, Writers, lost, returned, until_primary, until_settled};
use support::service::SOON;
use support::{Factory, Output, Result, Service, Site, postgres, seed};
use warm_spare::cluster::{FenceError, LocalCluster, enforce_fence, set_fence};
use warm_spare::config;
use warm_spare::domain::Side;

const BOTH: &str =
    "[local.datastore]\nssl_mode = \"require\"\n[peer.datastore]\nssl_mode = \"require\"";
const TO_MANAGED: &str = "[peer.datastore]\nssl_mode = \"require\"";
const ON_MANAGED: &str = "[local.datastore]\nssl_mode = \"require\"";

fn managed(provider: Provider) -> postgres::Builder {
    Managed::of(provider).server()
}

async fn site(name: &str, primary: postgres::Builder, spare: postgres::Builder) -> Result<Site> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let site = Site::builder(name).primary(primary).spare(spare);
    let site = site.start().await?;
    Factory::seeded().fill(&site.primary, 4).await?;
    Ok(site)
}

fn another(number: u64) -> Factory {
    Factory::new(seed() + number).with_keys_of(seed())
}

async fn verified_deep(site: &Site) -> Result<()> {
    let output = site.warm_spare(&["verify", "--deep", "--json"]).await.ok();
    let differences = output.json()["differences"].clone();
    assert_eq!(differences.as_array().map(Vec::len), Some(0), "{output}");
    Ok(())
}

/// A planned handover under load, which loses nothing.
async fn handover(pair: &Pair, service: &Service<'_>, settings: &str) -> Result<()> {
    let site = &pair.there;
    let writers = Writers::start([&site.primary, &site.spare], 2);
    writers.until_written(0, 50).await;
    service.reconfigure(&format!("{PROMOTE}\n{settings}"));
    until_primary(service, 2).await;
    writers.until_written(1, 50).await;
    until_settled(service).await;
    let acknowledged = writers.stop().await;
    assert_eq!(lost(&site.spare, &acknowledged).await?, [""; 0]);
    Ok(())
}

/// From the first copy over a kill to the stream that goes on.
async fn follows_over_a_kill(site: &Site, settings: &str) -> Result<()> {
    let mut factory = another(5);
    site.write_config(settings);
    prepare(site).await;
    let service = Service::start(site, settings);
    until_following(&service).await;
    service.running.kill9()?;
    factory.fill(&site.primary, 2).await?;
    let service = Service::start(site, settings);
    until_following(&service).await;
    until_equal(site).await?;
    assert_eq!(copies(&service).await?, 0, "it goes on");
    service.running.kill9()?;
    Ok(())
}

/// By the stream to the handover, and the way back.
async fn there_and_back(pair: &Pair, there: &str, back: &str, visitors: &[&Visitor]) -> Result<()> {
    let (site, mut factory) = (&pair.there, another(6));
    site.write_config(there);
    prepare(site).await;
    let service = Service::start(site, there);
    until_following(&service).await;
    factory.fill(&site.primary, 2).await?;
    until_equal(site).await?;
    verified_deep(site).await?;
    for visitor in visitors {
        visitor.until_inside().await;
    }
    handover(pair, &service, there).await?;
    let back = returned(&pair.back, back).await?;
    factory.fill(&pair.back.primary, 2).await?;
    until_equal(&pair.back).await?;
    verified_deep(&pair.back).await?;
    back.stop().await.ok();
    service.stop().await.ok();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_of_a_provider() -> Result<()> {
    let site = site("managed_primary", managed(Provider::Azure), logical()).await?;
    let pair = Pair::of(site)?;
    let visitor = Visitor::start(&pair.there.primary.pg).await?;
    follows_over_a_kill(&pair.there, TO_MANAGED).await?;
    there_and_back(&pair, TO_MANAGED, ON_MANAGED, &[&visitor]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spare_of_a_provider() -> Result<()> {
    let site = site("managed_spare", logical(), managed(Provider::Rds)).await?;
    let pair = Pair::of(site)?;
    let visitor = Visitor::start(&pair.there.spare.pg).await?;
    follows_over_a_kill(&pair.there, ON_MANAGED).await?;
    there_and_back(&pair, ON_MANAGED, TO_MANAGED, &[&visitor]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn both_of_providers() -> Result<()> {
    let (primary, spare) = (managed(Provider::Azure), managed(Provider::Rds));
    let pair = Pair::of(site("managed_both", primary, spare).await?)?;
    let visitors = (
        Visitor::start(&pair.there.primary.pg).await?,
        Visitor::start(&pair.there.spare.pg).await?,
    );
    there_and_back(&pair, BOTH, BOTH, &[&visitors.0, &visitors.1]).await
}

/// Cloud SQL lets nobody switch triggers off, and has no bound of the log.
#[tokio::test(flavor = "multi_thread")]
async fn a_spare_that_may_not_apply_uses_snapshots_and_says_why() -> Result<()> {
    let site = site("managed_snapshot", logical(), managed(Provider::CloudSql)).await?;
    prepare(&site).await;
    let pair = Pair::of(site)?;
    let (site, mut factory) = (&pair.there, another(6));
    let _visitor = Visitor::start(&site.spare.pg).await?;
    let service = Service::start(site, ON_MANAGED);
    let by_snapshots = |status: &Value| {
        status["state"] == "following" && status["replication"]["mode"] == "snapshot"
    };
    let status = service.until("snapshots", by_snapshots).await;
    let reason = status["replication"]["reason"].as_str().unwrap_or_default();
    for words in ["session_replication_role", "to nobody"] {
        assert!(reason.contains(words), "{reason}");
    }
    factory.fill(&site.primary, 2).await?;
    until_equal(site).await?;
    verified_deep(site).await?;
    assert_eq!(lasting_slots(site).await?, [""; 0]);
    handover(&pair, &service, ON_MANAGED).await?;

    // The way back is a stream, once the missing bound is accepted.
    pair.back.write_config(TO_MANAGED);
    let prepared = pair.back.warm_spare(&["prepare"]).await.ok().stdout;
    assert!(
        prepared.contains("Next step: Cloud SQL has no such flag"),
        "{prepared}"
    );
    let accepted = format!("{TO_MANAGED}\n[replication]\nwal_unbounded = true");
    let back = returned(&pair.back, &accepted).await?;
    factory.fill(&pair.back.primary, 2).await?;
    until_equal(&pair.back).await?;
    back.stop().await.ok();
    service.stop().await.ok();
    Ok(())
}

fn says(output: &Output, words: &[&str]) {
    let said = format!("{}{}", output.stdout, output.stderr);
    for word in words {
        assert!(said.contains(word), "no {word:?}: {output}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_console_and_a_limited_role_need_is_printed_and_the_rest_is_made() -> Result<()> {
    let bare = Managed {
        may_replicate: false,
        logical: false,
        ..Managed::of(Provider::Rds)
    };
    let site = site("managed_prepare", bare.server(), logical()).await?;
    site.write_config("[peer.datastore]\nssl_mode = \"disable\"");
    let output = site.warm_spare(&["prepare"]).await;
    assert_ne!(output.code, Some(0), "TLS is forced: {output}");
    site.write_config(TO_MANAGED);
    let provider = site.primary.pg.as_provider("postgres").await?;
    let revoked = "REVOKE pg_monitor, pg_signal_backend FROM rds_superuser";
    provider.batch_execute(revoked).await?;
    let printed = site.warm_spare(&["prepare", "--print"]).await.ok();
    says(
        &printed,
        &[
            "-- note: wal_level is replica, and is a parameter of Amazon RDS or Aurora: set rds.logical_replication = 1",
            "-- note: max_slot_wal_keep_size is unlimited",
            "CREATE PUBLICATION",
            "GRANT rds_replication TO \"hab\";",
            "GRANT pg_monitor TO \"hab\";",
            "GRANT pg_signal_backend TO \"hab\";",
        ],
    );
    assert!(!printed.stdout.contains("ALTER SYSTEM"), "{printed}");
    // Membership alone is no right on this server: the right is tried, and not looked up.
    let output = site.warm_spare(&["prepare"]).await;
    assert_eq!(output.code, Some(3), "{output}");
    says(
        &output,
        &["privilege: the peer's user hab may not replicate"],
    );

    provider.batch_execute("ALTER ROLE hab REPLICATION").await?;
    let made = site.warm_spare(&["prepare"]).await.ok();
    says(
        &made,
        &[
            "Made: publication warm_spare_",
            "Stream: not yet. wal_level is replica on the primary",
            "Next step: set rds.logical_replication = 1",
        ],
    );
    site.primary.pg.append_configuration(bare.console())?;
    site.primary.pg.stop_fast().await?;
    site.primary.pg.start_again().await?;
    // Where the level comes from cannot be seen, and need not be: the provider's settings are seen.
    let again = site.warm_spare(&["prepare"]).await.ok();
    says(&again, &["Nothing to do", "Stream: possible."]);
    let gone = site.warm_spare(&["release"]).await.ok();
    says(
        &gone,
        &[
            "Removed: publication",
            "are parameters of Amazon RDS or Aurora",
        ],
    );
    Ok(())
}

/// A restart for a minor version, and a failover to another machine with the same disk.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_and_a_failover_of_the_primary_cost_no_copy() -> Result<()> {
    let site = site("managed_failover", managed(Provider::Rds), logical()).await?;
    site.write_config(TO_MANAGED);
    prepare(&site).await;
    let service = Service::start(&site, TO_MANAGED);
    until_following(&service).await;
    let (pg, mut factory) = (&site.primary.pg, another(4));
    pg.stop_fast().await?;
    pg.start_again().await?;
    factory.fill(&site.primary, 1).await?;
    until_equal(&site).await?;
    pg.kill9();
    pg.start_again().await?;
    factory.fill(&site.primary, 1).await?;
    until_equal(&site).await?;
    until_following(&service).await;
    assert_eq!(copies(&service).await?, 1);
    service.stop().await.ok();
    Ok(())
}

/// Without the right to copy a slot the lasting one is made first, and a dead copy's is replaced.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_copies_no_slot_gets_the_lasting_one_first() -> Result<()> {
    let site = site("managed_slot", managed(Provider::Azure), logical()).await?;
    let provider = site.primary.pg.as_provider("builder").await?;
    let revoked = "REVOKE EXECUTE ON FUNCTION pg_copy_logical_replication_slot(name, name, boolean) FROM PUBLIC";
    provider.batch_execute(revoked).await?;
    site.write_config(TO_MANAGED);
    prepare(&site).await;
    Service::doomed(&site, TO_MANAGED, "slot.before_copy")
        .dead()
        .await?;
    let left = lasting_slots(&site).await?;
    assert_eq!(left.len(), 1, "it was made at the beginning: {left:?}");
    another(1).fill(&site.primary, 2).await?;
    let service = Service::start(&site, TO_MANAGED);
    until_following(&service).await;
    another(2).fill(&site.primary, 2).await?;
    until_equal(&site).await?;
    assert_eq!(copies(&service).await?, 1);
    assert_eq!(lasting_slots(&site).await?, left);
    service.stop().await.ok();
    Ok(())
}

/// A provider's session that stays is waived by name, in an event; anybody else's is not.
#[tokio::test(flavor = "multi_thread")]
async fn the_fence_waives_the_providers_own_sessions_alone() -> Result<()> {
    let site = site("managed_fence", managed(Provider::Azure), logical()).await?;
    let pair = Pair::of(site)?;
    let site = &pair.there;
    site.write_config(TO_MANAGED);
    prepare(site).await;
    let stays = site.primary.pg.as_provider("builder").await?;
    let service = Service::start(site, TO_MANAGED);
    until_following(&service).await;
    handover(&pair, &service, TO_MANAGED).await?;
    let status = service.status().await?;
    let told = events(&status, "fence");
    assert!(
        told.iter()
            .any(|text| text.contains("waives the sessions of azuresu")
                && text.contains("the peer database builder")),
        "{told:?}"
    );
    service.stop().await.ok();
    stays.batch_execute("SELECT 1").await?;

    // The same session under another name holds the fence up, and is named.
    let create = "CREATE ROLE somebody SUPERUSER LOGIN PASSWORD ";
    let password = site.primary.pg.password();
    stays
        .batch_execute("SET default_transaction_read_only = off")
        .await?;
    stays
        .batch_execute(&format!("{create}'{password}'"))
        .await?;
    let _other = site
        .primary
        .pg
        .conn_as("somebody", "builder", "a report")
        .await?;
    let config = config::load(&pair.back.write_config(ON_MANAGED))?;
    let session = LocalCluster::of(&config).maintenance().await?;
    set_fence(&session, "builder").await?;
    match enforce_fence(&session, &config.local.datastore, "builder").await {
        Err(FenceError::Staying {
            side: Side::Local,
            left: 1,
            who,
            ..
        }) => {
            assert!(who.contains("of somebody (a report)"), "{who}");
        }
        other => panic!("{other:?}"),
    }
    Ok(())
}

/// A session that stays in the spare's database makes the rename impossible: it is named, and
/// nothing has changed.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_keeps_the_switch_from_happening_is_named() -> Result<()> {
    let site = site("managed_switch", logical(), managed(Provider::Rds)).await?;
    site.write_config(ON_MANAGED);
    site.warm_spare(&["sync"]).await.ok();
    another(3).fill(&site.primary, 1).await?;
    let stays = site.spare.pg.as_provider("builder").await?;
    let before = support::content(&site.spare).await?;
    let mut running = site.spawn(&["sync"]);
    let named = |line: &str| line.contains("of rdsadmin (provider) in database builder");
    running.wait_for_line(named, SOON).await?;
    assert_eq!(support::content(&site.spare).await?, before);
    drop(stays);
    running.wait(SOON).await?.ok();
    until_equal(&site).await
}
