//! A primary that takes no session of ours, and lives: it is not called lost, and nobody is promoted over it unasked.

use support::crowd::Crowd;
use support::follow::{followed, logical, prepare};
use support::pair::{
    PROMOTE, forced, is_writable, until_asked, until_primary, until_read_only, write,
};
use support::service::approval_id;
use support::{Factory, Result, Site};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_without_a_free_connection_is_fenced_all_the_same() -> Result<()> {
    let primary = logical().setting("max_connections", "24");
    let site = Site::builder("full").primary(primary).own_stores();
    let site = site.start().await?;
    prepare(&site).await;
    Factory::seeded().fill(&site.primary, 2).await?;
    let service = followed(&site, "").await?;
    let crowd = Crowd::gather(&site.primary).await;
    service.reconfigure(PROMOTE);
    let status = service.until_hold("force_needed").await;
    let hold = &status["hold"];
    assert!(
        hold["detail"].to_string().contains("too many clients"),
        "{hold:#}"
    );
    assert!(
        !hold["next_step"].to_string().contains("force_epoch"),
        "{hold:#}"
    );
    let sessions = crowd.settle();
    service.reconfigure(&forced(2));
    until_primary(&service, 2).await;
    let mut wrote = 0;
    for session in &sessions {
        let sql = "INSERT INTO accounts (name, email) VALUES (gen_random_uuid()::text, 'late')";
        wrote += u32::from(session.execute(sql, &[]).await.is_ok());
    }
    assert_eq!(
        wrote, 0,
        "sessions of the old primary that could still write"
    );
    drop(sessions);
    until_read_only(&site.primary).await;
    write(&site.spare, "first").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_promoted_over_a_primary_that_answers_and_cannot_be_fenced() -> Result<()> {
    let site = Site::builder("lives").primary(logical()).own_stores();
    let site = site.start().await?;
    prepare(&site).await;
    Factory::seeded().fill(&site.primary, 2).await?;
    let service = followed(&site, "").await?;
    let administrator = site.primary.conn().await?;
    administrator
        .batch_execute("ALTER ROLE hab PASSWORD 'another'")
        .await?;
    service.reconfigure(PROMOTE);
    let status = service.until_hold("force_needed").await;
    let hold = &status["hold"];
    assert!(hold["detail"].to_string().contains("password"), "{hold:#}");
    assert!(
        !hold["next_step"].to_string().contains("force_epoch"),
        "{hold:#}"
    );
    service.reconfigure(&forced(2));
    let asked = until_asked(&service).await;
    let id = approval_id(&asked).unwrap_or_else(|| panic!("{asked:#}"));
    assert!(!is_writable(&site.spare).await);
    let count = "INSERT INTO accounts (name, email) VALUES ('alive', 'alive')";
    administrator.execute(count, &[]).await?;
    // The word for another case is none for this one.
    service.reconfigure(&format!("{}\nfuse.approve = \"00000000\"", forced(2)));
    service.until_hold("force_needed").await;
    service.reconfigure(&format!("{}\nfuse.approve = \"{id}\"", forced(2)));
    until_primary(&service, 2).await;
    write(&site.spare, "first").await?;
    Ok(())
}

/// Builder's sessions go on for as long as they like, and nobody else gets in: not even a fence.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_promoted_over_a_primary_that_is_shutting_down() -> Result<()> {
    let site = Site::builder("stopping").primary(logical()).own_stores();
    let site = site.start().await?;
    prepare(&site).await;
    Factory::seeded().fill(&site.primary, 2).await?;
    let service = followed(&site, "").await?;
    let builder = site.primary.conn().await?;
    site.primary.pg.begin_smart_stop();
    service.reconfigure(PROMOTE);
    let status = service.until_hold("force_needed").await;
    let step = status["hold"]["next_step"].to_string();
    assert!(!step.contains("force_epoch"), "{step}");
    service.reconfigure(&forced(2));
    until_asked(&service).await;
    assert!(!is_writable(&site.spare).await);
    let sql = "INSERT INTO accounts (name, email) VALUES ('late', 'late')";
    builder.execute(sql, &[]).await?;
    // With the last session the server ends, and is lost: now it goes on by itself.
    drop(builder);
    until_primary(&service, 2).await;
    Ok(())
}

/// It answers before a session begins, and without a code: it has no process for us, and its sessions go on.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_promoted_over_a_primary_that_has_no_process_for_us() -> Result<()> {
    let site = Site::builder("no_process").primary(logical()).own_stores();
    let site = site.start().await?;
    prepare(&site).await;
    Factory::seeded().fill(&site.primary, 2).await?;
    let service = followed(&site, "").await?;
    let port = without_processes().await?;
    service.reconfigure(&format!("{}\npeer.datastore.port = {port}", forced(2)));
    let asked = until_asked(&service).await;
    let detail = asked["hold"]["detail"].to_string();
    assert!(detail.contains("cannot start a process"), "{detail}");
    assert!(!is_writable(&site.spare).await, "{asked:#}");
    Ok(())
}

/// As a server answers whose machine has no memory left.
async fn without_processes() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let _ = client.read(&mut [0; 1024]).await;
            let words = b"Ecould not fork new process for connection: Cannot allocate memory\n\0";
            let _ = client.write_all(words).await;
        }
    });
    Ok(port)
}
