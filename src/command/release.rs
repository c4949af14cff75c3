//! `release`: removes our objects from the peer, or those of another cluster, or our state on this
//! side; or prints how to do it.

use super::prepare::{obstacles, script, steps};
use super::{exit, show};
use crate::cluster::preparation::Step;
use crate::config::Config;
use crate::replication::{Release, Traces, lift_the_fence, release, remove_traces, traces_script};
use serde_json::{Value, json};

pub(super) async fn run(config: &Config, cluster: Option<&str>, print: bool, as_json: bool) -> u8 {
    let on_step = |step: &Step| {
        if as_json {
            eprintln!("removed: {}", step.what);
        } else {
            say!("{}", step.done("Removed"));
        }
    };
    match release(config, cluster, print, on_step).await {
        Ok(found) => {
            if as_json {
                show::json(&document(&found, print));
            } else if print {
                let peer = &config.peer.datastore;
                say!("{}", script("release", peer, &found.database, &found.plan));
            } else {
                print_result(&found);
            }
            exit::DONE
        }
        Err(error) => show::failure(&error, as_json),
    }
}

fn print_result(found: &Release) {
    if found.plan.steps.is_empty() {
        say!(
            "Nothing to do: the primary has nothing of cluster {}.",
            found.names.id
        );
    }
    for note in &found.plan.notes {
        say!("Note: {note}.");
    }
}

fn document(found: &Release, print: bool) -> Value {
    json!({
        "format": 1,
        "carried_out": !print,
        "cluster_id": found.names.id,
        "steps": steps(&found.plan.steps),
        "in_the_way": obstacles(&found.plan),
        "notes": found.plan.notes,
    })
}

pub(super) async fn run_local(config: &Config, print: bool, force: bool, as_json: bool) -> u8 {
    let found = match remove_traces(config, print, force).await {
        Ok(found) => found,
        Err(error) => return show::failure(&error, as_json),
    };
    let lift = lift_the_fence(config);
    if as_json {
        show::json(&json!({
            "format": 1,
            "carried_out": !print,
            "databases": found.databases,
            "schema": found.schema,
            "objects": found.objects.len(),
            "generations_kept": found.generations,
            "fenced": found.fenced,
            "lift_the_fence": found.fenced.then_some(lift),
        }));
    } else if print {
        say!(
            "-- warm-spare release --local: with psql, in database postgres of {}:{}",
            config.local.datastore.host,
            config.local.datastore.port
        );
        say!("{}", traces_script(config, &found).trim_end());
        if found.fenced {
            say!("-- kept: the fence; to lift it: {lift};");
        }
    } else {
        print_local(config, &found, &lift);
    }
    exit::DONE
}

fn print_local(config: &Config, found: &Traces, lift: &str) {
    if found.is_empty() {
        say!("Nothing to do: the local cluster has nothing of warm-spare.");
    }
    for database in &found.databases {
        say!("Removed: database {database}.");
    }
    if found.schema {
        say!(
            "Removed: schema warm_spare in database {}.",
            config.local.datastore.database
        );
    }
    if !found.objects.is_empty() {
        let objects = show::count(found.objects.len() as u64, "object");
        say!(
            "Removed: {objects} under {} in bucket {}.",
            config.artifacts.marks().unwrap_or_default(),
            config.local.s3.bucket_name
        );
    }
    for generation in &found.generations {
        say!("Kept: database {generation}, a generation.");
    }
    if found.fenced {
        say!(
            "Kept: the fence. Database {} is read-only; to lift it, in database postgres: {lift};",
            config.local.datastore.database
        );
    }
}
