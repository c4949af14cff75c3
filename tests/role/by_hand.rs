//! The verbs `promote` and `fence`: what a person does where the service cannot run.

use support::follow::followed;
use support::pair::{Pair, is_writable, returned, until_settled, write};
use support::{Factory, Output, Result, Service, Site};

async fn promote(site: &Site, epoch: &str) -> Output {
    site.warm_spare(&["promote", "--epoch", epoch]).await
}

fn refused(output: &Output, words: &str) {
    assert_eq!(output.code, Some(4), "{output}");
    assert!(output.stderr.contains(words), "{output}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spare_without_its_service_is_promoted_and_fences_the_old_primary_later() -> Result<()> {
    let pair = Pair::start("by_hand").await?;
    let site = &pair.there;
    let mut factory = Factory::new(3);
    factory.fill(&site.primary, 3).await?;
    let service = followed(site, "").await?;
    refused(&promote(site, "2").await, "another warm-spare");
    service.stop().await.ok();
    site.primary.pg.kill9();

    refused(
        &promote(site, "3").await,
        "the next one of this cluster, which is 2",
    );
    refused(&promote(site, "0").await, "which is 2");
    assert!(!is_writable(&site.spare).await);
    let done = promote(site, "2").await.ok();
    assert!(done.stdout.contains("the primary of epoch 2"), "{done}");
    assert!(is_writable(&site.spare).await);
    write(&site.spare, "after").await?;
    // No id is given twice: the sequences were ahead of the last ones that were copied.
    factory.fill(&site.spare, 2).await?;
    refused(&promote(site, "3").await, "the primary of epoch 2 already");

    // The old primary comes up again, with nobody to tell it.
    site.primary.pg.start_again().await?;
    assert!(is_writable(&site.primary).await);
    let shown = site.warm_spare(&["fence", "--peer"]).await;
    assert_eq!(shown.code, Some(0), "{shown}");
    let service = Service::start(site, "role = \"keep\"");
    until_settled(&service).await;
    assert!(!is_writable(&site.primary).await);
    let shown = site.warm_spare(&["--json", "fence", "--peer"]).await;
    assert_eq!(shown.code, Some(1), "{shown}");
    let by = &shown.json()["by"];
    assert_eq!(
        (&by["epoch"], &by["final"]),
        (&2.into(), &true.into()),
        "{shown}"
    );
    let back = returned(&pair.back, "").await?;
    back.stop().await.ok();
    service.stop().await.ok();
    Ok(())
}

/// A fenced old primary whose successor is lost takes the role back.
#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_old_primary_is_promoted_above_its_fence() -> Result<()> {
    let pair = Pair::start("by_hand_back").await?;
    let site = &pair.there;
    Factory::new(3).fill(&site.primary, 2).await?;
    let service = followed(site, "").await?;
    service.reconfigure(support::pair::PROMOTE);
    until_settled(&service).await;
    service.stop().await.ok();
    pair.back.write_config("role = \"keep\"");
    let shown = pair.back.warm_spare(&["fence"]).await;
    assert_eq!(shown.code, Some(1), "{shown}");
    assert!(shown.stdout.contains("under epoch 2, for good"), "{shown}");
    refused(&promote(&pair.back, "2").await, "which is 3");
    promote(&pair.back, "3").await.ok();
    assert!(is_writable(&site.primary).await);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fence_is_shown_and_lifted_only_where_nobody_needs_it() -> Result<()> {
    let site = support::site("fence_verb").await;
    Factory::new(3).fill(&site.primary, 2).await?;
    site.write_config("");
    let shown = site.warm_spare(&["fence"]).await;
    assert_eq!(shown.code, Some(0), "{shown}");
    site.warm_spare(&["sync"]).await.ok();
    let shown = site.warm_spare(&["fence"]).await;
    assert_eq!(shown.code, Some(1), "{shown}");
    assert!(
        shown.stdout.contains("This is the fence of every spare."),
        "{shown}"
    );
    let shown = site.warm_spare(&["fence", "--peer"]).await;
    assert_eq!(shown.code, Some(0), "{shown}");
    refused(
        &site.warm_spare(&["fence", "--lift"]).await,
        "is on record as spare",
    );
    assert!(!is_writable(&site.spare).await);
    site.warm_spare(&["release", "--local", "--force"])
        .await
        .ok();
    let shown = site.warm_spare(&["fence"]).await;
    assert_eq!(shown.code, Some(1), "{shown}");
    let lifted = site.warm_spare(&["fence", "--lift"]).await.ok();
    assert!(lifted.stdout.contains("The fence is lifted"), "{lifted}");
    assert!(is_writable(&site.spare).await);
    let again = site.warm_spare(&["fence", "--lift"]).await.ok();
    assert!(again.stdout.contains("was not fenced"), "{again}");
    Ok(())
}
