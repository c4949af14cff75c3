//! A row of Builder's table of packages, by the three columns that identify its artifact.

use super::{Checksum, Ident, Target, object_key};

/// The texts are as the row has them, so they need not be valid. A NULL is an empty text.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PackageRow {
    pub ident: String,
    pub target: String,
    pub checksum: String,
}

impl PackageRow {
    /// Returns the package's name for people.
    pub fn name(&self) -> String {
        format!("{} {}", self.ident, self.target)
    }

    /// Returns the key of the artifact, whatever its checksum is. None: ident or target is not
    /// valid.
    pub fn key(&self) -> Option<String> {
        key_of_package(&self.ident, &self.target)
    }

    /// Returns the artifact's key and checksum. None: the row names no possible artifact.
    pub fn artifact(&self) -> Option<(String, Checksum)> {
        let checksum = self.checksum.parse().ok()?;
        Some((self.key()?, checksum))
    }
}

/// Returns the key of a package's artifact. None: ident or target is not valid.
pub fn key_of_package(ident: &str, target: &str) -> Option<String> {
    let ident: Ident = ident.parse().ok()?;
    let target: Target = target.parse().ok()?;
    Some(object_key(&ident, &target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_names_its_artifact_and_a_broken_one_names_none() {
        let sum = "0".repeat(64);
        let row = |ident: &str, target: &str, checksum: &str| PackageRow {
            ident: ident.into(),
            target: target.into(),
            checksum: checksum.into(),
        };
        let ident = "core/redis/4.0.14+b~1/20200421191514";
        let sound = row(ident, "x86_64-linux", &sum);
        let key = "core/redis/4.0.14+b~1/20200421191514/x86_64/linux/core-redis-4.0.14+b~1-20200421191514-x86_64-linux.hart";
        let (named, checksum) = sound.artifact().expect("a sound row");
        assert_eq!((named.as_str(), checksum.to_string()), (key, sum));
        assert_eq!(sound.name(), format!("{ident} x86_64-linux"));
        let no_checksum = row(ident, "x86_64-linux", "none");
        assert_eq!(no_checksum.artifact(), None);
        assert_eq!(no_checksum.key().as_deref(), Some(key));
        let no_ident = row("core/redis", "x86_64-linux", &"0".repeat(64));
        assert_eq!((no_ident.key(), no_ident.artifact()), (None, None));
    }
}
