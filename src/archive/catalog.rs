//! The generations of a place. A generation exists when its manifest does.

use super::error::{damaged, no_generation};
use super::format::{Manifest, Pin, read_manifest};
use super::layout;
use super::place::Place;
use crate::domain::ErrorCode;
use crate::replication::ReplicationError;
use std::collections::{BTreeMap, BTreeSet};

/// The names in a place.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// Generations that exist, the oldest first.
    pub whole: Vec<String>,
    /// Files of generations without a manifest: somebody makes one, or was killed.
    pub unfinished: Vec<String>,
}

/// A generation of the list: its manifest, or the reason why it cannot be read.
#[derive(Debug)]
pub struct Listed {
    pub name: String,
    pub manifest: Result<Manifest, ReplicationError>,
    pub pin: Option<Pin>,
}

/// Lists the folder of the generations. The artifacts are not listed.
pub(super) async fn names(place: &Place) -> Result<Names, ReplicationError> {
    let found = place.list(layout::GENERATIONS).await?;
    let whole: BTreeSet<String> = found
        .iter()
        .filter_map(|found| {
            let name = layout::generation_of(&found.path)?;
            (found.path == layout::manifest(name)).then(|| name.to_string())
        })
        .collect();
    let unfinished = found
        .into_iter()
        .map(|found| found.path)
        .filter(|path| layout::generation_of(path).is_some_and(|name| !whole.contains(name)))
        .collect();
    Ok(Names {
        whole: whole.into_iter().collect(),
        unfinished,
    })
}

/// Reads the manifest of a generation.
pub(super) async fn manifest(place: &Place, name: &str) -> Result<Manifest, ReplicationError> {
    if !layout::is_generation(name) {
        return Err(no_generation(place.name(), name));
    }
    let text = place.document(&layout::manifest(name)).await?;
    let text = text.ok_or_else(|| no_generation(place.name(), name))?;
    read_manifest(place.name(), name, &text)
}

/// Returns all generations, the newest first. One that cannot be read is listed with its error; an
/// error of the place ends the list.
pub(super) async fn all(place: &Place) -> Result<Vec<Listed>, ReplicationError> {
    let mut pins: BTreeMap<String, Pin> = BTreeMap::new();
    for found in place.list(layout::PINS).await? {
        let name = found.path.strip_prefix(layout::PINS);
        let name = name.and_then(|name| name.strip_suffix(".json"));
        let Some(name) = name else { continue };
        match place.json(&found.path).await {
            Ok(Some(pin)) => drop(pins.insert(name.to_string(), pin)),
            Ok(None) => {}
            Err(error) if error.code() == ErrorCode::ArchiveUnreachable => return Err(error),
            // A pin that nobody can read still holds.
            Err(error) => drop(pins.insert(name.to_string(), Pin::unreadable(&error))),
        }
    }
    let mut listed = Vec::new();
    for name in names(place).await?.whole.into_iter().rev() {
        let text = place.document(&layout::manifest(&name)).await?;
        let manifest = match text {
            Some(text) => read_manifest(place.name(), &name, &text),
            None => Err(damaged(
                place.name(),
                &layout::manifest(&name),
                "it has just gone",
            )),
        };
        let pin = pins.remove(&name);
        listed.push(Listed {
            name,
            manifest,
            pin,
        });
    }
    Ok(listed)
}

/// Returns the newest generation whose manifest is whole.
pub(super) async fn newest(
    place: &Place,
    names: &Names,
) -> Result<Option<Manifest>, ReplicationError> {
    for name in names.whole.iter().rev() {
        match manifest(place, name).await {
            Ok(manifest) => return Ok(Some(manifest)),
            Err(error) if error.code() == ErrorCode::ArchiveDamaged => {
                log::warn!("{error}; the generation before it is used");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
