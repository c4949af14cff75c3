//! Reports whether builder-api will start by itself when the fence is lifted, as far as the
//! Supervisor of this node knows.

use crate::observe::get;
use http::StatusCode;
use std::time::Duration;

/// The Supervisor's HTTP gateway, at its usual address.
const GATEWAY: &str = "127.0.0.1:9631";
const PATH: &str = "/services/builder-api/default/health";
/// Time limit for the answer. It is short, because this check never refuses.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(150);

pub(super) async fn look() -> String {
    let asked = get(GATEWAY, PATH);
    match tokio::time::timeout(ANSWER_TIMEOUT, asked).await {
        Ok(Ok((status, body))) => describe(status, &body),
        _ => {
            "no Supervisor answers at 127.0.0.1:9631: it is not known whether builder-api is loaded"
                .into()
        }
    }
}

fn describe(status: StatusCode, body: &[u8]) -> String {
    if status == StatusCode::UNAUTHORIZED {
        return "the Supervisor asks for its gateway's token: it is not known whether builder-api is loaded".into();
    }
    if status == StatusCode::NOT_FOUND {
        return "the Supervisor has no builder-api.default loaded".into();
    }
    let json: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    match json["status"].as_str() {
        Some("OK" | "WARNING") => "the Supervisor runs builder-api".into(),
        // The Supervisor does not report whether it starts builder-api again now, or delays that
        // after the latest failures.
        Some(word) => format!(
            "the Supervisor has builder-api loaded and its health is {word}: behind the fence it cannot start, and after a promotion it \
             comes up at the Supervisor's next try (at once, unless it runs with a --service-max-backoff-period)"
        ),
        None => "the program at 127.0.0.1:9631 is not a Supervisor: it is not known whether builder-api is loaded".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_answer_is_told() {
        let told = |status, body: &str| describe(status, body.as_bytes());
        assert!(told(StatusCode::OK, r#"{"status":"OK"}"#).contains("runs builder-api"));
        let down = told(StatusCode::SERVICE_UNAVAILABLE, r#"{"status":"CRITICAL"}"#);
        assert!(down.contains("CRITICAL") && down.contains("next try"));
        assert!(told(StatusCode::NOT_FOUND, "").contains("no builder-api"));
        assert!(told(StatusCode::UNAUTHORIZED, "").contains("token"));
        assert!(told(StatusCode::OK, "<html>").contains("not a Supervisor"));
    }
}
