//! Would a promotion work today? Every reason against it is named, and a primary that is gone is none against a failover.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use bytes::Bytes;
use serde_json::Value;
use strum::VariantArray;
use support::builder_keys::BuilderKey;
use support::follow::{prepared, tamper};
use support::pair::{PROMOTE, is_writable, lost, until_primary, until_settled, write};
use support::{Factory, Output, Package, Result, Service, Site, site};
use warm_spare::domain::PreflightCheck;

const USED: &str = "20240101000000";
const NEWER: &str = "20260101000000";

fn keys_dir(site: &Site) -> PathBuf {
    site.dir.path().join("keys")
}

/// The configuration of all these tests, with `extra` added.
fn configure(site: &Site, extra: &str) {
    let keys = keys_dir(site);
    site.write_config(&format!(
        "{extra}\n[local]\nbuilder_keys_dir = {:?}\n",
        keys.display().to_string()
    ));
}

/// A spare of ten packages, followed by a slot, and its builder key.
async fn spare(name: &str) -> Result<(Site, BuilderKey)> {
    let site = prepared(name).await?;
    Factory::seeded().fill(&site.primary, 10).await?;
    let key = BuilderKey::new(USED);
    key.seal_all(&site.primary).await?;
    key.write(&keys_dir(&site))?;
    configure(&site, "");
    site.warm_spare(&["sync"]).await.ok();
    Ok((site, key))
}

async fn ask(site: &Site, purpose: &str) -> Output {
    site.warm_spare(&["--json", "preflight", "--for", purpose])
        .await
}

/// What was found for the purpose; the exit code must say the same.
async fn preflight(site: &Site, purpose: &str) -> Value {
    let output = ask(site, purpose).await;
    let json = output.json();
    let refused = json["result"] == "refuse";
    assert_eq!(output.code, Some(i32::from(refused)), "{output}");
    assert_eq!(json["for"], purpose);
    let made = json["checks"].as_array().expect("checks").len();
    assert_eq!(made, PreflightCheck::VARIANTS.len());
    json
}

fn check<'a>(found: &'a Value, name: &str) -> (&'a str, &'a str) {
    let checks = found["checks"].as_array().expect("checks");
    let check = checks.iter().find(|check| check["name"] == name);
    let check = check.unwrap_or_else(|| panic!("{name}: {found:#}"));
    let text = |key: &str| check[key].as_str().expect("a text");
    (text("result"), text("reason"))
}

#[track_caller]
fn assert_check(found: &Value, name: &str, result: &str, word: &str) {
    let (actual, reason) = check(found, name);
    assert!(
        actual == result && reason.contains(word),
        "{name}: {found:#}"
    );
}

fn refused(found: &Value) -> Vec<&str> {
    let checks = found["checks"].as_array().expect("checks").iter();
    let refused = checks.filter(|check| check["result"] == "refuse");
    refused.filter_map(|check| check["name"].as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_spare_may_be_promoted_and_each_key_that_is_wrong_is_named() -> Result<()> {
    let (site, key) = spare("preflight_keys").await?;
    for purpose in ["planned", "unplanned"] {
        let found = preflight(&site, purpose).await;
        assert_eq!(refused(&found), [""; 0], "{found:#}");
        assert_check(&found, "builder_keys", "ok", USED);
        assert_check(&found, "mode", "ok", "stream");
        assert_check(&found, "verification", "warn", "never");
        assert_check(&found, "fence", "ok", "holds here; the peer is open");
        assert_check(&found, "clocks", "ok", "newest id");
    }
    let text = site.warm_spare(&["preflight"]).await.ok().stdout;
    println!("{text}");
    let warned: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("warn    "))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    // The machine's own disk may be nearly full.
    let of_the_spare: Vec<&&str> = warned.iter().filter(|name| **name != "disk").collect();
    assert_eq!(of_the_spare, [&"verification"], "{text}");
    let last = match warned.len() {
        1 => "planned: warn (1 warning)".to_owned(),
        number => format!("planned: warn ({number} warnings)"),
    };
    assert_eq!(text.lines().last(), Some(last.as_str()), "{text}");

    let mut took = Vec::new();
    for _ in 0..5 {
        took.push(ask(&site, "planned").await.took);
    }
    println!("preflight took {took:?}");

    let other = BuilderKey::new(NEWER);
    other.write(&keys_dir(&site))?;
    let found = preflight(&site, "unplanned").await;
    assert_check(
        &found,
        "builder_keys",
        "warn",
        "newer than any key that the primary uses",
    );
    other.remove(&keys_dir(&site))?;
    BuilderKey::new(USED).write(&keys_dir(&site))?;
    let found = preflight(&site, "unplanned").await;
    assert_check(
        &found,
        "builder_keys",
        "refuse",
        "is not the key of that name that sealed it",
    );
    key.remove(&keys_dir(&site))?;
    other.write(&keys_dir(&site))?;
    let found = preflight(&site, "unplanned").await;
    assert_check(&found, "builder_keys", "refuse", "is missing");
    other.remove(&keys_dir(&site))?;
    let found = preflight(&site, "unplanned").await;
    assert_check(&found, "builder_keys", "refuse", "no builder key is in");
    site.write_config("[local]\nbuilder_keys_dir = \"\"");
    let found = preflight(&site, "unplanned").await;
    assert_check(&found, "builder_keys", "warn", "not on this node");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lowered_fence_a_lost_bucket_and_a_silent_peer_are_each_named() -> Result<()> {
    let (site, _) = spare("preflight_faults").await?;
    configure(&site, "[local.s3]\nbucket_name = \"nowhere\"");
    let found = preflight(&site, "unplanned").await;
    assert_eq!(refused(&found), ["bucket"], "{found:#}");
    configure(&site, "");

    site.spare.pg.set_fence(false).await?;
    let found = preflight(&site, "planned").await;
    assert_eq!(refused(&found), ["fence"], "{found:#}");
    let found = preflight(&site, "unplanned").await;
    assert_check(&found, "fence", "warn", "its fence is down");
    site.spare.pg.set_fence(true).await?;

    let primary = site.primary.conn().await?;
    let drop_slot = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots";
    primary.batch_execute(drop_slot).await?;
    drop(primary);
    let found = preflight(&site, "planned").await;
    assert_eq!(refused(&found), ["wal"], "{found:#}");

    site.primary.pg.stop_fast().await?;
    let found = preflight(&site, "planned").await;
    assert_check(&found, "peer_reachable", "refuse", "peer datastore");
    let found = preflight(&site, "unplanned").await;
    assert_eq!(refused(&found), [""; 0], "{found:#}");
    assert_check(&found, "peer_reachable", "warn", "peer datastore");

    let admin = site.spare.pg.conn("postgres").await?;
    admin
        .batch_execute("ALTER DATABASE builder RENAME TO mine")
        .await?;
    let found = preflight(&site, "unplanned").await;
    assert_check(&found, "recovery_point", "refuse", "builder");
    drop(admin);
    site.spare.pg.stop_fast().await?;
    let output = ask(&site, "unplanned").await;
    assert_eq!(output.code, Some(3), "{output}");
    assert_eq!(output.json()["error"]["exit_code"], 3);
    Ok(())
}

/// As our own database on the spare would have it.
async fn remember(site: &Site, sql: &str) -> Result<()> {
    let state = site.spare.pg.conn("warm_spare").await?;
    Ok(state.batch_execute(sql).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_old_different_or_lacking_is_told_with_its_figure() -> Result<()> {
    let (site, _) = spare("preflight_figures").await?;
    let verified = |age: &str, differences: u32| {
        format!(
            "INSERT INTO verification (time, deep, differences, lsn) VALUES (now() - interval '{age}', false, {differences}, '')"
        )
    };
    remember(&site, &verified("3 days", 0)).await?;
    let found = preflight(&site, "planned").await;
    assert_check(&found, "verification", "warn", "3 d 0 h ago");
    remember(&site, &verified("1 hour", 2)).await?;
    let lack = "INSERT INTO warm_spare.unavailable (key, checksum, reason) VALUES ('core/a', '', 'missing')";
    tamper(&site, lack).await?;
    let late =
        "INSERT INTO confirmation (time, clock_offset) VALUES (now() - interval '1 hour', 0)";
    remember(&site, late).await?;
    // An id of a year to come: a clock was wrong once, and nobody goes on from there.
    tamper(
        &site,
        "INSERT INTO accounts (id, name) VALUES ((900000000000::int8 << 23), 'later')",
    )
    .await?;
    let found = preflight(&site, "planned").await;
    assert_eq!(refused(&found), ["lag", "verification"], "{found:#}");
    assert_check(&found, "verification", "refuse", "2 differences");
    assert_check(&found, "lag", "refuse", "over rpo");
    assert_check(
        &found,
        "artifacts",
        "warn",
        "1 are missing or damaged on the primary, such as core/a",
    );
    assert_check(&found, "clocks", "warn", "of a time in the future (2043-");
    assert_check(&found, "read_only_time", "warn", "60 min");

    site.primary.pg.sigstop();
    let begun = std::time::Instant::now();
    let found = preflight(&site, "unplanned").await;
    site.primary.pg.sigcont();
    assert!(begun.elapsed().as_secs() < 8, "{:?}", begun.elapsed());
    assert_eq!(refused(&found), [""; 0], "{found:#}");
    assert_check(&found, "peer_reachable", "warn", "no answer within 5s");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_never_copied_may_not_be_promoted_and_a_whole_copy_may() -> Result<()> {
    let site = site("preflight_nothing").await;
    BuilderKey::new(USED).write(&keys_dir(&site))?;
    configure(&site, "");
    let found = preflight(&site, "unplanned").await;
    assert_eq!(refused(&found), ["recovery_point"], "{found:#}");
    assert_check(
        &found,
        "recovery_point",
        "refuse",
        "nothing has been copied",
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_that_is_no_superuser_is_told_what_it_lacks_to_fence_and_fences_when_it_may()
-> Result<()> {
    let (site, _) = spare("preflight_steward").await?;
    let steward = "[peer.datastore]\nuser = \"steward\"\npassword = \"looks after it\"";
    configure(&site, steward);
    let primary = site.primary.conn().await?;
    let sql = "CREATE ROLE steward LOGIN REPLICATION PASSWORD 'looks after it';
               GRANT SELECT ON ALL TABLES IN SCHEMA public TO steward;
               GRANT SELECT ON ALL SEQUENCES IN SCHEMA public TO steward";
    primary.batch_execute(sql).await?;
    let found = preflight(&site, "planned").await;
    assert_eq!(refused(&found), ["privileges"], "{found:#}");
    for lacks in [
        "may not create databases",
        "pg_signal_backend",
        "pg_read_all_stats",
        "does not own database builder",
    ] {
        assert_check(&found, "privileges", "refuse", lacks);
    }
    let sql = "ALTER ROLE steward CREATEDB; GRANT pg_signal_backend, pg_read_all_stats TO steward;
               ALTER DATABASE builder OWNER TO steward";
    primary.batch_execute(sql).await?;
    // As another user's warm-spare would have left it.
    site.primary.pg.create_database("warm_spare").await?;
    let found = preflight(&site, "planned").await;
    assert_check(
        &found,
        "privileges",
        "refuse",
        "does not own database warm_spare",
    );
    primary.batch_execute("DROP DATABASE warm_spare").await?;
    let sql = "CREATE ROLE app; ALTER ROLE app SET default_transaction_read_only = false";
    primary.batch_execute(sql).await?;
    let found = preflight(&site, "planned").await;
    assert_check(&found, "fence", "refuse", "role app has");
    primary
        .batch_execute("ALTER ROLE app RESET default_transaction_read_only")
        .await?;
    // Ours, which is a superuser's.
    let found = preflight(&site, "planned").await;
    assert_eq!(refused(&found), ["fence"], "{found:#}");
    assert_check(
        &found,
        "fence",
        "refuse",
        "1 sessions there belong to a superuser",
    );

    // What it is to take away in the end is its own too.
    let sql = "SELECT pubname::text FROM pg_publication";
    let publication: String = primary.query_one(sql, &[]).await?.get(0);
    let sql = format!(
        "ALTER PUBLICATION {publication} OWNER TO steward; GRANT pg_read_all_settings TO steward"
    );
    primary.batch_execute(&sql).await?;
    site.warm_spare(&["sync"]).await.ok();
    write(&site.primary, "acknowledged").await?;
    drop(primary);
    let service = Service::start(&site, &format!("{PROMOTE}\n{steward}"));
    until_primary(&service, 2).await;
    until_settled(&service).await;
    assert!(!is_writable(&site.primary).await);
    let acknowledged = BTreeMap::from([("acknowledged".to_string(), 0)]);
    assert_eq!(lost(&site.spare, &acknowledged).await?, [""; 0]);
    service.stop().await.ok();
    Ok(())
}

/// Chance chooses what is looked for; what was once found to be absent is not left to it.
#[tokio::test]
async fn an_artifact_that_was_found_to_be_absent_stays_known() -> Result<()> {
    let site = Site::builder("preflight_absent")
        .own_stores()
        .start()
        .await?;
    let packages = Factory::seeded().fill(&site.primary, 120).await?;
    site.write_config("");
    site.warm_spare(&["sync"]).await.ok();
    // Half of the artifacts, but none of those at either end, which are looked for each time.
    let sql = "SELECT ident || ' ' || target FROM origin_packages ORDER BY id OFFSET 30 LIMIT 60";
    let rows = site.spare.conn().await?.query(sql, &[]).await?;
    let inner: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
    let mut lost: Vec<(&Package, Bytes)> = Vec::new();
    for package in &packages {
        if inner.contains(&format!("{} {}", package.ident, package.target)) {
            let bytes = site.spare.get(&package.key).await?;
            lost.push((package, bytes.expect("it was copied")));
            site.spare.delete(&package.key).await?;
        }
    }
    let found = async || {
        let json = ask(&site, "unplanned").await.json();
        let (result, text) = check(&json, "artifacts");
        (result.to_string(), text.to_string())
    };
    let (result, text) = found().await;
    assert_eq!(result, "refuse", "{text}");
    // All are put back but one, which alone is rarely among the chosen ones.
    let known = lost
        .iter()
        .position(|(package, _)| text.ends_with(&package.key));
    let (absent, bytes) = lost.swap_remove(known.unwrap_or_else(|| panic!("{text}")));
    for (package, bytes) in lost {
        site.spare.put(&package.key, bytes).await?;
    }
    for _ in 0..8 {
        let (result, text) = found().await;
        assert_eq!(result, "refuse");
        assert!(
            text.starts_with("1 of ") && text.ends_with(&absent.key),
            "{text}"
        );
    }
    site.spare.put(&absent.key, bytes).await?;
    assert_eq!(found().await.0, "ok");
    Ok(())
}

/// What is absent, and is named by no row any more, is not looked for any more.
#[tokio::test]
async fn an_absent_artifact_is_forgotten_with_its_row() -> Result<()> {
    let (site, _) = spare("preflight_forgotten").await?;
    let lost = &Factory::seeded().fill(&site.primary, 1).await?[0];
    site.warm_spare(&["sync"]).await.ok();
    site.spare.delete(&lost.key).await?;
    let result = async || {
        let json = ask(&site, "unplanned").await.json();
        check(&json, "artifacts").0.to_string()
    };
    assert_eq!(result().await, "refuse");
    support::packages::delete_package(&site.primary, lost).await?;
    site.warm_spare(&["sync"]).await.ok();
    assert_eq!(result().await, "ok");
    Ok(())
}

/// Every revision that a ciphertext names is looked for, wherever it lies; a single one that is spoilt refuses nothing.
#[tokio::test(flavor = "multi_thread")]
async fn each_revision_that_a_ciphertext_names_is_opened() -> Result<()> {
    use base64::prelude::{BASE64_STANDARD, Engine};
    let (site, used) = spare("preflight_revisions").await?;
    let newer = BuilderKey::new(NEWER);
    newer.write(&keys_dir(&site))?;
    let token = |key: &BuilderKey| format!("_{}", BASE64_STANDARD.encode(key.seal("a token")));
    let sealed = |key: &BuilderKey| key.seal("a secret key");
    // Secret keys and the newest tokens are the newer key's; one old token, and an integration, the older one's.
    let secret = format!(
        "UPDATE origin_secret_keys SET body = '{}', encryption_key_rev = '{NEWER}'",
        sealed(&newer)
    );
    tamper(&site, &secret).await?;
    let tokens = async || -> Result<()> {
        tamper(&site, "DELETE FROM account_tokens").await?;
        for account in 1..=4 {
            let sql = format!(
                "INSERT INTO account_tokens (account_id, token) VALUES ({account}, '{}')",
                token(&newer)
            );
            tamper(&site, &sql).await?;
        }
        Ok(())
    };
    tokens().await?;
    let old = format!(
        "UPDATE account_tokens SET token = '{}' WHERE id = (SELECT min(id) FROM account_tokens)",
        token(&used)
    );
    tamper(&site, &old).await?;
    let found = preflight(&site, "unplanned").await;
    assert_check(&found, "builder_keys", "ok", &format!("bldr-{USED} opens"));
    used.remove(&keys_dir(&site))?;
    let found = preflight(&site, "unplanned").await;
    assert_eq!(refused(&found), ["builder_keys"], "{found:#}");
    assert_check(
        &found,
        "builder_keys",
        "refuse",
        &format!("bldr-{USED} (an access token: 1 rows)"),
    );
    tokens().await?;
    let integration = format!(
        "INSERT INTO origin_integrations (origin, integration, name, body) SELECT name, 'docker', 'hub', '{}' FROM origins LIMIT 1",
        BASE64_STANDARD.encode(sealed(&used))
    );
    tamper(&site, &integration).await?;
    let found = preflight(&site, "unplanned").await;
    assert_check(&found, "builder_keys", "refuse", "an integration: 1 rows");
    let step = found.to_string();
    assert!(step.contains("local.builder_keys_dir = \\\"\\\""), "{step}");
    tamper(&site, "DELETE FROM origin_integrations").await?;

    // The newest token is cut short: its key opens all others.
    let cut = "UPDATE account_tokens SET token = '_' || encode(substr(decode(substr(token, 2), 'base64'), 1, 110), 'base64') \
               WHERE id = (SELECT max(id) FROM account_tokens)";
    tamper(&site, cut).await?;
    let found = preflight(&site, "unplanned").await;
    let (result, reason) = check(&found, "builder_keys");
    assert!(result != "refuse", "{reason}");
    Ok(())
}
