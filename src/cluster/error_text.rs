//! The text of an error, with its causes and, of a certificate, in words.

/// Returns an error with all its causes. The library's `Display` hides them ("Validation error
/// occurred"); people need the innermost too.
pub(in crate::cluster) fn chain(error: &dyn std::error::Error) -> String {
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

/// Returns an explanation of a refused certificate; None if the text has another cause.
pub(in crate::cluster) fn explain(text: &str) -> Option<String> {
    let told = if text.contains("CaUsedAsEndEntity") {
        "the server's certificate is self-signed (a certificate authority used as a server certificate); give the server a certificate signed by your authority, and that authority's certificate in the CA file"
    } else if text.contains("UnsupportedCertVersion") {
        "the server's certificate is of the obsolete version 1; make one of version 3 with a subject alternative name"
    } else if text.contains("UnknownIssuer") {
        "the server's certificate is signed by an authority that is not trusted here"
    } else if text.contains("NotValidForName") || text.contains("not valid for name") {
        "the server's certificate is for another host name; use the name that it was made for, or a certificate with this name as a subject alternative name"
    } else if text.contains("Expired") || text.contains("certificate expired") {
        "the server's certificate has expired"
    } else if text.contains("invalid peer certificate") {
        "the server's certificate was not accepted"
    } else if text.contains("InvalidContentType") || text.contains("corrupt message") {
        "the server does not speak TLS on this port"
    } else {
        return None;
    };
    Some(format!("{told} ({text})"))
}
