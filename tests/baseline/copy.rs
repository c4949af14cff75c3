//! Everything BUILDER.md names arrives, at one point; a second run copies only what is missing.

use support::packages::{self, delete_package, promote};
use support::{Factory, Result, Site, Spec, site};
use tokio_postgres::Client;

/// Rows of every table in text form, sorted; sequences, views, functions, triggers, enums, indexes, constraints, extensions.
async fn fingerprint(client: &Client) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let tables = client
        .query(
            "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables \
             WHERE schemaname NOT IN ('pg_catalog', 'information_schema', 'warm_spare') ORDER BY 1",
            &[],
        )
        .await?;
    for table in tables {
        let name: String = table.get(0);
        let rows = client
            .query(&format!("SELECT t::text FROM {name} t ORDER BY 1"), &[])
            .await?;
        lines.extend(
            rows.iter()
                .map(|row| format!("{name}: {}", row.get::<_, String>(0))),
        );
        lines.push(format!("{name}: {} rows", rows.len()));
    }
    let catalogs = [
        "SELECT 'sequence ' || sequencename || ' ' || coalesce(last_value::text, 'unused') FROM pg_sequences WHERE schemaname = 'public'",
        "SELECT 'view ' || viewname || ' ' || definition FROM pg_views WHERE schemaname = 'public'",
        "SELECT 'function ' || pg_get_functiondef(p.oid) FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang \
           WHERE p.pronamespace = 'public'::regnamespace AND l.lanname IN ('sql', 'plpgsql')",
        "SELECT 'trigger ' || pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal",
        "SELECT 'enum ' || t.typname || ' ' || string_agg(e.enumlabel, ',' ORDER BY e.enumsortorder) \
           FROM pg_enum e JOIN pg_type t ON t.oid = e.enumtypid GROUP BY t.typname",
        "SELECT 'index ' || indexdef FROM pg_indexes WHERE schemaname = 'public'",
        "SELECT 'constraint ' || conrelid::regclass || ' ' || pg_get_constraintdef(oid) FROM pg_constraint \
           WHERE connamespace = 'public'::regnamespace",
        "SELECT 'extension ' || extname || ' ' || extversion FROM pg_extension",
        "SELECT 'column ' || attrelid::regclass || ' ' || attname || ' ' || format_type(atttypid, atttypmod) || ' ' || \
           attnotnull || ' ' || coalesce(pg_get_expr(adbin, adrelid), '') \
           FROM pg_attribute JOIN pg_class c ON c.oid = attrelid LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum \
           WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND attnum > 0 AND NOT attisdropped",
    ];
    for sql in catalogs {
        let mut found: Vec<String> = client
            .query(sql, &[])
            .await?
            .iter()
            .map(|row| row.get(0))
            .collect();
        assert!(
            !found.is_empty(),
            "the test's own query finds something: {sql}"
        );
        found.sort();
        lines.extend(found);
    }
    Ok(lines)
}

async fn assert_equal(site: &Site) -> Result<()> {
    let primary = fingerprint(&site.primary.conn().await?).await?;
    let spare = fingerprint(&site.spare.conn().await?).await?;
    for (ours, theirs) in spare.iter().zip(&primary) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(spare.len(), primary.len());
    Ok(())
}

async fn assert_same_bytes(site: &Site, package: &packages::Package) -> Result<()> {
    let found = site
        .spare
        .s3()
        .checksum(&site.spare.bucket, &package.key)
        .await?;
    assert_eq!(
        found.as_deref(),
        Some(package.checksum.as_str()),
        "{}",
        package.key
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_thing_arrives_and_every_artifact_byte_for_byte() -> Result<()> {
    let site = site("everything").await;
    let mut factory = Factory::seeded();
    let filled = factory.fill(&site.primary, 40).await?;
    // Names of all three kinds of odd but legal characters, and an artifact of several parts.
    for version in ["1.0~rc1", "2.0+git.1", "50%25", "1_0.b~+%"] {
        let package = factory
            .package(&site.primary, Spec::new("core", "odd", version))
            .await?;
        assert!(package.key.contains(version));
    }
    let large = factory
        .package(
            &site.primary,
            Spec::new("core", "large", "1").size(20 << 20),
        )
        .await?;
    site.primary
        .put("core/without/a/row.hart", "an object that no row names")
        .await?;

    let output = site.warm_spare(&["--json", "sync"]).await.ok().json();
    assert_eq!(output["outcome"], "copied");
    assert_eq!(output["packages"], 45);
    assert_eq!(output["artifacts"]["copied"], 45);
    assert_eq!(
        output["artifacts"]["unavailable"].as_array().map(Vec::len),
        Some(0)
    );

    assert_equal(&site).await?;
    for package in filled.iter().chain([&large]) {
        assert_same_bytes(&site, package).await?;
    }
    let theirs: Vec<String> = site
        .primary
        .keys()
        .await?
        .into_iter()
        .filter(|key| !key.contains("without/a/row"))
        .collect();
    assert_eq!(
        site.spare.keys().await?,
        theirs,
        "keys arrive unchanged, and nothing of ours is left"
    );
    let verified = site
        .warm_spare(&["--json", "verify", "--deep"])
        .await
        .ok()
        .json();
    assert_eq!(verified["signatures"]["good"], 45);
    assert_eq!(verified["newer"], false);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_run_copies_only_what_is_missing() -> Result<()> {
    let site = site("second").await;
    let mut factory = Factory::seeded();
    let old = factory.fill(&site.primary, 12).await?;
    site.warm_spare(&["sync"]).await.ok();

    let nothing = site.warm_spare(&["--json", "sync"]).await.ok().json();
    assert_eq!(nothing["outcome"], "unchanged");
    assert_eq!(nothing["artifacts"]["copied"], 0);
    assert_eq!(nothing["artifacts"]["verified"], 0);

    let new = factory
        .package(&site.primary, Spec::new("core", "new", "1"))
        .await?;
    promote(&site.primary, &old[0], "stable").await.ok();
    delete_package(&site.primary, &old[1]).await?;
    let again = site.warm_spare(&["--json", "sync"]).await.ok().json();
    assert_eq!(again["outcome"], "copied");
    assert_eq!(again["artifacts"]["copied"], 1);
    assert_eq!(again["vanished_packages"], 1);
    assert_equal(&site).await?;
    assert_same_bytes(&site, &new).await?;
    assert_same_bytes(&site, &old[1]).await?;
    site.warm_spare(&["verify", "--deep"]).await.ok();

    // Lost on the spare, and nothing new on the primary: brought again.
    site.spare.delete(&old[2].key).await?;
    let mended = site.warm_spare(&["--json", "sync"]).await.ok().json();
    assert_eq!(mended["outcome"], "unchanged");
    assert_eq!(mended["artifacts"]["copied"], 1);
    assert_same_bytes(&site, &old[2]).await
}

/// The cheap test for changes must not miss one: each kind of change makes a new baseline.
#[tokio::test(flavor = "multi_thread")]
async fn no_change_of_the_primary_is_missed() -> Result<()> {
    let site = site("changes").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    site.warm_spare(&["sync"]).await.ok();
    let client = site.primary.conn().await?;
    let sequence: String = client
        .query_one(
            "SELECT min(sequencename)::text FROM pg_sequences WHERE schemaname = 'public'",
            &[],
        )
        .await?
        .get(0);
    let changes = [
        "INSERT INTO accounts (id, name, email) VALUES (77, 'new', 'e')".to_string(),
        "UPDATE accounts SET email = 'other' WHERE id = 77".into(),
        "DELETE FROM accounts WHERE id = 77".into(),
        "CREATE TABLE later (id int)".into(),
        "TRUNCATE audit_package".into(),
        format!("SELECT setval('{sequence}', 4711)"),
        format!("SELECT nextval('{sequence}')"),
    ];
    for change in changes {
        client.batch_execute(&change).await?;
        let output = site.warm_spare(&["--json", "sync"]).await.ok().json();
        assert_eq!(output["outcome"], "copied", "after {change}");
        assert_equal(&site).await?;
    }
    site.primary.pg.stop_fast().await?;
    site.primary.pg.start_again().await?;
    let output = site.warm_spare(&["--json", "sync"]).await.ok().json();
    assert_eq!(
        output["outcome"], "copied",
        "after a start of the server, which may be an older copy of it"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_replaced_database_is_kept_and_its_properties_pass_on() -> Result<()> {
    let site = Site::builder("properties").spare_database().start().await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 3).await?;
    let admin = site.spare.pg.conn("postgres").await?;
    for statement in [
        "CREATE ROLE owner LOGIN",
        "CREATE ROLE reader LOGIN",
        "ALTER DATABASE builder OWNER TO owner",
        "REVOKE CONNECT ON DATABASE builder FROM PUBLIC",
        "GRANT CONNECT ON DATABASE builder TO reader WITH GRANT OPTION",
        "ALTER DATABASE builder SET search_path = public, pg_catalog",
        "ALTER DATABASE builder SET work_mem = '7MB'",
        "ALTER ROLE reader IN DATABASE builder SET statement_timeout = '5s'",
        "ALTER DATABASE builder CONNECTION LIMIT 77",
        "COMMENT ON DATABASE builder IS 'it''s Builder''s'",
    ] {
        admin.batch_execute(statement).await?;
    }
    let properties = "SELECT pg_get_userbyid(datdba)::text, datconnlimit, shobj_description(oid, 'pg_database'), \
          (SELECT string_agg(a::text, ' ' ORDER BY a::text) FROM unnest(datacl) a), \
          (SELECT string_agg(c || ' of ' || setrole::regrole, ' ' ORDER BY c) FROM pg_db_role_setting, unnest(setconfig) c \
             WHERE setdatabase = pg_database.oid AND c <> 'default_transaction_read_only=on') \
        FROM pg_database WHERE datname = 'builder'";
    let read = async || -> Result<Vec<Option<String>>> {
        let row = admin.query_one(properties, &[]).await?;
        Ok(vec![
            row.get(0),
            Some(row.get::<_, i32>(1).to_string()),
            row.get(2),
            row.get(3),
            row.get(4),
        ])
    };
    let before = read().await?;
    assert!(
        before.iter().all(Option::is_some),
        "the test set all of them: {before:?}"
    );
    let output = site.warm_spare(&["--json", "sync"]).await.ok().json();
    assert_eq!(read().await?, before);
    let generation = output["generation"]
        .as_str()
        .expect("there was a database before");
    assert!(site.spare.pg.has_database(generation).await?);
    let owner: String = site
        .spare
        .conn()
        .await?
        .query_one(
            "SELECT tableowner::text FROM pg_tables WHERE tablename = 'origin_packages'",
            &[],
        )
        .await?
        .get(0);
    assert_eq!(
        owner, "owner",
        "what is in the database belongs to its owner"
    );

    site.write_config("replication.keep_generations = 2");
    for _ in 0..3 {
        site.warm_spare(&["sync", "--baseline"]).await.ok();
    }
    let kept: i64 = admin
        .query_one(
            "SELECT count(*) FROM pg_database WHERE datname LIKE 'builder\\_2%'",
            &[],
        )
        .await?
        .get(0);
    assert_eq!(kept, 2);
    assert!(
        !site.spare.pg.has_database(generation).await?,
        "the oldest goes first"
    );
    Ok(())
}

/// Server-wide limits that would end a snapshot or a copy do not end ours.
#[tokio::test(flavor = "multi_thread")]
async fn time_outs_of_the_servers_do_not_end_the_copy() -> Result<()> {
    let site = Site::builder("limits").start().await?;
    Factory::seeded()
        .bulk_artifacts(&site.primary, 300, 1000)
        .await?;
    for cluster in [&site.primary, &site.spare] {
        let admin = cluster.pg.conn("postgres").await?;
        for (name, limit) in [
            ("idle_in_transaction_session_timeout", "1ms"),
            // Not even the first statement of a session of ours is under it.
            ("statement_timeout", "1ms"),
            ("lock_timeout", "1ms"),
            ("idle_session_timeout", "100ms"),
        ] {
            admin
                .batch_execute(&format!("ALTER ROLE hab SET {name} = '{limit}'"))
                .await?;
        }
    }
    site.warm_spare(&["sync"]).await.ok();
    site.warm_spare(&["verify"]).await.ok();
    Ok(())
}

/// Roles that may do no more than they must, on both sides; a proxy in the environment is not used.
#[tokio::test(flavor = "multi_thread")]
async fn it_needs_no_superuser_and_no_proxy() -> Result<()> {
    let mut site = site("roles").await;
    Factory::seeded().fill(&site.primary, 4).await?;
    site.primary
        .conn()
        .await?
        .batch_execute(
            "CREATE ROLE looker LOGIN PASSWORD 'looks'; \
             GRANT SELECT ON ALL TABLES IN SCHEMA public TO looker; \
             GRANT SELECT ON ALL SEQUENCES IN SCHEMA public TO looker",
        )
        .await?;
    site.spare
        .pg
        .conn("postgres")
        .await?
        .batch_execute(
            "CREATE ROLE copier LOGIN CREATEDB PASSWORD 'copies'; GRANT pg_signal_backend TO copier",
        )
        .await?;
    for name in ["http_proxy", "HTTP_PROXY", "ALL_PROXY"] {
        site.environment
            .push((name.into(), "http://127.0.0.1:1".into()));
    }
    site.write_config(
        "[peer.datastore]\nuser = \"looker\"\npassword = \"looks\"\n\
         [local.datastore]\nuser = \"copier\"\npassword = \"copies\"",
    );
    for _ in 0..2 {
        site.warm_spare(&["sync", "--baseline"]).await.ok();
        site.warm_spare(&["verify", "--deep"]).await.ok();
    }
    assert_equal(&site).await
}
