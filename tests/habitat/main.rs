//! The package: plan, templates, hooks, and the real Supervisor.

mod ends;
mod hooks;
mod package;
mod supervisor;
mod templates;
