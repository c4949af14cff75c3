//! Whatever befalls the service or its four servers, the spare stands at a commit of the primary, with its artifacts; and
//! Builder on the primary never notices that it is followed.

mod support;

use std::time::Duration;
use support::campaign::{Plan, trial};
use support::{Result, seed};

/// A sample of what `scripts/campaign` does at length.
const SAMPLE: Duration = Duration::from_secs(80);

#[tokio::test(flavor = "multi_thread")]
async fn the_spare_stands_at_a_commit_whatever_befalls_it() -> Result<()> {
    let mut plan = Plan::new("snapshot", seed());
    plan.time = SAMPLE;
    match trial(&plan).await {
        Ok(summary) => {
            println!("{summary}");
            Ok(())
        }
        // Its lines are to be read.
        Err(error) => panic!("{error}"),
    }
}
