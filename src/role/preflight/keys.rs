//! The check of the builder keys: do the keys of this node open the ciphertexts in the database?

use super::here::Sealed;
use super::{ok, refuse, unknown, warn};
use crate::cluster::{BuilderKeys, sealed_by};
use crate::config::Config;
use crate::domain::PreflightCheck;
use crate::observe::Check;
use crate::replication::ReplicationError;
use std::collections::BTreeMap;

const NAME: PreflightCheck = PreflightCheck::BuilderKeys;

/// Checks the keys of this node with the rows that they have sealed.
pub(super) fn builder_keys(config: &Config, sealed: Result<&[Sealed], &ReplicationError>) -> Check {
    let Some(directory) = &config.builder_keys_dir else {
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
    // Without a database another check refuses, and names this error.
    let sealed = match sealed {
        Ok(sealed) => sealed,
        Err(error) => {
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
    /// Number of rows by kind.
    rows: BTreeMap<&'static str, i64>,
    opened: bool,
    /// The reason why one of the rows does not open.
    error: Option<String>,
}

impl Named {
    fn summary(&self) -> String {
        let counts = self.rows.iter();
        let counts = counts.map(|(what, number)| format!("{what}: {number} rows"));
        counts.collect::<Vec<_>>().join(", ")
    }
}

fn judge(keys: &BuilderKeys, sealed: &[Sealed], copy: String) -> Check {
    let named = by_revision(keys, sealed);
    // A row that opens proves the key; another row that does not open is itself spoilt.
    let shut = named.iter().filter(|(_, named)| !named.opened);
    let shut: Vec<String> = shut
        .map(|(revision, named)| {
            let error = named.error.as_deref().unwrap_or("none of its rows opens");
            format!("bldr-{revision} ({}): {error}", named.summary())
        })
        .collect();
    if !shut.is_empty() {
        let text = format!("sealed rows do not open: {}", shut.join("; "));
        let step = format!(
            "{copy}; if the key is lost, or kept elsewhere, set local.builder_keys_dir = \"\": a forced promotion then continues without this check"
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
                "bldr-{newest} is newer than any key that the primary uses (bldr-{used}): rows that this cluster seals with it do not open there"
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

/// Returns every revision that a ciphertext names, with its rows. A ciphertext that names no key
/// does not belong to the builder keys: it is a token of another kind.
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
            named.summary()
        )
    });
    opens.collect::<Vec<_>>().join("; ")
}
