//! The status as text for people: state, age, faults, next step. It is made from the document
//! alone, so that it is the same wherever it is printed.

use serde_json::Value;

/// Returns five or six lines, and one more for each further reason.
pub fn describe(status: &Value) -> Vec<String> {
    let spare = status["role"]["actual"] != "primary" && status["state"] != "fenced";
    let second = if spare {
        freshness(status)
    } else {
        peer(status)
    };
    let mut lines = vec![headline(status), second];
    let reasons = status["health"]["reasons"].as_array();
    let reasons = reasons.map(Vec::as_slice).unwrap_or_default();
    if reasons.is_empty() {
        lines.push("Wrong:    nothing".into());
    }
    for reason in reasons {
        lines.push(format!(
            "Wrong:    {}: {}",
            word(&reason["code"]),
            word(&reason["text"])
        ));
    }
    lines.push(format!("Next:     {}", next_step(status)));
    lines.push(stores(status));
    lines.extend(takeover(status));
    lines
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap_or("unknown")
}

fn headline(status: &Value) -> String {
    let level = match status["health"]["level"].as_u64() {
        Some(0) => "OK",
        Some(1) => "WARNING",
        Some(2) => "CRITICAL",
        _ => "UNKNOWN",
    };
    let site = match word(&status["site"]) {
        "" => String::new(),
        site => format!(" {site}"),
    };
    let role = status["role"]["actual"]
        .as_str()
        .unwrap_or("no role on record");
    let state = match (word(&status["state"]), status["hold"]["reason"].as_str()) {
        (state, Some(reason)) => format!("{state} ({reason})"),
        (state, None) => state.to_string(),
    };
    let epoch = status["role"]["epoch"]
        .as_u64()
        .map_or(String::new(), |epoch| format!(", epoch {epoch}"));
    let baseline = &status["replication"]["baseline"];
    let under_way = match baseline["phase"].as_str() {
        Some(phase) => {
            let share = match (
                baseline["done_bytes"].as_f64(),
                baseline["total_bytes"].as_f64(),
            ) {
                (Some(done), Some(total)) => format!(" {:.0} %", (100.0 * done / total).min(100.0)),
                _ => String::new(),
            };
            format!(", copying: {phase}{share}")
        }
        None => String::new(),
    };
    let transition = &status["transition"];
    let under_way = match transition["step"].as_str() {
        Some(step) => format!(
            ", {}: step {} of {}, {step}",
            word(&transition["kind"]),
            transition["number"],
            transition["of"]
        ),
        None => under_way,
    };
    format!("{level}:{site} {state}{under_way} ({role}{epoch})")
}

fn freshness(status: &Value) -> String {
    let point = &status["recovery_point"];
    let Some(lsn) = point["lsn"].as_str() else {
        return "Fresh:    nothing was copied yet".into();
    };
    let lag = &status["lag"];
    let waits = match lag["bytes"].as_u64() {
        Some(0) => "no changes waited then".to_string(),
        Some(bytes) => format!("{} of changes wait", bytesize::ByteSize(bytes)),
        None => "it is not known whether changes wait".into(),
    };
    let offset = match status["peer"]["clock_offset_seconds"].as_f64() {
        Some(offset) if offset.abs() >= 1.0 => {
            let ahead = if offset > 0.0 { "ahead of" } else { "behind" };
            format!(
                "; the primary's clock is {} {ahead} the local clock",
                span(offset.abs())
            )
        }
        _ => String::new(),
    };
    format!(
        "Fresh:    complete {} ago, {waits}; recovery point {lsn}, committed {} by the primary's clock{offset}",
        span(lag["seconds"].as_f64().unwrap_or_default()),
        word(&point["commit_time"]),
    )
}

/// Returns the line about the peer. A primary has no freshness of its own; it matters whether a
/// spare could take over.
fn peer(status: &Value) -> String {
    let peer = &status["peer"];
    let role = match (peer["role"].as_str(), peer["epoch"].as_u64()) {
        (Some(role), Some(epoch)) => format!("{role} of epoch {epoch}"),
        _ if peer["datastore"]["reachable"] == true => "no role on record".into(),
        _ => "not known: the peer does not answer, or was not asked yet".into(),
    };
    let fenced = match peer["fenced"].as_bool() {
        Some(true) => ", read-only",
        Some(false) => ", may be written to",
        None => "",
    };
    format!("Peer:     {role}{fenced}")
}

/// Returns the line that says whether a promotion of this spare would work.
fn takeover(status: &Value) -> Option<String> {
    let preflight = &status["preflight"];
    let planned = preflight["planned"].as_str()?;
    let drill = &status["drill"];
    let drill = match drill["time"].as_str() {
        Some(time) if drill["ok"] == true => format!("; drill good at {time}"),
        Some(time) => format!("; drill FAILED at {time}"),
        None => "; never drilled".into(),
    };
    Some(format!(
        "Takeover: planned {planned}, unplanned {} (force_epoch = {}){drill}",
        word(&preflight["unplanned"]),
        status["role"]["next_epoch"]
    ))
}

/// Returns the next step of the worst reason, or of the hold if no reason is worse.
fn next_step(status: &Value) -> &str {
    let reasons = status["health"]["reasons"].as_array();
    let first = reasons.and_then(|reasons| reasons.first());
    first.map_or("nothing to do", |reason| word(&reason["next_step"]))
}

fn stores(status: &Value) -> String {
    let store = |side: &str, name: &str| {
        let found = &status[side][name];
        let verdict = match found["reachable"].as_bool() {
            Some(true) => "up",
            Some(false) => "DOWN",
            None => "not asked yet",
        };
        format!("{name} {verdict}")
    };
    let primary = status["state"] == "primary";
    let fence = match status["local"]["fenced"].as_bool() {
        _ if primary => "",
        Some(true) => ", fenced",
        Some(false) => ", NOT FENCED",
        None => "",
    };
    let unavailable = &status["artifacts"];
    let artifacts = match (
        unavailable["missing_on_primary"].as_u64(),
        unavailable["damaged_on_primary"].as_u64(),
    ) {
        (Some(missing), Some(damaged)) => {
            format!("; missing or damaged on the primary: {}", missing + damaged)
        }
        _ => String::new(),
    };
    format!(
        "Stores:   local {}, {}{fence}; peer {}, {}{artifacts}",
        store("local", "datastore"),
        store("local", "s3"),
        store("peer", "datastore"),
        store("peer", "s3"),
    )
}

/// Returns a length of time for people: `0.4 s`, `35 s`, `12 min`, `3 h 20 min`, `2 d 4 h`.
pub fn span(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..10 => format!("{seconds:.1} s"),
        10..120 => format!("{whole} s"),
        120..7200 => format!("{} min", whole / 60),
        7200..172_800 => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{} d {} h", whole / 86_400, whole % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::span;

    #[test]
    fn spans_are_short() {
        assert_eq!(span(0.44), "0.4 s");
        assert_eq!(span(35.9), "35 s");
        assert_eq!(span(725.0), "12 min");
        assert_eq!(span(12_000.0), "3 h 20 min");
        assert_eq!(span(187_200.0), "2 d 4 h");
    }
}
