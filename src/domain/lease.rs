//! The lease of a shared bucket: one object that says which cluster takes live traffic.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use strum::{Display, IntoStaticStr};

/// The format that this program writes. It reads no other one.
const FORMAT: u32 = 1;
/// Maximum number of characters of a name in the lease.
const TEXT_MAX: usize = 1000;
/// Maximum time that a lease may name.
const TIME_MAX: Duration = Duration::from_secs(24 * 3600);

/// The content of the object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    format: u32,
    /// Random, made with the first lease and kept by all later ones.
    pub series: String,
    /// Number of the write in its series. A copy of an older time has a lower one.
    pub number: u64,
    /// The promotion of the holder.
    #[serde(flatten)]
    pub line: LeaseLine,
    pub state: LeaseState,
    /// The cluster that asks for the lease.
    pub asked_by: Option<Asker>,
    /// Position of the holder's log: behind its fence, or at its last renewal. Empty: not known.
    pub last_lsn: String,
    /// Random for each write, so that a writer recognises its own.
    pub nonce: String,
    ttl_ms: u64,
    fence_bound_ms: u64,
    pub isolated: Isolated,
    /// Why the holder cannot do what is asked; empty: nothing is asked, or it can.
    pub reason: String,
    /// The holder before the present one, to whom an undone takeover gives the lease back.
    pub former: Option<LeaseLine>,
    /// For people. Nothing is decided by it.
    pub written_at: DateTime<Utc>,
}

/// A holder and its place in the line of promotions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseLine {
    /// Id of the cluster.
    pub holder: String,
    pub site: String,
    pub epoch: i64,
    /// Id of its promotion, and of the promotion before; empty: there is none.
    pub promotion: String,
    pub parent: String,
}

/// The cluster that asks, and the epoch that it takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asker {
    pub cluster: String,
    pub epoch: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Display, IntoStaticStr)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum LeaseState {
    /// The holder takes live traffic.
    Held,
    /// Another cluster asks the holder to fence itself.
    Asked,
    /// The holder has fenced itself, and has proved it.
    Fenced,
    /// The holder has given it up.
    Free,
}

/// The promise of the holder for the time in which it cannot renew the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Display, IntoStaticStr)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum Isolated {
    /// It goes on, so nobody takes the lease without an operator's consent.
    GoOn,
    /// It fences itself within its time limit.
    Fence,
}

/// The terms that a holder writes into its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseTerms {
    /// Time for which the lease holds without a renewal.
    pub ttl: Duration,
    /// Maximum time that the holder's fence takes.
    pub fence_bound: Duration,
    pub isolated: Isolated,
}

impl Lease {
    /// Returns the first lease of a series.
    pub fn first(line: LeaseLine, terms: LeaseTerms, nonce: String, now: DateTime<Utc>) -> Lease {
        Lease {
            format: FORMAT,
            series: nonce.clone(),
            number: 1,
            line,
            state: LeaseState::Held,
            asked_by: None,
            last_lsn: String::new(),
            nonce,
            ttl_ms: milliseconds(terms.ttl),
            fence_bound_ms: milliseconds(terms.fence_bound),
            isolated: terms.isolated,
            reason: String::new(),
            former: None,
            written_at: now,
        }
    }

    /// Returns the next lease of the series, unchanged except for the marks of a write.
    pub fn next(&self, nonce: String, now: DateTime<Utc>) -> Lease {
        Lease {
            number: self.number.saturating_add(1),
            nonce,
            written_at: now,
            ..self.clone()
        }
    }

    /// Returns this lease as held by that cluster, to whom nobody asks anything.
    pub fn held_by(self, line: LeaseLine, terms: LeaseTerms) -> Lease {
        Lease {
            former: (line.holder != self.line.holder)
                .then(|| self.line.clone())
                .or(self.former),
            line,
            state: LeaseState::Held,
            asked_by: None,
            ttl_ms: milliseconds(terms.ttl),
            fence_bound_ms: milliseconds(terms.fence_bound),
            isolated: terms.isolated,
            reason: String::new(),
            ..self
        }
    }

    /// Returns the next lease, given back to that holder by the cluster that had asked for it or
    /// taken it. Nothing is promised in the holder's name.
    pub fn given_back(&self, to: LeaseLine, nonce: String, now: DateTime<Utc>) -> Lease {
        let terms = LeaseTerms {
            isolated: Isolated::GoOn,
            ..self.terms()
        };
        Lease {
            former: None,
            ..self.next(nonce, now).held_by(to, terms)
        }
    }

    pub fn terms(&self) -> LeaseTerms {
        LeaseTerms {
            ttl: Duration::from_millis(self.ttl_ms),
            fence_bound: Duration::from_millis(self.fence_bound_ms),
            isolated: self.isolated,
        }
    }

    /// Returns the time after which a holder that promised to fence itself has done so: its clock
    /// may be 5 % slower than ours.
    pub fn promise_kept_after(&self) -> Duration {
        let terms = self.terms();
        (terms.ttl + terms.fence_bound).mul_f64(1.05) + Duration::from_secs(1)
    }

    /// Returns whether that cluster asks for the lease.
    pub fn is_asked_by(&self, cluster: &str, epoch: i64) -> bool {
        let asker = self.asked_by.as_ref();
        asker.is_some_and(|asker| asker.cluster == cluster && asker.epoch == epoch)
    }

    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads a lease. The error says what is wrong.
    pub fn parse(text: &[u8]) -> Result<Lease, String> {
        let lease: Lease = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if lease.format != FORMAT {
            return Err(format!(
                "its format is {}, and this program reads {FORMAT}",
                lease.format
            ));
        }
        let lines = [Some(&lease.line), lease.former.as_ref()];
        if lines.into_iter().flatten().any(|line| line.epoch < 1) {
            return Err("it has an epoch below 1".into());
        }
        let names = lines.into_iter().flatten();
        let names =
            names.flat_map(|line| [&line.holder, &line.site, &line.promotion, &line.parent]);
        let others = [&lease.series, &lease.nonce, &lease.last_lsn, &lease.reason];
        if names.chain(others).any(|text| text.len() > TEXT_MAX) {
            return Err(format!("a text in it has more than {TEXT_MAX} bytes"));
        }
        if lease.line.holder.is_empty() || lease.nonce.is_empty() {
            return Err("it has no holder or no nonce".into());
        }
        if lease.number > i64::MAX.unsigned_abs() {
            return Err("its number is out of range".into());
        }
        let terms = lease.terms();
        if terms.ttl.is_zero() || terms.ttl.max(terms.fence_bound) > TIME_MAX {
            return Err("its times are not between 0 and 24 h".into());
        }
        Ok(lease)
    }
}

fn milliseconds(time: Duration) -> u64 {
    time.as_millis().try_into().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease() -> Lease {
        let line = LeaseLine {
            holder: "aaaaaaaa".into(),
            site: "dc1".into(),
            epoch: 1,
            promotion: "root-7".into(),
            parent: String::new(),
        };
        let terms = LeaseTerms {
            ttl: Duration::from_secs(15),
            fence_bound: Duration::from_secs(15),
            isolated: Isolated::Fence,
        };
        Lease::first(line, terms, "n".into(), DateTime::UNIX_EPOCH)
    }

    #[test]
    fn a_lease_is_read_as_it_was_written() {
        let lease = lease();
        assert_eq!(Lease::parse(lease.to_json().as_bytes()), Ok(lease.clone()));
        assert_eq!(lease.promise_kept_after(), Duration::from_millis(32_500));
    }

    #[test]
    fn a_lease_that_is_given_back_promises_nothing() {
        let (first, now) = (lease(), DateTime::UNIX_EPOCH);
        let other = LeaseLine {
            holder: "bbbbbbbb".into(),
            epoch: 2,
            ..first.line.clone()
        };
        let taken = first.next("m".into(), now).held_by(other, first.terms());
        let former = taken.former.clone().expect("the first holder");
        let back = taken.given_back(former, "o".into(), now);
        assert_eq!((back.number, &back.line), (3, &first.line));
        assert_eq!(back.isolated, Isolated::GoOn);
        assert_eq!((back.former, back.asked_by), (None, None));
        assert_eq!(back.series, first.series);
    }

    #[test]
    fn garbage_is_no_lease() {
        let spoilt = |spoil: fn(&mut Lease)| {
            let mut lease = lease();
            spoil(&mut lease);
            Lease::parse(lease.to_json().as_bytes())
        };
        assert!(spoilt(|_| ()).is_ok());
        assert!(spoilt(|lease| lease.format = 2).is_err());
        assert!(spoilt(|lease| lease.line.epoch = 0).is_err());
        assert!(spoilt(|lease| lease.line.holder = String::new()).is_err());
        assert!(spoilt(|lease| lease.nonce = String::new()).is_err());
        assert!(spoilt(|lease| lease.ttl_ms = 0).is_err());
        assert!(spoilt(|lease| lease.fence_bound_ms = u64::MAX).is_err());
        assert!(spoilt(|lease| lease.reason = "x".repeat(2000)).is_err());
        for text in ["", "{}", "null", "\u{0}\u{1}", "<html>busy</html>"] {
            assert!(Lease::parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
