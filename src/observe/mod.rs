//! The observation of a running service: one state, which all outputs only read.

mod clock;
mod counters;
mod get;
mod health;
mod health_step;
mod http;
mod meter;
mod metrics;
mod progress;
mod settings;
mod state;
mod status;
mod text;
mod view;

pub use clock::{Clock, Simulation};
pub use counters::Counters;
pub use get::get;
pub use health::{Health, Level, health};
pub use http::serve;
pub use meter::Meter;
pub use progress::{Listener, Phase, Progress, Silent, Step};
pub use settings::Settings;
pub use state::{
    ArchiveFacts, ArchiveProof, ArchiveTrouble, Arrivals, Artifacts, Baseline, Check, Checks,
    ClusterFacts, ConfigState, Generations, HandoverFacts, Held, Hold, Lag, LeaseFacts, LockFacts,
    Mode, NewestGeneration, OnPrimary, PairFacts, PeerRecord, Preflight, Reachability, Seen,
    ServiceState, SideStatus, SpareFacts, Standing, Unproven, Verified, Work,
};
pub use text::{describe, span};
pub use view::ServiceView;
