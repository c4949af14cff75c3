//! Another mode, or another bucket: nothing that was planned for the former one is carried out.

use crate::shared::{SHARED, acting};
use crate::unproven::until_unproven;
use support::follow::{bytes_of, until_equal, until_following};
use support::packages::{self, delete_package};
use support::pair::Pair;
use support::service::SOON;
use support::{Factory, Result, Service, Site, Spec, seed, wait_until};

const BRIEF: &str = "[replication]\nartifact_retention = \"1s\"\nretry_missing = \"1s\"";
const EXTERNAL: &str = "[artifacts]\nmode = \"external\"\n[replication]\ngate_grace = \"300ms\"";
const NUMBER: usize = 1000;

/// Puts objects into the spare's bucket that no row names, and whose deletion is due.
async fn plan_deletions(site: &Site) -> Result<()> {
    for number in 0..NUMBER {
        site.spare
            .put(&format!("due/{number}"), "of the former bucket")
            .await?;
    }
    let state = site.spare.pg.conn("warm_spare").await?;
    let sql = format!(
        "INSERT INTO retirement (key, checksum, since) \
         SELECT 'due/' || n, '', now() - interval '1 day' FROM generate_series(0, {NUMBER} - 1) n"
    );
    state.batch_execute(&sql).await?;
    Ok(())
}

async fn planned(site: &Site) -> Result<i64> {
    let state = site.spare.pg.conn("warm_spare").await?;
    let sql = "SELECT count(*) FROM retirement WHERE key LIKE 'due/%'";
    Ok(state.query_one(sql, &[]).await?.get(0))
}

async fn left(site: &Site) -> Result<usize> {
    Ok(site
        .spare
        .s3()
        .list(&site.spare.bucket, "due/")
        .await?
        .len())
}

/// Waits until a deletion of now is carried out: the due ones came before it.
async fn until_swept(site: &Site, factory: &mut Factory) -> Result<()> {
    let gone = factory.fill(&site.primary, 1).await?.remove(0);
    until_equal(site).await?;
    delete_package(&site.primary, &gone).await?;
    wait_until("its artifact is deleted", SOON, || async {
        match bytes_of(site, &gone.key).await? {
            None => Ok(()),
            Some(_) => Err("it is there".into()),
        }
    })
    .await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn another_mode_deletes_nothing() -> Result<()> {
    let pair = Pair::of_own_stores("place_mode").await?;
    let (site, mut factory) = (&pair.there, Factory::new(seed() + 3).with_keys_of(seed()));
    let service = Service::start(site, "");
    until_following(&service).await;
    plan_deletions(site).await?;
    service.reconfigure(EXTERNAL);
    wait_until("the plan is void", SOON, || async {
        match planned(site).await? {
            0 => Ok(()),
            some => Err(format!("{some} are planned").into()),
        }
    })
    .await;
    // Back in the mode that deletes, after a second.
    service.reconfigure(BRIEF);
    until_following(&service).await;
    until_swept(site, &mut factory).await?;
    assert_eq!(left(site).await?, NUMBER);
    service.stop().await.ok();
    Ok(())
}

/// From a bucket of the spare's own to the primary's, which both share from then on.
#[tokio::test(flavor = "multi_thread")]
async fn sharing_the_primarys_bucket_deletes_nothing() -> Result<()> {
    let mut pair = Pair::of_own_stores("place_shared").await?;
    let mut factory = Factory::new(seed() + 5).with_keys_of(seed());
    let service = Service::start(&pair.there, BRIEF);
    until_following(&service).await;
    service.stop().await.ok();
    let former = pair.there.spare.clone();
    plan_deletions(&pair.there).await?;
    let shared = pair.there.primary.clone();
    pair.there.spare.bucket = shared.bucket.clone();
    pair.there.spare.minio = shared.minio.clone();
    for number in 0..NUMBER {
        shared
            .put(&format!("due/{number}"), "of the shared bucket")
            .await?;
    }
    let old = acting(&pair, "").await;
    let site = &pair.there;
    let service = Service::start(site, &format!("{SHARED}\n{BRIEF}"));
    wait_until("the plan is void", SOON, || async {
        match planned(site).await? {
            0 => Ok(()),
            some => Err(format!("{some} are planned").into()),
        }
    })
    .await;
    until_following(&service).await;
    until_unproven(&service, 0).await;
    // A deletion of now is the primary's own, and the others are left.
    let gone = factory.fill(&site.primary, 1).await?.remove(0);
    until_equal(site).await?;
    delete_package(&site.primary, &gone).await?;
    until_equal(site).await?;
    service.stop().await.ok();
    old.stop().await.ok();
    for cluster in [&former, &shared] {
        let due = cluster.s3().list(&cluster.bucket, "due/").await?;
        assert_eq!(due.len(), NUMBER);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn another_bucket_is_proved_anew_and_loses_nothing() -> Result<()> {
    let mut pair = Pair::of_own_stores("place_bucket").await?;
    let mut factory = Factory::new(seed() + 4).with_keys_of(seed());
    let service = Service::start(&pair.there, "");
    until_following(&service).await;
    service.stop().await.ok();
    let former = pair.there.spare.clone();
    plan_deletions(&pair.there).await?;
    // The operator has copied nothing into the new bucket but what is due by the old plan.
    let bucket = format!("{}-new", former.bucket);
    pair.there.spare.s3().create_bucket(&bucket).await?;
    pair.there.spare.bucket = bucket;
    for number in 0..NUMBER {
        pair.there
            .spare
            .put(&format!("due/{number}"), "of the new bucket")
            .await?;
    }
    let service = Service::start(&pair.there, BRIEF);
    until_following(&service).await;
    until_swept(&pair.there, &mut factory).await?;
    assert_eq!(left(&pair.there).await?, NUMBER);
    // All artifacts are in the new bucket, and the former one has lost none.
    let output = pair
        .there
        .warm_spare(&["verify", "--deep", "--json"])
        .await
        .ok();
    let differences = output.json()["differences"].clone();
    assert_eq!(differences.as_array().map(Vec::len), Some(0), "{output}");
    assert!(former.keys().await?.len() >= NUMBER + 3);
    service.stop().await.ok();
    Ok(())
}

/// The same bucket under another name of its server: all that is known of it holds.
#[tokio::test(flavor = "multi_thread")]
async fn another_address_of_the_bucket_changes_nothing() -> Result<()> {
    let pair = Pair::of_own_stores("place_address").await?;
    let site = &pair.there;
    let service = Service::start(site, "");
    until_following(&service).await;
    service.stop().await.ok();
    plan_deletions(site).await?;
    let known = "SELECT count(*) FROM artifact";
    let state = site.spare.pg.conn("warm_spare").await?;
    let before: i64 = state.query_one(known, &[]).await?.get(0);
    let port = site.spare.minio.port();
    let alias = format!("[local.s3]\nendpoint = \"http://localhost:{port}\"");
    let service = Service::start(site, &alias);
    until_following(&service).await;
    wait_until("a pass has looked at it", SOON, || async {
        let place = "SELECT FROM artifact_place WHERE proved AND endpoint LIKE '%localhost%'";
        let rows = state.query(place, &[]).await?;
        let open = || "not yet".into();
        (!rows.is_empty()).then_some(()).ok_or_else(open)
    })
    .await;
    assert_eq!(planned(site).await?, NUMBER as i64);
    let after: i64 = state.query_one(known, &[]).await?.get(0);
    assert_eq!((before, after), (3, 3));
    service.stop().await.ok();
    Ok(())
}

/// A service that ends before its pass over the new bucket goes on with it after its next start.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_bucket_stays_unproved_until_a_pass_has_proved_it() -> Result<()> {
    let mut pair = Pair::of_own_stores("place_unproved").await?;
    let service = Service::start(&pair.there, "");
    until_following(&service).await;
    service.stop().await.ok();
    let keys = pair.there.spare.keys().await?;
    let bucket = format!("{}-new", pair.there.spare.bucket);
    pair.there.spare.s3().create_bucket(&bucket).await?;
    pair.there.spare.bucket = bucket;
    let site = &pair.there;
    site.primary.minio.kill9();
    let service = Service::start(site, "");
    let state = site.spare.pg.conn("warm_spare").await?;
    wait_until("the new bucket is noticed", SOON, || async {
        let open = "SELECT FROM artifact_place WHERE NOT proved";
        let rows = state.query(open, &[]).await?;
        let proved = || "it counts as proved".into();
        (!rows.is_empty()).then_some(()).ok_or_else(proved)
    })
    .await;
    service.running.kill9()?;
    site.primary.minio.start_again().await?;
    let service = Service::start(site, "");
    wait_until("the artifacts are in the new bucket", SOON, || async {
        match site.spare.keys().await? {
            found if found == keys => Ok(()),
            found => Err(format!("{found:?}").into()),
        }
    })
    .await;
    service.stop().await.ok();
    Ok(())
}

/// Killed with half of the bytes replaced, and started again in a mode in which nothing is written:
/// the old bytes are restored first, because the visible row names them.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_half_replaced_is_restored_before_the_mode_changes() -> Result<()> {
    let pair = Pair::of_own_stores("place_half").await?;
    let (site, mut factory) = (&pair.there, Factory::seeded());
    factory = factory.with_keys_of(seed());
    let service = Service::start(site, "");
    until_following(&service).await;
    let old = factory.make(Spec::new("acme", "half", "1.0.0").release("20250101000000"));
    packages::upload(&site.primary, &old).await?;
    until_equal(site).await?;
    service.stop().await.ok();
    let spec = Spec::new("acme", "half", "1.0.0").release("20250101000000");
    let new = factory.make(spec.size(60_000));
    assert_eq!(new.key, old.key);
    let doomed = Service::doomed(site, "", "swap.half");
    delete_package(&site.primary, &old).await?;
    packages::upload(&site.primary, &new).await?;
    doomed.dead().await?;
    assert_eq!(bytes_of(site, &old.key).await?, Some(new.checksum.clone()));
    let service = Service::start(site, EXTERNAL);
    wait_until("the old bytes are there", SOON, || async {
        match bytes_of(site, &old.key).await? {
            Some(found) if found == old.checksum => Ok(()),
            found => Err(format!("{found:?}").into()),
        }
    })
    .await;
    service.stop().await.ok();
    Ok(())
}
