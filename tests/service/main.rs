//! The process that runs for good: configuration, schedule, faults, a second node.

mod config;
mod faults;
mod harm;
mod schedule;
mod second_node;
mod watch;
mod whole;
