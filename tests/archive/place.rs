//! The places and the generations of a test.

use serde_json::Value;
use std::path::PathBuf;
use support::archive::Archive;
use support::{Output, Site};

/// Makes a directory for an archive, and writes it into the spare's configuration.
pub(crate) fn directory(site: &Site, extra: &str) -> Archive {
    let path = site.dir.path().join("archive");
    std::fs::create_dir_all(&path).expect("a directory");
    site.write_config(&format!("{extra}\n[archive]\nlocation = {path:?}\n"));
    Archive(path)
}

/// Makes a generation. Returns what `archive create --json` printed.
pub(crate) async fn create(site: &Site) -> Value {
    site.warm_spare(&["archive", "create", "--json"])
        .await
        .ok()
        .json()
}

/// Makes a generation, and returns its name.
pub(crate) async fn generation(site: &Site) -> String {
    name_of(&create(site).await)
}

pub(crate) fn name_of(made: &Value) -> String {
    made["generation"]["name"]
        .as_str()
        .expect("it has a name")
        .to_string()
}

/// Runs a verb of the archive.
pub(crate) async fn archive(site: &Site, arguments: &[&str]) -> Output {
    let arguments: Vec<&str> = ["archive"].iter().chain(arguments).copied().collect();
    site.warm_spare(&arguments).await
}

pub(crate) fn path_of(archive: &Archive, name: &str, file: &str) -> PathBuf {
    archive.0.join("generations").join(name).join(file)
}
