//! `drill`: 0 the takeover would have worked, 1 it would have failed, 3 the drill could not run, 4
//! another drill is running.

use super::{exit, show};
use crate::config::Config;
use crate::role::{Drill, DrillStep, Rehearsal, drill};
use clap::Args;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Args)]
pub(super) struct DrillArguments {
    /// Number of artifacts to read from the local bucket, chosen at random, or `all`.
    #[arg(long, value_name = "N", default_value = "20", value_parser = sample)]
    sample: Sample,
    /// Command that the shell starts once the clone is writable. Its environment has PGHOST,
    /// PGPORT, PGUSER, PGPASSWORD and PGDATABASE.
    #[arg(long, value_name = "CMD")]
    exec: Option<String>,
    /// URL (plain HTTP) that is requested until it answers with success, for at most 60 s.
    #[arg(long, value_name = "URL", value_parser = url)]
    url: Option<http::Uri>,
}

#[derive(Clone, Copy)]
struct Sample(Option<usize>);

fn sample(text: &str) -> Result<Sample, String> {
    match text {
        "all" => Ok(Sample(None)),
        number => match number.parse() {
            Ok(number) => Ok(Sample(Some(number))),
            Err(_) => Err("expected a number or `all`".into()),
        },
    }
}

fn url(text: &str) -> Result<http::Uri, String> {
    let url: http::Uri = text.parse().map_err(|_| "this is not a URL".to_string())?;
    match (url.scheme_str(), url.host()) {
        (Some("http"), Some(_)) => Ok(url),
        _ => Err("expected a URL such as http://127.0.0.1:9636/v1/status".into()),
    }
}

pub(super) async fn run(config: &Config, arguments: &DrillArguments, as_json: bool) -> u8 {
    let rehearsal = Rehearsal {
        sample: arguments.sample.0,
        exec: arguments.exec.clone(),
        url: arguments.url.clone(),
    };
    // The handlers are installed before the drill makes anything, so that a signal cannot leave a
    // clone behind.
    let signals = [SignalKind::terminate(), SignalKind::interrupt()].map(signal);
    let [Ok(mut terminate), Ok(mut interrupt)] = signals else {
        eprintln!("error: cannot install the signal handlers on this system");
        return exit::UNFINISHED;
    };
    let stop = async {
        tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
    };
    let on_step = |step: &DrillStep| {
        let line = line(step);
        match as_json {
            true => eprintln!("{line}"),
            false => say!("{line}"),
        }
    };
    let drill = match Box::pin(drill(config, &rehearsal, on_step, stop)).await {
        Ok(drill) => drill,
        Err(error) => return show::failure(&error, as_json),
    };
    match as_json {
        true => show::json(&document(&drill)),
        false => print(&drill),
    }
    match drill.ok() {
        true => exit::DONE,
        false => exit::NO,
    }
}

fn line(step: &DrillStep) -> String {
    let word = if step.ok { "ok" } else { "FAILED" };
    format!(
        "{word} {} ({:.2} s): {}",
        step.name, step.seconds, step.text
    )
}

fn print(drill: &Drill) {
    let seconds = |of: Option<f64>| of.map(|seconds| format!("{seconds:.2} s"));
    if let Some(write) = seconds(drill.write_seconds) {
        say!("First write {write} after the start of the takeover.");
    }
    if let Some(answer) = seconds(drill.answer_seconds) {
        say!("First answer {answer} after the start of the takeover.");
    }
    match drill.ok() {
        true => say!("The drill succeeded."),
        false => say!("The drill FAILED."),
    }
}

fn document(drill: &Drill) -> Value {
    let step = |step: &DrillStep| json!({ "name": step.name, "ok": step.ok, "seconds": step.seconds, "text": step.text });
    json!({
        "format": 1,
        "time": drill.time.to_rfc3339(),
        "ok": drill.ok(),
        "write_seconds": drill.write_seconds,
        "answer_seconds": drill.answer_seconds,
        "steps": drill.steps.iter().map(step).collect::<Vec<_>>(),
    })
}
