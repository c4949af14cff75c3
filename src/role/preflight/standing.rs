//! Checks of the relation of both clusters: fences, identity, log kept on the primary, clocks.

use super::facts::Facts;
use super::there::There;
use super::{ok, refuse, unknown, warn};
use crate::cluster::{FenceRecord, RecoveryPoint};
use crate::domain::{PreflightCheck, Role};
use crate::observe::{Check, span};
use bytesize::ByteSize;
use std::time::Duration;

/// Maximum time for which a handover waits for a clock of the local datastore that is behind
/// Builder's newest id.
pub(crate) const CLOCK_WAIT: Duration = Duration::from_secs(5);
/// Difference of the clocks in seconds above which the check warns. NTP keeps clocks closer.
const CLOCKS_APART: f64 = 1.0;

pub(super) fn fence(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Fence;
    let open = match &facts.remembered {
        Ok(None) => return refuse(NAME, "not set: this cluster has no role on record", ""),
        Ok(Some(state)) => state.open.as_ref(),
        Err(error) => return unknown(NAME, error),
    };
    let peer = match &facts.there {
        Ok(there) => peers_fence(there),
        Err(_) => "the peer's fence is not known".into(),
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
            "remove this obstacle on the primary first",
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

/// Refuses if another cluster has fenced the primary: that cluster has taken its place, or is about
/// to, so this cluster must not hand it over. A read-only primary without a record was set so by
/// hand.
fn fenced_by_other(facts: &Facts, there: &There) -> Option<Check> {
    const NAME: PreflightCheck = PreflightCheck::Fence;
    let local = facts.remembered.as_ref().ok()?.as_ref()?;
    let record = there.record.as_ref().and_then(|there| there.fence.as_ref());
    match record {
        Some(fence) if is_own_fence(there, fence) => Some(warn(
            NAME,
            "the peer has fenced itself, because it could not renew the lease of the shared bucket",
            "make the store of the lease answer at the other site",
        )),
        Some(fence) if fence.by_cluster != local.cluster.id => Some(refuse(
            NAME,
            format!(
                "the peer was fenced by cluster {} under epoch {}: this cluster must not hand it over",
                fence.by_cluster, fence.epoch
            ),
            "find out which cluster is the primary now, and follow that one",
        )),
        None if there.seen.fenced => Some(warn(
            NAME,
            "the peer is read-only, and no record says by whom",
            "if nobody intended this, on the primary: ALTER DATABASE builder RESET default_transaction_read_only",
        )),
        _ => None,
    }
}

/// Returns whether a primary has fenced itself, because its lease had run out.
fn is_own_fence(there: &There, fence: &FenceRecord) -> bool {
    let record = there.record.as_ref();
    record.is_some_and(|record| record.cluster_id == fence.by_cluster) && !fence.settled
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

pub(super) fn peer_identity(facts: &Facts) -> Check {
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
            format!(
                "server {}, the server that was copied",
                there.seen.system_id
            ),
        ),
    }
}

/// Returns the reason why the peer is not the primary of the copy.
fn stranger(there: &There, point: &RecoveryPoint) -> Option<String> {
    if there.seen.system_id != point.system_id {
        let (found, copied) = (&there.seen.system_id, &point.system_id);
        return Some(format!(
            "the peer is server {found}, but server {copied} was copied"
        ));
    }
    let record = there.record.as_ref();
    let id = record.map_or("", |record| record.cluster_id.as_str());
    if let Some(was) = &point.peer_cluster
        && id != was
    {
        return Some(format!(
            "the peer's cluster id is {id:?}, but the copied cluster has {was:?}"
        ));
    }
    let role = record.and_then(|record| record.role);
    (role == Some(Role::Spare)).then(|| "the peer is a spare itself".to_string())
}

pub(super) fn peer_reachable(facts: &Facts) -> Check {
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

/// Checks the slot, which is needed to drain the last changes.
pub(super) fn wal(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Wal;
    let Some(point) = facts.point().filter(|_| facts.streams()) else {
        return ok(
            NAME,
            "the primary keeps no log for us: full copies are made",
        );
    };
    if !facts.is_planned() {
        return ok(NAME, "not checked: without the primary nothing is drained");
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
            "slot {} does not exist on the primary any more, or the primary has given it up",
            point.slot()
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
        point.slot()
    );
    if slot.held_bytes > bound / 2 {
        return warn(NAME, text, "let the service catch up first");
    }
    ok(NAME, text)
}

pub(super) fn clocks(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Clocks;
    let server = match &facts.server {
        Ok(server) => server,
        Err(error) => return unknown(NAME, error),
    };
    let drain = facts.config.takeover.drain_timeout.as_secs_f64();
    let step = "set both servers' clocks by NTP";
    // Ids are made of time: an id that is made here would be smaller than existing ones. Ids of the
    // future do not count, because the primary does not continue from them.
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
    let text = format!(
        "the primary's clock differs from the local clock by {}",
        span(offset.abs())
    );
    match offset.abs() {
        apart if apart > drain => {
            refuse(NAME, format!("{text}, over takeover.drain_timeout"), step)
        }
        apart if apart > CLOCKS_APART => warn(NAME, text, step),
        _ if to_come.is_some() => warn(
            NAME,
            format!(
                "{text}; an id of Builder's is of a time in the future ({}): a clock was wrong when it was made, and new ids are smaller",
                to_come.unwrap_or_default().format("%Y-%m-%d")
            ),
            "no step is needed if the primary's clock is right now",
        ),
        _ => ok(
            NAME,
            format!("{text}; the local clock is past Builder's newest id"),
        ),
    }
}
