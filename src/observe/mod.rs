//! The observation of a running service: one state, which all outputs only read.

mod clock;
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

pub use clock::{Clock, Simulation};
pub use get::get;
pub use health::{Health, Level, health};
pub use http::serve;
pub use meter::Meter;
pub use metrics::Counters;
pub use progress::{Listener, Phase, Progress, Silent, Step};
pub use settings::Settings;
pub use state::{
    Artifacts, Baseline, Check, ConfigState, Held, Hold, Lag, Mode, Preflight, Reach, Seen,
    Sighting, Standing, State, Verified, Work,
};
pub use status::Watched;
pub use text::{describe, span};
