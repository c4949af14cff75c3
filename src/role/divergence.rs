use crate::cluster::{Promotion, State};
use crate::config::Config;
use crate::replication::PassError;
pub struct Divergence {
    pub transactions: i64,
    pub rows: i64,
    pub packages: i64,
}
pub async fn record(_: &Config, _: &State, _: &Promotion) -> Result<Divergence, PassError> {
    Ok(Divergence {
        transactions: 0,
        rows: 0,
        packages: 0,
    })
}
