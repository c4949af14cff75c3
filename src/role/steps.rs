//! The steps of a transition. Each step is written to the journal before it begins, then shown and
//! logged. A kill may follow any step.

use crate::cluster::{Lock, State};
use crate::domain::{Step, Transition, TransitionKind};
use crate::killpoint;
use crate::replication::PassError;
use chrono::Utc;

/// Receiver of every step.
pub type Told<'a> = &'a (dyn Fn(Transition) + Send + Sync);

pub(super) struct Walk<'a> {
    pub state: &'a State,
    pub lock: Lock,
    pub told: Told<'a>,
    pub entry: Transition,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        state: &'a State,
        lock: Lock,
        told: Told<'a>,
        kind: TransitionKind,
        (epoch, asked): (i64, &str),
    ) -> Self {
        Walk {
            state,
            lock,
            told,
            entry: Transition {
                kind,
                epoch,
                step: None,
                started: Utc::now(),
                asked: asked.to_string(),
                undone: None,
            },
        }
    }

    pub(super) async fn step(&mut self, step: Step) -> Result<(), PassError> {
        self.entry.step = Some(step);
        self.state.journal(self.lock, &self.entry).await?;
        let text = match self.entry.progress() {
            (Some(number), of) => format!("step {number} of {of}: {step}"),
            (None, _) => step.to_string(),
        };
        let (kind, epoch) = (self.entry.kind, self.entry.epoch);
        log::info!("{kind}: {text} (epoch {epoch})");
        (self.told)(self.entry.clone());
        killpoint::step(kind.into_str(), step.into_str());
        Ok(())
    }

    /// Returns whether the journal has reached that step or a later one.
    pub(super) fn was_at(&self, entry: Option<&Transition>, step: Step) -> bool {
        let steps = self.entry.kind.steps();
        let place = |step: Option<Step>| steps.iter().position(|known| Some(*known) == step);
        entry.is_some_and(|entry| {
            entry.kind == self.entry.kind
                && entry.epoch == self.entry.epoch
                && place(entry.step) >= place(Some(step))
        })
    }
}
