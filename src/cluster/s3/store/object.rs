//! An object as a store names it: its length, its ETag, and the condition for its replacement.

/// The store's facts about one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub bytes: u64,
    pub etag: String,
}

/// One line of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub key: String,
    pub stored: Stored,
}

/// The object that must be under a key for a request that changes the key. The server refuses the
/// request if another object is there. So a process that looked, hung and lost its lock does no
/// harm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expected {
    /// Any object or none: nobody else gives that name to other bytes.
    Anything,
    Nothing,
    Etag(String),
}

impl Expected {
    /// Expects the object that was found.
    pub fn as_found(stored: Option<&Stored>) -> Expected {
        match stored {
            Some(stored) => Expected::Etag(stored.etag.clone()),
            None => Expected::Nothing,
        }
    }

    pub(super) fn header(&self) -> Option<(&'static str, String)> {
        match self {
            Expected::Anything => None,
            Expected::Nothing => Some(("If-None-Match", "*".into())),
            Expected::Etag(etag) => Some(("If-Match", format!("\"{etag}\""))),
        }
    }
}
