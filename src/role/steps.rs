//! The steps of a transition. Each step is written to the journal before it begins, then shown and
//! logged. A kill may follow any step.

use crate::cluster::{Lock, State, Transition};
use crate::killpoint;
use crate::observe;
use crate::replication::PassError;
use chrono::Utc;

/// Receiver of every step.
pub type Told<'a> = &'a (dyn Fn(observe::Transition) + Send + Sync);

pub const HANDOVER: &[&str] = &[
    "preflight",
    "fence",
    "drain",
    "compare",
    "sequences",
    "promote",
];
pub const FAILBACK: &[&str] = &["peer", "fence", "divergence", "release", "role"];

pub struct Walk<'a> {
    pub state: &'a State,
    pub lock: Lock,
    pub told: Told<'a>,
    pub entry: Transition,
    pub steps: &'static [&'static str],
}

impl<'a> Walk<'a> {
    pub fn new(
        state: &'a State,
        lock: Lock,
        told: Told<'a>,
        kind: &str,
        (epoch, asked): (i64, &str),
    ) -> Self {
        Walk {
            state,
            lock,
            told,
            entry: Transition {
                kind: kind.to_string(),
                epoch,
                step: String::new(),
                started: Utc::now(),
                asked: asked.to_string(),
                undone: None,
            },
            steps: match kind {
                "failback" => FAILBACK,
                _ => HANDOVER,
            },
        }
    }

    pub async fn step(&mut self, name: &'static str) -> Result<(), PassError> {
        self.entry.step = name.to_string();
        self.state.journal(self.lock, &self.entry).await?;
        let number = self.steps.iter().position(|step| *step == name);
        let shown = observe::Transition {
            kind: self.entry.kind.clone(),
            step: name.to_string(),
            number: number.map_or(0, |at| at + 1),
            of: self.steps.len(),
            started: self.entry.started,
        };
        let step = match number {
            Some(at) => format!("step {} of {}: {name}", at + 1, self.steps.len()),
            None => name.to_string(),
        };
        let (kind, epoch) = (&self.entry.kind, self.entry.epoch);
        log::info!("{kind}: {step} (epoch {epoch})");
        (self.told)(shown);
        killpoint::step(&self.entry.kind, name);
        Ok(())
    }

    /// Returns whether the journal has reached that step or a later one.
    pub fn was_at(&self, entry: Option<&Transition>, name: &str) -> bool {
        let place = |step: &str| self.steps.iter().position(|known| *known == step);
        entry.is_some_and(|entry| {
            entry.kind == self.entry.kind
                && entry.epoch == self.entry.epoch
                && place(&entry.step) >= place(name)
        })
    }
}
