//! A connection pooler between us and a server gives no sessions of the kind that we need. It is named, and not taken for
//! the server.

use support::pooler::Pooler;
use support::{Factory, Result, site};

/// PgBouncer as it comes; told to drop start-up options; and giving each transaction to another server process.
const KINDS: [(&str, &str); 3] = [
    ("", "unsupported startup parameter"),
    (
        "ignore_startup_parameters = options",
        "drops start-up options",
    ),
    (
        "ignore_startup_parameters = options\npool_mode = transaction",
        "a connection pooler is in between",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_is_named_on_either_side() -> Result<()> {
    let site = site("pooler").await;
    Factory::seeded().fill(&site.primary, 1).await?;
    for (side, cluster) in [("local", &site.spare), ("peer", &site.primary)] {
        for (settings, words) in KINDS {
            let pooler = Pooler::start(&cluster.pg, settings).await?;
            site.write_config(&format!("{side}.datastore.port = {}", pooler.port()));
            for verb in [
                &["sync"][..],
                &["check-config", "--connect"],
                &["preflight"],
            ] {
                let output = site.warm_spare(verb).await;
                let said = format!("{}{}", output.stdout, output.stderr);
                let named = said.contains("name the PostgreSQL server itself");
                // A preflight asks for the primary's state first: the pooler says that there is no such database.
                let told = named && (said.contains(words) || verb == ["preflight"]);
                assert!(told, "{side}, {settings:?}: {output}");
                assert_ne!(output.code, Some(0), "{side}, {settings:?}: {output}");
            }
        }
    }
    let databases = "SELECT datname::text FROM pg_database WHERE datname LIKE '%warm%'";
    let made = site
        .spare
        .pg
        .conn("postgres")
        .await?
        .query(databases, &[])
        .await?;
    assert!(made.is_empty(), "nothing was begun");
    // Without one all is well.
    site.write_config("");
    site.warm_spare(&["sync"]).await.ok();
    Ok(())
}
