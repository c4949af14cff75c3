//! Keeps a spare cluster of Habitat Builder at a checked point of the primary's history.

pub mod config;
pub mod package;
