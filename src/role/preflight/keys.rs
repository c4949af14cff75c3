//! The check of the builder keys: does what is in the database open with what lies here?

use super::facts::Facts;
use super::here::Sealed;
use super::{ok, refuse, unknown, warn};
use crate::cluster::{BuilderKeys, sealed_by};
use crate::observe::Check;
use std::collections::BTreeSet;

const NAME: &str = "builder_keys";

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

fn judge(keys: &BuilderKeys, sealed: &Sealed, copy: String) -> Check {
    let mut named = BTreeSet::new();
    for (revision, body) in &sealed.secret_keys {
        let revision = revision.strip_prefix("bldr-").unwrap_or(revision);
        named.insert(revision.to_string());
        if let Err(error) = keys.open(body) {
            let text =
                format!("an origin's secret key, of revision {revision}, does not open: {error}");
            return refuse(NAME, text, copy);
        }
    }
    // A token of another make names no key, and is none of theirs.
    if let Some((token, revision)) = token(sealed) {
        named.insert(revision);
        if let Err(error) = keys.open(token) {
            let text = format!("the newest access token does not open: {error}");
            return refuse(NAME, text, copy);
        }
    }
    let here = keys.revisions();
    if let (Some(newest), Some(used)) = (here.last(), named.last())
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
    if let Some(flaw) = keys.flaws().first() {
        return warn(NAME, flaw.clone(), copy);
    }
    ok(NAME, describe(&named, &here))
}

fn token(sealed: &Sealed) -> Option<(&str, String)> {
    let token = sealed.token.as_deref()?;
    Some((token, sealed_by(token)?))
}

fn describe(named: &BTreeSet<String>, here: &[String]) -> String {
    if named.is_empty() {
        return format!(
            "bldr-{} here; the database names none",
            here.join(", bldr-")
        );
    }
    let named: Vec<&str> = named.iter().map(String::as_str).collect();
    format!(
        "bldr-{} opens what is in the database",
        named.join(", bldr-")
    )
}
