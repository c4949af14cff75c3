//! Clients behind a balancer while two sites exchange their roles. A sample of `scripts/campaign 100 1 front`.

use support::Result;
use support::balancer::WITH_SNIPPET;
use support::exchanges::trial;

#[tokio::test(flavor = "multi_thread")]
async fn no_read_fails_and_writes_are_told_when_to_come_again() -> Result<()> {
    let counts = trial(support::seed(), 3, &WITH_SNIPPET, true).await?;
    for one in &counts {
        println!("{one}");
    }
    for one in &counts {
        assert_eq!(one.faults(), Vec::<String>::new(), "{one}");
        assert!(one.refused > 0, "nobody wrote during a switchover: {one}");
    }
    Ok(())
}
