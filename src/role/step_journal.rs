//! The steps of a transition. Each step is written to the journal before it begins, then shown and
//! logged. A kill may follow any step.

use crate::cluster::{Lock, StateDb};
use crate::domain::{Step, Transition, TransitionKind};
use crate::killpoint;
use crate::replication::ReplicationError;
use chrono::Utc;

/// Receiver of every step.
pub type OnStep<'a> = &'a (dyn Fn(Transition) + Send + Sync);

pub(super) struct StepJournal<'a> {
    pub state: &'a StateDb,
    pub lock: Lock,
    pub on_step: OnStep<'a>,
    pub entry: Transition,
}

impl<'a> StepJournal<'a> {
    pub(super) fn new(
        state: &'a StateDb,
        lock: Lock,
        on_step: OnStep<'a>,
        kind: TransitionKind,
        (epoch, asked): (i64, &str),
    ) -> Self {
        StepJournal {
            state,
            lock,
            on_step,
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

    pub(super) async fn step(&mut self, step: Step) -> Result<(), ReplicationError> {
        self.entry.step = Some(step);
        self.state.journal(self.lock, &self.entry).await?;
        let text = match self.entry.progress() {
            (Some(number), of) => format!("step {number} of {of}: {step}"),
            (None, _) => step.to_string(),
        };
        let (kind, epoch) = (self.entry.kind, self.entry.epoch);
        log::info!("{kind}: {text} (epoch {epoch})");
        (self.on_step)(self.entry.clone());
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
