//! What a pass under way may leave behind, and what others do to the spare meanwhile: found by a hostile reader.

use serde_json::Value;
use support::packages::{delete_package, upload};
use support::service::SOON;
use support::{Factory, Package, Result, Service, Site, Spec, site, wait_until};

const ANY_CHANGE: &str = "[fuse]\nmax_percent = 100\nmin_count = 1000\n";
/// A rate at which replacing a dozen artifacts takes seconds.
const SLOW: &str = "[replication]\nbandwidth_limit = \"60KB/s\"\n";

/// A dozen packages that are deleted and uploaded anew with other bytes, and a pass in the middle of replacing them.
async fn replacing(site: &Site) -> Result<(Service<'_>, Vec<Package>)> {
    let mut factory = Factory::seeded();
    let spec =
        |number: usize| Spec::new("core", &format!("p{number}"), "1").release("20200101000000");
    let mut packages = Vec::new();
    for number in 0..12 {
        packages.push(
            factory
                .package(&site.primary, spec(number).size(60_000))
                .await?,
        );
    }
    let service = Service::start(site, ANY_CHANGE);
    service.until_level().await;
    service.reconfigure(&format!("paused = true\n{ANY_CHANGE}"));
    service.until_hold("paused").await;
    for (number, package) in packages.iter().enumerate() {
        delete_package(&site.primary, package).await?;
        let other = factory.make(spec(number).size(61_000 + number as u64));
        upload(&site.primary, &other).await?;
    }
    service.reconfigure(&format!("{ANY_CHANGE}{SLOW}"));
    service
        .until("some are replaced", |status| {
            let baseline = &status["replication"]["baseline"];
            baseline["phase"] == "replacements" && baseline["done_bytes"].as_u64() >= Some(4)
        })
        .await;
    Ok((service, packages))
}

/// How many visible rows have other bytes under their key than they say.
async fn torn(site: &Site, packages: &[Package]) -> Result<usize> {
    let rows = site.spare.conn().await?;
    let mut torn = 0;
    for package in packages {
        let sql = "SELECT checksum FROM origin_packages WHERE ident = $1";
        let row = rows.query_one(sql, &[&package.ident]).await?;
        let found = site
            .spare
            .s3()
            .checksum(&site.spare.bucket, &package.key)
            .await?;
        torn += usize::from(found != Some(row.get::<_, String>(0)));
    }
    Ok(torn)
}

#[tokio::test(flavor = "multi_thread")]
async fn half_replaced_bytes_are_put_back_although_the_primary_is_gone() -> Result<()> {
    let site = Site::own_servers("torn").await;
    let (service, packages) = replacing(&site).await?;
    site.primary.pg.kill9();
    site.primary.minio.kill9();
    service.running.kill9()?;
    assert!(torn(&site, &packages).await? > 0, "it was in the middle");
    let service = Service::start(&site, &format!("{ANY_CHANGE}{SLOW}"));
    service.until_hold("peer_unreachable").await;
    wait_until("they are put back", SOON, || async {
        match torn(&site, &packages).await? {
            0 => Ok(()),
            left => Err(format!("{left} are torn").into()),
        }
    })
    .await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_does_not_stop_in_the_middle_of_replacing() -> Result<()> {
    let site = site("torn_pause").await;
    let (service, packages) = replacing(&site).await?;
    service.reconfigure(&format!("paused = true\n{ANY_CHANGE}"));
    service
        .until("the pass is over", |status| {
            status["replication"]["baseline"].is_null()
        })
        .await;
    service.until_hold("paused").await;
    assert_eq!(torn(&site, &packages).await?, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_taken_by_hand_in_the_middle_of_a_pass_stands() -> Result<()> {
    let site = site("role_in_pass").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 5).await?;
    let mut service = Service::start(&site, "");
    let before = service.until_level().await["recovery_point"]["lsn"].clone();
    let state = site.spare.pg.conn("warm_spare").await?;
    service.running.forget();
    factory
        .package(&site.primary, Spec::new("core", "new", "1"))
        .await?;
    service
        .running
        .wait_for_line(|line| line.ends_with("phase schema"), SOON)
        .await?;
    state
        .batch_execute("UPDATE cluster SET role = 'primary'")
        .await?;
    let status = service.until_hold("conflict").await;
    assert_eq!(status["role"]["actual"], "primary", "{status:#}");
    let row = state
        .query_one("SELECT role, (SELECT lsn FROM copied) FROM cluster", &[])
        .await?;
    assert_eq!(row.get::<_, String>(0), "primary");
    assert_eq!(
        Value::from(row.get::<_, String>(1)),
        before,
        "nothing was made visible after it"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_database_is_copied_anew_whatever_the_schedule() -> Result<()> {
    let site = site("dropped").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    // Nothing is due for a day, and nobody would be alarmed by age.
    let nightly = "[replication]\nschedule = \"0 3 * * *\"\nlag_warn = \"26h\"\nrpo = \"30h\"";
    let service = Service::start(&site, nightly);
    service.until_level().await;
    service.reconfigure(&format!("paused = true\n{nightly}"));
    service.until_hold("paused").await;
    let admin = site.spare.pg.conn("postgres").await?;
    admin
        .batch_execute("DROP DATABASE builder WITH (FORCE)")
        .await?;
    let status = service
        .until("astray", |status| {
            status["health"]["reasons"][0]["code"] == "database_astray"
        })
        .await;
    assert_eq!(status["health"]["level"], 2, "{status:#}");
    service.reconfigure(nightly);
    let status = service.until_level().await;
    assert_eq!(status["health"]["level"], 0, "{status:#}");
    let rows = site.spare.conn().await?;
    let sql = "SELECT count(*) FROM origin_packages";
    assert_eq!(rows.query_one(sql, &[]).await?.get::<_, i64>(0), 3);
    Ok(())
}

/// It always fails late, after it got on well: that is no reason to make it anew every second.
#[tokio::test(flavor = "multi_thread")]
async fn a_pass_that_always_fails_late_is_not_made_all_the_time() -> Result<()> {
    let site = site("fails_late").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    let hidden = "CREATE TABLE looked_up (k int); CREATE TABLE indexed (a int); INSERT INTO indexed VALUES (1); \
                  CREATE FUNCTION lookup(int) RETURNS int LANGUAGE sql IMMUTABLE \
                    AS 'SELECT count(*)::int FROM looked_up WHERE k = $1'; \
                  CREATE INDEX unrestorable ON indexed (lookup(a))";
    site.primary.conn().await?.batch_execute(hidden).await?;
    let service = Service::start(&site, "[replication]\nlag_warn = \"2s\"\nrpo = \"8s\"");
    let status = service.until_hold("failed").await;
    let detail = status["hold"]["detail"].as_str().unwrap_or_default();
    assert!(
        detail.contains("does not exist"),
        "the cause is told: {detail}"
    );
    let status = service
        .until("critical", |status| status["health"]["level"] == 2)
        .await;
    assert_eq!(status["hold"]["reason"], "failed", "{status:#}");
    let failed = service
        .metric("warm_spare_baselines_total{result=\"failed\"}")
        .await?;
    assert!(
        failed.is_some_and(|failed| failed <= 2.0),
        "{failed:?} full copies in 8 s"
    );
    Ok(())
}

/// The fence is gone and cannot be set: an alarm at once, no line that says otherwise, and all is well when it can be.
#[tokio::test(flavor = "multi_thread")]
async fn a_fence_that_cannot_be_set_is_critical() -> Result<()> {
    let site = site("no_right").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    let service = Service::start(&site, "");
    service.until_level().await;
    let admin = site.spare.pg.conn("postgres").await?;
    admin
        .batch_execute(
            "CREATE ROLE boss SUPERUSER LOGIN PASSWORD 'x'; ALTER DATABASE builder OWNER TO boss; \
             ALTER DATABASE builder RESET default_transaction_read_only; ALTER ROLE hab NOSUPERUSER",
        )
        .await?;
    let open = |status: &Value| {
        let reasons = status["health"]["reasons"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        reasons.iter().any(|reason| reason["code"] == "not_fenced")
    };
    let status = service.until("not_fenced", open).await;
    assert_eq!(status["health"]["level"], 2, "{status:#}");
    assert_eq!(status["local"]["fenced"], false, "{status:#}");
    assert_eq!(
        service.metric("warm_spare_fenced{side=\"local\"}").await?,
        Some(0.0)
    );
    let claims = |line: &String| line.contains("it was set again");
    assert!(
        !service.running.stderr().iter().any(claims),
        "{:#?}",
        service.running.stderr()
    );
    let boss = format!(
        "host={} port={} user=boss password=x dbname=postgres",
        site.spare.pg.host(),
        site.spare.pg.port()
    );
    let (client, connection) = tokio_postgres::connect(&boss, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    client.batch_execute("ALTER ROLE hab SUPERUSER").await?;
    service
        .until("fenced again", |status| {
            status["local"]["fenced"] == true && status["health"]["level"] == 0
        })
        .await;
    Ok(())
}
