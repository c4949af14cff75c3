//! The documents, the architecture, the form of the command line, and the tests' own tools.

mod architecture;
mod cli;
mod commands;
mod harts;
mod oracle;
mod pictures;
mod reference;
mod support_itself;
