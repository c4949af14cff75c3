//! The keys of a shared bucket, together.

use super::*;

const SHARED: &str = r#"
    [artifacts]
    mode = "shared"
    attach = "at_takeover"
    isolated = "fence"
    [artifacts.lease]
    endpoint = "http://lease:9000"
    bucket_name = "lease"
    key_id = "hunter2-lease-id"
    secret_key = "hunter2-lease"
"#;

#[test]
fn a_shared_bucket_may_have_its_lease_elsewhere() {
    let config = Site::new(&format!("{MINIMAL}{SHARED}")).load().unwrap();
    assert_eq!(config.artifacts.mode, ArtifactsMode::Shared);
    assert!(config.artifacts.are_detached());
    let lease = config.artifacts.lease;
    assert!(lease.fences_isolated);
    let store = lease.store.unwrap();
    assert_eq!(store.endpoint, "http://lease:9000");
    assert_eq!(store.bucket_name, "lease");
}

#[test]
fn a_store_of_the_lease_is_whole_or_not_there() {
    for key in ["bucket_name", "key_id", "secret_key"] {
        let mut site = Site::new(&format!("{MINIMAL}{SHARED}"));
        let error = site
            .set(&format!("artifacts.lease.{key}"), r#""""#)
            .load()
            .unwrap_err();
        assert!(
            error.starts_with(&format!("artifacts.lease.{key}: not set")),
            "{error}"
        );
    }
    let mut site = Site::new(&format!("{MINIMAL}{SHARED}"));
    let error = site
        .set("artifacts.lease.endpoint", r#""""#)
        .load()
        .unwrap_err();
    assert!(
        error.contains("is set without artifacts.lease.endpoint"),
        "{error}"
    );
}
