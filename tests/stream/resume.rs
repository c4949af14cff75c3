//! Whatever makes following impossible is noticed, and a new baseline closes the gap: nothing is lost without a word.

use support::follow::{
    audit, copies, logical, prepare, prepared, slot, until_closed, until_copied, until_equal,
    until_following,
};
use support::packages::{insert, put};
use support::service::{SOON, approval, until_conflict};
use support::{Factory, Result, Service, Site, Spec, content, slots, wait_until};

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_was_dropped_made_anew_or_moved_is_noticed() -> Result<()> {
    let site = prepared("slots").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = Service::start(&site, "");
    until_following(&service).await;

    let before = copies(&service).await?;
    assert!(slots::drop_slot(&site.primary, slots::ANY).await?);
    audit(&site, "without a slot").await?;
    until_closed(&service, "is gone", before).await?;

    // Made anew while nobody looks: its start is past what the spare has, and what lies between is in neither.
    let again = stopped(service).await;
    audit(&site, "between").await?;
    assert!(slots::make_anew(&site.primary, slots::ANY).await?);
    let service = again();
    until_closed(&service, "created again or moved by hand", 0).await?;

    let again = stopped(service).await;
    audit(&site, "skipped").await?;
    assert!(slots::advance(&site.primary, slots::ANY).await?);
    let service = again();
    until_closed(&service, "created again or moved by hand", 0).await?;
    audit(&site, "after").await?;
    until_equal(&site).await?;
    assert_eq!(copies(&service).await?, 1);
    Ok(())
}

/// How to start it again.
async fn stopped<'a>(service: Service<'a>) -> impl FnOnce() -> Service<'a> {
    let Service {
        site,
        port,
        running,
    } = service;
    running.terminate();
    running.wait(SOON).await.expect("it ends").ok();
    move || Service {
        site,
        port,
        running: site.spawn(&["run"]),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_published_any_more_is_noticed() -> Result<()> {
    let site = prepared("published").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    let client = site.primary.conn().await?;
    let name: String = client
        .query_one("SELECT pubname::text FROM pg_publication", &[])
        .await?
        .get(0);
    let taken_out = format!("ALTER PUBLICATION {name} DROP TABLE audit_package");
    let before = copies(&service).await?;
    client.batch_execute(&taken_out).await?;
    until_closed(&service, "audit_package is not in the publication", before).await?;

    // With a row that the stream does not bring, the comparison of rows may be the first to see it.
    client.batch_execute(&taken_out).await?;
    audit(&site, "not published").await?;
    until_closed(&service, "audit_package", before + 1).await?;

    // Whole copies go on without one, and say what would change it.
    let before = copies(&service).await?;
    client
        .batch_execute(&format!("DROP PUBLICATION {name}"))
        .await?;
    audit(&site, "no publication").await?;
    let status = service
        .until("whole copies", |status| {
            status["replication"]["mode"] == "snapshot"
        })
        .await;
    let reason = status["replication"]["reason"].as_str().unwrap_or_default();
    assert!(
        reason.contains("no publication") && reason.contains("warm-spare prepare"),
        "{reason}"
    );
    until_equal(&site).await?;
    until_copied(&service, before).await;
    assert_eq!(slot(&site).await?, None, "what nobody reads holds nothing");
    site.warm_spare(&["prepare"]).await.ok();
    until_following(&service).await;
    audit(&site, "published again").await?;
    until_equal(&site).await
}

/// The older copy has outgrown the spare before anybody looks: no position tells it from the right one.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_that_has_outgrown_the_spare_is_noticed() -> Result<()> {
    let site = prepared("outgrown").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    let pg = &site.primary.pg;
    pg.stop_fast().await?;
    pg.keep_data().await?;
    pg.start_again().await?;
    until_following(&service).await;
    audit(&site, "lost too").await?;
    until_equal(&site).await?;
    let before = copies(&service).await?;
    service.running.sigstop();
    pg.stop_fast().await?;
    pg.restore_data().await?;
    pg.start_again().await?;
    site.primary
        .conn()
        .await?
        .batch_execute("SELECT pg_switch_wal()")
        .await?;
    audit(&site, "another history").await?;
    let newer = content(&site.spare).await?;
    service.running.sigcont();
    let status = until_conflict(&service, &["set back to an older copy"]).await;
    assert_eq!(content(&site.spare).await?, newer);
    service.reconfigure(&approval(&status));
    until_closed(&service, "set back to an older copy", before).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spare_set_back_to_an_older_copy_is_noticed() -> Result<()> {
    let site = prepared("spare_back").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    let again = stopped(service).await;
    let pg = &site.spare.pg;
    pg.stop_fast().await?;
    pg.keep_data().await?;
    pg.start_again().await?;
    let service = again();
    until_following(&service).await;
    audit(&site, "lost with the spare").await?;
    until_equal(&site).await?;
    // Until the slot is past the older copy, nothing is lost by it.
    let reached = site.spare.conn().await?;
    let sql = "SELECT coalesce(mark, lsn)::text FROM warm_spare.recovery_point";
    let point: String = reached.query_one(sql, &[]).await?.get(0);
    wait_until("the slot moves", SOON, || async {
        let sql = "SELECT confirmed_flush_lsn >= $1::text::pg_lsn FROM pg_replication_slots";
        let row = site.primary.conn().await?.query_one(sql, &[&point]).await?;
        row.get::<_, bool>(0).then_some(()).ok_or("not yet".into())
    })
    .await;
    let before = copies(&service).await?;
    pg.stop_fast().await?;
    pg.restore_data().await?;
    pg.start_again().await?;
    until_closed(&service, "past the spare", before).await
}

/// The one that was asleep gives up when it wakes, and what it had in its hands comes once.
#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_wakes_up_writes_nothing() -> Result<()> {
    let primary = logical().setting("wal_sender_timeout", "3s");
    let site = Site::builder("asleep").primary(primary).own_stores();
    let site = site.start().await?;
    prepare(&site).await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 1).await?;
    let asleep = Service::start(&site, "");
    until_following(&asleep).await;
    let waking = asleep.beside("");
    waking.until_state("standby").await;

    let late = factory.make(Spec::new("core", "late", "1"));
    put(&site.primary, &late).await?;
    site.primary.minio.sigstop();
    insert(&site.primary, &late).await?;
    audit(&site, "once").await?;
    asleep
        .until("the gate waits", |status| {
            status["replication"]["gate_waiting"].as_u64() >= Some(1)
        })
        .await;
    asleep.running.sigstop();
    // Its lock goes with its session; the one that applies stays.
    let admin = site.spare.pg.conn("warm_spare").await?;
    let end =
        "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted
                 AND database = (SELECT oid FROM pg_database WHERE datname = 'warm_spare')";
    admin.batch_execute(end).await?;
    site.primary.minio.sigcont();
    until_equal(&site).await?;
    until_following(&waking).await;
    asleep.running.sigcont();
    asleep.until_state("standby").await;
    audit(&site, "after").await?;
    until_equal(&site).await?;
    let said = waking.running.last_said(30);
    assert_eq!(copies(&waking).await?, 0, "no new baseline: {said:#?}");
    Ok(())
}

/// A holder that was frozen in the middle of a commit keeps its lock on the recovery point. Nobody waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_sleeps_over_the_recovery_point_is_ended() -> Result<()> {
    let site = prepared("over_it").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    let again = stopped(service).await;
    let asleep = site.spare.conn().await?;
    let sql = "BEGIN READ WRITE; UPDATE warm_spare.recovery_point SET token = token";
    asleep.batch_execute(sql).await?;
    audit(&site, "past it").await?;
    let service = again();
    until_following(&service).await;
    until_equal(&site).await?;
    assert!(asleep.batch_execute("COMMIT").await.is_err());
    Ok(())
}

/// Another holder's token stands beside the recovery point: what is about to be committed is not.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_under_another_holders_token_fails() -> Result<()> {
    let site = prepared("token").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let mut service = Service::start(&site, "");
    until_following(&service).await;
    let sql =
        "SET transaction_read_only = off; UPDATE warm_spare.recovery_point SET token = token + 1";
    service.running.forget();
    site.spare.conn().await?.batch_execute(sql).await?;
    audit(&site, "once").await?;
    service
        .running
        .wait_for_line(|line| line.contains("another warm-spare has taken o"), SOON)
        .await?;
    until_equal(&site).await
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_its_most_delicate_points_it_applies_everything_once() -> Result<()> {
    let site = prepared("killed").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 1).await?;
    for point in ["slot.after_copy", "switch.before_commit"] {
        killed_at(&site, point, "").await?;
    }
    let service = Service::start(&site, "");
    until_following(&service).await;
    service.stop().await.ok();
    for point in [
        "apply.before_flush",
        "apply.before_commit",
        "apply.after_commit",
    ] {
        factory
            .package(&site.primary, Spec::new("core", "killed", point))
            .await?;
        killed_at(&site, point, point).await?;
    }
    much_log_of_nothing(&site).await?;
    killed_at(&site, "confirm.before_commit", "").await?;
    let service = Service::start(&site, "");
    until_equal(&site).await?;
    until_following(&service).await;
    assert_eq!(copies(&service).await?, 0, "no new baseline");
    let sql = "SELECT count(*) FROM pg_replication_slots";
    let slots: i64 = site.primary.conn().await?.query_one(sql, &[]).await?.get(0);
    assert_eq!(slots, 1, "a killed baseline leaves none behind");
    Ok(())
}

/// Waits until the point was moved over what held nothing, so that no transaction proves the history.
async fn until_unmarked(site: &Site) -> Result<()> {
    much_log_of_nothing(site).await?;
    wait_until("the point bears no mark", SOON, || async {
        let sql = "SELECT mark IS NULL FROM warm_spare.recovery_point";
        let row = site.spare.conn().await?.query_one(sql, &[]).await?;
        row.get::<_, bool>(0).then_some(()).ok_or("marked".into())
    })
    .await;
    Ok(())
}

/// What the spare shows of both histories: rows of the one and of the other, and how far a sequence is.
async fn shown(site: &Site) -> Result<(bool, bool, i64)> {
    let sql = "SELECT coalesce(bool_or(package_ident = 'lost'), false), coalesce(bool_or(package_ident = 'other'), false),
                 (SELECT coalesce(last_value, 0) FROM pg_sequences WHERE sequencename = 'counted')
               FROM audit_package";
    let row = site.spare.conn().await?.query_one(sql, &[]).await?;
    Ok((row.get(0), row.get(1), row.get(2)))
}

/// More waits than the spare may lay down while it compares: what is there is looked at all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_history_that_is_too_long_to_be_compared_is_not_simply_copied() -> Result<()> {
    let site = prepared("too_long").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let limit = "[replication]\nwal_hold_limit = \"4MB\"\n";
    let service = Service::start(&site, "");
    until_following(&service).await;
    let pg = &site.primary.pg;
    pg.stop_fast().await?;
    pg.keep_data().await?;
    pg.start_again().await?;
    until_following(&service).await;
    audit(&site, "lost").await?;
    until_unmarked(&site).await?;
    let newer = content(&site.spare).await?;
    service.stop().await.ok();
    pg.stop_fast().await?;
    pg.restore_data().await?;
    pg.start_again().await?;
    let builder = site.primary.conn().await?;
    for _ in 0..12 {
        audit(&site, "other").await?;
        builder.batch_execute("SELECT pg_switch_wal()").await?;
    }
    let much = "INSERT INTO audit_package (origin) SELECT repeat(md5(n::text), 20) FROM generate_series(1, 50000) n";
    builder.batch_execute(much).await?;
    let before = copies_ever(&site).await?;
    // The comparison waits here until more has come than may be laid down.
    let here = site.spare.conn().await?;
    here.batch_execute("BEGIN; LOCK TABLE accounts IN ACCESS EXCLUSIVE MODE")
        .await?;
    let service = Service::start(&site, limit);
    service
        .until("the proof is given up", |status| {
            let gaps = support::follow::gaps(status);
            gaps.iter().any(|text| text.contains("cannot be proven"))
        })
        .await;
    here.batch_execute("ROLLBACK").await?;
    let status = until_conflict(&service, &["are on the primary but not here"]).await;
    assert_eq!(content(&site.spare).await?, newer);
    assert_eq!(copies_ever(&site).await?, before);
    service.reconfigure(&format!("{limit}{}", approval(&status)));
    until_equal(&site).await?;
    service.stop().await.ok();
    Ok(())
}

/// Databases that were replaced, and are kept.
async fn copies_ever(site: &Site) -> Result<usize> {
    let sql = "SELECT FROM pg_database WHERE datname LIKE 'builder\\_%'";
    Ok(site.spare.conn().await?.query(sql, &[]).await?.len())
}

/// Where no transaction proves the history, nothing of it leaves a trace before it is compared.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_mark_nothing_is_applied_before_the_history_is_proven() -> Result<()> {
    let site = prepared("unproven").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let builder = site.primary.conn().await?;
    builder.batch_execute("CREATE SEQUENCE counted").await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    let pg = &site.primary.pg;
    pg.stop_fast().await?;
    pg.keep_data().await?;
    pg.start_again().await?;
    until_following(&service).await;
    audit(&site, "lost").await?;
    let builder = site.primary.conn().await?;
    builder
        .batch_execute("SELECT setval('counted', 100)")
        .await?;
    until_unmarked(&site).await?;
    wait_until("the sequence is there", SOON, || async {
        let found = shown(&site).await?;
        (found == (true, false, 100))
            .then_some(())
            .ok_or_else(|| format!("{found:?}").into())
    })
    .await;
    let again = stopped(service).await;
    pg.stop_fast().await?;
    pg.restore_data().await?;
    pg.start_again().await?;
    let builder = site.primary.conn().await?;
    for _ in 0..12 {
        audit(&site, "other").await?;
        builder.batch_execute("SELECT pg_switch_wal()").await?;
    }
    // The comparison waits here, and whoever does not wait for it is seen.
    builder
        .batch_execute("BEGIN; LOCK TABLE accounts IN ACCESS EXCLUSIVE MODE")
        .await?;
    let service = again();
    wait_until("the rows are being compared", SOON, || async {
        let sql = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'warm-spare' AND wait_event_type = 'Lock'";
        let client = pg.conn("postgres").await?;
        let found = client.query_opt(sql, &[]).await?;
        found.map(|_| ()).ok_or_else(|| "nobody waits".into())
    })
    .await;
    for _ in 0..20 {
        assert_eq!(
            shown(&site).await?,
            (true, false, 100),
            "a trace of another history"
        );
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    builder.batch_execute("COMMIT").await?;
    wait_until("it is noticed", SOON, || async {
        let found = shown(&site).await?;
        assert!(!(found.0 && found.1), "both histories at once");
        let told = service.status().await?.to_string();
        let told = told.contains("set back to an older copy");
        told.then_some(())
            .ok_or_else(|| format!("{found:?}").into())
    })
    .await;
    Ok(())
}

/// An ordinary restart of a quiet primary, whose store comes back later: its tables are read once.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_mark_a_restart_is_compared_once_while_the_gate_waits() -> Result<()> {
    let site = Site::builder("compared_once")
        .primary(logical())
        .own_stores();
    let site = site.start().await?;
    prepare(&site).await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 1).await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    until_unmarked(&site).await?;
    let pg = &site.primary.pg;
    site.primary.minio.sigstop();
    pg.stop_fast().await?;
    pg.start_again().await?;
    let late = factory.make(Spec::new("core", "late", "1"));
    insert(&site.primary, &late).await?;
    service
        .until("the gate waits", |status| {
            status["replication"]["gate_waiting"].as_u64() >= Some(1)
        })
        .await;
    // Once is enough: what it found does not change by waiting.
    let compared = "the rows of both sides are the same";
    wait_until(
        "the comparison ends",
        std::time::Duration::from_secs(20),
        || async {
            let lines = service.running.stderr();
            let ended = lines.iter().any(|line| line.contains(compared));
            ended.then_some(()).ok_or("not yet".into())
        },
    )
    .await;
    site.primary.minio.sigcont();
    put(&site.primary, &late).await?;
    until_equal(&site).await?;
    until_following(&service).await;
    let lines = service.running.stderr();
    let times = lines.iter().filter(|line| line.contains(compared)).count();
    assert_eq!(times, 1, "compared {times} times");
    assert_eq!(copies(&service).await?, 1, "no new baseline");
    Ok(())
}

/// The primary fails over to its own standby: while that is in recovery it is waited for, and then one copy is enough.
#[tokio::test(flavor = "multi_thread")]
async fn a_failover_of_the_primary_to_its_standby_costs_one_copy() -> Result<()> {
    let site = prepared("standby").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    let pg = &site.primary.pg;
    let standby = pg.standby().await?;
    // So much that the checkpoint after the promotion takes its time.
    let many = "INSERT INTO audit_package (operation, trigger, requester_id, requester_name, origin, channel, package_ident)
                SELECT 'promote', 'hab_client', 1, 'me', 'core', 'stable', repeat(md5(n::text), 20) FROM generate_series(1, 6000) n";
    site.primary.conn().await?.batch_execute(many).await?;
    until_equal(&site).await?;
    wait_until("the standby has it", SOON, || async {
        let sql = "SELECT count(*) FROM audit_package";
        let row = standby.conn("builder").await?.query_one(sql, &[]).await?;
        (row.get::<_, i64>(0) >= 6000)
            .then_some(())
            .ok_or("not yet".into())
    })
    .await;
    pg.kill9();
    let moved = format!("[peer.datastore]\nport = {}\n", standby.port());
    service.reconfigure(&moved);
    let status = service
        .until("it is known as a standby", |status| {
            let detail = status["hold"]["detail"].as_str().unwrap_or_default();
            detail.contains("physical standby")
        })
        .await;
    assert_eq!(status["health"]["level"], 1, "it may pass: {status:#}");
    standby.promote().await?;
    let control = "SELECT timeline_id FROM pg_control_checkpoint()";
    let client = standby.conn("builder").await?;
    let timeline: i32 = client.query_one(control, &[]).await?.get(0);
    assert_eq!(timeline, 1, "the checkpoint was too fast for this test");
    until_copied(&service, 1).await;
    service.until_level().await;
    client.batch_execute("CHECKPOINT").await?;
    let timeline: i32 = client.query_one(control, &[]).await?.get(0);
    assert_eq!(timeline, 2);
    // The line is cut, so that all is asked anew.
    client.batch_execute(END_READERS).await?;
    let sql = "INSERT INTO accounts (name, email) VALUES ('after', 'after')";
    client.batch_execute(sql).await?;
    wait_until("it is followed", SOON, || async {
        let sql = "SELECT 1 FROM accounts WHERE name = 'after'";
        let row = site.spare.conn().await?.query_opt(sql, &[]).await?;
        row.map(|_| ()).ok_or_else(|| "not yet".into())
    })
    .await;
    assert_eq!(copies(&service).await?, 2, "one copy for one failover");
    Ok(())
}

const END_READERS: &str =
    "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active";

/// More than an idle primary is left to hold for us.
async fn much_log_of_nothing(site: &Site) -> Result<()> {
    let client = site.primary.conn().await?;
    for _ in 0..6 {
        let message = "SELECT pg_logical_emit_message(false, 'test', 'a new segment is begun')";
        client.batch_execute(message).await?;
        client.batch_execute("SELECT pg_switch_wal()").await?;
    }
    Ok(())
}

/// Runs until it dies there, with something to apply.
async fn killed_at(site: &Site, point: &str, line: &str) -> Result<()> {
    if !line.is_empty() {
        audit(site, line).await?;
    }
    let dead = Service::doomed(site, "", point).dead().await;
    Ok(dead.map_err(|error| format!("{point}: {error}"))?)
}
