//! `divergence`: 0 no divergence, 1 a divergence is recorded, 3 the record or a file could not be
//! read.

use super::{exit, show};
use crate::cluster::{DivergedPackage, Divergence, LocalCluster, TableChanges};
use crate::config::Config;
use crate::domain::DivergedClass;
use crate::replication::ReplicationError;
use crate::role::{self, Fetched, file_name};
use serde_json::{Value, json};
use std::path::Path;

/// Classes of packages in the order of the output, each with its meaning.
const CLASSES: [(DivergedClass, &str); 4] = [
    (DivergedClass::OnlyHere, "the new primary does not have"),
    (
        DivergedClass::OtherBytes,
        "the new primary has with other bytes",
    ),
    (
        DivergedClass::GoneHere,
        "were deleted here and are still on the new primary",
    ),
    (DivergedClass::Same, "are the same on both"),
];

/// The record of the latest divergence.
struct Recorded {
    summary: Divergence,
    tables: Vec<TableChanges>,
    packages: Vec<DivergedPackage>,
}

/// An artifact that was requested, and the result of the fetch.
struct Outcome<'a> {
    package: &'a DivergedPackage,
    result: Result<Fetched, ReplicationError>,
}

pub(super) async fn run(config: &Config, fetch: Option<&Path>, as_json: bool) -> u8 {
    let recorded = match read(config).await {
        Ok(Some(recorded)) => recorded,
        Ok(None) => return none(as_json),
        Err(error) => return show::failure(&error, as_json),
    };
    if !as_json {
        print(&recorded, fetch);
    }
    let outcomes = match fetch {
        None => Vec::new(),
        Some(directory) => match fetch_all(config, &recorded, directory, as_json).await {
            Ok(outcomes) => outcomes,
            Err(error) => return show::failure(&error, as_json),
        },
    };
    if as_json {
        show::json(&document(&recorded, &outcomes));
    }
    if outcomes.iter().any(|outcome| outcome.result.is_err()) {
        return exit::UNFINISHED;
    }
    // Only an exact count of zero proves that there is no divergence.
    match (recorded.summary.rows, recorded.summary.exact) {
        (0, true) => exit::DONE,
        _ => exit::NO,
    }
}

fn none(as_json: bool) -> u8 {
    if as_json {
        show::json(&json!({ "format": 1, "divergence": null }));
    } else {
        say!("No divergence is recorded: this cluster was not brought back from being a primary.");
    }
    exit::DONE
}

async fn read(config: &Config) -> Result<Option<Recorded>, ReplicationError> {
    let Some(state) = LocalCluster::of(config).existing_state().await? else {
        return Ok(None);
    };
    let Some(summary) = state.divergence().await? else {
        return Ok(None);
    };
    Ok(Some(Recorded {
        tables: state.diverged_tables(summary.epoch).await?,
        packages: state.diverged_packages(summary.epoch).await?,
        summary,
    }))
}

/// Returns whether this cluster has bytes that the new primary does not have.
fn is_wanted(package: &DivergedPackage) -> bool {
    package.class.is_lost_elsewhere()
}

/// Fetches all wanted artifacts and prints each result at once. An artifact that cannot be fetched
/// does not stop the others.
async fn fetch_all<'a>(
    config: &Config,
    recorded: &'a Recorded,
    directory: &Path,
    as_json: bool,
) -> Result<Vec<Outcome<'a>>, ReplicationError> {
    let store = LocalCluster::of(config).reading_store()?;
    std::fs::create_dir_all(directory).map_err(|source| ReplicationError::Scratch {
        what: directory.display().to_string(),
        source,
    })?;
    let mut outcomes = Vec::new();
    for package in recorded.packages.iter().filter(|p| is_wanted(p)) {
        let result = role::fetch(&store, package, directory).await;
        match &result {
            Err(error) => eprintln!("error: {error}\nnext step: {}", error.next_step()),
            Ok(_) if as_json => {}
            Ok(Fetched::Written(path)) => say!("Fetched: {}", path.display()),
            Ok(Fetched::Kept(path)) => say!("Already there: {}", path.display()),
        }
        outcomes.push(Outcome { package, result });
    }
    Ok(outcomes)
}

fn print(recorded: &Recorded, fetch: Option<&Path>) {
    let found = &recorded.summary;
    let rows = show::count(found.rows.unsigned_abs(), "row");
    match found.exact {
        true => say!(
            "Divergence of epoch {}, exact: {} changing {rows}, from {} to {} ({}).",
            found.epoch,
            show::count(found.transactions.unsigned_abs(), "transaction"),
            found.from,
            found.to,
            found.reason
        ),
        false => say!(
            "Divergence of epoch {}, APPROXIMATE: {rows}, from {} to {} ({}).",
            found.epoch,
            found.from,
            found.to,
            found.reason
        ),
    }
    for table in &recorded.tables {
        say!("Table {}: {}.", table.table, changes(table));
    }
    for (class, meaning) in CLASSES {
        let of_class: Vec<&DivergedPackage> = recorded
            .packages
            .iter()
            .filter(|package| package.class == class)
            .collect();
        if of_class.is_empty() {
            continue;
        }
        let packages = show::count(of_class.len() as u64, "package");
        say!("{class}: {packages} that {meaning}.");
        for package in of_class {
            print_package(package, fetch);
        }
    }
    if recorded
        .packages
        .iter()
        .any(|p| p.class == DivergedClass::OtherBytes)
    {
        say!(
            "WARNING: the new primary refuses other bytes under the same ident. Compare the files. To keep the bytes of this cluster, build the package again with a new release and upload that release."
        );
    }
    if fetch.is_none() && recorded.packages.iter().any(is_wanted) {
        say!("`warm-spare divergence --fetch DIR` copies those files to DIR.");
    }
}

fn changes(table: &TableChanges) -> String {
    let kinds = [
        (table.inserted, "inserted"),
        (table.updated, "updated"),
        (table.deleted, "deleted"),
    ];
    let mut parts: Vec<String> = kinds
        .iter()
        .filter(|(number, _)| *number > 0)
        .map(|(number, kind)| format!("{number} {kind}"))
        .collect();
    if table.truncated > 0 {
        parts.push("emptied".into());
    }
    parts.join(", ")
}

fn print_package(package: &DivergedPackage, fetch: Option<&Path>) {
    let name = format!("{} {}", package.ident, package.target);
    match &package.their_checksum {
        Some(theirs) if package.class == DivergedClass::OtherBytes => {
            say!("  {name}: {} here, {theirs} there", package.checksum);
        }
        _ => say!("  {name}"),
    }
    let file = match fetch {
        Some(directory) => directory.join(file_name(package)).display().to_string(),
        None => file_name(package).to_string(),
    };
    match package.class {
        DivergedClass::OnlyHere => say!("    {}", upload(&file)),
        DivergedClass::OtherBytes => say!("    compare: {file}"),
        _ => {}
    }
}

/// Returns the upload command, quoted so that it can be copied into a shell.
fn upload(file: &str) -> String {
    // `hab` would read a file name that begins with a dash as an option.
    let file = &match file.starts_with('-') {
        true => format!("./{file}"),
        false => file.to_string(),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "._/+-".contains(c);
    if file.chars().all(plain) {
        return format!("hab pkg upload --force {file}");
    }
    format!("hab pkg upload --force '{}'", file.replace('\'', r"'\''"))
}

fn document(recorded: &Recorded, outcomes: &[Outcome]) -> Value {
    let found = &recorded.summary;
    let table = |table: &TableChanges| {
        json!({
            "table": table.table,
            "inserted": table.inserted,
            "updated": table.updated,
            "deleted": table.deleted,
            "truncated": table.truncated,
        })
    };
    let package = |package: &DivergedPackage| {
        let outcome = outcomes
            .iter()
            .find(|outcome| std::ptr::eq(outcome.package, package));
        let (file, error) = match outcome.map(|outcome| &outcome.result) {
            None => (None, None),
            Some(Ok(Fetched::Written(path) | Fetched::Kept(path))) => {
                (Some(path.display().to_string()), None)
            }
            Some(Err(error)) => (None, Some(error.to_string())),
        };
        let command = (package.class == DivergedClass::OnlyHere)
            .then(|| upload(file.as_deref().unwrap_or(file_name(package))));
        json!({
            "ident": package.ident,
            "target": package.target,
            "class": package.class.to_string(),
            "checksum": (!package.checksum.is_empty()).then_some(&package.checksum),
            "their_checksum": package.their_checksum,
            "key": package.key,
            "upload": command,
            "file": file,
            "error": error,
        })
    };
    json!({
        "format": 1,
        "divergence": {
            "epoch": found.epoch,
            "exact": found.exact,
            "reason": found.reason,
            "from": found.from,
            "to": found.to,
            "transactions": found.exact.then_some(found.transactions),
            "rows": found.rows,
            "tables": recorded.tables.iter().map(table).collect::<Vec<_>>(),
            "packages": recorded.packages.iter().map(package).collect::<Vec<_>>(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_one_word_of_shell_for_its_file() {
        assert_eq!(upload("-x.hart"), "hab pkg upload --force ./-x.hart");
        assert_eq!(upload("d/a-1.hart"), "hab pkg upload --force d/a-1.hart");
        assert_eq!(
            upload("it's $(x).hart"),
            r"hab pkg upload --force 'it'\''s $(x).hart'"
        );
    }
}
