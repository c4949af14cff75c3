//! The primary's transactions arrive one after the other, artifact before row, whatever kind of change they make.

mod support;

use support::packages::{self, delete_package, demote, promote};
use support::{Factory, Postgres, Result, Site, Spec, content, site};

async fn streaming(name: &str) -> Result<Site> {
    let site = Site::builder(name)
        .primary(Postgres::builder().logical())
        .start()
        .await?;
    site.write_config("");
    Ok(site)
}

/// What an operator's `warm-spare prepare` makes.
async fn prepare(site: &Site) -> Result<()> {
    let client = site.primary.conn().await?;
    let spare = site.spare.pg.conn("postgres").await?;
    let _ = spare;
    for table in ["origin_members", "audit_package", "audit_package_group"] {
        client.batch_execute(&format!("ALTER TABLE {table} REPLICA IDENTITY FULL")).await?;
    }
    client.batch_execute("DO $$ DECLARE t text; BEGIN SELECT string_agg(format('%I.%I', schemaname, tablename), ', ') INTO t FROM pg_tables WHERE schemaname='public'; EXECUTE 'CREATE PUBLICATION pre FOR TABLE ' || t; END $$").await?;
    site.write_config("[replication]\npublication = \"pre\"");
    Ok(())
}

#[tokio::test]
async fn what_is_committed_after_the_copy_comes_through_the_slot() -> Result<()> {
    let site = streaming("stream_sync").await?;
    let mut factory = Factory::seeded();
    let made = factory.fill(&site.primary, 10).await?;
    prepare(&site).await?;
    let first = site.warm_spare(&["sync", "--json"]).await.ok().json();
    assert_eq!(first["outcome"], "copied");
    promote(&site.primary, &made[0], "stable").await?;
    delete_package(&site.primary, &made[1]).await?;
    factory
        .package(&site.primary, Spec::new("core", "later", "1.0.0"))
        .await?;
    let second = site.warm_spare(&["sync", "--json"]).await.ok().json();
    assert_eq!(second["outcome"], "followed", "{second:#}");
    assert_eq!(content(&site.primary).await?, content(&site.spare).await?);
    Ok(())
}
