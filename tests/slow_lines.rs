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
    rustix::process::kill_process(process, rustix::process::Signal::STOP)?;
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
