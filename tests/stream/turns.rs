//! On a long line each wait for an answer costs a round trip. They are counted on the line itself,
//! and bounded.

use std::time::Duration;
use support::follow::{audit, followed, prepared, until_equal};
use support::http_fault::HttpFault;
use support::proxy::{Mode, Proxy};
use support::service::SOON;
use support::{Factory, Result, Site, Spec, wait_until};

/// One way. Statements that are sent together are sent in a much shorter time.
const WAY: Duration = Duration::from_millis(50);

/// The sessions on the spare, by database and the beginning of the last statement.
const APPLYING: (&str, &str) = ("builder", "COMMIT");
const RECORDS: (&str, &str) = ("warm_spare", "INSERT INTO artifact");
const VISIBLE: (&str, &str) = (
    "builder",
    "SELECT checksum::text FROM public.origin_packages",
);

/// Returns the turns of that session until now. The server of the spare says which connection it
/// is.
async fn turns(
    site: &Site,
    line: &Proxy,
    (database, statement): (&str, &str),
) -> Result<(u16, u64)> {
    let sql = "SELECT client_port FROM pg_stat_activity \
               WHERE datname = $1 AND starts_with(query, $2) AND pid <> pg_backend_pid()";
    let known = line.turns();
    let found = wait_until("the session", SOON, || async {
        let client = site.spare.pg.conn("postgres").await?;
        let rows = client.query(sql, &[&database, &statement]).await?;
        let ports = rows.iter().map(|row| row.get::<_, i32>(0) as u16);
        let ours = ports.filter_map(|port| known.iter().find(|(known, _)| *known == port));
        match ours.collect::<Vec<_>>()[..] {
            [one] => Ok(*one),
            ref other => Err(format!("{statement}: {other:?} of {known:?}").into()),
        }
    });
    Ok(found.await)
}

fn local(line: &Proxy) -> String {
    format!("[local.datastore]\nport = {}\n", line.port())
}

async fn until_seen(site: &Site, ident: &str) {
    wait_until("the row", SOON, || async {
        let sql = "SELECT FROM origin_packages WHERE ident = $1";
        match site.spare.conn().await?.query(sql, &[&ident]).await?.len() {
            1 => Ok(()),
            _ => Err("not yet".into()),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_takes_two_turns_of_each_session_and_two_requests() -> Result<()> {
    const UPLOADS: u64 = 6;
    /// The description of a table may come again, for which the spare's table is read.
    const MORE: u64 = 3;
    let site = prepared("turns").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 1).await?;
    let line = Proxy::start(site.spare.pg.port()).await?;
    let store = HttpFault::start(site.spare.minio.port()).await?;
    let through = format!(
        "{}[local.s3]\nendpoint = \"{}\"\n",
        local(&line),
        store.endpoint()
    );
    let service = followed(&site, &through).await?;
    line.set(Mode::Far(WAY)).await;
    let mut before = Vec::new();
    // The first upload prepares the statements.
    for number in 0..=UPLOADS {
        let spec = Spec::new("core", "turns", &number.to_string());
        let package = factory.package(&site.primary, spec).await?;
        until_seen(&site, &package.ident).await;
        let path = format!("/{}/{}", site.spare.bucket, package.key);
        let asked = ["HEAD", "GET", "PUT"].map(|method| store.count(method, &path));
        assert_eq!(asked, [0, 1, 1], "requests to the store");
        if number == 0 {
            for session in [APPLYING, RECORDS, VISIBLE] {
                before.push(turns(&site, &line, session).await?);
            }
        }
    }
    for (session, before, each) in [
        (APPLYING, before[0], 2),
        (RECORDS, before[1], 2),
        (VISIBLE, before[2], 1),
    ] {
        let now = turns(&site, &line, session).await?;
        assert_eq!(now.0, before.0, "the same connection");
        let took = now.1 - before.1;
        println!("{session:?}: {took} turns for {UPLOADS} uploads");
        assert!(took <= each * UPLOADS + MORE, "{session:?}: {took} turns");
    }
    service.stop().await.ok();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_that_have_arrived_are_applied_in_one() -> Result<()> {
    const TRANSACTIONS: u64 = 30;
    let site = prepared("turns_group").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let line = Proxy::start(site.spare.pg.port()).await?;
    let service = followed(&site, &local(&line)).await?;
    audit(&site, "the first one").await?;
    until_equal(&site).await?;
    let before = turns(&site, &line, APPLYING).await?;
    line.set(Mode::Hold).await;
    for number in 0..TRANSACTIONS {
        audit(&site, &format!("transaction {number}")).await?;
    }
    let primary = site.primary.conn().await?;
    let row = primary.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]);
    let end: String = row.await?.get(0);
    wait_until("all of them have arrived", SOON, || async {
        let sql = "SELECT FROM pg_stat_replication WHERE write_lsn >= $1::text::pg_lsn";
        match primary.query(sql, &[&end]).await?.len() {
            1 => Ok(()),
            _ => Err("not yet".into()),
        }
    })
    .await;
    line.set(Mode::Pass).await;
    until_equal(&site).await?;
    let now = turns(&site, &line, APPLYING).await?;
    assert_eq!(now.0, before.0, "the same connection");
    let took = now.1 - before.1;
    println!("{took} turns for {TRANSACTIONS} transactions");
    // The first of them may be alone, and a line without delay may answer each statement.
    assert!(took <= TRANSACTIONS / 2, "{took} turns");
    service.stop().await.ok();
    Ok(())
}
