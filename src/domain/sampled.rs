//! A sample of the artifacts in a bucket.

/// What was found of the artifacts that were looked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sampled {
    pub looked_for: usize,
    /// Keys that are not there, although a row names them.
    pub absent: Vec<String>,
}
