//! Every difference is listed, and what is newer on the primary is none.

use support::follow::tamper;
use support::{Factory, Package, Result, Site, Spec, site};

async fn copied(name: &str) -> Result<(Site, Factory, Vec<Package>)> {
    let site = site(name).await;
    let mut factory = Factory::seeded();
    let packages = factory.fill(&site.primary, 8).await?;
    site.warm_spare(&["sync"]).await.ok();
    Ok((site, factory, packages))
}

async fn differences(site: &Site, arguments: &[&str]) -> Result<Vec<(String, String, String)>> {
    let output = site
        .warm_spare(&[&["--json", "verify"], arguments].concat())
        .await;
    let json = output.json();
    let listed = json["differences"].as_array().expect("a list").clone();
    assert_eq!(
        output.code,
        Some(if listed.is_empty() { 0 } else { 1 }),
        "{output}"
    );
    let text = |value: &serde_json::Value| value.as_str().expect("a text").to_string();
    Ok(listed
        .iter()
        .map(|d| (text(&d["kind"]), text(&d["name"]), text(&d["text"])))
        .collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn later_changes_of_the_primary_are_newer_and_no_difference() -> Result<()> {
    let (site, mut factory, _) = copied("later").await?;
    factory
        .package(&site.primary, Spec::new("core", "later", "1"))
        .await?;
    let json = site.warm_spare(&["--json", "verify"]).await.ok().json();
    assert_eq!(json["newer"], true);
    site.primary.pg.stop_fast().await?;
    let json = site
        .warm_spare(&["--json", "verify", "--deep"])
        .await
        .ok()
        .json();
    assert_eq!(json["newer"], serde_json::Value::Null, "unknown is null");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_rows_tables_and_artifacts_are_each_listed() -> Result<()> {
    let (site, _, packages) = copied("changed").await?;
    assert_eq!(differences(&site, &["--deep"]).await?, []);
    tamper(&site, "UPDATE accounts SET email = 'other'").await?;
    tamper(
        &site,
        "DELETE FROM audit_package WHERE ctid IN (SELECT ctid FROM audit_package LIMIT 1)",
    )
    .await?;
    tamper(&site, "CREATE TABLE extra (); DROP TABLE license_keys").await?;
    site.spare.delete(&packages[0].key).await?;
    site.spare.put(&packages[1].key, "short").await?;
    let mut same_length = packages[2].bytes().to_vec();
    *same_length.last_mut().expect("it has bytes") ^= 1;
    site.spare.put(&packages[2].key, same_length).await?;

    let found = differences(&site, &[]).await?;
    let has = |kind: &str, name: &str, word: &str| {
        assert!(
            found
                .iter()
                .any(|(k, n, text)| k == kind && n == name && text.contains(word)),
            "{kind} {name} {word}: {found:?}"
        );
    };
    has("table", "public.accounts", "some rows differ");
    has("table", "public.audit_package", "rows");
    has("table", "public.extra", "is not among the tables");
    has("table", "public.license_keys", "is gone");
    has("artifact", &packages[0].key, "not in the local bucket");
    has("artifact", &packages[1].key, "another length");
    has("artifact", &packages[2].key, "written again");
    assert_eq!(found.len(), 7, "{found:?}");
    let deep = differences(&site, &["--deep"]).await?;
    let wrong = deep
        .iter()
        .filter(|(kind, _, text)| kind == "artifact" && text.contains("hash to"))
        .count();
    assert_eq!(wrong, 2, "{deep:?}");
    // A new copy makes it whole again.
    site.warm_spare(&["sync", "--baseline"]).await.ok();
    assert_eq!(differences(&site, &["--deep"]).await?, []);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signature_by_another_key_is_a_difference_and_an_unknown_key_is_not() -> Result<()> {
    let (site, mut factory, packages) = copied("signed").await?;
    let client = site.primary.conn().await?;
    // The database's key under that name is another one: as if the artifact had been signed by a stranger.
    factory.origin(&site.primary, "stranger").await?;
    client
        .batch_execute(
            "UPDATE origin_public_keys SET body = replace((SELECT body FROM origin_public_keys WHERE name = 'stranger'), 'stranger', 'core') \
             WHERE name = 'core'; DELETE FROM origin_public_keys WHERE name = 'acme'",
        )
        .await?;
    site.warm_spare(&["sync"]).await.ok();
    let found = differences(&site, &["--deep"]).await?;
    let of = |origin: &str| packages.iter().filter(|p| p.spec.origin == origin).count();
    assert_eq!(found.len(), of("core"), "{found:?}");
    assert!(
        found
            .iter()
            .all(|(kind, _, text)| kind == "signature"
                && text.contains("is not signed by key core-"))
    );
    let json = site
        .warm_spare(&["--json", "verify", "--deep"])
        .await
        .json();
    assert_eq!(json["signatures"]["key_unknown"], of("acme"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn before_the_first_copy_and_in_a_foreign_database_it_says_so() -> Result<()> {
    let (site, _, _) = copied("foreign").await?;
    let admin = site.spare.pg.conn("postgres").await?;
    admin
        .batch_execute("ALTER DATABASE builder RENAME TO aside")
        .await?;
    site.spare.create_builder_database().await?;
    let found = differences(&site, &[]).await?;
    assert!(
        matches!(&found[..], [(kind, _, text)] if kind == "database" && text.contains("no recovery point")),
        "{found:?}"
    );
    let fresh = support::site("fresh").await;
    let output = fresh.warm_spare(&["verify"]).await;
    assert_eq!(output.code, Some(3), "{output}");
    assert!(
        output.stderr.contains("nothing has been copied"),
        "{output}"
    );
    assert!(
        !fresh.spare.pg.has_database("warm_spare").await?,
        "verify makes nothing"
    );
    Ok(())
}
