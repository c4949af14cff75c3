//! The failures of an artifact store, in the classes that decide the reaction.

use super::store::Answered;
use crate::cluster::error_text;
use crate::domain::Side;
use minio::s3::error::{Error, NetworkError, S3ServerError, ValidationErr};
use minio::s3::minio_error_response::MinioErrorCode;
use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreFault {
    /// The request was refused, interrupted, timed out, or answered by a 5xx: nothing is known
    /// about the object. Tried again.
    Unreachable,
    /// The server answers, and asks for fewer requests. Tried again.
    Busy,
    /// The key or the bucket policy does not allow it.
    Denied,
    /// The server has no such bucket.
    NoBucket,
    /// The server reports that its disks are full, or that the bucket has reached its quota.
    Full,
    /// The certificate was not accepted.
    Tls,
    /// The HTTP proxy on the way refuses to carry the request, or its configuration is wrong.
    ProxyRefused,
    /// Not an S3 server that Builder can use (Artifactory).
    Unsupported,
    /// The object under the key is not the one that the request was to change or to continue:
    /// another client wrote in the meantime.
    Changed,
    /// The object is in an archive tier, and can be read only after it was restored from there.
    Archived,
    /// The server can hold no object under such a key.
    ImpossibleKey,
    /// An answer of no class above; the text has it.
    Unexpected,
}

/// A failed request to an artifact store: which side, what was being done, and the server's own
/// words.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{side} artifact store {endpoint}{}: {doing}: {text}", through(.proxy))]
pub struct StoreError {
    pub side: Side,
    pub endpoint: String,
    /// URL of the proxy on the way, without user and password.
    pub proxy: Option<Box<str>>,
    pub doing: String,
    pub fault: StoreFault,
    pub text: String,
    /// Time for which the server asks us to wait.
    pub wait: Option<Duration>,
}

fn through(proxy: &Option<Box<str>>) -> String {
    match proxy {
        Some(proxy) => format!(" through the proxy {proxy}"),
        None => String::new(),
    }
}

impl StoreError {
    pub fn is_transient(&self) -> bool {
        matches!(self.fault, StoreFault::Unreachable | StoreFault::Busy)
    }

    pub fn asks_for_fewer(&self) -> bool {
        self.fault == StoreFault::Busy
    }

    /// Returns whether the fault may be of the object: the peer refuses this object, and may go on
    /// refusing it (an archived object, a disabled key, a policy of its own), or a store can hold
    /// no such key. Only other objects show whether the store serves at all.
    pub fn may_be_of_the_object(&self) -> bool {
        // A proxy may refuse a single object too, as one that looks for malware does.
        use StoreFault::{Archived, Denied, ProxyRefused, Unexpected};
        let is_refusal = matches!(self.fault, Archived | Denied | ProxyRefused | Unexpected);
        self.is_of_the_key() || self.side == Side::Peer && is_refusal
    }

    /// Returns whether the fault is of the key: the store cannot hold it, whatever else it holds.
    pub fn is_of_the_key(&self) -> bool {
        self.fault == StoreFault::ImpossibleKey
    }

    pub fn next_step(&self) -> String {
        let side = self.side;
        match self.fault {
            StoreFault::Unreachable if self.proxy.is_some() => format!(
                "check that the proxy runs and reaches the server, that the server runs, and that {side}.s3.proxy and {side}.s3.endpoint are right"
            ),
            StoreFault::Unreachable => {
                format!("check that the server runs and that {side}.s3.endpoint is right")
            }
            StoreFault::Busy => format!(
                "let the {side} artifact store take more requests at once (MinIO: MINIO_API_REQUESTS_MAX), or lower replication.copies"
            ),
            StoreFault::Denied if self.names("timetooskewed") => format!(
                "set the clock of this machine, or that of the {side} artifact store: they differ by more than signatures allow"
            ),
            StoreFault::Denied => {
                format!(
                    "check {side}.s3.key_id and {side}.s3.secret_key, and what that key may do in the bucket"
                )
            }
            StoreFault::NoBucket => {
                format!(
                    "check {side}.s3.bucket_name; Builder's own name for it is in builder-api's [s3]"
                )
            }
            StoreFault::Full if names_a_quota(&self.text) => {
                format!("raise the quota of the bucket in {side}.s3.bucket_name, or of its owner")
            }
            StoreFault::Full => format!("make room on the {side} artifact store's disks"),
            // Some proxies answer 401 to a wrong password, and 407 only where there is none.
            StoreFault::ProxyRefused
                if ["HTTP status 401", "HTTP status 407"]
                    .iter()
                    .any(|status| self.text.contains(status)) =>
            {
                format!(
                    "give the user and the password that the proxy accepts in {side}.s3.proxy or {side}.s3.proxy_file: http://user:password@host:port"
                )
            }
            StoreFault::ProxyRefused => format!(
                "let the proxy carry the requests of this machine to {}, or correct {side}.s3.proxy",
                self.endpoint
            ),
            StoreFault::Tls if self.proxy.is_some() => format!(
                "give the certificate authority in {side}.s3.ca_file; if the proxy opens TLS connections, that is the proxy's authority"
            ),
            StoreFault::Tls => format!(
                "give the certificate authority in {side}.s3.ca_file, or use a server certificate signed by one that the system trusts"
            ),
            StoreFault::Unsupported => {
                "warm-spare replicates MinIO and S3 only; move the packages out of Artifactory"
                    .into()
            }
            StoreFault::Changed => {
                format!(
                    "find out who else writes into the {side} bucket; the object is checked again"
                )
            }
            StoreFault::Archived => format!(
                "restore the object from its archive tier, and keep the {side} bucket's lifecycle rules from archiving packages"
            ),
            StoreFault::ImpossibleKey => {
                "nothing on the spare; delete the package on the primary if nobody needs it".into()
            }
            StoreFault::Unexpected if self.text.contains("HTTP status 413") => format!(
                "let the proxy before the {side} artifact store take requests of any size (nginx: client_max_body_size)"
            ),
            StoreFault::Unexpected
                if ["authorizationheadermalformed", "permanentredirect"]
                    .iter()
                    .any(|code| self.names(code)) =>
            {
                format!("check the region in {side}.s3.endpoint, and {side}.s3.key_id")
            }
            StoreFault::Unexpected => format!("read the {side} artifact store's log"),
        }
    }

    /// Returns whether another client writes the same key at the same time (409).
    pub(in crate::cluster) fn is_write_conflict(&self) -> bool {
        self.names("conditionalrequestconflict")
    }

    /// Returns whether the server's own words contain this word, in upper or lower case.
    fn names(&self, word: &str) -> bool {
        self.text.to_ascii_lowercase().contains(word)
    }
}

/// Classifies an error of the S3 library. `None` for the one good answer "there is no such key".
/// `said`: the answer's status, which the library does not return if the answer has a code.
pub(in crate::cluster) fn classify(
    error: &Error,
    said: Option<&Answered>,
) -> Option<(StoreFault, String)> {
    if let Some(fault) = said.and_then(|said| said.proxy_fault.clone()) {
        return Some((fault.fault, fault.text));
    }
    let (fault, text) = match error {
        Error::S3Server(S3ServerError::S3Error(answer)) => {
            let message = answer.message().clone().unwrap_or_default();
            let code = answer.code();
            if is_made_up(&code, &message) {
                return Some((
                    StoreFault::Unreachable,
                    "HTTP status 404 without a body: no S3 server answers like this".into(),
                ));
            }
            if matches!(code, MinioErrorCode::NoSuchKey) {
                return None;
            }
            let status = said.map(|said| said.status);
            (
                fault_of_answer(&code, &message, status),
                told(&code, &message, status),
            )
        }
        Error::S3Server(S3ServerError::InvalidServerResponse {
            http_status_code, ..
        }) => (
            fault_of_page(*http_status_code),
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
        // S3's own limit, which the library checks: no store has an object under a longer key.
        Error::Validation(ValidationErr::InvalidObjectName(_)) => {
            (StoreFault::ImpossibleKey, error_text::chain(error))
        }
        Error::Validation(ValidationErr::XmlParseError(_) | ValidationErr::XmlError { .. }) => {
            match said {
                Some(said) => (
                    fault_of_page(said.status),
                    format!(
                        "HTTP status {} with a body that is no S3 answer: {}",
                        said.status,
                        error_text::chain(error)
                    ),
                ),
                None => (StoreFault::Unreachable, error_text::chain(error)),
            }
        }
        other => (StoreFault::Unexpected, error_text::chain(other)),
    };
    Some((fault, text))
}

/// Returns the answer in the server's own words. HEAD has none; there the status has more
/// information than the code that the library makes.
fn told(code: &MinioErrorCode, message: &str, status: Option<u16>) -> String {
    match status {
        Some(status) => format!("{code}: {message} (HTTP status {status})"),
        None => format!("{code}: {message}"),
    }
}

/// Returns whether the library made code and message itself, because a 404 had no body. A proxy
/// without a route answers so for a moment; a store names the thing that does not exist.
fn is_made_up(code: &MinioErrorCode, message: &str) -> bool {
    match code {
        MinioErrorCode::NoSuchKey => message == "Object does not exist",
        MinioErrorCode::NoSuchBucket => message == "Bucket does not exist",
        MinioErrorCode::ResourceNotFound => message == "Request resource not found",
        _ => false,
    }
}

/// Returns whether it is the same answer to HEAD, which never has a body.
pub(in crate::cluster) fn is_bodiless_no(error: &Error) -> bool {
    matches!(error, Error::S3Server(S3ServerError::S3Error(answer))
        if matches!(answer.code(), MinioErrorCode::NoSuchKey))
}

fn fault_of_status(status: u16) -> StoreFault {
    match status {
        507 => StoreFault::Full,
        412 | 416 => StoreFault::Changed,
        401 | 403 => StoreFault::Denied,
        429 => StoreFault::Busy,
        // A function that is not implemented is not a transient fault.
        501 => StoreFault::Unexpected,
        408 | 425 | 499 | 500.. => StoreFault::Unreachable,
        _ => StoreFault::Unexpected,
    }
}

/// Returns the fault of an answer whose body is not S3's: it is from a proxy, or from a server that
/// has not started yet.
fn fault_of_page(status: u16) -> StoreFault {
    match status {
        200..400 | 404 => StoreFault::Unreachable,
        status => fault_of_status(status),
    }
}

/// Returns the fault of a failure in the body of a 200.
pub(in crate::cluster) fn fault_of_body(code: Option<&str>) -> StoreFault {
    match code {
        Some(code) => fault_of_name(code).unwrap_or(StoreFault::Unexpected),
        None => StoreFault::Unreachable,
    }
}

fn fault_of_answer(code: &MinioErrorCode, message: &str, status: Option<u16>) -> StoreFault {
    // Some servers answer so with 500, again and again.
    if message.to_ascii_lowercase().contains("file name too long") {
        return StoreFault::ImpossibleKey;
    }
    // Backblaze and Garage report a reached limit under a code with another meaning. A limit on the
    // rate is reported by 429 and 503.
    if names_a_quota(message) && status.is_none_or(|status| matches!(status, 400..429 | 507)) {
        return StoreFault::Full;
    }
    let by_code = match code {
        MinioErrorCode::NoSuchBucket => Some(StoreFault::NoBucket),
        MinioErrorCode::AccessDenied => Some(StoreFault::Denied),
        MinioErrorCode::OtherError(name) => fault_of_name(name),
        _ => None,
    };
    by_code
        .or(status.map(fault_of_status))
        .unwrap_or(StoreFault::Unexpected)
}

/// Returns the fault of a code that has more information than its status. The library lower-cases
/// every code that it does not know.
fn fault_of_name(name: &str) -> Option<StoreFault> {
    let name = name.to_ascii_lowercase();
    // AWS puts this before its key service's own codes.
    let name = name.strip_prefix("kms.").unwrap_or(&name);
    Some(match name {
        // An error page that is not S3's: of a proxy before the server, or of a server that has not
        // started yet.
        "" => StoreFault::Unreachable,
        "xminiostoragefull" | "insufficientcapacity" | "insufficientstorage" | "notenoughspace" => {
            StoreFault::Full
        }
        _ if names_a_quota(name) => StoreFault::Full,
        // An upload that another client aborted, or that the server's own cleanup removed: a new
        // upload may succeed.
        "preconditionfailed" | "invalidrange" | "nosuchupload" => StoreFault::Changed,
        "invalidobjectstate" => StoreFault::Archived,
        "keytoolongerror"
        | "keytoolong"
        | "xminioinvalidobjectname"
        | "xminioinvalidresourcename" => StoreFault::ImpossibleKey,
        "nosuchbucket" => StoreFault::NoBucket,
        "accessdenied"
        | "allaccessdisabled"
        | "expiredtoken"
        | "invalidaccesskeyid"
        | "requesttimetooskewed"
        | "signaturedoesnotmatch" => StoreFault::Denied,
        "slowdown"
        | "toomanyrequests"
        | "throttling"
        | "throttlingexception"
        | "throttledexception"
        | "requestlimitexceeded"
        | "requestthrottled"
        | "ratelimitexceeded"
        | "userratelimitexceeded"
        | "bandwidthlimitexceeded"
        | "serverbusy" => StoreFault::Busy,
        // Statuses below 500, and bodies of a 200: the sent bytes were damaged or cut on the way,
        // or another client is writing.
        "baddigest"
        | "clientdisconnected"
        | "conditionalrequestconflict"
        | "incompletebody"
        | "internalerror"
        | "operationaborted"
        | "requesttimeout"
        | "serviceunavailable"
        | "slowdownread"
        | "slowdownwrite"
        | "xamzcontentchecksummismatch"
        | "xamzcontentsha256mismatch" => StoreFault::Unreachable,
        _ => return None,
    })
}

/// Returns whether the text is about a limit that somebody set, not about a full disk: MinIO, Ceph,
/// Garage and providers each have their own word for it. The name of a bucket, a user or a key may
/// contain that word too: AWS quotes names, as paths.
fn names_a_quota(text: &str) -> bool {
    let is_name = |word: &&str| word.contains([':', '/', '"', '\'']) && !word.ends_with(':');
    let words: Vec<&str> = text
        .split_whitespace()
        .filter(|word| !is_name(word))
        .collect();
    let text = words.join(" ").to_ascii_lowercase();
    ["quota", "storagecap", "storage cap"]
        .iter()
        .any(|word| text.contains(word))
}

fn network(cause: &reqwest::Error) -> (StoreFault, String) {
    let text = error_text::chain(cause);
    match error_text::explain(&text) {
        Some(person) => (StoreFault::Tls, person),
        None => (StoreFault::Unreachable, text),
    }
}

#[cfg(test)]
mod tests;
