//! Names of packages and of targets, and the key of the artifact that follows from both.

use std::fmt;
use std::str::FromStr;

/// A package with version and release: `origin/name/version/release`.
///
/// The parts are kept unchanged. Builder allows characters in them (`~`, `+`, `%`) that look as if
/// they needed escaping. The code that puts a key into a URL escapes it there, once.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ident {
    origin: String,
    name: String,
    version: String,
    release: String,
}

/// Reasons why a text is not the name of a package.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentError {
    #[error("{0:?} is not of the form origin/name/version/release")]
    Parts(String),
    /// A part that would name another object than the package's own, or no object.
    #[error("{part:?} cannot be the {what} of a package")]
    Part { what: &'static str, part: String },
}

impl Ident {
    pub fn new(origin: &str, name: &str, version: &str, release: &str) -> Result<Self, IdentError> {
        Ok(Self {
            origin: part("origin", origin)?,
            name: part("name", name)?,
            version: part("version", version)?,
            release: part("release", release)?,
        })
    }

    pub fn origin(&self) -> &str {
        &self.origin
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn version(&self) -> &str {
        &self.version
    }

    pub fn release(&self) -> &str {
        &self.release
    }
}

fn part(what: &'static str, text: &str) -> Result<String, IdentError> {
    let refused = text.is_empty()
        || text == "."
        || text == ".."
        || text.contains(|c: char| c == '/' || c.is_control());
    if refused {
        return Err(IdentError::Part {
            what,
            part: text.to_string(),
        });
    }
    Ok(text.to_string())
}

impl FromStr for Ident {
    type Err = IdentError;

    fn from_str(text: &str) -> Result<Self, IdentError> {
        let parts: Vec<&str> = text.split('/').collect();
        match parts[..] {
            [origin, name, version, release] => Self::new(origin, name, version, release),
            _ => Err(IdentError::Parts(text.to_string())),
        }
    }
}

impl fmt::Display for Ident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            origin,
            name,
            version,
            release,
        } = self;
        write!(f, "{origin}/{name}/{version}/{release}")
    }
}

/// The system for which a package is made: `arch-system`, sometimes with a variant, such as
/// `x86_64-linux-kernel2`.
///
/// Unknown names are accepted too: a primary that is newer than this program must not stop the
/// spare.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    architecture: String,
    system: String,
    variant: Option<String>,
}

/// Error for a text that is not the name of a target.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a target such as x86_64-linux")]
pub struct TargetError(String);

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let parts: Vec<&str> = text.split('-').collect();
        let good = |part: &&str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        if !parts.iter().all(good) {
            return Err(TargetError(text.to_string()));
        }
        let (architecture, system, variant) = match parts[..] {
            [architecture, system] => (architecture, system, None),
            [architecture, system, variant] => (architecture, system, Some(variant.to_string())),
            _ => return Err(TargetError(text.to_string())),
        };
        Ok(Self {
            architecture: architecture.to_string(),
            system: system.to_string(),
            variant,
        })
    }
}

impl Target {
    /// Returns the parts of the name, joined by `separator`.
    fn joined(&self, separator: char) -> String {
        let mut text = format!("{}{separator}{}", self.architecture, self.system);
        if let Some(variant) = &self.variant {
            text.push(separator);
            text.push_str(variant);
        }
        text
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.joined('-'))
    }
}

/// Returns the key under which Builder keeps the artifact of a package in its bucket. It is not
/// escaped.
pub fn object_key(ident: &Ident, target: &Target) -> String {
    let Ident {
        origin,
        name,
        version,
        release,
    } = ident;
    let folder = target.joined('/');
    format!("{ident}/{folder}/{origin}-{name}-{version}-{release}-{target}.hart")
}

/// Returns the package whose artifact has this key; None: the key belongs to no package.
pub fn package_of_key(key: &str) -> Option<(Ident, Target)> {
    let parts: Vec<&str> = key.split('/').collect();
    let ident: Ident = parts.get(..4)?.join("/").parse().ok()?;
    let file = format!("{}-", parts[..4].join("-"));
    let target = parts.last()?.strip_prefix(&file)?.strip_suffix(".hart")?;
    let target: Target = target.parse().ok()?;
    (object_key(&ident, &target) == key).then_some((ident, target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_its_package() {
        for (ident, target) in [
            ("core/redis/4.0.14/20200421191514", "x86_64-linux"),
            ("a-b/c-d/1-2~+%/3", "x86_64-linux-kernel2"),
        ] {
            let (ident, target) = (ident.parse().unwrap(), target.parse().unwrap());
            let key = object_key(&ident, &target);
            assert_eq!(package_of_key(&key), Some((ident, target)));
        }
        for none in [
            "",
            "a/b/c",
            "a/b/c/d/x86_64/linux/other.hart",
            ".warm-spare/staged/1",
        ] {
            assert_eq!(package_of_key(none), None, "{none}");
        }
    }

    fn key(ident: &str, target: &str) -> String {
        object_key(&ident.parse().unwrap(), &target.parse().unwrap())
    }

    #[test]
    fn key_is_where_builder_puts_the_artifact() {
        assert_eq!(
            key("core/redis/4.0.14/20200421191514", "x86_64-linux"),
            "core/redis/4.0.14/20200421191514/x86_64/linux/core-redis-4.0.14-20200421191514-x86_64-linux.hart"
        );
        assert_eq!(
            key(
                "neurosis/testapp/0.1.3/20181116180420",
                "x86_64-linux-kernel2"
            ),
            "neurosis/testapp/0.1.3/20181116180420/x86_64/linux/kernel2/\
             neurosis-testapp-0.1.3-20181116180420-x86_64-linux-kernel2.hart"
        );
    }

    #[test]
    fn odd_characters_pass_unchanged() {
        let odd = "o_1/a+b-c.d/1.0~rc1+%20é/20200101000000";
        let ident: Ident = odd.parse().unwrap();
        assert_eq!(ident.to_string(), odd);
        assert_eq!(ident.version(), "1.0~rc1+%20é");
        assert_eq!(
            (ident.origin(), ident.name(), ident.release()),
            ("o_1", "a+b-c.d", "20200101000000")
        );
        assert_eq!(
            key(odd, "aarch64-darwin"),
            "o_1/a+b-c.d/1.0~rc1+%20é/20200101000000/aarch64/darwin/o_1-a+b-c.d-1.0~rc1+%20é-20200101000000-aarch64-darwin.hart"
        );
    }

    #[test]
    fn refuses_what_would_name_another_object() {
        for bad in [
            "",
            "o/n/v",
            "o/n/v/r/x",
            "o/n/v/",
            "/n/v/r",
            "o//v/r",
            "o/../v/r",
            "o/n/./r",
            "o/n/v\n/r",
            "o/n/\0/r",
        ] {
            assert!(bad.parse::<Ident>().is_err(), "{bad:?} was accepted");
        }
        assert_eq!(
            Ident::new("o", "n/m", "v", "r"),
            Err(IdentError::Part {
                what: "name",
                part: "n/m".to_string()
            })
        );
        // Three dots are a valid name, if an odd one.
        assert!("o/.../v/r".parse::<Ident>().is_ok());
    }

    #[test]
    fn targets() {
        for good in [
            "x86_64-linux",
            "x86_64-linux-kernel2",
            "x86_64-windows",
            "aarch64-linux",
            "aarch64-darwin",
            "riscv64-linux",
        ] {
            assert_eq!(good.parse::<Target>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "linux",
            "x86_64-",
            "-linux",
            "x86_64--linux",
            "x86_64-linux-a-b",
            "X86_64-linux",
            "x86_64-li/nux",
            "x86_64-linux ",
        ] {
            assert!(bad.parse::<Target>().is_err(), "{bad:?} was accepted");
        }
    }
}
