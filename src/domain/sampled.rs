//! A sample of the artifacts in a bucket.

/// The result of a sample.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sampled {
    pub looked_for: usize,
    /// Keys without an object, although a row names them.
    pub absent: Vec<String>,
}
