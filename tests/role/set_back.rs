//! An old primary that was set back to a copy from before its place was taken: it comes back like any other, and what it
//! has written since is on record.

use support::follow::{events, followed, until_equal};
use support::pair::{
    PROMOTE, Pair, is_writable, returned, until_primary, until_read_only, until_settled, write,
};
use support::{Cluster, Result, Service, slots};

/// The second cluster has taken the place of the first, whose server is then set back, and nobody is at work.
async fn set_back(name: &str) -> Result<Pair> {
    let pair = Pair::start(name).await?;
    let site = &pair.there;
    followed(site, "").await?.stop().await.ok();
    let old = &site.primary.pg;
    old.stop_fast().await?;
    old.keep_data().await?;
    old.start_again().await?;
    let service = followed(site, "").await?;
    for number in 0..20 {
        write(&site.primary, &format!("kept by its successor {number}")).await?;
    }
    until_equal(site).await?;
    service.reconfigure(PROMOTE);
    until_primary(&service, 2).await;
    until_settled(&service).await;
    service.stop().await.ok();
    old.stop_fast().await?;
    old.restore_data().await?;
    old.start_again().await?;
    assert!(is_writable(&site.primary).await, "it knows of no fence");
    Ok(pair)
}

async fn diverged(cluster: &Cluster) -> Result<Vec<String>> {
    let sql = "SELECT new->>'name' FROM diverged_row WHERE new ? 'name' ORDER BY 1";
    let state = cluster.pg.conn("warm_spare").await?;
    let rows = state.query(sql, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Brings the server's log past the place of the promotion: each segment is 16 MiB.
async fn outgrow(cluster: &Cluster) -> Result<()> {
    let client = cluster.conn().await?;
    for _ in 0..4 {
        let message = "SELECT pg_logical_emit_message(false, 'test', 'a new segment is begun')";
        client.batch_execute(message).await?;
        client.batch_execute("SELECT pg_switch_wal()").await?;
    }
    Ok(())
}

/// The old primary comes back to its successor, and these rows are in an approximate list.
async fn comes_back_and_lists(pair: &Pair, rows: &[&str]) -> Result<()> {
    let new = Service::start(&pair.there, PROMOTE);
    until_settled(&new).await;
    let old = returned(&pair.back, "").await?;
    until_equal(&pair.back).await?;
    assert_eq!(diverged(&pair.back.spare).await?, rows);
    let output = pair.back.warm_spare(&["divergence", "--json"]).await;
    assert_eq!(output.json()["divergence"]["exact"], false, "{output}");
    old.stop().await.ok();
    new.stop().await.ok();
    Ok(())
}

/// Its log ends before the place from which on the slot is to be read: the end of what is read would never come by.
#[tokio::test]
async fn an_old_primary_that_was_set_back_comes_back() -> Result<()> {
    let pair = set_back("set_back_short").await?;
    write(&pair.there.primary, "written after it was set back").await?;
    comes_back_and_lists(&pair, &["written after it was set back"]).await
}

/// What lies before that place is of another history now, and the successor does not have it.
#[tokio::test]
async fn what_an_outgrown_old_primary_wrote_is_no_change_that_its_successor_has() -> Result<()> {
    let pair = set_back("set_back_long").await?;
    let site = &pair.there;
    let promoted: String = {
        let state = site.spare.pg.conn("warm_spare").await?;
        let sql = "SELECT lsn FROM promotion";
        state.query_one(sql, &[]).await?.get(0)
    };
    write(&site.primary, "before that place").await?;
    outgrow(&site.primary).await?;
    let past = "SELECT pg_current_wal_lsn() > $1::text::pg_lsn";
    let row = site
        .primary
        .conn()
        .await?
        .query_one(past, &[&promoted])
        .await?;
    assert!(row.get::<_, bool>(0), "it has outgrown the promotion");
    write(&site.primary, "behind that place").await?;
    comes_back_and_lists(&pair, &["before that place", "behind that place"]).await
}

/// The configuration still says that it is the primary, and its server has no record any more.
#[tokio::test]
async fn one_whose_place_was_taken_is_not_declared_the_primary() -> Result<()> {
    let pair = set_back("set_back_declared").await?;
    let new = Service::start(&pair.there, PROMOTE);
    new.running.sigstop();
    let old = Service::start(&pair.back, PROMOTE);
    // It gives way by itself, while its successor sleeps.
    until_read_only(&pair.back.spare).await;
    let status = old
        .until("it gave way", |status| status["state"] == "fenced")
        .await;
    let roles = events(&status, "role");
    assert!(roles.is_empty(), "{roles:?}");
    new.running.sigcont();
    until_settled(&new).await;
    assert!(is_writable(&pair.there.spare).await);
    old.stop().await.ok();
    new.stop().await.ok();
    Ok(())
}

/// Its fence is younger than what was written while it was open, and no slot tells of that.
#[tokio::test]
async fn what_was_written_before_it_gave_way_is_listed() -> Result<()> {
    let pair = set_back("set_back_late_fence").await?;
    let old = &pair.back.spare;
    slots::drop_slot(old, slots::ANY).await?;
    write(old, "written before it gave way").await?;
    // The log does not tell any more that it was set back.
    outgrow(old).await?;
    let service = Service::start(&pair.back, PROMOTE);
    until_read_only(old).await;
    service
        .until("it gave way", |status| status["state"] == "fenced")
        .await;
    service.stop().await.ok();
    comes_back_and_lists(&pair, &["written before it gave way"]).await
}
