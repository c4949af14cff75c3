//! An upgrade of both sites, the spare first. `scripts/campaign N SEED upgrade` measures it.

use support::Result;
use support::balancer::Kind;
use support::postgres::other_version;
use support::upgrades::trial;

#[tokio::test(flavor = "multi_thread")]
async fn both_sites_are_upgraded_and_builder_is_away_for_two_handovers() -> Result<()> {
    let Some(newer) = other_version(18) else {
        support::skip("no PostgreSQL 18 here (scripts/setup: pip)");
        return Ok(());
    };
    let upgrade = trial(support::seed(), Kind::Nginx, &newer).await?;
    println!("{upgrade}");
    assert_eq!(upgrade.counts.faults(), Vec::<String>::new(), "{upgrade}");
    assert_eq!(upgrade.objects_written_again, 0, "{upgrade}");
    assert_eq!(upgrade.strays, 0, "{upgrade}");
    let copies: u64 = upgrade.copies.iter().map(|(_, copies)| copies).sum();
    assert_eq!(copies, 3, "{upgrade}");
    let (result, reason) = upgrade.no_way_back;
    assert_eq!(result, "warn", "{reason}");
    assert!(reason.contains("18 here, 15 on the primary"), "{reason}");
    Ok(())
}
