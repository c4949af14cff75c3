//! Builder's packages: name, key of the artifact, checksum, signature.
//!
//! This module does no input or output, and does not know where packages are kept: it turns bytes
//! and text into facts.

mod checksum;
mod hart;
mod id;
mod ident;
mod inspect;
mod row;
mod signature;

pub use checksum::{Checksum, ChecksumError, Hasher};
pub use hart::{HartError, HartHeader};
pub use id::{first_id_of, time_of_id};
pub use ident::{Ident, IdentError, Target, TargetError, object_key, package_of_key};
pub use inspect::{HartFacts, Inspection, Inspector};
pub use row::{PackageRow, key_of_package};
pub use signature::{KeyError, PublicKey, Signature};
