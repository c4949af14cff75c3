//! What cannot be copied is said before anything is changed, and the old state stands.

use support::{Factory, Output, Postgres, Result, Site, site};

/// Databases and objects of the spare: what a refused pass must leave as it was.
async fn inventory(site: &Site) -> Result<(Vec<String>, Vec<String>)> {
    let admin = site.spare.pg.conn("postgres").await?;
    let databases = admin
        .query("SELECT datname::text FROM pg_database ORDER BY 1", &[])
        .await?;
    Ok((
        databases.iter().map(|row| row.get(0)).collect(),
        site.spare.keys().await?,
    ))
}

async fn refused(site: &Site, code: i32, words: &[&str]) -> Result<Output> {
    let before = inventory(site).await?;
    let output = site.warm_spare(&["sync"]).await;
    assert_eq!(output.code, Some(code), "{output}");
    for word in words {
        assert!(
            output.stderr.contains(word),
            "{word:?} is missing: {output}"
        );
    }
    assert!(output.stderr.contains("next step: "), "{output}");
    assert_eq!(inventory(site).await?, before, "nothing was changed");
    Ok(output)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_either_side_is_named() -> Result<()> {
    let site = site("wrong").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    for (extra, words) in [
        (
            "peer.datastore.password = \"wrong\"",
            vec!["peer datastore", "password", "peer.datastore.password"],
        ),
        (
            "local.datastore.password = \"wrong\"",
            vec!["local datastore", "password"],
        ),
        (
            "peer.datastore.database = \"none\"",
            vec![
                "peer datastore",
                "\"none\" does not exist",
                "peer.datastore.database",
            ],
        ),
        (
            "peer.datastore.port = 1",
            vec!["peer datastore 127.0.0.1:1", "refused"],
        ),
        (
            "peer.s3.bucket_name = \"no-such-bucket\"",
            vec![
                "peer artifact store",
                "no-such-bucket",
                "peer.s3.bucket_name",
            ],
        ),
        (
            "local.s3.bucket_name = \"no-such-bucket\"",
            vec!["local artifact store", "no-such-bucket"],
        ),
        (
            "peer.s3.secret_key = \"wrong-wrong\"",
            vec!["peer artifact store", "peer.s3.secret_key"],
        ),
        (
            "local.s3.key_id = \"nobody\"",
            vec!["local artifact store", "local.s3.key_id"],
        ),
        (
            "peer.datastore.ssl_mode = \"require\"",
            vec!["peer datastore", "TLS"],
        ),
    ] {
        site.write_config(extra);
        let transient = extra.contains("port = 1");
        if !transient {
            let output = refused(&site, 3, &words).await?;
            assert!(
                !output.stderr.contains(site.primary.pg.password()),
                "secrets are not printed"
            );
            assert!(
                !output.stderr.contains(site.primary.minio.secret_key()),
                "secrets are not printed"
            );
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_without_builders_rows_is_refused() -> Result<()> {
    let site = Site::builder("empty").spare_database().start().await?;
    // Who sets both sites up at once has no package on either.
    site.warm_spare(&["sync"]).await.ok();
    Factory::seeded().fill(&site.primary, 1).await?;
    site.warm_spare(&["sync"]).await.ok();
    let all = "DELETE FROM origin_channel_packages; DELETE FROM origin_packages";
    site.primary.conn().await?.batch_execute(all).await?;
    refused(&site, 4, &["empty_primary", "the spare's has 1"]).await?;
    site.primary.pg.create_database("other").await?;
    site.write_config("peer.datastore.database = \"other\"");
    refused(&site, 3, &["not_builder", "origin_packages"]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ends_must_be_two() -> Result<()> {
    let site = site("same").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    let (pg, minio) = (&site.primary.pg, &site.primary.minio);
    site.write_config(&format!(
        "local.datastore.port = {}\nlocal.datastore.password = \"{}\"",
        pg.port(),
        pg.password()
    ));
    refused(&site, 4, &["same_server"]).await?;
    site.write_config(&format!(
        "local.datastore.port = {}\nlocal.datastore.password = \"{}\"\nlocal.datastore.database = \"another\"",
        pg.port(),
        pg.password()
    ));
    refused(&site, 4, &["same_server"]).await?;
    site.write_config(&format!(
        "[local.s3]\nendpoint = \"http://localhost:{}\"\nkey_id = \"{}\"\nsecret_key = \"{}\"\nbucket_name = \"{}\"",
        minio.port(),
        minio.access_key(),
        minio.secret_key(),
        site.primary.bucket
    ));
    let keys = site.primary.keys().await?;
    refused(&site, 4, &["same_bucket"]).await?;
    assert_eq!(site.primary.keys().await?, keys, "the probe is gone");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_never_told_its_role_does_nothing() -> Result<()> {
    let site = site("roleless").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    site.write_config("role = \"keep\"");
    refused(&site, 4, &["role_unset", "role = \"spare\""]).await?;
    site.write_config("");
    site.warm_spare(&["sync"]).await.ok();
    site.write_config("role = \"keep\"");
    site.warm_spare(&["sync"]).await.ok();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn exchanged_ends_are_noticed_before_the_first_copy() -> Result<()> {
    let site = Site::builder("exchanged").spare_database().start().await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    factory.fill(&site.spare, 3).await?;
    let output = site.warm_spare(&["sync"]).await;
    assert_eq!(output.code, Some(4), "{output}");
    assert!(
        output
            .stderr
            .contains("ends_exchanged: the local database holds 3 packages"),
        "{output}"
    );
    let rows = site
        .spare
        .conn()
        .await?
        .query_one("SELECT count(*) FROM origin_packages", &[])
        .await?;
    assert_eq!(rows.get::<_, i64>(0), 3, "nothing was copied over");
    // The consent to a promotion is none to this.
    site.write_config("force_epoch = 1");
    let output = site.warm_spare(&["--json", "sync"]).await;
    assert_eq!(output.code, Some(4), "{output}");
    let (_, id) = output
        .stderr
        .split_once("fuse.approve = \"")
        .unwrap_or_else(|| panic!("{output}"));
    let id = id.split('"').next().unwrap_or_default();
    site.write_config(&format!("[fuse]\napprove = \"{id}\""));
    site.warm_spare(&["sync"]).await.ok();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_extensions_privileges_and_disk_are_looked_at_first() -> Result<()> {
    let mut site = site("needs").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    site.environment = vec![("WARM_SPARE_PG_CLIENTS".into(), "/nonexistent".into())];
    refused(
        &site,
        3,
        &[
            "no pg_dump and pg_restore",
            "apt install postgresql-client-",
        ],
    )
    .await?;
    site.environment.clear();

    let primary = site.primary.conn().await?;
    let spare = site.spare.pg.conn("postgres").await?;
    // An extension that only the primary has: written into its catalog, for both servers run the same programs.
    let made = "INSERT INTO pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion) \
                VALUES (99999, 'only_there', 10, 2200, false, '1')";
    primary
        .batch_execute(&format!("SET allow_system_table_mods = on; {made}"))
        .await?;
    refused(&site, 3, &["extension: ", "only_there"]).await?;
    primary
        .batch_execute("DELETE FROM pg_extension WHERE oid = 99999")
        .await?;

    primary
        .batch_execute("CREATE ROLE looker LOGIN PASSWORD 'looks'")
        .await?;
    site.write_config("peer.datastore.user = \"looker\"\npeer.datastore.password = \"looks\"");
    refused(&site, 3, &["privilege: the peer's user may not read"]).await?;
    spare
        .batch_execute("CREATE ROLE guest LOGIN PASSWORD 'guest'")
        .await?;
    site.write_config("local.datastore.user = \"guest\"\nlocal.datastore.password = \"guest\"");
    refused(
        &site,
        3,
        &["privilege: the local datastore's user guest may not create databases"],
    )
    .await?;
    site.write_config("");

    // pg_database_size counts every file in the database's directory; this one takes no room.
    let path: String = primary
        .query_one(
            "SELECT 'base/' || oid::text FROM pg_database WHERE datname = 'builder'",
            &[],
        )
        .await?
        .get(0);
    let sparse = site.primary.pg.data_dir().join(path).join("sparse");
    std::fs::File::create(&sparse)?.set_len(1 << 42)?;
    refused(&site, 3, &["disk_full: ", "one more copy"]).await?;
    std::fs::remove_file(&sparse)?;

    primary.batch_execute("SELECT lo_create(0)").await?;
    refused(&site, 3, &["unsupported: ", "1 large objects"]).await?;
    primary
        .batch_execute("SELECT lo_unlink(oid) FROM pg_largeobject_metadata")
        .await?;
    site.warm_spare(&["sync"]).await.ok();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_is_not_the_primarys_is_noticed() -> Result<()> {
    let site = site("foreign").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    site.primary.s3().create_bucket("foreign-bucket").await?;
    site.write_config("peer.s3.bucket_name = \"foreign-bucket\"");
    let output = site.warm_spare(&["sync"]).await;
    assert_eq!(output.code, Some(3), "{output}");
    assert!(
        output.stderr.contains("none of the 3 artifacts"),
        "{output}"
    );
    assert!(!site.spare.pg.has_database("builder").await?);
    Ok(())
}

/// An older binary must not touch what a newer one wrote.
#[tokio::test(flavor = "multi_thread")]
async fn a_newer_state_is_refused() -> Result<()> {
    let site = site("newer").await;
    Factory::seeded().fill(&site.primary, 2).await?;
    site.warm_spare(&["sync"]).await.ok();
    let state = site.spare.pg.conn("warm_spare").await?;
    state.batch_execute("UPDATE meta SET format = 99").await?;
    refused(&site, 2, &["has format 99"]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn scram_passwords_work_as_md5_ones_do() -> Result<()> {
    let scram = Postgres::builder().scram();
    let site = Site::builder("scram").primary(scram).start().await?;
    Factory::seeded().fill(&site.primary, 2).await?;
    site.warm_spare(&["sync"]).await.ok();
    Ok(())
}

/// As a program of format 2 left it, which knew no promotion; whoever comes first brings it up to date.
#[tokio::test]
async fn an_older_state_is_brought_up_to_date_by_several_at_once() -> Result<()> {
    let site = site("older_state").await;
    Factory::seeded().fill(&site.primary, 2).await?;
    site.warm_spare(&["sync"]).await.ok();
    let state = site.spare.pg.conn("warm_spare").await?;
    let newest = format_of(&state).await?;
    state
        .batch_execute(
            "DROP TABLE artifact_place, promotion, fence, divergence, diverged_row, diverged_package, drill; \
             ALTER TABLE cluster DROP COLUMN coming_back; ALTER TABLE copied DROP COLUMN peer_cluster; \
             ALTER TABLE transition DROP COLUMN epoch, DROP COLUMN asked, DROP COLUMN undone; \
             UPDATE meta SET format = 2",
        )
        .await?;
    let several: Vec<_> = (0..6)
        .map(|_| site.spawn(&["generations", "list"]))
        .collect();
    for one in several {
        one.wait(std::time::Duration::from_secs(60)).await?.ok();
    }
    assert_eq!(format_of(&state).await?, newest);
    site.warm_spare(&["sync"]).await.ok();
    Ok(())
}

/// The format of the state database, as its own table tells it.
async fn format_of(state: &tokio_postgres::Client) -> Result<i32> {
    Ok(state
        .query_one("SELECT format FROM meta", &[])
        .await?
        .get(0))
}
