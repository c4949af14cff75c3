//! The check of the builder keys: does what is in the database open with what lies here?

use super::facts::Facts;
use super::here::Sealed;
use super::{ok, refuse, unknown, warn};
use crate::cluster::{BuilderKeys, sealed_by};
use crate::domain::PreflightCheck;
use crate::observe::Check;
use std::collections::BTreeMap;

const NAME: PreflightCheck = PreflightCheck::BuilderKeys;

pub fn builder_keys(facts: &Facts) -> Check {
    let Some(directory) = &facts.config.builder_keys_dir else {
        return warn(
            NAME,
            "not on this node (local.builder_keys_dir is empty), so not compared",
            "compare them where builder-api runs",
        );
    };
    let copy = format!(
        "copy the primary's bldr-*.pub and bldr-*.box.key into {} (hab file upload builder-api.default)",
        directory.display()
    );
    let keys = match BuilderKeys::read(directory) {
        Ok(keys) => keys,
        Err(error) => return refuse(NAME, error.to_string(), copy),
    };
    if keys.revisions().is_empty() {
        let text = format!("no builder key is in {}", directory.display());
        let flaws = keys.flaws().into_iter();
        let text = std::iter::once(text).chain(flaws).collect::<Vec<_>>();
        return refuse(NAME, text.join("; "), copy);
    }
    // Without a database there is a worse refusal, and that names this error.
    let sealed = match facts.server.as_ref().map(|server| &server.sealed) {
        Ok(Ok(sealed)) => sealed,
        Ok(Err(error)) | Err(error) => {
            let check = unknown(NAME, error);
            return warn(
                NAME,
                format!("not compared: {}", check.reason),
                check.next_step,
            );
        }
    };
    judge(&keys, sealed, copy)
}

/// Rows that one revision has sealed.
#[derive(Default)]
struct Named {
    /// By what they are.
    rows: BTreeMap<&'static str, i64>,
    opened: bool,
    /// Why one of them does not open.
    error: Option<String>,
}

impl Named {
    fn told(&self) -> String {
        let told = self.rows.iter();
        let told = told.map(|(what, number)| format!("{what}: {number} rows"));
        told.collect::<Vec<_>>().join(", ")
    }
}

fn judge(keys: &BuilderKeys, sealed: &[Sealed], copy: String) -> Check {
    let named = by_revision(keys, sealed);
    // One that opens proves the key; one that does not, beside it, is spoilt itself.
    let shut = named.iter().filter(|(_, named)| !named.opened);
    let shut: Vec<String> = shut
        .map(|(revision, named)| {
            let error = named.error.as_deref().unwrap_or("nothing of it opens");
            format!("bldr-{revision} ({}): {error}", named.told())
        })
        .collect();
    if !shut.is_empty() {
        let text = format!("what is sealed here does not open: {}", shut.join("; "));
        let step = format!(
            "{copy}; if the key is lost, or kept elsewhere, local.builder_keys_dir = \"\" has a forced promotion go on without this check"
        );
        return refuse(NAME, text, step);
    }
    let here = keys.revisions();
    let used = named.keys().next_back();
    if let (Some(newest), Some(used)) = (here.last(), used)
        && newest > used
    {
        return warn(
            NAME,
            format!(
                "bldr-{newest} is newer than any that the primary uses (bldr-{used}): what is sealed with it here does not open there"
            ),
            format!(
                "remove bldr-{newest} from this node if the primary does not have it, or copy it to the primary"
            ),
        );
    }
    if let Some(error) = named.values().find_map(|named| named.error.as_ref()) {
        let text = format!("single rows do not open, although others of their key do: {error}");
        return warn(
            NAME,
            text,
            "make that key, token or integration again on the primary",
        );
    }
    if let Some(flaw) = keys.flaws().first() {
        return warn(NAME, flaw.clone(), copy);
    }
    ok(NAME, describe(&named, &here))
}

/// Every revision that a ciphertext names, with what it has sealed. What names no key is none of theirs: a token of
/// another make.
fn by_revision(keys: &BuilderKeys, sealed: &[Sealed]) -> BTreeMap<String, Named> {
    let mut named: BTreeMap<String, Named> = BTreeMap::new();
    for group in sealed {
        let beside = group.revision.strip_prefix("bldr-");
        let beside = beside.unwrap_or(&group.revision);
        let inside = group.newest.iter().find_map(|stored| sealed_by(stored));
        let revision = match (inside, beside) {
            (Some(inside), _) => inside,
            (None, "") => continue,
            (None, beside) => beside.to_string(),
        };
        let entry = named.entry(revision).or_default();
        *entry.rows.entry(group.what).or_default() += group.rows;
        for stored in &group.newest {
            match keys.open(stored) {
                Ok(_) => entry.opened = true,
                Err(error) => {
                    let text = format!("{} does not open: {error}", group.what);
                    entry.error.get_or_insert(text);
                }
            }
        }
    }
    named
}

fn describe(named: &BTreeMap<String, Named>, here: &[String]) -> String {
    if named.is_empty() {
        return format!(
            "bldr-{} here; the database names none",
            here.join(", bldr-")
        );
    }
    let opens = named.iter().map(|(revision, named)| {
        format!(
            "bldr-{revision} opens what it has sealed ({})",
            named.told()
        )
    });
    opens.collect::<Vec<_>>().join("; ")
}
