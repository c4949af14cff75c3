//! No clock decides safety: those of both servers are stepped, at every step of a handover.

use support::follow::{followed, logical, prepare, until_equal};
use support::pair::{PROMOTE, Pair, is_writable, until_primary, until_settled, write};
use support::{Factory, Result, Service, Site};

/// Seconds.
const HOUR: i64 = 3600;

async fn pair(name: &str) -> Result<Pair> {
    let site = Site::builder(name)
        .primary(logical().own_clock())
        .spare(logical().own_clock());
    let there = site.start().await?;
    Factory::seeded().fill(&there.primary, 2).await?;
    prepare(&there).await;
    Pair::of(there)
}

/// A session that began an hour ahead of the clock that the fence is set by is an old one all the same.
#[tokio::test]
async fn a_session_from_before_the_fence_is_ended_whatever_its_time() -> Result<()> {
    let pair = pair("clocks_session").await?;
    let site = &pair.there;
    let pg = &site.primary.pg;
    pg.set_clock(HOUR)?;
    let ahead = site.primary.conn().await?;
    ahead.batch_execute("SELECT 1").await?;
    let sql = "SELECT clock_timestamp() - now() < '1 s' AND backend_start > $1::text::timestamptz \
               FROM pg_stat_activity WHERE pid = pg_backend_pid()";
    let half_an_hour = chrono::Utc::now() + chrono::TimeDelta::minutes(30);
    let row = ahead.query_one(sql, &[&half_an_hour.to_rfc3339()]).await?;
    assert!(row.get::<_, bool>(0), "its clock was not ahead");
    pg.set_clock(0)?;
    let service = followed(site, "").await?;
    service.reconfigure(PROMOTE);
    until_primary(&service, 2).await;
    until_settled(&service).await;
    let late = "INSERT INTO accounts (name, email) VALUES ('too late', '')";
    assert!(
        ahead.execute(late, &[]).await.is_err(),
        "it is still writable"
    );
    service.stop().await.ok();
    Ok(())
}

/// Both servers' clocks jump by an hour, in opposite directions, while the handover stands at a step.
#[tokio::test]
async fn stepped_clocks_leave_one_primary_and_lose_nothing() -> Result<()> {
    let steps = ["fence", "drain", "compare", "sequences", "promote"];
    for (number, step) in steps.iter().enumerate() {
        let pair = pair("clocks_steps").await?;
        let site = &pair.there;
        followed(site, "").await?.stop().await.ok();
        write(&site.primary, "before").await?;
        let (service, halt) = Service::halting(site, PROMOTE, &format!("switchover.{step}"));
        halt.reached().await;
        let by = if number % 2 == 0 { HOUR } else { -HOUR };
        site.primary.pg.set_clock(by)?;
        site.spare.pg.set_clock(-by)?;
        halt.go();
        let status = service
            .until("it has ended", |status| {
                status["role"]["actual"] == "primary"
                    || status["health"].to_string().contains("handover_undone")
            })
            .await;
        let promoted = status["role"]["actual"] == "primary";
        println!("{step}: promoted {promoted}");
        site.primary.pg.set_clock(0)?;
        site.spare.pg.set_clock(0)?;
        if promoted {
            until_settled(&service).await;
            assert!(!is_writable(&site.primary).await, "{step}");
            assert!(is_writable(&site.spare).await, "{step}");
            let sql = "SELECT FROM accounts WHERE name = 'before'";
            let rows = site.spare.conn().await?.query(sql, &[]).await?;
            assert_eq!(rows.len(), 1, "{step}");
        } else {
            support::pair::until_writable(&site.primary).await;
            assert!(!is_writable(&site.spare).await, "{step}");
            write(&site.primary, "after").await?;
            service.reconfigure("");
            until_equal(site).await?;
        }
        service.stop().await.ok();
    }
    Ok(())
}
