//! Which way is gone, said with its reason and changed at run time; and who may read the stream.

use support::follow::{
    audit, copies, events, logical, prepare, prepared, slot, until_copied, until_equal,
    until_following,
};
use support::tls::certificates;
use support::{Factory, Result, Service, Site};

#[tokio::test(flavor = "multi_thread")]
async fn the_mode_is_changed_at_run_time_and_back() -> Result<()> {
    let site = prepared("mode").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    assert!(slot(&site).await?.is_some());

    let before = copies(&service).await?;
    service.reconfigure("[replication]\nmode = \"snapshot\"");
    let status = service
        .until("snapshots", |status| {
            status["replication"]["mode"] == "snapshot" && !events(status, "slot").is_empty()
        })
        .await;
    let reason = status["replication"]["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("replication.mode is snapshot"), "{reason}");
    assert_eq!(slot(&site).await?, None, "what nobody reads holds nothing");
    audit(&site, "by a copy").await?;
    until_equal(&site).await?;
    until_copied(&service, before).await;

    service.reconfigure("");
    until_following(&service).await;
    let before = copies(&service).await?;
    audit(&site, "by the stream").await?;
    until_equal(&site).await?;
    assert_eq!(copies(&service).await?, before);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unprepared_primary_is_said_to_be_and_followed_once_it_is() -> Result<()> {
    let site = Site::builder("unprepared").primary(logical());
    let site = site.start().await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = Service::start(&site, "[replication]\nmode = \"stream\"");
    let status = service.until_hold("not_prepared").await;
    let next = status["hold"]["next_step"].as_str().unwrap_or_default();
    assert!(next.contains("warm-spare prepare"), "{status:#}");

    service.reconfigure("");
    let status = service
        .until("snapshots", |status| {
            status["state"] == "following" && status["replication"]["mode"] == "snapshot"
        })
        .await;
    let reason = status["replication"]["reason"].as_str().unwrap_or_default();
    assert!(
        reason.contains("no publication") && reason.contains("warm-spare prepare"),
        "{reason}"
    );
    until_equal(&site).await?;
    assert_eq!(slot(&site).await?, None);

    prepare(&site).await;
    until_following(&service).await;
    let before = copies(&service).await?;
    audit(&site, "by the stream").await?;
    until_equal(&site).await?;
    assert_eq!(copies(&service).await?, before);
    Ok(())
}

/// Over TLS that is checked, by SCRAM, and with a password that is changed while the stream runs.
#[tokio::test(flavor = "multi_thread")]
async fn the_stream_is_read_over_tls_by_scram_and_with_a_new_password() -> Result<()> {
    let made = certificates(&["127.0.0.1", "localhost"])?;
    let primary = logical().scram().ssl(&made.certificate, &made.key);
    let site = Site::builder("sealed").primary(primary).start().await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let authority = site.dir.path().join("authority.pem");
    std::fs::write(&authority, &made.authority)?;
    // The site's own sessions keep their password: what is changed is another user's.
    let admin = site.primary.conn().await?;
    admin
        .batch_execute("CREATE ROLE spare SUPERUSER REPLICATION LOGIN PASSWORD 'first'")
        .await?;
    let password = site.dir.path().join("password");
    support::site::write_secret(&password, "first")?;
    let settings = format!(
        "[peer.datastore]\nuser = \"spare\"\npassword = \"\"\npassword_file = \"{}\"\nssl_mode = \"verify-full\"\nssl_root_cert = \"{}\"",
        password.display(),
        authority.display()
    );
    site.write_config(&settings);
    site.warm_spare(&["prepare"]).await.ok();
    let service = Service::start(&site, &settings);
    let status = until_following(&service).await;
    assert_eq!(status["peer"]["datastore"]["tls"], true, "{status:#}");
    let sql = "SELECT bool_and(s.ssl) FROM pg_stat_replication r JOIN pg_stat_ssl s USING (pid)";
    let sealed: Option<bool> = admin.query_one(sql, &[]).await?.get(0);
    assert_eq!(sealed, Some(true), "the stream is sealed");

    admin
        .batch_execute("ALTER ROLE spare PASSWORD 'second'")
        .await?;
    support::site::write_secret(&password, "second")?;
    audit(&site, "with the old session").await?;
    until_equal(&site).await?;
    let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'spare'";
    admin.batch_execute(sql).await?;
    audit(&site, "with the new password").await?;
    until_equal(&site).await?;
    until_following(&service).await;
    assert_eq!(copies(&service).await?, 1, "no new baseline");
    Ok(())
}
