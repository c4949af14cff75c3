//! A planned handover: the primary is fenced, drained, and its spare promoted; or all is as it was.

mod support;

use support::follow::{events, followed, until_equal, until_following};
use support::pair::{
    PROMOTE, Pair, Writers, is_writable, lost, returned, until_primary, until_settled, write,
};
use support::{Result, content};

#[tokio::test]
async fn what_the_primary_acknowledged_is_on_the_new_primary() -> Result<()> {
    let pair = Pair::start("switchover_writers").await?;
    let site = &pair.there;
    let service = followed(site, "").await?;
    let writers = Writers::start([&site.primary, &site.spare], 4);
    writers.until_written(0, 200).await;
    service.reconfigure(PROMOTE);
    until_primary(&service, 2).await;
    writers.until_written(1, 200).await;
    let status = until_settled(&service).await;
    let acknowledged = writers.stop().await;
    let old = acknowledged.values().filter(|side| **side == 0).count();
    println!(
        "{} rows, {old} of them by the old primary",
        acknowledged.len()
    );
    assert_eq!(
        lost(&site.spare, &acknowledged).await?,
        Vec::<String>::new()
    );
    assert!(!is_writable(&site.primary).await);
    assert!(write(&site.primary, "late").await.is_err());
    assert_eq!(events(&status, "promotion").len(), 1, "{status:#}");
    // Nothing of ours is left on the old primary but the record of its fence.
    let sql = "SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication)";
    let left = site.primary.conn().await?.query_one(sql, &[]).await?;
    assert_eq!(left.get::<_, i64>(0), 0);
    println!("{}", service.running.stderr().join("\n"));
    service.stop().await.ok();
    Ok(())
}

#[tokio::test]
async fn back_and_forth() -> Result<()> {
    let pair = Pair::start("switchover_ten").await?;
    let (there, back) = (&pair.there, &pair.back);
    let mut epoch = 1;
    let mut now = followed(there, "").await?;
    for round in 0..5 {
        for (site, other) in [(there, back), (back, there)] {
            write(&site.primary, &format!("round-{round}-{epoch}")).await?;
            epoch += 1;
            now.reconfigure(PROMOTE);
            until_primary(&now, epoch).await;
            until_settled(&now).await;
            let next = returned(other, "").await?;
            until_equal(other).await?;
            let healthy = now
                .until("a spare follows", |status| status["health"]["level"] == 0)
                .await;
            assert_eq!(healthy["peer"]["role"], "spare");
            other.warm_spare(&["verify", "--deep"]).await.ok();
            now.stop().await.ok();
            now = next;
        }
    }
    assert_eq!(content(&there.primary).await?, content(&there.spare).await?);
    until_following(&now).await;
    now.stop().await.ok();
    Ok(())
}
