//! What the spare shows is whole: bytes that were half replaced are put back, and what somebody changed or lost here is
//! found and told, while the primary is at rest and while it is followed.

use hyper::http::request::Parts;
use support::follow::{
    bytes_of, copies, followed, gaps, prepared, tamper, until_equal, until_following,
};
use support::http_fault::{Fault, HttpFault};
use support::packages::{self, delete_rows, insert_rows};
use support::service::SOON;
use support::{Factory, Package, Result, Service, Site, Spec, slots, wait_until};

/// Two packages, so that one can be replaced and the other not yet; each before and after.
struct Pairs {
    old: Vec<Package>,
    new: Vec<Package>,
}

impl Pairs {
    async fn upload(site: &Site, factory: &mut Factory) -> Result<Self> {
        let of = |size: u64| {
            let spec = move |name| Spec::new("core", name, "1").release("20240101000001");
            ["first", "second"].map(|name| spec(name).size(size))
        };
        factory.origin(&site.primary, "core").await?;
        let old = of(3000).map(|spec| factory.make(spec)).to_vec();
        let new = of(5000).map(|spec| factory.make(spec)).to_vec();
        for package in &old {
            packages::upload(&site.primary, package).await?;
        }
        Ok(Self { old, new })
    }

    /// In one transaction: there is no state of the primary in which neither the old nor the new is named.
    async fn replace(&self, site: &Site) -> Result<()> {
        let client = site.primary.conn().await?;
        client.batch_execute("BEGIN").await?;
        for (old, new) in self.old.iter().zip(&self.new) {
            packages::put(&site.primary, new).await?;
            delete_rows(&client, old.names()).await?;
            insert_rows(&client, new).await?;
        }
        Ok(client.batch_execute("COMMIT").await?)
    }
}

async fn are_there(site: &Site, packages: &[Package]) -> Result<usize> {
    let mut there = 0;
    for package in packages {
        let found = bytes_of(site, &package.key).await?;
        there += usize::from(found.as_ref() == Some(&package.checksum));
    }
    Ok(there)
}

async fn until_there(site: &Site, packages: &[Package], what: &str) {
    wait_until(what, SOON, || async {
        match are_there(site, packages).await? {
            all if all == packages.len() => Ok(()),
            some => Err(format!("{some} of {}", packages.len()).into()),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_half_replaced_by_a_killed_service_are_put_back_without_the_primary() -> Result<()> {
    let site = prepared("whole_killed").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let mut pairs = Pairs::upload(&site, &mut factory).await?;
    followed(&site, "").await?.stop().await.ok();
    for (point, replaced) in [
        ("swap.staging", 0),
        ("swap.journalled", 0),
        ("swap.half", 1),
    ] {
        let doomed = Service::doomed(&site, "", point);
        pairs.replace(&site).await?;
        doomed.dead().await?;
        assert_eq!(are_there(&site, &pairs.new).await?, replaced, "{point}");
        site.primary.pg.stop_fast().await?;
        let service = Service::start(&site, "");
        service
            .until("the primary is not there", |status| {
                status["hold"]["reason"] == "peer_unreachable"
            })
            .await;
        until_there(&site, &pairs.old, "what the visible rows name").await;
        site.primary.pg.start_again().await?;
        until_equal(&site).await?;
        assert_eq!(are_there(&site, &pairs.new).await?, 2, "{point}");
        until_following(&service).await;
        assert_eq!(copies(&service).await?, 0, "no new baseline");
        service.stop().await.ok();
        std::mem::swap(&mut pairs.old, &mut pairs.new);
    }
    site.warm_spare(&["verify", "--deep"]).await.ok();
    Ok(())
}

/// Nothing is killed here: the stream is left, for a pause, with one object replaced and one not.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_half_replaced_when_the_stream_is_left_are_put_back_at_once() -> Result<()> {
    let site = prepared("whole_left").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 2).await?;
    let pairs = Pairs::upload(&site, &mut factory).await?;
    let store = HttpFault::start(site.spare.minio.port()).await?;
    let through = format!("[local.s3]\nendpoint = \"{}\"\n", store.endpoint());
    let service = followed(&site, &through).await?;
    let second = format!("/{}/{}", site.spare.bucket, pairs.new[1].key);
    let aimed = second.clone();
    store.forget();
    let put = move |request: &Parts| request.method == "PUT" && request.uri.path() == aimed;
    store.times(1, put, Fault::Hang);
    pairs.replace(&site).await?;
    wait_until("the second is being replaced", SOON, || async {
        let begun = store.count("PUT", &second) > 0;
        begun.then_some(()).ok_or("not yet".into())
    })
    .await;
    assert_eq!(are_there(&site, &pairs.new).await?, 1);
    service.reconfigure(&format!("paused = true\n{through}"));
    service.until_hold("paused").await;
    until_there(&site, &pairs.old, "what the visible rows name").await;
    service.reconfigure(&through);
    until_equal(&site).await?;
    assert_eq!(are_there(&site, &pairs.new).await?, 2);
    until_following(&service).await;
    assert_eq!(gaps(&service.status().await?), Vec::<String>::new());
    Ok(())
}

/// The primary's log has gone on past the last commit, and nothing more will come.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_changed_past_the_fence_is_told_while_the_primary_is_at_rest() -> Result<()> {
    let site = prepared("whole_rest").await?;
    Factory::seeded().fill(&site.primary, 2).await?;
    // Else the service may find the row first, and mend it.
    let _service = followed(&site, "[verify]\nrolling = 0\n").await?;
    let client = site.primary.conn().await?;
    client.batch_execute("CHECKPOINT").await?;
    site.warm_spare(&["verify"]).await.ok();
    tamper(&site, "UPDATE accounts SET email = 'changed here'").await?;
    let output = site.warm_spare(&["verify", "--json"]).await;
    assert_eq!(output.code, Some(1), "{output}");
    let told = output.json();
    let listed = told["differences"].as_array().cloned().unwrap_or_default();
    let names: Vec<_> = listed.iter().map(|d| d["name"].as_str()).collect();
    assert_eq!(names, [Some("public.accounts")], "{output}");
    Ok(())
}

/// The copy ends the sessions of whoever reads the database that it replaces.
#[tokio::test(flavor = "multi_thread")]
async fn a_verification_goes_on_when_a_copy_replaces_what_it_reads() -> Result<()> {
    let site = prepared("whole_replaced").await?;
    Factory::seeded().fill(&site.primary, 2).await?;
    let _service = followed(&site, "[verify]\nrolling = 0\n").await?;
    let lock = site.spare.conn().await?;
    let held = "SET default_transaction_read_only = off; BEGIN; LOCK accounts";
    lock.batch_execute(held).await?;
    let verification = site.spawn(&["verify", "--json"]);
    let spare = site.spare.pg.conn("postgres").await?;
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'builder' AND wait_event_type = 'Lock'";
    wait_until("the verification waits for the table", SOON, || async {
        let number: i64 = spare.query_one(waiting, &[]).await?.get(0);
        (number > 0).then_some(()).ok_or("not yet".into())
    })
    .await;
    slots::drop_slot(&site.primary, slots::ANY).await?;
    let output = verification.wait(SOON).await?;
    assert_eq!(output.code, Some(0), "{output}");
    assert!(output.json()["rows"].as_u64() > Some(0), "{output}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_artifact_lost_here_is_found_and_brought_again_while_following() -> Result<()> {
    let site = prepared("whole_lost").await?;
    let made = Factory::seeded().fill(&site.primary, 3).await?;
    followed(&site, "").await?.stop().await.ok();
    site.spare.delete(&made[0].key).await?;
    // The one of last night is made up for at once.
    let state = site.spare.pg.conn("warm_spare").await?;
    let missed = "INSERT INTO verification (time, deep, differences, lsn) VALUES (now() - interval '2 days', false, 0, '0/0')";
    state.batch_execute(missed).await?;
    let service = followed(&site, "[verify]\nschedule = \"0 3 * * *\"").await?;
    until_there(&site, &made, "it is brought again").await;
    service
        .until("looked at again, and whole", |status| {
            status["verification"]["differences"] == 0 && status["state"] == "following"
        })
        .await;
    assert_eq!(copies(&service).await?, 0, "no new baseline");
    Ok(())
}
