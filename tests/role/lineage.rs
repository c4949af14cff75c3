//! Epochs count within one line of descent only, and nothing that goes back is followed, obeyed or promoted unasked.

use support::follow::{copies, events, followed, until_copied, until_equal, until_following};
use support::pair::{
    PROMOTE, Pair, forced, is_writable, returned, until_primary, until_read_only, until_settled,
    write,
};
use support::service::{approval, until_conflict};
use support::{Cluster, Factory, Result, Service, Site, Spec, content};

async fn sql(cluster: &Cluster, database: &str, statements: &str) -> Result<()> {
    Ok(cluster
        .pg
        .conn(database)
        .await?
        .batch_execute(statements)
        .await?)
}

/// Replaced databases, and which of them are pinned.
async fn pinned(cluster: &Cluster) -> Result<usize> {
    let client = cluster.pg.conn("warm_spare").await?;
    let sql = "SELECT count(*) FROM generation JOIN pg_database ON datname = name WHERE pinned";
    let count: i64 = client.query_one(sql, &[]).await?.get(0);
    Ok(count as usize)
}

/// A primary that an operator restored from the wrong night's backup.
#[tokio::test]
async fn a_primary_that_was_set_back_is_followed_only_when_asked() -> Result<()> {
    let site = support::follow::prepared("lineage_set_back").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let service = followed(&site, "").await?;
    let pg = &site.primary.pg;
    pg.stop_fast().await?;
    pg.keep_data().await?;
    pg.start_again().await?;
    until_following(&service).await;
    for name in ["a", "b", "c"] {
        let spec = Spec::new("core", name, "1");
        factory.package(&site.primary, spec).await?;
    }
    until_equal(&site).await?;
    let newer = content(&site.spare).await?;
    let before = copies(&service).await?;

    pg.stop_fast().await?;
    pg.restore_data().await?;
    pg.start_again().await?;
    let status = until_conflict(&service, &["set back to an older copy"]).await;
    // Neither a look at it nor the operator's other words change anything.
    let output = site.warm_spare(&["sync"]).await;
    assert_eq!(output.code, Some(4), "{output}");
    service.reconfigure("[fuse]\napprove = \"00000000\"");
    until_conflict(&service, &["set back to an older copy"]).await;
    assert_eq!(content(&site.spare).await?, newer);
    assert_eq!(copies(&service).await?, before);

    service.reconfigure(&approval(&status));
    until_copied(&service, before).await;
    until_equal(&site).await?;
    assert_eq!(
        pinned(&site.spare).await?,
        1,
        "what was replaced is kept for good"
    );
    service.stop().await.ok();
    Ok(())
}

/// By snapshots there is no stream whose position could tell.
#[tokio::test]
async fn by_snapshots_a_primary_that_was_set_back_is_noticed_too() -> Result<()> {
    let site = Site::builder("lineage_snapshots")
        .own_stores()
        .start()
        .await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let service = Service::start(&site, "");
    service.until_level().await;
    let pg = &site.primary.pg;
    pg.stop_fast().await?;
    pg.keep_data().await?;
    pg.start_again().await?;
    let spec = Spec::new("core", "newer", "1");
    factory.package(&site.primary, spec).await?;
    until_equal(&site).await?;
    service.until_level().await;
    let newer = content(&site.spare).await?;
    pg.stop_fast().await?;
    pg.restore_data().await?;
    pg.start_again().await?;
    until_conflict(&service, &["set back to an older copy"]).await;
    assert_eq!(content(&site.spare).await?, newer);
    service.stop().await.ok();
    Ok(())
}

/// The primary gives the same transaction numbers and positions out once more, for other rows, and more of them.
async fn outgrow(site: &Site, factory: &mut Factory) -> Result<()> {
    let client = site.primary.conn().await?;
    for version in ["1", "2", "3", "4"] {
        let spec = Spec::new("core", "other", version);
        factory.package(&site.primary, spec).await?;
        client.batch_execute("SELECT pg_switch_wal()").await?;
    }
    Ok(())
}

/// Our slot is not in a copy that pg_basebackup has made.
fn forget_slots(cluster: &Cluster) -> Result<()> {
    for slot in std::fs::read_dir(cluster.pg.data_dir().join("pg_replslot"))? {
        std::fs::remove_dir_all(slot?.path())?;
    }
    Ok(())
}

/// What has ended on the primary is known to have ended.
async fn until_known(site: &Site) -> Result<()> {
    let sql = "SELECT txid_snapshot_xmin(txid_current_snapshot())::text";
    let row = site.primary.conn().await?.query_one(sql, &[]).await?;
    let ended: String = row.get(0);
    support::wait_until("it is confirmed", support::service::SOON, || async {
        let sql = "SELECT split_part(transactions, ':', 1)::int8 >= $1::text::int8 FROM copied";
        let client = site.spare.pg.conn("warm_spare").await?;
        let known: bool = client.query_one(sql, &[&ended]).await?.get(0);
        known.then_some(()).ok_or("not yet".into())
    })
    .await;
    Ok(())
}

/// An older copy of the primary that has outgrown the spare, of which no position and no stream tells.
async fn an_older_copy_without_our_slot(name: &str, stream: bool) -> Result<()> {
    let site = match stream {
        true => support::follow::prepared(name).await?,
        false => Site::builder(name).own_stores().start().await?,
    };
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let service = Service::start(&site, "");
    service.until_level().await;
    let pg = &site.primary.pg;
    pg.stop_fast().await?;
    pg.keep_data().await?;
    pg.start_again().await?;
    service.until_level().await;
    for name in ["a", "b", "c"] {
        let spec = Spec::new("core", name, "1");
        factory.package(&site.primary, spec).await?;
    }
    until_equal(&site).await?;
    until_known(&site).await?;
    let newer = content(&site.spare).await?;
    service.running.sigstop();
    pg.stop_fast().await?;
    pg.restore_data().await?;
    if stream {
        forget_slots(&site.primary)?;
    }
    pg.start_again().await?;
    outgrow(&site, &mut factory).await?;
    service.running.sigcont();
    let status = until_conflict(
        &service,
        &[
            "set back to an older copy",
            "are on the primary but not here",
        ],
    )
    .await;
    let output = site.warm_spare(&["sync"]).await;
    assert_eq!(output.code, Some(4), "{output}");
    assert_eq!(content(&site.spare).await?, newer);

    service.reconfigure(&approval(&status));
    until_equal(&site).await?;
    service.until_level().await;
    // By snapshots the first start of the server, of which nothing was proven, has its own.
    let kept = if stream { 1 } else { 2 };
    assert_eq!(pinned(&site.spare).await?, kept);
    service.stop().await.ok();
    Ok(())
}

#[tokio::test]
async fn an_outgrown_older_copy_without_our_slot_is_followed_only_when_asked() -> Result<()> {
    an_older_copy_without_our_slot("lineage_no_slot", true).await
}

#[tokio::test]
async fn by_snapshots_an_outgrown_older_copy_is_followed_only_when_asked() -> Result<()> {
    an_older_copy_without_our_slot("lineage_no_stream", false).await
}

/// Restored from a dump, on the server that was followed: all rows have new numbers, and the sequences have old values.
#[tokio::test]
async fn a_database_that_was_restored_from_a_dump_is_followed_only_when_asked() -> Result<()> {
    let site = Site::builder("lineage_dump").own_stores().start().await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let service = Service::start(&site, "");
    service.until_level().await;
    let sequence = "SELECT last_value FROM origin_package_id_seq";
    let client = site.primary.conn().await?;
    let then: i64 = client.query_one(sequence, &[]).await?.get(0);
    // More than a crash takes back.
    let used = "SELECT nextval('origin_package_id_seq') FROM generate_series(1, 100)";
    client.batch_execute(used).await?;
    let spec = Spec::new("core", "newer", "1");
    let lost = factory.package(&site.primary, spec).await?;
    until_equal(&site).await?;
    service.until_level().await;
    let newer = content(&site.spare).await?;
    service.running.sigstop();
    support::packages::delete_package(&site.primary, &lost).await?;
    let rewritten = format!(
        "SET session_replication_role = replica; UPDATE origin_packages SET ident = ident; SELECT setval('origin_package_id_seq', {then})"
    );
    client.batch_execute(&rewritten).await?;
    let pg = &site.primary.pg;
    pg.stop_fast().await?;
    pg.start_again().await?;
    service.running.sigcont();
    until_conflict(&service, &["set back", "origin_package_id_seq"]).await;
    assert_eq!(content(&site.spare).await?, newer);
    service.stop().await.ok();
    Ok(())
}

/// What an honest primary does between two starts of its server raises no doubt, whatever it does.
#[tokio::test]
async fn a_primary_that_was_only_started_anew_is_copied_without_a_question() -> Result<()> {
    let site = Site::builder("lineage_honest").own_stores().start().await?;
    let mut factory = Factory::seeded();
    let packages = factory.fill(&site.primary, 3).await?;
    let client = site.primary.conn().await?;
    client
        .batch_execute(
            "CREATE TABLE emptied (id serial PRIMARY KEY, created_at timestamptz DEFAULT now()); \
             INSERT INTO emptied SELECT FROM generate_series(1, 50); \
             CREATE TABLE swapped (id int8 PRIMARY KEY, note text); INSERT INTO swapped VALUES (1, 'one'); \
             CREATE TABLE other (id int8 PRIMARY KEY, note text); INSERT INTO other VALUES (2, 'two'); \
             CREATE UNLOGGED TABLE scratch (note text)",
        )
        .await?;
    let service = Service::start(&site, "");
    service.until_level().await;
    for restarts in 1..=3 {
        let early = site.primary.conn().await?;
        early
            .batch_execute("BEGIN; INSERT INTO audit_package (origin) VALUES ('of a lower number')")
            .await?;
        let spec = Spec::new("core", "later", &restarts.to_string());
        factory.package(&site.primary, spec).await?;
        until_equal(&site).await?;
        let before = copies(&service).await?;
        service.running.sigstop();
        early.batch_execute("COMMIT").await?;
        let client = site.primary.conn().await?;
        let statements = match restarts {
            1 => {
                "DELETE FROM audit_package; UPDATE origin_packages SET hidden = NOT hidden; VACUUM FULL origin_packages"
            }
            2 => {
                "TRUNCATE emptied RESTART IDENTITY; INSERT INTO emptied DEFAULT VALUES; \
                  ALTER TABLE swapped RENAME TO old; ALTER TABLE other RENAME TO swapped; ALTER TABLE old RENAME TO other; \
                  ALTER TABLE origin_channels DROP COLUMN updated_at; ALTER TABLE audit_origin ADD COLUMN extra text DEFAULT 'was'"
            }
            _ => {
                "SELECT nextval('origin_package_id_seq') FROM generate_series(1, 40); ALTER TYPE origin_member_role RENAME VALUE 'owner' TO 'boss'"
            }
        };
        for statement in statements.split("; ") {
            client.batch_execute(statement).await?;
        }
        if restarts == 1 {
            support::packages::delete_package(&site.primary, &packages[0]).await?;
        }
        let pg = &site.primary.pg;
        match restarts {
            3 => pg.kill9(),
            _ => pg.stop_fast().await?,
        }
        pg.start_again().await?;
        service.running.sigcont();
        until_copied(&service, before).await;
        until_equal(&site).await?;
    }
    // Of what could not be proven either way the first and the last are kept.
    assert_eq!(pinned(&site.spare).await?, 2);
    service.stop().await.ok();

    // Their time is over.
    let old = "UPDATE generation SET created = created - interval '8 days' WHERE pinned";
    sql(&site.spare, "warm_spare", old).await?;
    let spec = Spec::new("core", "last", "1");
    factory.package(&site.primary, spec).await?;
    site.warm_spare(&["sync"]).await.ok();
    assert_eq!(pinned(&site.spare).await?, 0);
    Ok(())
}

/// A restored backup, an old machine that was switched on again, a name that leads elsewhere.
#[tokio::test]
async fn an_older_primary_is_not_followed() -> Result<()> {
    let pair = Pair::start("lineage_older").await?;
    let (site, back) = (&pair.there, &pair.back);
    let on_b = followed(site, "").await?;
    on_b.reconfigure(PROMOTE);
    until_primary(&on_b, 2).await;
    until_settled(&on_b).await;
    let on_a = returned(back, "").await?;
    on_b.stop().await.ok();
    let before = content(&back.spare).await?;
    sql(&site.spare, "warm_spare", "UPDATE cluster SET epoch = 1").await?;
    let slots = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active";
    sql(&site.spare, "builder", slots).await?;
    sql(
        &site.spare,
        "builder",
        "DELETE FROM audit_package; DELETE FROM origin_members",
    )
    .await?;
    let status = until_conflict(&on_a, &["older primary", "epoch 1", "epoch 2"]).await;
    assert_eq!(content(&back.spare).await?, before, "{status:#}");
    on_a.stop().await.ok();
    Ok(())
}

/// Another server answers at the primary's address.
#[tokio::test]
async fn another_server_is_followed_only_when_asked() -> Result<()> {
    let site = support::follow::prepared("lineage_other").await?;
    let other = support::follow::prepared("lineage_other_b").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    factory.fill(&other.primary, 1).await?;
    let service = followed(&site, "").await?;
    let before = content(&site.spare).await?;
    let elsewhere = |extra: &str| {
        let peer = other.primary.pg.as_peer(extra);
        format!(
            "{peer}\n[peer.s3]\nbucket_name = \"{}\"",
            other.primary.bucket
        )
    };
    service.reconfigure(&elsewhere(""));
    let status = until_conflict(&service, &["another server", "system id"]).await;
    assert_eq!(content(&site.spare).await?, before);
    service.reconfigure(&elsewhere(&approval(&status)));
    support::wait_until("it is copied", support::service::SOON, || async {
        match content(&site.spare).await? == content(&other.primary).await? {
            true => Ok(()),
            false => Err("other rows".into()),
        }
    })
    .await;
    assert_eq!(pinned(&site.spare).await?, 1);
    service.stop().await.ok();
    Ok(())
}

/// A mistyped address: production sees the primary of a staging pair that has been drilled often.
#[tokio::test]
async fn a_stranger_of_a_higher_epoch_is_neither_obeyed_nor_touched() -> Result<()> {
    let pair = Pair::start("lineage_production").await?;
    let staging = Pair::start("lineage_staging").await?;
    let strange = followed(&staging.there, "").await?;
    strange.reconfigure(PROMOTE);
    until_primary(&strange, 2).await;
    until_settled(&strange).await;

    let production = Service::start(&pair.back, PROMOTE);
    until_primary(&production, 1).await;
    production.reconfigure(&staging.there.spare.pg.as_peer(PROMOTE));
    let status = until_conflict(&production, &["another line", "system id"]).await;
    assert_eq!(status["state"], "primary", "{status:#}");
    assert_eq!(production.get("/primary").await?.status, 200);
    write(&pair.back.spare, "still the primary").await?;
    // Told to come back, it does not come back to that one.
    production.reconfigure(&staging.there.spare.pg.as_peer("role = \"spare\""));
    let status = until_conflict(&production, &["another line"]).await;
    assert_eq!(status["state"], "primary", "{status:#}");
    write(&pair.back.spare, "and again").await?;
    assert!(is_writable(&staging.there.spare).await);
    // The right address, and all is well.
    production.reconfigure(PROMOTE);
    production
        .until("no hold", |status| status["hold"].is_null())
        .await;
    production.stop().await.ok();
    strange.stop().await.ok();
    Ok(())
}

/// Restored from a copy of before our state was made, or dropped by hand.
#[tokio::test]
async fn an_old_primary_that_has_lost_its_record_is_fenced_all_the_same() -> Result<()> {
    let pair = Pair::start("lineage_lost").await?;
    let (site, back) = (&pair.there, &pair.back);
    let old = Service::start(back, PROMOTE);
    until_primary(&old, 1).await;
    let new = followed(site, "").await?;
    // Its cluster id is on record here from now on.
    old.until("a spare follows", |status| status["health"]["level"] == 0)
        .await;
    old.stop().await.ok();
    site.primary.pg.kill9();
    new.reconfigure(&forced(2));
    until_primary(&new, 2).await;
    site.primary.pg.start_again().await?;
    until_settled(&new).await;
    let lose = "ALTER DATABASE builder RESET default_transaction_read_only; DROP DATABASE warm_spare WITH (FORCE)";
    for statement in lose.split("; ") {
        sql(&site.primary, "postgres", statement).await?;
    }
    until_read_only(&site.primary).await;

    // Another cluster's record: it is told, and left alone.
    let other = "ALTER DATABASE builder RESET default_transaction_read_only";
    let record = "DELETE FROM fence; UPDATE cluster SET id = 'ffffffff', role = 'primary', epoch = 1; \
                  UPDATE lineage SET id = 'x'";
    new.running.sigstop();
    sql(&site.primary, "warm_spare", record).await?;
    sql(&site.primary, "postgres", other).await?;
    new.running.sigcont();
    let status = until_conflict(&new, &["ffffffff", "system id"]).await;
    assert_eq!(status["state"], "primary", "{status:#}");
    new.stop().await.ok();
    Ok(())
}

/// Somebody else holds our epoch: on the old primary's fence, or as a primary of it.
#[tokio::test]
async fn two_primaries_of_one_epoch_are_told_however_they_came_about() -> Result<()> {
    let pair = Pair::start("lineage_equal").await?;
    let site = &pair.there;
    let old = Service::start(&pair.back, PROMOTE);
    until_primary(&old, 1).await;
    let new = followed(site, "").await?;
    old.stop().await.ok();
    site.primary.pg.kill9();
    new.reconfigure(&forced(2));
    until_primary(&new, 2).await;
    new.stop().await.ok();
    site.primary.pg.start_again().await?;
    // As a restored state has it.
    sql(&site.primary, "warm_spare", "UPDATE cluster SET epoch = 2").await?;
    let new = Service::start(site, PROMOTE);
    let status = new.until_hold("two_primaries").await;
    assert_eq!(status["health"]["level"], 2, "{status:#}");
    new.running.sigstop();
    // A third node has fenced the old primary under the same number.
    let third = "UPDATE cluster SET epoch = 1; \
        INSERT INTO fence (epoch, by_cluster, settled, lifted) VALUES (2, 'cccccccc', true, false)";
    sql(&site.primary, "warm_spare", third).await?;
    site.primary.pg.set_fence(true).await?;
    new.running.sigcont();
    let status = new
        .until("the third node is named", |status| {
            let detail = status["hold"]["detail"].as_str().unwrap_or_default();
            detail.contains("cccccccc")
        })
        .await;
    assert_eq!(status["hold"]["reason"], "two_primaries", "{status:#}");
    new.stop().await.ok();
    Ok(())
}

/// A damaged or hostile primary must not use up the numbers.
#[tokio::test]
async fn an_epoch_out_of_all_bounds_disables_no_failover() -> Result<()> {
    let pair = Pair::start("lineage_bounds").await?;
    let site = &pair.there;
    let old = Service::start(&pair.back, PROMOTE);
    until_primary(&old, 1).await;
    let service = followed(site, "").await?;
    old.stop().await.ok();
    for epoch in [i64::MAX, 100_000] {
        let out = format!("UPDATE cluster SET epoch = {epoch}");
        sql(&site.primary, "warm_spare", &out).await?;
        let cut = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active";
        sql(&site.primary, "builder", cut).await?;
        let status = until_conflict(&service, &[&epoch.to_string(), "not believed"]).await;
        assert_eq!(status["role"]["next_epoch"], 2, "{status:#}");
    }
    // It answers, and cannot be fenced under that number.
    service.reconfigure(&forced(2));
    until_primary(&service, 2).await;
    write(&site.spare, "promoted").await?;
    service.stop().await.ok();
    Ok(())
}

/// dc2 was promoted by force; its database is then restored from a time before, with the old consent still applied.
#[tokio::test]
async fn a_consent_to_an_epoch_is_used_once() -> Result<()> {
    for lose_data in [false, true] {
        let pair = Pair::start("lineage_consent").await?;
        let (site, back) = (&pair.there, &pair.back);
        let on_b = followed(site, "").await?;
        on_b.stop().await.ok();
        let b = &site.spare.pg;
        b.stop_fast().await?;
        b.keep_data().await?;
        b.start_again().await?;
        let on_b = followed(site, "").await?;
        site.primary.pg.kill9();
        on_b.reconfigure(&forced(2));
        until_primary(&on_b, 2).await;
        site.primary.pg.start_again().await?;
        until_settled(&on_b).await;
        for name in ["one", "two"] {
            write(&site.spare, name).await?;
        }
        let on_a = returned(back, "").await?;
        until_equal(back).await?;
        let newest = content(&back.spare).await?;

        on_b.running.signal(rustix::process::Signal::KILL);
        b.stop_fast().await?;
        b.restore_data().await?;
        b.start_again().await?;
        if lose_data {
            // The whole node was lost; its bucket, and the peer, still know better.
            std::fs::remove_dir_all(warm_spare::config::data_dir(&site.config_file()))?;
        }
        let on_b = on_b.start_again();
        let status = on_b
            .until("the state went back", |status| {
                let codes = status["health"]["reasons"].as_array().cloned();
                let codes = codes.unwrap_or_default();
                codes
                    .iter()
                    .any(|reason| reason["code"] == "state_went_back")
            })
            .await;
        assert_eq!(status["role"]["actual"], "spare", "{status:#}");
        assert_eq!(status["role"]["next_epoch"], 3, "{status:#}");
        until_conflict_or_held(&on_b).await;
        assert!(!is_writable(&site.spare).await, "promoted once more");
        // dc1 has the newest rows, and keeps them.
        assert_eq!(content(&back.spare).await?, newest);
        assert!(events(&on_a.status().await?, "gap").is_empty());
        // The operator decides: dc1 it is.
        on_a.reconfigure(&forced(3));
        until_primary(&on_a, 3).await;
        assert!(is_writable(&back.spare).await);
        on_a.stop().await.ok();
        on_b.stop().await.ok();
    }
    Ok(())
}

async fn until_conflict_or_held(service: &Service<'_>) {
    service
        .until("it is held", |status| {
            let reason = status["hold"]["reason"].as_str().unwrap_or_default();
            matches!(reason, "conflict" | "force_needed")
        })
        .await;
}

/// A primary whose own state was set back sees a spare that knows of its later life.
#[tokio::test]
async fn a_primary_whose_state_was_set_back_says_so() -> Result<()> {
    let pair = Pair::start("lineage_primary_back").await?;
    let (site, back) = (&pair.there, &pair.back);
    let on_b = followed(site, "").await?;
    on_b.reconfigure(PROMOTE);
    until_primary(&on_b, 2).await;
    until_settled(&on_b).await;
    let on_a = returned(back, "").await?;
    on_b.stop().await.ok();
    sql(
        &back.spare,
        "warm_spare",
        "UPDATE cluster SET epoch = 4; UPDATE lineage SET epoch = 4, id = 'later' WHERE epoch = 2",
    )
    .await?;
    let on_b = Service::start(site, PROMOTE);
    let status = until_conflict(&on_b, &["set back", "epoch 4", "epoch 2"]).await;
    assert_eq!(status["state"], "primary", "{status:#}");
    on_a.stop().await.ok();
    on_b.stop().await.ok();
    Ok(())
}
