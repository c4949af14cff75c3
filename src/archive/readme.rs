//! The text in each archive for people who restore without this program.

pub(super) const TEXT: &str = include_str!("readme.txt");
