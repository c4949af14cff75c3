//! Answers of many servers, as their users report them.

use crate::cluster::s3::store_error::*;
use minio::s3::types::minio_error_response::MinioErrorResponse;

fn sorted(status: u16, code: &str, message: &str) -> StoreError {
    let body = format!("<Error><Code>{code}</Code><Message>{message}</Message></Error>");
    let answer = MinioErrorResponse::new_from_body(body.into(), http::HeaderMap::new());
    let error = Error::S3Server(S3ServerError::S3Error(Box::new(answer.expect("XML"))));
    let said = Answered {
        status,
        retry_after: None,
        proxy_fault: None,
    };
    let (fault, text) = classify(&error, Some(&said)).expect("it is a fault");
    StoreError {
        side: Side::Local,
        endpoint: "http://store".into(),
        proxy: None,
        doing: "writing a key".into(),
        fault,
        text,
        wait: None,
    }
}

#[test]
fn a_bound_that_was_reached_is_told_from_a_denial() {
    for (status, code, message) in [
        (
            400,
            "XMinioAdminBucketQuotaExceeded",
            "Bucket quota exceeded",
        ),
        (403, "QuotaExceeded", ""),
        // Garage.
        (
            403,
            "AccessDenied",
            "Bucket size quota is reached, maximum total size is 1",
        ),
        // Backblaze.
        (
            403,
            "AccessDenied",
            "Cannot upload files, storage cap exceeded. See the Caps page",
        ),
        // StorageGRID.
        (
            403,
            "TenantLimit",
            "Data byte limit exceeded for this tenant. Contact your administrator to increase the tenant storage quota.",
        ),
    ] {
        let error = sorted(status, code, message);
        assert_eq!(error.fault, StoreFault::Full, "{error}");
        assert!(error.next_step().contains("raise the quota"), "{code}");
    }
    let full = sorted(
        507,
        "XMinioStorageFull",
        "Storage backend has reached its minimum",
    );
    assert_eq!(full.fault, StoreFault::Full);
    assert!(full.next_step().contains("disks"));
    // A limit on the rate is no limit on the stored bytes.
    let rate = sorted(429, "SomebodysOwn", "Over your quota of requests");
    assert_eq!(rate.fault, StoreFault::Busy);
    assert_eq!(sorted(403, "AccessDenied", "no").fault, StoreFault::Denied);
    // Names of a user, a bucket and a key.
    let denied = sorted(
        403,
        "AccessDenied",
        "User: arn:aws:iam::1:user/quota-admin is not authorized to perform: s3:GetObject on resource: \"arn:aws:s3:::quota/core/quota/1\" because no policy allows it",
    );
    assert_eq!(denied.fault, StoreFault::Denied);
}

#[test]
fn a_clock_and_a_region_are_named_as_the_cause() {
    let skewed = sorted(403, "RequestTimeTooSkewed", "The difference is too large");
    assert!(skewed.next_step().contains("clock"), "{skewed}");
    let malformed = sorted(
        400,
        "AuthorizationHeaderMalformed",
        "the region 'us-east-1' is wrong; expecting 'eu-west-1'",
    );
    assert!(malformed.next_step().contains("region"), "{malformed}");
    let throttled = sorted(400, "KMS.ThrottlingException", "Rate exceeded");
    assert_eq!(throttled.fault, StoreFault::Busy);
}

#[test]
fn a_key_that_is_too_long_is_told_by_each_server_in_its_own_way() {
    for (status, code, message) in [
        (400, "KeyTooLongError", "Your key is too long"),
        (
            400,
            "XMinioInvalidObjectName",
            "Object name contains unsupported characters.",
        ),
        // RustFS and older MinIO.
        (
            500,
            "InternalError",
            "Io error: io error File name too long (os error 36)",
        ),
    ] {
        let error = sorted(status, code, message);
        assert_eq!(error.fault, StoreFault::ImpossibleKey, "{error}");
        assert!(error.may_be_of_the_object());
    }
}

#[test]
fn what_no_code_tells_the_status_does() {
    for (status, fault) in [
        (400, StoreFault::Unexpected),
        (401, StoreFault::Denied),
        (403, StoreFault::Denied),
        (404, StoreFault::Unexpected),
        (408, StoreFault::Unreachable),
        (409, StoreFault::Unexpected),
        (412, StoreFault::Changed),
        (416, StoreFault::Changed),
        (429, StoreFault::Busy),
        (499, StoreFault::Unreachable),
        (500, StoreFault::Unreachable),
        (501, StoreFault::Unexpected),
        (502, StoreFault::Unreachable),
        (503, StoreFault::Unreachable),
        (507, StoreFault::Full),
        (530, StoreFault::Unreachable),
        (599, StoreFault::Unreachable),
    ] {
        let error = sorted(status, "NobodyKnowsThis", "");
        assert_eq!(error.fault, fault, "{error}");
        let transient = matches!(fault, StoreFault::Unreachable | StoreFault::Busy);
        assert_eq!(error.is_transient(), transient, "{status}");
    }
    assert_eq!(
        sorted(403, "InvalidObjectState", "").fault,
        StoreFault::Archived
    );
    assert_eq!(
        sorted(400, "RequestTimeout", "").fault,
        StoreFault::Unreachable
    );
    assert_eq!(sorted(503, "SlowDown", "").fault, StoreFault::Busy);
    // Reads and writes on a server without quorum have nothing to do with the rate.
    assert_eq!(
        sorted(503, "SlowDownRead", "").fault,
        StoreFault::Unreachable
    );
}
