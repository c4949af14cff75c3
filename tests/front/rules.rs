//! The rules of each snippet, on sides whose answers the test sets.

use bytes::Bytes;
use support::balancer::{Addresses, Balancer, Kind, WITH_SNIPPET};
use support::http_fault::{Fault, HttpFault};
use support::service::SOON;
use support::visitors::{Answer, ask};
use support::{Result, wait_until};

const PATH: &str = "/v1/depot/pkgs/core/zlib/1/1";
const SENTENCE: &str = "Builder takes no writes at this moment";

/// Two sites. A side's frontend and its `warm-spare` answer as the test says.
struct Sides {
    builder: [HttpFault; 2],
    warm_spare: [HttpFault; 2],
    balancer: Balancer,
}

impl Sides {
    /// The first one is the primary; the frontends answer 200 to all.
    async fn start(kind: Kind) -> Result<Sides> {
        let never = support::ports::free_port()?;
        let both = async || -> Result<[HttpFault; 2]> {
            Ok([
                HttpFault::start(never).await?,
                HttpFault::start(never).await?,
            ])
        };
        let (builder, warm_spare) = (both().await?, both().await?);
        let addresses =
            [0, 1].map(|side| Addresses::here(builder[side].port(), warm_spare[side].port()));
        for side in 0..2 {
            answer(&builder[side], side, 200);
            tell(&warm_spare[side], side == 0);
        }
        let sides = Sides {
            balancer: Balancer::start(kind, addresses).await?,
            builder,
            warm_spare,
        };
        sides.until_primary(Some(0)).await;
        sides.until_a_500_is_shown().await;
        answer(&sides.builder[0], 0, 200);
        Ok(sides)
    }

    async fn ask(&self, method: &str) -> Answer {
        for builder in &self.builder {
            builder.forget();
        }
        let asked = ask(self.balancer.port(), method, PATH, &[], Bytes::new()).await;
        asked.unwrap_or_else(|error| panic!("{method}: {error}; {}", self.balancer.said()))
    }

    /// Returns how often each side's frontend was asked for the path.
    fn asked(&self) -> [usize; 2] {
        let count = |builder: &HttpFault| {
            let requests = builder.requests();
            requests.iter().filter(|(_, path)| path == PATH).count()
        };
        [count(&self.builder[0]), count(&self.builder[1])]
    }

    /// Tells which side is the primary, and waits until the balancer goes by it.
    async fn set_primary(&self, primary: Option<usize>) {
        for side in 0..2 {
            tell(&self.warm_spare[side], primary == Some(side));
        }
        self.until_primary(primary).await;
    }

    /// After its start HAProxy takes each side for one that takes over, until it has asked often enough.
    async fn until_a_500_is_shown(&self) {
        answer(&self.builder[0], 0, 500);
        wait_until("a 500 is shown", SOON, || async {
            match self.ask("POST").await.status {
                500 => Ok(()),
                other => Err(format!("{other}").into()),
            }
        })
        .await;
    }

    async fn until_primary(&self, primary: Option<usize>) {
        wait_until("the balancer goes by /primary", SOON, || async {
            let answer = self.ask("DELETE").await;
            let by = answer.side();
            match by == primary {
                true => Ok(()),
                false => Err(format!("{} by {by:?}", answer.status).into()),
            }
        })
        .await;
    }
}

fn answer(builder: &HttpFault, side: usize, status: u16) {
    let headers = vec![("x-side", ["0", "1"][side])];
    builder.set(move |_| Fault::RespondWith(status, headers.clone(), Bytes::new()));
}

fn tell(warm_spare: &HttpFault, primary: bool) {
    let (status, state) = match primary {
        true => (200, "{\"state\":\"primary\"}"),
        false => (503, "{\"state\":\"following\"}"),
    };
    warm_spare.set(move |_| Fault::Respond(status, state.into()));
}

/// Whether it is the answer by which a client knows when to come again.
fn refuses(answer: &Answer) -> bool {
    let text = answer.body.as_ref().expect("a whole body");
    answer.status == 503
        && answer.headers.contains_key("retry-after")
        && String::from_utf8_lossy(text).contains(SENTENCE)
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_go_to_the_primary() -> Result<()> {
    for kind in WITH_SNIPPET {
        let sides = Sides::start(kind).await?;
        for (primary, expected) in [(0, [1, 0]), (1, [0, 1])] {
            sides.set_primary(Some(primary)).await;
            for method in ["GET", "HEAD", "POST", "PUT", "DELETE"] {
                let answer = sides.ask(method).await;
                assert_eq!(answer.status, 200, "{kind:?} {method}");
                assert_eq!(answer.side(), Some(primary), "{kind:?} {method}");
                assert_eq!(sides.asked(), expected, "{kind:?} {method}");
            }
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_is_tried_once_more_at_the_other_side() -> Result<()> {
    for kind in WITH_SNIPPET {
        let sides = Sides::start(kind).await?;
        for status in [500, 502, 503, 504] {
            answer(&sides.builder[0], 0, status);
            for method in ["GET", "HEAD"] {
                let answer = sides.ask(method).await;
                assert_eq!(answer.status, 200, "{kind:?} {method} {status}");
                assert_eq!(sides.asked(), [1, 1], "{kind:?} {method} {status}");
            }
        }
        // Both sides say that it fails: they are asked three times at most.
        answer(&sides.builder[1], 1, 500);
        answer(&sides.builder[0], 0, 500);
        assert_eq!(sides.ask("GET").await.status, 500, "{kind:?}");
        let asked = sides.asked();
        assert!(
            asked.iter().all(|times| (1..=3).contains(times)),
            "{kind:?} {asked:?}"
        );
        // The other side's Builder does not run, and the session of this one was just ended.
        sides.builder[1].set(|_| Fault::Drop);
        let first = std::sync::atomic::AtomicBool::new(true);
        sides.builder[0].set(move |_| {
            let first = first.swap(false, std::sync::atomic::Ordering::Relaxed);
            Fault::Respond(if first { 500 } else { 200 }, Bytes::new())
        });
        assert_eq!(sides.ask("GET").await.status, 200, "{kind:?}");
        // A side that closes the connection.
        answer(&sides.builder[1], 1, 200);
        sides.builder[0].set(|_| Fault::Drop);
        assert_eq!(sides.ask("GET").await.status, 200, "{kind:?}");
        // What the primary does not have is not there, whatever an older side has.
        answer(&sides.builder[0], 0, 404);
        assert_eq!(sides.ask("GET").await.status, 404, "{kind:?}");
        assert_eq!(sides.asked(), [1, 0], "{kind:?}");
    }
    Ok(())
}

/// One of the two may not have the newest rows yet.
#[tokio::test(flavor = "multi_thread")]
async fn while_nobody_is_the_primary_reads_are_answered_by_any_side() -> Result<()> {
    for kind in WITH_SNIPPET {
        let sides = Sides::start(kind).await?;
        sides.set_primary(None).await;
        for (missing, other) in [(0, 1), (1, 0)] {
            answer(&sides.builder[missing], missing, 404);
            answer(&sides.builder[other], other, 200);
            for _ in 0..4 {
                let answer = sides.ask("GET").await;
                assert_eq!(
                    (answer.status, answer.side()),
                    (200, Some(other)),
                    "{kind:?}"
                );
            }
        }
        answer(&sides.builder[1], 1, 404);
        answer(&sides.builder[0], 0, 404);
        assert_eq!(sides.ask("GET").await.status, 404, "{kind:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_goes_to_one_side_once() -> Result<()> {
    for kind in WITH_SNIPPET {
        let sides = Sides::start(kind).await?;
        for status in [400, 403, 404, 409, 500, 504] {
            answer(&sides.builder[0], 0, status);
            for method in ["POST", "PUT", "DELETE"] {
                let answer = sides.ask(method).await;
                // A true error stays visible while the side is the primary.
                assert_eq!(answer.status, status, "{kind:?} {method}");
                assert_eq!(sides.asked(), [1, 0], "{kind:?} {method} {status}");
            }
        }
        sides.builder[0].set(|_| Fault::Drop);
        for method in ["POST", "PUT", "DELETE"] {
            let answer = sides.ask(method).await;
            assert!([502, 503].contains(&answer.status), "{kind:?} {method}");
            assert_eq!(sides.asked(), [1, 0], "{kind:?} {method}");
        }
        // Nobody is asked while nobody is the primary.
        answer(&sides.builder[0], 0, 200);
        sides.set_primary(None).await;
        for method in ["POST", "PUT", "DELETE"] {
            let answer = sides.ask(method).await;
            assert!(refuses(&answer), "{kind:?} {method}: {answer:?}");
            assert_eq!(sides.asked(), [0, 0], "{kind:?} {method}");
        }
    }
    Ok(())
}

/// The balancer's last answer of that side is older than the fence.
#[tokio::test(flavor = "multi_thread")]
async fn a_500_of_a_side_that_is_no_primary_any_more_becomes_503() -> Result<()> {
    for kind in WITH_SNIPPET {
        let sides = Sides::start(kind).await?;
        answer(&sides.builder[0], 0, 500);
        // The other side has begun to take over.
        let promoting = || Fault::Respond(503, "{\"state\":\"promoting\"}".into());
        sides.warm_spare[1].set(move |_| promoting());
        let refused = wait_until("the takeover is seen", SOON, || async {
            tell(&sides.warm_spare[0], false);
            let answer = sides.ask("POST").await;
            let again = refuses(&answer);
            tell(&sides.warm_spare[0], true);
            match again {
                true => Ok(answer),
                false => Err(format!("{answer:?}").into()),
            }
        })
        .await;
        assert_eq!(refused.status, 503, "{kind:?}");
    }
    Ok(())
}
