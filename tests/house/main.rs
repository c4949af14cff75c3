//! What a reader of the repository relies on: documents, architecture, the command line's form, and the tests' own tools.

mod architecture;
mod cli;
mod harts;
mod oracle;
mod reference;
mod support_itself;
