//! What can go wrong with an artifact store, in the classes that decide what happens next.

use super::Side;
use minio::s3::error::{Error, NetworkError, S3ServerError, ValidationErr};
use minio::s3::minio_error_response::MinioErrorCode;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreFault {
    /// Refused, cut, timed out, or a 5xx: nothing is known about the object. Tried again.
    Unreachable,
    /// The key or the bucket policy does not allow it.
    Denied,
    /// The server has no such bucket.
    NoBucket,
    /// The server says that its disks are full.
    Full,
    /// The certificate was not accepted.
    Tls,
    /// Not an S3 server that Builder can use (Artifactory).
    Unsupported,
    /// What lies under the key is not what the request was to change: somebody else wrote meanwhile.
    Changed,
    /// An answer that fits nothing above; the text says which.
    Unexpected,
}

/// A failed request to an artifact store: which side, what was being done, and the server's own words.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{side} artifact store {endpoint}: {doing}: {text}")]
pub struct StoreError {
    pub side: Side,
    pub endpoint: String,
    pub doing: String,
    pub fault: StoreFault,
    pub text: String,
}

impl StoreError {
    pub fn is_transient(&self) -> bool {
        self.fault == StoreFault::Unreachable
    }

    /// The peer refuses this one object, as far as that tells, and would go on refusing it: an archived one, a key that was
    /// disabled, a policy of its own. Whether it serves others must be asked.
    pub fn may_be_of_the_object(&self) -> bool {
        self.side == Side::Peer && matches!(self.fault, StoreFault::Denied | StoreFault::Unexpected)
    }

    pub fn next_step(&self) -> String {
        let side = self.side;
        match self.fault {
            StoreFault::Unreachable => {
                format!("check that the server runs and that {side}.s3.endpoint is right")
            }
            StoreFault::Denied => {
                format!(
                    "check {side}.s3.key_id and {side}.s3.secret_key, and what that key may do in the bucket"
                )
            }
            StoreFault::NoBucket => {
                format!(
                    "check {side}.s3.bucket_name; Builder's own name for it stands in builder-api's [s3]"
                )
            }
            StoreFault::Full => format!("make room on the {side} artifact store's disks"),
            StoreFault::Tls => format!(
                "give the certificate authority in {side}.s3.ca_file, or use a server certificate signed by one that the system trusts"
            ),
            StoreFault::Unsupported => {
                "warm-spare replicates MinIO and S3 only; move the packages out of Artifactory"
                    .into()
            }
            StoreFault::Changed => {
                format!("look who else writes in the {side} bucket; it is looked at again")
            }
            StoreFault::Unexpected => format!("read the {side} artifact store's log"),
        }
    }
}

/// What the S3 library returned, sorted. `None` where the one good answer "there is no such key" was given.
pub(super) fn classify(error: &Error) -> Option<(StoreFault, String)> {
    let (fault, text) = match error {
        Error::S3Server(S3ServerError::S3Error(answer)) => {
            let message = answer.message().clone().unwrap_or_default();
            let code = answer.code();
            if is_made_up(&code, &message) {
                return Some((
                    StoreFault::Unreachable,
                    "HTTP status 404 without a body: no S3 server answers so".into(),
                ));
            }
            if matches!(code, MinioErrorCode::NoSuchKey) {
                return None;
            }
            (fault_of_code(&code), format!("{code:?}: {message}"))
        }
        Error::S3Server(S3ServerError::InvalidServerResponse {
            http_status_code, ..
        }) => (
            fault_of_status(*http_status_code),
            format!("HTTP status {http_status_code} without an S3 error body"),
        ),
        Error::S3Server(S3ServerError::HttpError(status, body)) => (
            fault_of_status(*status),
            format!("HTTP status {status}: {body}"),
        ),
        Error::Network(NetworkError::ServerError(status)) => {
            (fault_of_status(*status), format!("HTTP status {status}"))
        }
        Error::Validation(ValidationErr::HttpError(cause)) => network(cause),
        Error::Network(NetworkError::ReqwestError(cause)) => network(cause),
        other => (StoreFault::Unexpected, chain(other)),
    };
    Some((fault, text))
}

/// Where a 404 has no body, the library makes code and message itself. A proxy without a route answers so for a moment; a
/// store says what is not there.
fn is_made_up(code: &MinioErrorCode, message: &str) -> bool {
    match code {
        MinioErrorCode::NoSuchKey => message == "Object does not exist",
        MinioErrorCode::NoSuchBucket => message == "Bucket does not exist",
        MinioErrorCode::ResourceNotFound => message == "Request resource not found",
        _ => false,
    }
}

/// The same answer to HEAD, which never has a body.
pub(super) fn is_bodiless_no(error: &Error) -> bool {
    matches!(error, Error::S3Server(S3ServerError::S3Error(answer))
        if matches!(answer.code(), MinioErrorCode::NoSuchKey))
}

fn fault_of_status(status: u16) -> StoreFault {
    match status {
        507 => StoreFault::Full,
        412 => StoreFault::Changed,
        401 | 403 => StoreFault::Denied,
        429 | 500.. => StoreFault::Unreachable,
        _ => StoreFault::Unexpected,
    }
}

fn fault_of_code(code: &MinioErrorCode) -> StoreFault {
    match code {
        MinioErrorCode::NoSuchBucket => StoreFault::NoBucket,
        MinioErrorCode::AccessDenied => StoreFault::Denied,
        // The library lower-cases every code that it does not know.
        MinioErrorCode::OtherError(name) => match name.to_ascii_lowercase().as_str() {
            // An error page that is none of S3's: a proxy before the server, or a server that is not up yet.
            "" => StoreFault::Unreachable,
            "xminiostoragefull" => StoreFault::Full,
            "preconditionfailed" => StoreFault::Changed,
            "invalidaccesskeyid" | "signaturedoesnotmatch" | "requesttimetooskewed" => {
                StoreFault::Denied
            }
            "slowdown"
            | "slowdownread"
            | "slowdownwrite"
            | "internalerror"
            | "serviceunavailable"
            | "requesttimeout"
            | "incompletebody"
            | "xminioservernotinitialized"
            | "xminioreadquorum"
            | "xminiowritequorum"
            | "operationaborted" => StoreFault::Unreachable,
            _ => StoreFault::Unexpected,
        },
        _ => StoreFault::Unexpected,
    }
}

fn network(cause: &reqwest::Error) -> (StoreFault, String) {
    let text = chain(cause);
    match super::tls::explain(&text) {
        Some(person) => (StoreFault::Tls, person),
        None => (StoreFault::Unreachable, text),
    }
}

/// The library's `Display` hides causes ("Validation error occurred"); people need the innermost too.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        source = inner.source();
    }
    text
}
