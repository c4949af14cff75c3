//! The operator's own command that fences the other site: it revokes the key of that site's store,
//! or stops its Builder. Its success is a proof.

use crate::config::Config;
use crate::domain::ErrorCode;
use crate::replication::ReplicationError;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

/// Time limit of the command.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs the command. False: none is configured.
pub async fn run_fence_command(config: &Config, epoch: i64) -> Result<bool, ReplicationError> {
    let command = &config.takeover.fence_command;
    if command.is_empty() {
        return Ok(false);
    }
    log::info!("takeover.fence_command: {command}");
    let mut shell = Command::new("sh");
    shell
        .args(["-c", command])
        .env("WARM_SPARE_SIDE", "peer")
        .env("WARM_SPARE_EPOCH", epoch.to_string())
        .env("WARM_SPARE_ADDRESS", config.peer.datastore.address())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .kill_on_drop(true);
    let ended = match tokio::time::timeout(LIMIT, shell.status()).await {
        Ok(Ok(status)) if status.success() => return Ok(true),
        Ok(Ok(status)) => format!("ended: {status}"),
        Ok(Err(error)) => format!("could not be started: {error}"),
        Err(_) => format!("did not end within {} s", LIMIT.as_secs()),
    };
    Err(ReplicationError::Refused {
        rule: ErrorCode::PrimaryLives,
        text: format!("not promoted: takeover.fence_command {ended}; the other site is not known to be fenced"),
        next_step: "read what the command wrote into the log, and mend it; or fence the other site by hand and remove takeover.fence_command".into(),
    })
}
