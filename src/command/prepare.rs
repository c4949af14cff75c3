//! `prepare`: makes on the primary what the stream needs, or prints the SQL for a database
//! administrator.

use super::{exit, show};
use crate::cluster::preparation::{Plan, Step};
use crate::config::{Config, Datastore};
use crate::replication::{Because, Choice, Prepare, prepare};
use serde_json::{Value, json};

pub(super) async fn run(
    config: &Config,
    print: bool,
    bound_other_slots: bool,
    as_json: bool,
) -> u8 {
    let on_step = |step: &Step| {
        if as_json {
            eprintln!("made: {}", step.what);
        } else {
            say!("{}", step.done("Made"));
        }
    };
    match prepare(config, print, bound_other_slots, on_step).await {
        Ok(found) => {
            if as_json {
                show::json(&document(&found, print));
            } else if print {
                say!(
                    "{}",
                    script(
                        "prepare",
                        &config.peer.datastore,
                        &found.database,
                        &found.plan
                    )
                );
            } else {
                print_result(&found);
            }
            exit::DONE
        }
        Err(error) => show::failure(&error, as_json),
    }
}

fn print_result(found: &Prepare) {
    if found.plan.steps.is_empty() {
        say!("Nothing to do: everything that prepare makes exists already.");
    }
    for note in &found.plan.notes {
        say!("Note: {note}.");
    }
    match &found.choice {
        Choice::Stream => say!("Stream: possible. The service uses it."),
        Choice::Snapshot(because) | Choice::NotPrepared(because) => {
            say!(
                "Stream: not yet. {}. Next step: {}.",
                because.reason,
                because.change
            );
        }
    }
}

/// Returns the plan as a script for psql. Obstacles that the script cannot remove, and notes, come
/// first as comments.
pub(super) fn script(verb: &str, peer: &Datastore, database: &str, plan: &Plan) -> String {
    let mut lines = vec![format!(
        "-- warm-spare {verb}: with psql, as a superuser, in database {database} of {}:{}",
        peer.host, peer.port
    )];
    for obstacle in &plan.obstacles {
        lines.push(format!(
            "-- IN THE WAY: {}. {}",
            obstacle.text, obstacle.next_step
        ));
    }
    for note in &plan.notes {
        lines.push(format!("-- note: {note}"));
    }
    if plan.steps.is_empty() && plan.grants.is_empty() {
        lines.push("-- nothing to do".into());
        return lines.join("\n");
    }
    lines.push(
        "-- each statement waits at most 200 ms for a lock: after a timeout, run the script again from that statement".into(),
    );
    lines.push("\\set ON_ERROR_STOP on".into());
    let steps = plan.steps.iter().chain(&plan.grants);
    lines.extend(steps.map(|step| format!("\n{}", step.script().trim_end())));
    lines.join("\n")
}

pub(super) fn steps(steps: &[Step]) -> Value {
    let steps = steps.iter().map(|step| {
        json!({
            "what": step.what,
            "reason": step.reason,
            "sql": step.sql,
        })
    });
    steps.collect()
}

pub(super) fn obstacles(plan: &Plan) -> Value {
    let obstacles = plan.obstacles.iter().map(|obstacle| {
        json!({
            "code": obstacle.check.into_str(),
            "text": obstacle.text,
            "next_step": obstacle.next_step,
        })
    });
    obstacles.collect()
}

fn document(found: &Prepare, print: bool) -> Value {
    let (possible, because) = match &found.choice {
        Choice::Stream => (true, None),
        Choice::Snapshot(because) | Choice::NotPrepared(because) => (false, Some(because)),
    };
    let part = |part: fn(&Because) -> &String| because.map(part);
    json!({
        "format": 1,
        "carried_out": !print,
        "steps": steps(&found.plan.steps),
        "grants": steps(&found.plan.grants),
        "in_the_way": obstacles(&found.plan),
        "notes": found.plan.notes,
        "stream": {
            "possible": possible,
            "reason": part(|because| &because.reason),
            "change": part(|because| &because.change),
        },
        "ours": found.prepared.ours(),
        "orphans": found.prepared.orphans().iter()
            .map(|(id, what)| json!({ "cluster_id": id, "what": what })).collect::<Vec<_>>(),
    })
}
