//! Whose artifact a row names is found out for every row: past what is looked at ahead of time, named several times in one
//! transaction, and for as long as the row is read and not committed.

use hyper::http::request::Parts;
use support::follow::{
    audit, bytes_of, copies, followed, gaps, prepared, unavailable, until_equal,
};
use support::http_fault::{Fault, HttpFault};
use support::packages::{self, delete_rows, insert_rows};
use support::service::SOON;
use support::{Factory, Package, Result, Service, Site, Spec, wait_until};

/// More rows than the gate looks after ahead of time. They name no possible artifact, so nobody looks for any.
const MANY: &str = "
    INSERT INTO origin_packages (owner_id, name, ident, ident_array, checksum, target, origin)
    SELECT 1, 'many', 'core/many/1/' || n, ARRAY['core', 'many', '1', n::text], 'none', 'x86_64-linux', 'core'
    FROM generate_series(1, 4200) n";
/// So many rows without artifacts are no reason to stop.
const LENIENT: &str = "[fuse]\nmin_count = 100000\n";

/// What is done in one transaction of the primary.
#[derive(Clone, Copy)]
enum Deed<'a> {
    Many,
    Insert(&'a Package),
    Delete(&'a Package),
    /// Empties a table, for which the spare waits where somebody reads it.
    Empty(&'a str),
}
use Deed::{Delete, Empty, Insert, Many};

async fn at_once(site: &Site, deeds: &[Deed<'_>]) -> Result<()> {
    let client = site.primary.conn().await?;
    client.batch_execute("BEGIN").await?;
    for deed in deeds {
        match deed {
            Many => client.batch_execute(MANY).await?,
            Insert(package) => insert_rows(&client, package).await?,
            Delete(package) => delete_rows(&client, package.names()).await?,
            Empty(table) => client.batch_execute(&format!("TRUNCATE {table}")).await?,
        }
    }
    Ok(client.batch_execute("COMMIT").await?)
}

/// Two packages of one ident and target, with other bytes.
fn twins(factory: &mut Factory, name: &str) -> (Package, Package) {
    let spec = || Spec::new("core", name, "1").release("20240101000001");
    let (old, new) = (spec().size(3000), spec().size(5000));
    (factory.make(old), factory.make(new))
}

/// The bytes that the package's row names lie in the spare's bucket.
async fn assert_here(site: &Site, package: &Package, case: &str) -> Result<()> {
    let found = bytes_of(site, &package.key).await?;
    assert_eq!(found.as_ref(), Some(&package.checksum), "{case}");
    Ok(())
}

/// No copy of everything hid that a transaction could not be applied.
async fn assert_followed(service: &Service<'_>) -> Result<()> {
    assert_eq!(gaps(&service.status().await?), Vec::<String>::new());
    assert_eq!(copies(service).await?, 1, "no new baseline");
    Ok(())
}

async fn until_held(service: &Service<'_>) {
    service
        .until("the gate holds it", |status| {
            status["replication"]["gate_waiting"].as_u64() >= Some(1)
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_past_what_is_looked_at_ahead_have_their_artifacts_too() -> Result<()> {
    let site = prepared("keys_many").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 3).await?;
    let service = followed(&site, LENIENT).await?;
    let there = factory.make(Spec::new("core", "there", "1"));
    packages::put(&site.primary, &there).await?;
    let lost = factory.make(Spec::new("core", "lost", "1"));
    let (old, new) = twins(&mut factory, "twice");
    packages::put(&site.primary, &new).await?;
    let deeds = [
        Many,
        Insert(&there),
        Insert(&lost),
        Insert(&old),
        Delete(&old),
        Insert(&new),
    ];
    at_once(&site, &deeds).await?;
    until_equal(&site).await?;
    assert_here(&site, &there, "past the look-ahead").await?;
    assert_here(&site, &new, "named twice past the look-ahead").await?;
    let lacking = unavailable(&site).await?;
    assert_eq!(lacking.len(), 4201, "those of no artifact, and the lost");
    assert!(lacking.contains(&lost.key), "its row passes, and is told");
    assert_followed(&service).await
}

/// With a grace that no test outlives: what is deleted in the same transaction waits for nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_named_more_than_once_in_a_transaction_ends_with_the_right_bytes() -> Result<()> {
    let site = prepared("keys_twice").await?;
    let mut factory = Factory::seeded();
    let made = factory.fill(&site.primary, 3).await?;
    let (visible, replaced) = twins(&mut factory, "visible");
    packages::upload(&site.primary, &visible).await?;
    let service = followed(&site, "[replication]\ngate_grace = \"1h\"").await?;

    let same = factory.make(Spec::new("core", "same", "1"));
    packages::put(&site.primary, &same).await?;
    at_once(&site, &[Insert(&same), Delete(&same), Insert(&same)]).await?;
    until_equal(&site).await?;
    assert_here(&site, &same, "the same bytes again").await?;

    let (old, new) = twins(&mut factory, "other");
    packages::put(&site.primary, &new).await?;
    at_once(&site, &[Insert(&old), Delete(&old), Insert(&new)]).await?;
    until_equal(&site).await?;
    assert_here(&site, &new, "other bytes").await?;

    let (old, new) = twins(&mut factory, "thrice");
    packages::put(&site.primary, &new).await?;
    let twice = [Insert(&old), Delete(&old), Insert(&old), Delete(&old)];
    at_once(&site, &[&twice[..], &[Insert(&new)]].concat()).await?;
    until_equal(&site).await?;
    assert_here(&site, &new, "three times").await?;

    packages::put(&site.primary, &replaced).await?;
    at_once(&site, &[Delete(&visible), Insert(&replaced)]).await?;
    until_equal(&site).await?;
    assert_here(&site, &replaced, "in place of what was visible").await?;

    let (brief, _) = twins(&mut factory, "brief");
    at_once(&site, &[Insert(&brief), Delete(&brief)]).await?;
    let gone = &made[0];
    at_once(&site, &[Delete(gone), Insert(gone), Delete(gone)]).await?;
    until_equal(&site).await?;
    assert_eq!(unavailable(&site).await?, Vec::<String>::new());
    site.warm_spare(&["verify", "--deep"]).await.ok();
    assert_followed(&service).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_artifact_is_not_deleted_while_its_row_is_read_and_not_committed() -> Result<()> {
    let site = prepared("keys_open").await?;
    let mut factory = Factory::seeded();
    let made = factory.fill(&site.primary, 6).await?;
    let brief = "[replication]\nartifact_retention = \"3s\"\ngate_grace = \"1h\"\n";
    let service = followed(&site, &format!("{brief}{LENIENT}")).await?;
    for (round, before) in [&[][..], &[Many]].into_iter().enumerate() {
        let (again, gone) = (&made[2 * round], &made[2 * round + 1]);
        // In this order they are looked at, too.
        at_once(&site, &[Delete(again)]).await?;
        at_once(&site, &[Delete(gone)]).await?;
        let lost = factory.make(Spec::new("core", "lost", &round.to_string()));
        let deeds = [before, &[Insert(again), Insert(&lost)]].concat();
        at_once(&site, &deeds).await?;
        until_held(&service).await;
        wait_until("one that nobody names is deleted", SOON, || async {
            let there = site.spare.keys().await?.contains(&gone.key);
            (!there).then_some(()).ok_or("it is there".into())
        })
        .await;
        assert_here(&site, again, "its row is read").await?;
        packages::put(&site.primary, &lost).await?;
        until_equal(&site).await?;
        assert_here(&site, again, "its row is committed").await?;
    }
    assert_followed(&service).await
}

/// More than is waited for whole: it is applied while it arrives, and its artifacts are settled by its commit.
const LARGE: &str = "
    INSERT INTO audit_package (operation, trigger, requester_id, requester_name, origin, channel, package_ident)
    SELECT 'promote', 'unknown', 1, repeat('x', 1000), 'core', 'stable', n::text FROM generate_series(1, 8000) n";

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_found_out_lets_no_row_pass() -> Result<()> {
    let site = prepared("keys_denied").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let store = HttpFault::start(site.primary.minio.port()).await?;
    let through = format!("peer.s3.endpoint = \"{}\"\n", store.endpoint());
    let service = followed(&site, &through).await?;
    let late = factory.make(Spec::new("core", "late", "1"));
    packages::put(&site.primary, &late).await?;
    store.set(|_| Fault::s3(403, "AccessDenied"));
    let client = site.primary.conn().await?;
    client.batch_execute("BEGIN").await?;
    insert_rows(&client, &late).await?;
    client.batch_execute(LARGE).await?;
    client.batch_execute("COMMIT").await?;
    service
        .until("it is told", |status| !status["hold"].is_null())
        .await;
    let sql = "SELECT FROM origin_packages WHERE ident = $1";
    let rows = site.spare.conn().await?.query(sql, &[&late.ident]).await?;
    assert!(rows.is_empty(), "a row without its artifact");
    assert_eq!(unavailable(&site).await?, Vec::<String>::new());
    store.set(|_| Fault::Forward);
    until_equal(&site).await?;
    assert_here(&site, &late, "when it is allowed again").await?;
    assert_followed(&service).await
}

/// With a grace that no test outlives.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_past_the_look_ahead_that_is_deleted_further_on_waits_for_nothing() -> Result<()> {
    let site = prepared("keys_deleted").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let patient = format!("[replication]\ngate_grace = \"1h\"\n{LENIENT}");
    let service = followed(&site, &patient).await?;
    let (first, second) = (
        factory.make(Spec::new("core", "first", "1")),
        factory.make(Spec::new("core", "second", "1")),
    );
    let deeds = [Many, Insert(&first), Delete(&first), Insert(&second)];
    // The second is held by nothing but this, until its deletion is seen too.
    service.running.sigstop();
    at_once(&site, &deeds).await?;
    at_once(&site, &[Delete(&second)]).await?;
    service.running.sigcont();
    until_equal(&site).await?;
    assert_eq!(unavailable(&site).await?.len(), 4200, "no other is lacking");
    assert_followed(&service).await
}

/// The retry of an artifact that the primary lacked is at its key when the stream comes to a row that names it.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_row_waits_for_whoever_is_at_its_key() -> Result<()> {
    let site = prepared("keys_claimed").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let store = HttpFault::start(site.primary.minio.port()).await?;
    let eager = "gate_grace = \"1s\"\nretry_missing = \"1s\"\n";
    let extra = format!(
        "peer.s3.endpoint = \"{}\"\n[replication]\n{eager}{LENIENT}",
        store.endpoint()
    );
    let service = followed(&site, &extra).await?;
    let (old, new) = twins(&mut factory, "claimed");
    packages::insert(&site.primary, &old).await?;
    wait_until("it passes without", SOON, || async {
        let lacking = unavailable(&site).await?;
        lacking
            .contains(&old.key)
            .then_some(())
            .ok_or("not yet".into())
    })
    .await;
    let (let_go, wait) = tokio::sync::watch::channel(false);
    store.forget();
    let path = format!("/{}/{}", site.primary.bucket, old.key);
    let aimed = path.clone();
    let get = move |request: &Parts| request.method == "GET" && request.uri.path() == aimed;
    store.times(1, get, Fault::Until(wait));
    packages::put(&site.primary, &old).await?;
    wait_until("it is asked for again", SOON, || async {
        let asked = store.count("GET", &path) > 0;
        asked.then_some(()).ok_or("not yet".into())
    })
    .await;
    packages::put(&site.primary, &new).await?;
    at_once(&site, &[Many, Delete(&old), Insert(&new)]).await?;
    until_held(&service).await;
    let_go.send(true)?;
    until_equal(&site).await?;
    assert_here(&site, &new, "its row came while the key was taken").await?;

    // And whoever comes after has his turn.
    at_once(&site, &[Delete(&new)]).await?;
    packages::put(&site.primary, &old).await?;
    at_once(&site, &[Insert(&old)]).await?;
    audit(&site, "after").await?;
    until_equal(&site).await?;
    assert_here(&site, &old, "afterwards").await?;
    assert_followed(&service).await
}

/// Of two rows with one key, the later one was looked at before the earlier one: what was found out for it then does not
/// count any more when its turn comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_row_comes_before_a_later_one_that_was_looked_at() -> Result<()> {
    const TABLE: &str = "license_keys";
    let site = prepared("keys_order").await?;
    let mut factory = Factory::seeded();
    let made = factory.fill(&site.primary, 3).await?;
    let store = HttpFault::start(site.primary.minio.port()).await?;
    let extra = format!(
        "peer.s3.endpoint = \"{}\"\n[replication]\ngate_grace = \"1s\"\n{LENIENT}",
        store.endpoint()
    );
    let service = followed(&site, &extra).await?;
    let (earlier, later) = twins(&mut factory, "order");

    // No row behind these is looked at before they are committed.
    let held = factory.make(Spec::new("core", "held", "1"));
    let (let_go, wait) = tokio::sync::watch::channel(false);
    let key = held.key.clone();
    store.set(move |request| match request.uri.path().contains(&key) {
        true => Fault::Until(wait.clone()),
        false => Fault::Forward,
    });
    packages::put(&site.primary, &held).await?;
    at_once(&site, &[Insert(&held), Many]).await?;
    let late = [Delete(&made[0]), Empty(TABLE), Insert(&earlier)];
    at_once(&site, &late).await?;
    service
        .until("both have arrived", |status| {
            status["replication"]["gate_waiting"].as_u64() >= Some(2)
        })
        .await;
    // They are, and the one behind them stands right before its package.
    let reader = site.spare.conn().await?;
    reader
        .batch_execute(&format!("BEGIN; SELECT FROM {TABLE}"))
        .await?;
    let_go.send(true)?;
    wait_until("the table is waited for", SOON, || async {
        let sql = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'TRUNCATE%'";
        let waiting = site.spare.conn().await?.query(sql, &[]).await?;
        (!waiting.is_empty()).then_some(()).ok_or("not yet".into())
    })
    .await;

    packages::put(&site.primary, &later).await?;
    at_once(&site, &[Delete(&earlier)]).await?;
    at_once(&site, &[Insert(&later)]).await?;
    wait_until("the later one was looked at", SOON, || async {
        let sql = "SELECT FROM artifact WHERE key = $1 AND checksum = $2";
        let state = site.spare.pg.conn("warm_spare").await?;
        let found = state.query(sql, &[&later.key, &later.checksum]).await?;
        (!found.is_empty()).then_some(()).ok_or("not yet".into())
    })
    .await;
    assert_here(&site, &later, "ahead of its time").await?;
    // The earlier one finds its own bytes, and puts them in place of those.
    packages::put(&site.primary, &earlier).await?;
    reader.batch_execute("COMMIT").await?;
    until_equal(&site).await?;
    assert_here(&site, &earlier, "that is all the primary has").await?;
    let lacking = unavailable(&site).await?;
    assert!(
        lacking.contains(&later.key),
        "the bytes of another row lie there, and nobody is told"
    );
    assert_followed(&service).await
}
