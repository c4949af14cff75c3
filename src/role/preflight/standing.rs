//! Checks of how both clusters stand to each other: fences, identity, what is held, clocks.

use super::facts::Facts;
use super::there::There;
use super::{ok, refuse, unknown, warn};
use crate::cluster::CopiedPoint;
use crate::domain::{PreflightCheck, Role};
use crate::observe::{Check, span};
use bytesize::ByteSize;
use std::time::Duration;

/// A handover waits for a clock of the local datastore that is behind Builder's newest id by no more.
pub const CLOCK_WAIT: Duration = Duration::from_secs(5);
/// Clocks that NTP keeps are closer.
const CLOCKS_APART: f64 = 1.0;

pub fn fence(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Fence;
    let open = match &facts.remembered {
        Ok(None) => return refuse(NAME, "not set: this cluster was never told its role", ""),
        Ok(Some(state)) => state.open.as_ref(),
        Err(error) => return unknown(NAME, error),
    };
    let peer = match &facts.there {
        Ok(there) => peers_fence(there),
        Err(_) => "the peer's could not be asked for".into(),
    };
    let unfenceable = facts.there.as_ref().ok();
    let unfenceable = unfenceable.and_then(|there| there.server.unfenceable.as_ref());
    match open {
        None if unfenceable.is_some() => refuse(
            NAME,
            format!(
                "the peer could not be fenced: {}",
                unfenceable.map_or("", String::as_str)
            ),
            "take that away on the primary first",
        ),
        None => match facts
            .there
            .as_ref()
            .ok()
            .and_then(|there| fenced_by_other(facts, there))
        {
            Some(check) => check,
            None => ok(NAME, format!("holds here; {peer}")),
        },
        Some(why) => refuse(
            NAME,
            format!("{why}, so clients may have written; {peer}"),
            "let the service set it again (or run `warm-spare sync`), then `warm-spare verify`",
        ),
    }
}

/// A primary that somebody else has fenced is not this one's to hand over: another cluster has taken its place, or is about
/// to. One without a record was made read-only by hand.
fn fenced_by_other(facts: &Facts, there: &There) -> Option<Check> {
    const NAME: PreflightCheck = PreflightCheck::Fence;
    let ours = facts.remembered.as_ref().ok()?.as_ref()?;
    let record = there.record.as_ref().and_then(|there| there.fence.as_ref());
    match record {
        Some(fence) if fence.by_cluster != ours.cluster.id => Some(refuse(
            NAME,
            format!(
                "the peer was fenced by cluster {} under epoch {}: it is not this cluster's to hand over",
                fence.by_cluster, fence.epoch
            ),
            "see which cluster is the primary now, and follow that one",
        )),
        None if there.seen.fenced => Some(warn(
            NAME,
            "the peer is read-only, and no record says by whom",
            "if nobody meant it, on the primary: ALTER DATABASE builder RESET default_transaction_read_only",
        )),
        _ => None,
    }
}

fn peers_fence(there: &There) -> String {
    let record = there
        .record
        .as_ref()
        .and_then(|record| record.fence.as_ref());
    match (there.seen.fenced, record) {
        (false, _) => "the peer is open for writing, as a primary is".into(),
        (true, None) => "the peer is read-only".into(),
        (true, Some(fence)) => format!(
            "the peer is read-only, by cluster {} under epoch {}",
            fence.by_cluster, fence.epoch
        ),
    }
}

pub fn peer_identity(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::PeerIdentity;
    let there = match &facts.there {
        Ok(there) => there,
        Err(error) => return unknown(NAME, error),
    };
    if let Err(error) = &there.server.two {
        return unknown(NAME, error);
    }
    let strange = facts.point().and_then(|point| stranger(there, point));
    match strange {
        Some(text) => refuse(
            NAME,
            text,
            "check that peer.datastore names the primary that was copied",
        ),
        None => ok(
            NAME,
            format!("server {}, the one that was copied", there.seen.system_id),
        ),
    }
}

/// Why the peer is not the primary that the copy is of.
fn stranger(there: &There, point: &CopiedPoint) -> Option<String> {
    if there.seen.system_id != point.system_id {
        let (found, copied) = (&there.seen.system_id, &point.system_id);
        return Some(format!(
            "the peer is server {found}, and {copied} was copied"
        ));
    }
    let record = there.record.as_ref();
    let id = record.map_or("", |record| record.cluster_id.as_str());
    if !point.peer_cluster.is_empty() && id != point.peer_cluster {
        let was = &point.peer_cluster;
        return Some(format!(
            "the peer's cluster id is {id:?}, and that of the one that was copied {was:?}"
        ));
    }
    let role = record.and_then(|record| record.role);
    (role == Some(Role::Spare)).then(|| "the peer is a spare itself".to_string())
}

pub fn peer_reachable(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::PeerReachable;
    let (datastore, s3) = (&facts.config.peer.datastore, &facts.config.peer.s3);
    match (&facts.there, &facts.peer_bucket) {
        (Err(error), _) | (_, Err(error)) => unknown(NAME, error),
        (Ok(there), Ok(())) => ok(
            NAME,
            format!(
                "PostgreSQL {} at {}:{} and bucket {} answer",
                there.seen.server.version, datastore.host, datastore.port, s3.bucket_name
            ),
        ),
    }
}

/// The slot must be there to drain what is left.
pub fn wal(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Wal;
    let Some(point) = facts.point().filter(|_| facts.streams()) else {
        return ok(
            NAME,
            "nothing is held on the primary: whole copies are made",
        );
    };
    if !facts.is_planned() {
        return ok(
            NAME,
            "not looked at: without the primary nothing is drained",
        );
    }
    let there = match &facts.there {
        Ok(there) => there,
        Err(error) => return unknown(NAME, error),
    };
    let slot = there
        .seen
        .slot
        .as_ref()
        .filter(|slot| slot.wal_status != "lost");
    let Some(slot) = slot else {
        let text = format!(
            "slot {} is gone from the primary, or was given up there",
            point.slot
        );
        return refuse(
            NAME,
            text,
            "let the service make a new copy, which makes a new slot",
        );
    };
    let limit = facts.config.replication.wal_hold_limit;
    let bound = there.seen.wal_bound.map_or(limit, |bound| bound.min(limit));
    let (held, most) = (ByteSize(slot.held_bytes), ByteSize(bound));
    let text = format!(
        "slot {} holds {held} of at most {most} on the primary",
        point.slot
    );
    if slot.held_bytes > bound / 2 {
        return warn(NAME, text, "let the service catch up first");
    }
    ok(NAME, text)
}

pub fn clocks(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Clocks;
    let server = match &facts.server {
        Ok(server) => server,
        Err(error) => return unknown(NAME, error),
    };
    let drain = facts.config.takeover.drain_timeout.as_secs_f64();
    let step = "set both servers' clocks by NTP";
    // Ids are made of time: one that were made here would lie among those that are there. Ids of a time to come are none
    // that the primary goes on from.
    let to_come = facts.there.as_ref().ok().and_then(|there| {
        let until = there.clock() + super::there::ID_SLACK;
        server.newest_id.filter(|newest| *newest >= until)
    });
    let newest = match to_come {
        Some(_) => server.newest_past_id,
        None => server.newest_id,
    };
    let ahead = newest.map(|newest| (newest - server.clock).as_seconds_f64());
    if let Some(ahead) = ahead.filter(|ahead| *ahead > 0.0) {
        let text = format!(
            "the local clock is {} behind Builder's newest id",
            span(ahead)
        );
        return match ahead > CLOCK_WAIT.as_secs_f64() {
            true => refuse(NAME, text, step),
            false => warn(NAME, text, step),
        };
    }
    let there = match &facts.there {
        Ok(there) => there,
        Err(error) => return unknown(NAME, error),
    };
    let offset = there.seen.clock_offset_seconds;
    let text = format!("the primary's differs from ours by {}", span(offset.abs()));
    match offset.abs() {
        apart if apart > drain => {
            refuse(NAME, format!("{text}, over takeover.drain_timeout"), step)
        }
        apart if apart > CLOCKS_APART => warn(NAME, text, step),
        _ if to_come.is_some() => warn(
            NAME,
            format!(
                "{text}; an id of Builder's is of a time to come ({}): a clock was wrong when it was made, and new ids are smaller",
                to_come.unwrap_or_default().format("%Y-%m-%d")
            ),
            "nothing, if the primary's clock is right now",
        ),
        _ => ok(
            NAME,
            format!("{text}; the local one is past Builder's newest id"),
        ),
    }
}
