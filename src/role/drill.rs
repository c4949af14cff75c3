//! A takeover rehearsed on a clone of the spare's database. It does not touch replication, and it
//! removes everything that it makes. The result is the time that a takeover would take.

mod artifacts;
mod clone;
mod command;
mod leftovers;

use crate::cluster::{DrillRecord, LocalCluster, StateDb, WriteSession, lift_and_write, set_fence};
use crate::config::Config;
use crate::domain::{ErrorCode, Role};
use crate::replication::{ReplicationError, advance_sequences};
use chrono::{DateTime, Utc};
use clone::Clone;
use command::Running;
use std::time::Instant;

pub use leftovers::remove_drill_leftovers;

/// The parameters of a drill.
#[derive(Debug, Clone)]
pub struct Rehearsal {
    /// Number of artifacts to read; None: all of them.
    pub sample: Option<usize>,
    /// Command that the shell starts when the clone is writable.
    pub exec: Option<String>,
    /// URL that is requested until it answers with success.
    pub url: Option<http::Uri>,
}

/// A step of a drill, with its result.
#[derive(Debug, Clone, PartialEq)]
pub struct DrillStep {
    /// `clone`, `rows`, `artifacts`, `write`, `command` or `answer`.
    pub name: &'static str,
    pub ok: bool,
    pub text: String,
    pub seconds: f64,
}

/// A finished drill.
#[derive(Debug, Clone, PartialEq)]
pub struct Drill {
    pub time: DateTime<Utc>,
    pub steps: Vec<DrillStep>,
    /// Seconds from the start of the takeover to the first write, and to the first answer.
    pub write_seconds: Option<f64>,
    pub answer_seconds: Option<f64>,
}

impl Drill {
    pub fn ok(&self) -> bool {
        self.steps.iter().all(|step| step.ok)
    }

    fn record(&self) -> DrillRecord {
        let failed = self.steps.iter().filter(|step| !step.ok);
        let failed: Vec<String> = failed.map(|s| format!("{}: {}", s.name, s.text)).collect();
        DrillRecord {
            time: self.time,
            ok: self.ok(),
            text: failed.join("; "),
            write_seconds: self.write_seconds,
            answer_seconds: self.answer_seconds,
        }
    }
}

/// Runs a drill. `on_step` is called after each step. If `stop` comes first, everything is removed
/// too.
pub async fn drill(
    config: &Config,
    rehearsal: &Rehearsal,
    on_step: impl Fn(&DrillStep),
    stop: impl Future<Output = ()>,
) -> Result<Drill, ReplicationError> {
    let state = open(config).await?;
    leftovers::claim(&state).await?;
    leftovers::remove(&state).await?;
    let name = leftovers::new_name();
    let mut running = None;
    let work = Work {
        config,
        rehearsal,
        state: &state,
        name: &name,
    };
    let done = {
        let rehearsing = Box::pin(work.run(&on_step, &mut running));
        tokio::select! {
            done = rehearsing => done,
            () = stop => Err(ReplicationError::Precondition {
                check: ErrorCode::Interrupted,
                text: "the drill was interrupted by a signal".into(),
                next_step: "the drill has removed its clone; run it again".into(),
            }),
        }
    };
    if let Some(running) = running {
        running.end().await;
    }
    let removed = state.session().drop_database(&name).await;
    let drill = done?;
    removed?;
    state.record_drill(&drill.record()).await?;
    Ok(drill)
}

/// Opens the state of a spare that has a recovery point.
async fn open(config: &Config) -> Result<StateDb, ReplicationError> {
    let state = LocalCluster::of(config)
        .existing_state()
        .await?
        .ok_or_else(ReplicationError::nothing_copied)?;
    if state.cluster().await?.role == Some(Role::Primary) {
        return Err(ReplicationError::Refused {
            rule: ErrorCode::Role,
            text: "this cluster is the primary: there is nothing for it to take over".into(),
            next_step: "run the drill on the spare".into(),
        });
    }
    state
        .recovery_point()
        .await?
        .ok_or_else(ReplicationError::nothing_copied)?;
    Ok(state)
}

struct Work<'a> {
    config: &'a Config,
    rehearsal: &'a Rehearsal,
    state: &'a StateDb,
    /// Name of the clone.
    name: &'a str,
}

/// The finished steps.
struct Steps<'a> {
    on_step: &'a dyn Fn(&DrillStep),
    steps: Vec<DrillStep>,
}

impl Steps<'_> {
    /// Adds a step that began at `since`, with its success and its text.
    fn add(&mut self, name: &'static str, since: Instant, (ok, text): (bool, String)) {
        let step = DrillStep {
            name,
            ok,
            text,
            seconds: since.elapsed().as_secs_f64(),
        };
        (self.on_step)(&step);
        self.steps.push(step);
    }
}

impl Work<'_> {
    async fn run(
        &self,
        on_step: &dyn Fn(&DrillStep),
        running: &mut Option<Running>,
    ) -> Result<Drill, ReplicationError> {
        let steps = Vec::new();
        let mut steps = Steps { on_step, steps };
        let time = Utc::now();
        let inside = self.copy(&mut steps).await?;
        set_fence(self.state.session(), self.name).await?;
        let taken_over = Instant::now();
        let written = self.take_over(&inside).await;
        let write_seconds = written.is_ok().then(|| taken_over.elapsed().as_secs_f64());
        steps.add("write", taken_over, result_of(written));
        let mut answer_seconds = None;
        if write_seconds.is_some() {
            let answered = self.start_and_ask(&mut steps, running).await?;
            answer_seconds = answered.then(|| taken_over.elapsed().as_secs_f64());
        }
        Ok(Drill {
            time,
            steps: steps.steps,
            write_seconds,
            answer_seconds,
        })
    }

    /// Makes the clone, and checks the clone and its artifacts.
    async fn copy(&self, steps: &mut Steps<'_>) -> Result<WriteSession, ReplicationError> {
        let begun = Instant::now();
        let clone = Clone::make(self.config, self.state.session(), self.name).await?;
        steps.add("clone", begun, (true, clone.describe()));

        let begun = Instant::now();
        let inside = LocalCluster::of(self.config).database(self.name).await?;
        steps.add("rows", begun, clone.compare(&inside).await?);

        let begun = Instant::now();
        let (sample, unavailable) = (self.rehearsal.sample, clone.unavailable());
        let reading = artifacts::read(self.config, &inside, unavailable, sample);
        steps.add("artifacts", begun, Box::pin(reading).await?);
        Ok(inside)
    }

    /// Starts the command, and returns whether there was an answer.
    async fn start_and_ask(
        &self,
        steps: &mut Steps<'_>,
        running: &mut Option<Running>,
    ) -> Result<bool, ReplicationError> {
        let begun = Instant::now();
        if let Some(command) = &self.rehearsal.exec {
            *running = Some(Running::start(self.config, self.name, command)?);
        }
        if let Some(url) = &self.rehearsal.url {
            let answered = command::await_answer(url, running).await;
            let there = answered.is_ok();
            steps.add("answer", begun, result_of(answered));
            return Ok(there);
        }
        if let Some(running) = running {
            steps.add("command", begun, result_of(running.settle().await));
        }
        Ok(false)
    }

    /// Does what a failover would do: moves sequences past the last known ids, lifts the fence, and
    /// writes.
    async fn take_over(&self, inside: &WriteSession) -> Result<String, String> {
        let taken = async {
            advance_sequences(inside).await?;
            let local = &self.config.local.datastore;
            lift_and_write(self.state.session(), local, self.name).await?;
            Ok::<(), ReplicationError>(())
        };
        match taken.await {
            Ok(()) => Ok("the first write was committed".into()),
            Err(error) => Err(error.to_string()),
        }
    }
}

fn result_of(result: Result<String, String>) -> (bool, String) {
    match result {
        Ok(text) => (true, text),
        Err(text) => (false, text),
    }
}
