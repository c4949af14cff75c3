//! A link or a store is lost at a step of a switchover: it is done or undone, and never are both sides read-only for good.

use std::sync::atomic::{AtomicU64, Ordering};

use support::follow::{followed, until_equal, until_following};
use support::pair::{self, Pair, is_writable, returned, until_primary, write};
use support::proxy::{Mode, Proxy};
use support::service::SOON;
use support::{Factory, Result, Service, Site, Spec, wait_until};

const STEPS: [&str; 6] = [
    "preflight",
    "fence",
    "drain",
    "compare",
    "sequences",
    "promote",
];

/// Every wish is another one, or what was undone would not be begun again.
fn wish() -> String {
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    format!("role = \"primary\"\nchange = \"wish {number}\"")
}

#[derive(Debug, PartialEq)]
enum End {
    Done,
    Undone,
}

/// Exactly one of both may be written to in the end.
async fn ended(site: &Site, service: &Service<'_>, what: &str) -> End {
    wait_until(what, SOON, || async {
        let (old, new) = (
            is_writable(&site.primary).await,
            is_writable(&site.spare).await,
        );
        let status = service.status().await?;
        match (old, new) {
            (true, true) => panic!("{what}: both may be written to: {status:#}"),
            (false, true) if status["state"] == "primary" => Ok(End::Done),
            (true, false) if status["transition"].is_null() => Ok(End::Undone),
            _ => Err(format!(
                "{old} {new} {status:#}\n{}",
                service.running.stderr().join("\n")
            )
            .into()),
        }
    })
    .await
}

#[tokio::test]
async fn the_link_is_cut_at_each_step() -> Result<()> {
    let pair = Pair::start("losses_link").await?;
    let there = Proxy::start(pair.there.primary.pg.port()).await?;
    let back = Proxy::start(pair.back.primary.pg.port()).await?;
    let (mut way, mut other) = ((&pair.there, &there), (&pair.back, &back));
    followed(way.0, &way.1.to_peer("")).await?.stop().await.ok();
    for step in STEPS {
        let (site, line) = way;
        let point = format!("switchover.{step}");
        write(&site.primary, &point).await?;
        let wanted = line.to_peer(&wish());
        let (service, halt) = Service::halting(site, &wanted, &point);
        halt.reached().await;
        line.lose().await;
        halt.go();
        let told = service
            .until("what became of it", |status| {
                let hold = &status["hold"]["reason"];
                status["transition"].is_null()
                    && (hold == "force_needed"
                        || hold == "peer_unreachable"
                        || status["state"] == "primary")
            })
            .await;
        assert!(
            !(is_writable(&site.primary).await && is_writable(&site.spare).await),
            "{told:#}"
        );
        line.set(Mode::Pass).await;
        // One that was held before it began is tried again by itself: it may be done by then, or be still to come.
        if step == "preflight" {
            service.reconfigure(&line.to_peer(""));
        }
        let end = ended(site, &service, &point).await;
        println!("{point}: {end:?}");
        match step {
            // The primary was asked for all that is needed.
            "sequences" | "promote" => assert_eq!(end, End::Done),
            _ => assert_eq!(end, End::Undone, "{step}"),
        }
        if end == End::Undone {
            service.reconfigure(&line.to_peer(""));
            until_following(&service).await;
            write(&site.primary, &format!("{point} is over")).await?;
            until_equal(site).await?;
        } else {
            pair::until_settled(&service).await;
            let back = returned(other.0, &other.1.to_peer("")).await?;
            until_equal(other.0).await?;
            back.stop().await.ok();
            (way, other) = (other, way);
        }
        service.stop().await.ok();
    }
    Ok(())
}

/// Each store of each side is killed at each step, and comes again.
#[tokio::test]
async fn each_store_is_lost_at_each_step() -> Result<()> {
    let pair = Pair::of_own_stores("losses_stores").await?;
    let mut factory = Factory::seeded();
    let (mut site, mut other) = (&pair.there, &pair.back);
    let mut epoch = 1;
    let mut ends = Vec::new();
    followed(site, "").await?.stop().await.ok();
    let cases = pair::STORES
        .into_iter()
        .flat_map(|store| STEPS.map(|step| (store, step)));
    for (store, step) in support::every_other(cases) {
        let what = format!("{store} at {step}");
        write(&site.primary, &what).await?;
        // What the spare has not seen yet, and cannot have without the primary's bucket.
        let pending = store == "primary.s3" && step == "fence";
        let wanted = match pending {
            true => format!("{}\n[takeover]\ndrain_timeout = \"3s\"", wish()),
            false => wish(),
        };
        let (service, halt) = Service::halting(site, &wanted, &format!("switchover.{step}"));
        halt.reached().await;
        if pending {
            let spec = Spec::new("core", "pending", "1");
            factory.package(&site.primary, spec).await?;
        }
        pair::kill(site, store);
        halt.go();
        // It may be done without it, and otherwise says what it waits for.
        service
            .until("what becomes of it", |status| {
                status["state"] == "primary"
                    || (!status["hold"].is_null() && !pending)
                    || status["transition"].is_null()
            })
            .await;
        pair::start_again(site, store).await?;
        if step == "preflight" && store != "spare.pg" {
            service.reconfigure("");
        }
        let end = ended(site, &service, &what).await;
        println!("{what}: {end:?}");
        match (store, step) {
            (_, "sequences" | "promote") if store != "spare.pg" => {
                assert_eq!(end, End::Done, "{what}");
            }
            ("primary.pg", "fence" | "drain" | "compare") | ("primary.s3", "fence") => {
                assert_eq!(end, End::Undone, "{what}")
            }
            _ => {}
        }
        if end == End::Undone {
            service.reconfigure("");
            until_following(&service).await;
            write(&site.primary, &format!("{what} is over")).await?;
            until_equal(site).await?;
            service.stop().await.ok();
        } else {
            epoch += 1;
            until_primary(&service, epoch).await;
            pair::until_settled(&service).await;
            let back = returned(other, "").await?;
            until_equal(other).await?;
            back.stop().await.ok();
            service.stop().await.ok();
            (site, other) = (other, site);
        }
        ends.push(end);
    }
    assert!(ends.contains(&End::Done) && ends.contains(&End::Undone));
    Ok(())
}
