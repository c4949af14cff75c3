//! Slow is not gone: a line that carries a row for a minute, and a server that has nothing to say for as long.

use support::follow::{followed, logical, prepare, prepared, until_equal};
use support::proxy::{Mode, Proxy};
use support::{Factory, Result, Site, Spec, wait_until};

/// The server process at the other end of the stream.
async fn reader(site: &Site) -> Result<i32> {
    let sql = "SELECT active_pid FROM pg_replication_slots WHERE active_pid IS NOT NULL AND NOT temporary";
    let row = site
        .primary
        .pg
        .conn("postgres")
        .await?
        .query_one(sql, &[])
        .await?;
    Ok(row.get(0))
}

/// It takes longer than a stream may be silent, and every byte of it is a sign of life.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_takes_a_minute_on_the_line_arrives() -> Result<()> {
    let site = prepared("narrow").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 1).await?;
    let line = Proxy::start(site.primary.pg.port()).await?;
    let _service = followed(&site, &line.to_peer("")).await?;
    let before = reader(&site).await?;
    line.set(Mode::Narrow).await;
    let large = Spec::new("core", "large", "1").manifest_size(7_000_000);
    factory.package(&site.primary, large).await?;
    until_equal(&site).await?;
    assert_eq!(reader(&site).await?, before, "the stream was begun anew");
    Ok(())
}

/// As while it reads a large transaction of which a stream gets nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_process_that_says_nothing_for_a_minute_is_waited_for() -> Result<()> {
    // By itself it would say something after half of this.
    let primary = logical().setting("wal_sender_timeout", "0");
    let site = Site::builder("quiet").primary(primary).start().await?;
    prepare(&site).await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 1).await?;
    let service = followed(&site, "").await?;
    let before = reader(&site).await?;
    let process = rustix::process::Pid::from_raw(before).expect("a process");
    stop_at_work(&site, process).await?;
    factory
        .package(&site.primary, Spec::new("core", "late", "1"))
        .await?;
    wait_until("its silence is noticed", support::service::SOON, || async {
        match service
            .running
            .stderr()
            .iter()
            .any(|line| line.contains("is waited for"))
        {
            true => Ok(()),
            false => Err("not yet".into()),
        }
    })
    .await;
    assert_eq!(reader(&site).await?, before, "the stream was begun anew");
    rustix::process::kill_process(process, rustix::process::Signal::CONT)?;
    until_equal(&site).await?;
    assert_eq!(reader(&site).await?, before, "the stream was begun anew");
    Ok(())
}

/// Stops the server process while it reads a transaction that is rolled back: a stream gets nothing of that.
async fn stop_at_work(site: &Site, process: rustix::process::Pid) -> Result<()> {
    let writer = site.primary.conn().await?;
    let noise = "BEGIN; INSERT INTO audit_package (operation, trigger, requester_id, requester_name, origin, channel, package_ident)
                   SELECT 'promote', 'hab_client', 1, 'me', 'core', 'stable', n::text FROM generate_series(1, 300000) n; ROLLBACK";
    let pid = process.as_raw_nonzero().get();
    let watcher = site.primary.pg.conn("postgres").await?;
    for _ in 0..5 {
        writer.batch_execute(noise).await?;
        // A stopped process has what it had when it was stopped.
        for _ in 0..400 {
            rustix::process::kill_process(process, rustix::process::Signal::STOP)?;
            let sql = "SELECT coalesce(wait_event, '') FROM pg_stat_activity WHERE pid = $1";
            let waits: String = watcher.query_one(sql, &[&pid]).await?.get(0);
            if !waits.starts_with("WalSender") {
                return Ok(());
            }
            rustix::process::kill_process(process, rustix::process::Signal::CONT)?;
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
    Err("the server process was never seen at work".into())
}

/// The server has no limit of its own, and so keeps the process: it has nothing to do, and would have answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_is_lost_is_not_taken_for_a_server_at_work() -> Result<()> {
    let primary = logical().setting("wal_sender_timeout", "0");
    let site = Site::builder("half_open").primary(primary).start().await?;
    prepare(&site).await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 1).await?;
    let line = Proxy::start(site.primary.pg.port()).await?;
    let _service = followed(&site, &line.to_peer("")).await?;
    line.freeze();
    factory
        .package(&site.primary, Spec::new("core", "after", "1"))
        .await?;
    until_equal(&site).await
}
