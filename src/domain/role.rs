//! The role of a cluster, and its changes.

use chrono::{DateTime, Utc};
use strum::{Display, EnumString, IntoStaticStr, VariantArray};

/// The role that a cluster has on record. A cluster without a record has none.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Display, EnumString, IntoStaticStr, VariantArray,
)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum Role {
    Spare,
    Primary,
}

/// How a cluster became the primary of an epoch.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Display, EnumString, IntoStaticStr, VariantArray,
)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum PromotionKind {
    /// Planned. Nothing was lost.
    Switchover,
    /// At the recovery point. Later transactions of the old primary may be lost.
    Failover,
    /// It was the primary before warm-spare was loaded.
    Declared,
    /// A fenced primary, or one of two primaries, was promoted by `force_epoch`.
    TakenBack,
    /// Nothing is on record about it.
    ByHand,
}

/// A change of role that a cluster carries out in journalled steps.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Display, EnumString, IntoStaticStr, VariantArray,
)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum TransitionKind {
    Switchover,
    Failover,
    Failback,
    TakenBack,
}

/// One step of a transition.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Display, EnumString, IntoStaticStr, VariantArray,
)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum Step {
    Preflight,
    Fence,
    Drain,
    Compare,
    Sequences,
    /// The shared file system comes to this site.
    Attach,
    /// The lease of the shared bucket is taken.
    Lease,
    Promote,
    /// The fence on the peer is being withdrawn.
    Undo,
    /// The primary is as it was before the handover.
    Undone,
    Peer,
    Divergence,
    Release,
    Role,
}

const HANDOVER: &[Step] = &[
    Step::Preflight,
    Step::Fence,
    Step::Drain,
    Step::Compare,
    Step::Attach,
    Step::Lease,
    Step::Sequences,
    Step::Promote,
];
const FAILBACK: &[Step] = &[
    Step::Peer,
    Step::Fence,
    Step::Divergence,
    Step::Release,
    Step::Role,
];

impl TransitionKind {
    /// Returns its steps, in their order.
    pub fn steps(self) -> &'static [Step] {
        match self {
            TransitionKind::Failback => FAILBACK,
            TransitionKind::Switchover | TransitionKind::Failover | TransitionKind::TakenBack => {
                HANDOVER
            }
        }
    }
}

/// A transition under way, as the journal has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition {
    pub kind: TransitionKind,
    pub epoch: i64,
    /// None: no step has begun.
    pub step: Option<Step>,
    pub started: DateTime<Utc>,
    /// The part of the configuration that asked for it.
    pub asked: String,
    /// Why it was, or is to be, undone.
    pub undone: Option<String>,
}

impl Transition {
    /// Returns the place of the step in the journal, from 1, and the number of steps. None: it is
    /// not one of them.
    pub fn progress(&self) -> (Option<usize>, usize) {
        let steps = self.kind.steps();
        let number = steps.iter().position(|step| Some(*step) == self.step);
        (number.map(|at| at + 1), steps.len())
    }

    /// Returns the step's name; empty: no step has begun.
    pub fn step_name(&self) -> &'static str {
        self.step.map_or("", |step| step.into_str())
    }
}
