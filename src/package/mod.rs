//! What Builder means by a package: its name, where its artifact lies, its checksum, its signature.
//!
//! Nothing here reads or writes anything, or knows where packages are kept: bytes and text in, facts out.

mod checksum;
mod hart;
mod ident;
mod inspect;
mod signature;

pub use checksum::{Checksum, ChecksumError, Hasher};
pub use hart::{HartError, HartHeader};
pub use ident::{Ident, IdentError, Target, TargetError, object_key, package_of_key};
pub use inspect::{HartFacts, Inspection, Inspector};
pub use signature::{KeyError, PublicKey, Signature};
