use crate::config::Config;
use crate::observe::Check;
use std::time::Duration;
pub enum Purpose {
    Planned,
    Unplanned,
}
pub async fn preflight(_: &Config, _: Purpose, _: Duration) -> Vec<Check> {
    Vec::new()
}
