//! The status document: all known facts, in the form that `docs/reference.md` describes. An unknown
//! value is null.

use super::health::{awaited, health};
use super::meter::Meter;
use super::settings::Addresses;
use super::state::{ArchiveFacts, Reachability, ServiceState, SideStatus};
use super::view::ServiceView;
use crate::domain::Transition;
use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Value, json};

impl ServiceView {
    pub fn status(&self) -> Value {
        document(&self.borrow(), self.meter(), self.now())
    }
}

fn time(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Millis, true)
}

fn document(state: &ServiceState, meter: &Meter, now: DateTime<Utc>) -> Value {
    let health = health(state, meter, now);
    let lag = state.lag(now);
    json!({
        "format": 1,
        "version": env!("CARGO_PKG_VERSION"),
        "time": time(now),
        "site": state.settings.site,
        "cluster_id": state.cluster.id,
        "active": state.lock.active,
        "holder": state.lock.holder,
        "role": {
            "wanted": state.settings.wanted.as_str(),
            "actual": state.cluster.role.map(|role| role.into_str()),
            "epoch": state.cluster.epoch,
            // Value that force_epoch needs for a promotion that a check refuses.
            "next_epoch": state.next_epoch(),
            "since": state.cluster.since.map(time),
        },
        "state": state.name().into_str(),
        "hold": state.hold.as_ref().map(|hold| json!({
            "reason": hold.reason.into_str(),
            "detail": hold.detail,
            "next_step": hold.next_step,
            "since": time(hold.since),
        })),
        "health": {
            "level": health.level.code(),
            "reasons": health.reasons.iter()
                .map(|reason| json!({
                    "code": reason.code,
                    "text": reason.text,
                    "next_step": reason.next_step,
                }))
                .collect::<Vec<_>>(),
        },
        "recovery_point": state.spare.point.as_ref().map(|point| json!({
            "lsn": point.lsn,
            "commit_time": time(point.commit_time),
            "system_id": point.system_id,
            "timeline": point.timeline,
            // A copy has the schema of its own instant. A spare without later transactions had no
            // migration since.
            "schema_checked": lag.map(|lag| time(lag.complete_at)),
        })),
        "lag": lag.map(|lag| json!({
            "seconds": lag.seconds,
            "bytes": lag.bytes,
            "confirmed": time(lag.complete_at),
        })),
        "replication": replication(state, meter),
        "artifacts": artifacts(state, meter),
        "archives": state.archives.iter().map(archive).collect::<Vec<_>>(),
        "lease": lease(state),
        "counterpart": counterpart(state),
        "local": local(state),
        "peer": peer(state),
        "transition": state.handover.transition.as_ref().map(transition),
        "preflight": preflight(state),
        "verification": verification(state),
        "drill": state.checks.drill.as_ref().map(|drill| json!({
            "time": time(drill.time),
            "ok": drill.ok,
            "rto_seconds": drill.answer_seconds.or(drill.write_seconds),
            "text": drill.text,
        })),
        "config": {
            "valid": state.config.error.is_none(),
            "errors": state.config.error.iter().collect::<Vec<_>>(),
            "since": time(state.config.since),
        },
        "events": state.events.iter().map(|event| json!({
            "time": time(event.time),
            "kind": event.kind,
            "text": event.text,
            "change": event.change,
        })).collect::<Vec<_>>(),
    })
}

fn replication(state: &ServiceState, meter: &Meter) -> Value {
    let (done, total) = meter.progress();
    let known = |number: u64| (total > 0).then_some(number);
    json!({
        "mode": state.spare.mode.as_ref().map(|mode| if mode.stream { "stream" } else { "snapshot" }),
        "reason": state.spare.mode.as_ref().map(|mode| mode.reason.clone()),
        "direction": state.settings.direction.as_str(),
        "gate_waiting": state.spare.gate_waiting,
        "compared": state.checks.compared.map(time),
        "baseline": state.spare.baseline.map(|baseline| json!({
            "phase": meter.phase().map(|phase| phase.name()),
            // Bytes in the phase `tables`, items in other phases.
            "done_bytes": known(done),
            "total_bytes": known(total),
            "started": time(baseline.started),
        })),
    })
}

fn artifacts(state: &ServiceState, meter: &Meter) -> Value {
    let Some(found) = &state.spare.artifacts else {
        return Value::Null;
    };
    let arrivals = &state.spare.arrivals;
    let awaited = awaited(state, meter);
    json!({
        "missing_on_primary": found.missing,
        "damaged_on_primary": found.damaged,
        "unreadable_on_primary": state.spare.unreadable.as_ref().map_or(0, |(number, _)| *number),
        "unstorable": state.spare.unstorable.as_ref().map_or(0, |(number, _)| *number),
        "not_replicated": state.spare.not_replicated.as_ref().map_or(0, |(number, _)| *number),
        "unproven": state.spare.unproven.left,
        "awaited": awaited.as_ref().map_or(0, |(number, ..)| *number),
        "oldest_awaited": awaited.as_ref().map(|(_, key, _)| key),
        "oldest_awaited_seconds": awaited.as_ref().map(|(.., waits)| waits.as_secs_f64()),
        "arrival_p50_seconds": arrivals.percentile(0.5).map(|waits| waits.as_secs_f64()),
        "arrival_p99_seconds": arrivals.percentile(0.99).map(|waits| waits.as_secs_f64()),
        "staged": found.staged,
        "retired": found.retired,
        "looked_for_here": state.spare.sampled.as_ref().map(|sampled| sampled.looked_for),
        "missing_here": state.spare.sampled.as_ref().map(|sampled| sampled.absent.len()),
        "examples": found.examples.iter()
            .map(|(key, reason)| json!({ "key": key, "reason": reason.to_string() })).collect::<Vec<_>>(),
    })
}

fn archive(archive: &ArchiveFacts) -> Value {
    let proof = &archive.proof;
    json!({
        "name": archive.name,
        "due": archive.due.map(time),
        "making_since": archive.making.map(time),
        "generations": archive.generations,
        "newest": archive.newest.as_ref().map(|newest| json!({
            "name": newest.name,
            "time": time(newest.time),
            "made": time(newest.made),
            "joint": newest.joint,
        })),
        "trouble": archive.trouble.as_ref().map(|trouble| json!({
            "code": trouble.code.into_str(),
            "text": trouble.text,
            "next_step": trouble.next_step,
            "since": time(trouble.since),
        })),
        "verified": proof.verified.map(time),
        "faults": proof.verified.is_some().then_some(proof.faults),
        "oldest_proof": proof.oldest.map(time),
    })
}

fn lease(state: &ServiceState) -> Value {
    let facts = &state.lease;
    let Some(lease) = &facts.lease else {
        return match &facts.trouble {
            Some(trouble) => json!({ "trouble": trouble }),
            None => Value::Null,
        };
    };
    json!({
        "holder": lease.line.holder,
        "site": lease.line.site,
        "epoch": lease.line.epoch,
        "state": lease.state.into_str(),
        "asked_by": lease.asked_by.as_ref().map(|asker| asker.cluster.clone()),
        "isolated": lease.isolated.into_str(),
        "nonce": lease.nonce,
        "last_lsn": (!lease.last_lsn.is_empty()).then_some(&lease.last_lsn),
        "reason": (!lease.reason.is_empty()).then_some(&lease.reason),
        "written_at": time(lease.written_at),
        "permitted": facts.permitted,
        "trouble": facts.trouble,
    })
}

/// Returns the other process of a cluster that is fed from its primary's site.
fn counterpart(state: &ServiceState) -> Value {
    let Some(node) = &state.pair.other else {
        return Value::Null;
    };
    let told = &node.told;
    json!({
        "direction": told.direction.as_str(),
        "name": told.name,
        "site": told.site,
        "age_seconds": node.age().map(|age| age.as_secs_f64()),
        "wanted": told.role.as_str(),
        "force_epoch": told.force_epoch,
        "hold": (!told.hold.is_empty()).then_some(&told.hold),
    })
}

fn local(state: &ServiceState) -> Value {
    let mut document = side(&state.local, &state.settings.local);
    document["builder_keys"] = json!(state.builder_keys);
    document["generations"] = json!(state.generations.kept.as_ref().map(|generations| {
        let generation = |g: &crate::cluster::Generation| {
            json!({ "name": g.name, "created": time(g.created), "pinned": g.pinned })
        };
        generations.iter().map(generation).collect::<Vec<_>>()
    }));
    document
}

fn peer(state: &ServiceState) -> Value {
    let mut document = side(&state.peer, &state.settings.peer);
    document["role"] = json!(state.peer_record.role.map(|role| role.into_str()));
    document["epoch"] = json!(state.peer_record.epoch);
    document["ours"] = json!(state.on_primary.ours);
    document["orphans"] = json!(state.on_primary.orphans);
    document["footprint"] = json!(state.on_primary.footprint.map(|found| json!({
        "sessions": found.sessions,
        "walsenders": found.walsenders,
        "transaction_seconds": found.transaction_seconds,
        "xmin_age": found.xmin_age,
        "locks": found.locks,
        "temporary_slots": found.temporary_slots,
    })));
    document["wal_held_bytes"] = json!(state.on_primary.held.as_ref().map(|held| held.bytes));
    document["wal_unconfirmed_bytes"] =
        json!(state.on_primary.held.as_ref().map(|held| held.unconfirmed));
    document["wal_bound_bytes"] = json!(state.on_primary.held.as_ref().and_then(|held| held.bound));
    let offset = state
        .spare
        .confirmation
        .map(|found| found.clock_offset_seconds);
    document["clock_offset_seconds"] = json!(offset);
    document
}

/// Returns the fields that both sides have.
fn side(seen: &SideStatus, addresses: &Addresses) -> Value {
    let known = |text: &str| (!text.is_empty()).then(|| text.to_string());
    let reach = |reach: &Option<Reachability>| {
        let found = reach.as_ref();
        (
            found.map(|reach| reach.error.is_none()),
            found.and_then(|reach| reach.error.clone()),
            found.map(|reach| time(reach.since)),
        )
    };
    let (datastore, s3) = (reach(&seen.datastore), reach(&seen.s3));
    json!({
        "datastore": {
            "reachable": datastore.0,
            "error": datastore.1,
            "since": datastore.2,
            "address": known(&addresses.datastore),
            "version": seen.version,
            "tls": seen.tls,
            "source": known(addresses.datastore_source),
        },
        "s3": {
            "reachable": s3.0,
            "error": s3.1,
            "since": s3.2,
            "address": known(&addresses.s3),
            "source": known(addresses.s3_source),
        },
        "fenced": seen.fenced,
    })
}

fn transition(entry: &Transition) -> Value {
    let (number, of) = entry.progress();
    json!({
        "kind": entry.kind.into_str(),
        "step": entry.step_name(),
        "number": number.unwrap_or_default(),
        "of": of,
        "started": time(entry.started),
    })
}

fn preflight(state: &ServiceState) -> Value {
    let Some(found) = &state.checks.preflight else {
        return Value::Null;
    };
    json!({
        "time": time(found.time),
        "planned": found.planned.into_str(),
        "unplanned": found.unplanned.into_str(),
        "checks": found.checks.iter().map(|check| json!({
            "name": check.name.into_str(),
            "result": check.result.into_str(),
            "reason": check.reason,
            "next_step": check.next_step,
        })).collect::<Vec<_>>(),
    })
}

fn verification(state: &ServiceState) -> Value {
    let verified = state.checks.verified.as_ref();
    if verified.is_none() && state.checks.verification_error.is_none() && !state.checks.verifying {
        return Value::Null;
    }
    let record = verified.map(|verified| &verified.record);
    json!({
        "time": record.map(|record| time(record.time)),
        "deep": record.map(|record| record.deep),
        "differences": record.map(|record| record.differences),
        "examples": verified.map(|verified| verified.examples.clone()).unwrap_or_default(),
        "running": state.checks.verifying,
        "error": state.checks.verification_error,
    })
}
