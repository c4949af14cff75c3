//! The architecture as rules that fail: the order of the rooms, the only room that knows PostgreSQL and S3, the length of a
//! file, and no forgotten test file. docs/architecture.md has the reasons.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The rooms of `src`, from the ground up. A room uses itself and rooms before it.
const ROOMS: [&str; 11] = [
    "domain",
    "config",
    "package",
    "cluster",
    "observe",
    "replication",
    "verify",
    "archive",
    "role",
    "service",
    "command",
];
/// Files that belong to no room. Every room may use `killpoint`.
const BESIDE_THE_ROOMS: [&str; 3] = ["lib.rs", "main.rs", "killpoint.rs"];
/// Crates that only the room `cluster` names.
const CLIENT_CRATES: [&str; 3] = ["tokio_postgres", "postgres_protocol", "minio"];
/// Tables in Builder's database that only their owner, `cluster/spare_db.rs`, names; and the look of a client, which does
/// not use a session of ours.
const SPARE_TABLES: [&str; 3] = [
    "warm_spare.recovery_point",
    "warm_spare.unavailable",
    "warm_spare.silenced",
];
const NAMES_SPARE_TABLES: [&str; 3] = [
    "cluster/spare_db.rs",
    "cluster/spare_db/unavailable.rs",
    "cluster/postgres/as_client.rs",
];
/// Files outside of `cluster` that write statements of their own: over Builder's rows, whose form only they know, and over
/// the working tables in which such rows are compared.
const WRITES_STATEMENTS: [&str; 5] = [
    "replication/artifact/inventory.rs",
    "replication/baseline/continuation.rs",
    "replication/stream/changes.rs",
    "replication/stream/target.rs",
    "role/divergence/approximate.rs",
];
/// The beginnings of statements.
const STATEMENTS: [&str; 15] = [
    "SELECT ",
    "INSERT INTO ",
    "UPDATE ",
    "DELETE FROM ",
    "CREATE ",
    "ALTER DATABASE ",
    "DROP ",
    "TRUNCATE ",
    "WITH ",
    "COPY ",
    "SET ",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "LOCK ",
];
const LINES_MAX: usize = 500;
/// Longer files, each with its reason.
const LONGER: [(&str, &str); 0] = [];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the files with this ending below a folder.
fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(files(&path, ending));
        } else if path.extension().is_some_and(|end| end == ending) {
            found.push(path);
        }
    }
    found
}

/// A source file of the program: its path below `src`, and its lines of code with their numbers.
struct Source {
    name: String,
    lines: Vec<(usize, String)>,
}

impl Source {
    /// Returns the room of the file. None: it belongs to no room.
    fn room(&self) -> Option<&str> {
        let room = self.name.split(['/', '.']).next().unwrap_or_default();
        (!BESIDE_THE_ROOMS.contains(&self.name.as_str())).then_some(room)
    }
}

impl Source {
    /// Returns the number of modules from the root of the crate to this file.
    fn depth(&self) -> usize {
        let names = self.name.trim_end_matches("/mod.rs").split('/').count();
        // One more in its tests.
        names + usize::from(self.lines.iter().any(|(_, line)| line == "mod tests {"))
    }
}

fn sources() -> Vec<Source> {
    let src = root().join("src");
    let source = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("a text file");
        let name = path.strip_prefix(&src).expect("below src").to_str();
        Source {
            name: name.expect("a plain name").to_string(),
            lines: (1..)
                .zip(text.lines())
                .filter(|(_, line)| !line.trim_start().starts_with("//"))
                .map(|(number, line)| (number, line.to_string()))
                .collect(),
        }
    };
    let found: Vec<Source> = files(&src, "rs").into_iter().map(source).collect();
    assert!(found.len() > 100, "only {} files in src", found.len());
    found
}

/// Returns the words that follow `prefix` in a line, as far as letters, digits and `_` go.
fn words_after<'a>(line: &'a str, prefix: &'a str) -> impl Iterator<Item = &'a str> {
    let of_a_word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    line.split(prefix)
        .skip(1)
        .map(move |rest| rest.split(of_a_word).next().unwrap_or_default())
}

/// Returns whether a literal in the line begins as a statement does, or the line goes on with one.
fn writes_a_statement(line: &str) -> bool {
    let begins = |text: &str| STATEMENTS.iter().any(|word| text.starts_with(word));
    begins(line.trim_start()) || line.split('"').skip(1).any(begins)
}

#[test]
fn only_the_room_cluster_and_named_files_write_statements() {
    let mut wrong = Vec::new();
    let mut writers = BTreeSet::new();
    for source in sources() {
        let excepted = WRITES_STATEMENTS.contains(&source.name.as_str());
        if source.room() == Some("cluster") || source.name.ends_with("tests.rs") {
            continue;
        }
        for (number, line) in &source.lines {
            if !writes_a_statement(line) {
                continue;
            }
            writers.insert(source.name.clone());
            if !excepted {
                wrong.push(format!("src/{}:{number}: {}", source.name, line.trim()));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "statements outside of cluster: {wrong:#?}"
    );
    for named in WRITES_STATEMENTS {
        assert!(
            writers.contains(named),
            "{named} writes no statement any more"
        );
    }
}

#[test]
fn a_room_uses_only_rooms_below_it() {
    let place = |room: &str| ROOMS.iter().position(|known| *known == room);
    let mut wrong = Vec::new();
    for source in sources() {
        let Some(room) = source.room() else { continue };
        let Some(own) = place(room) else {
            wrong.push(format!("{}: {room} is no room of ROOMS", source.name));
            continue;
        };
        for (number, line) in &source.lines {
            for used in words_after(line, "crate::") {
                if place(used).is_some_and(|used| used > own) {
                    wrong.push(format!("src/{}:{number}: {room} uses {used}", source.name));
                }
            }
            // Both forms could leave the room without naming another one after `crate::`.
            if line.contains("crate::{") || line.contains(&"super::".repeat(source.depth())) {
                wrong.push(format!(
                    "src/{}:{number}: name the room after crate::",
                    source.name
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn only_the_room_cluster_names_postgresql_and_s3_clients() {
    let mut wrong = Vec::new();
    for source in sources() {
        if source.room() == Some("cluster") {
            continue;
        }
        for (number, line) in &source.lines {
            for client in CLIENT_CRATES {
                if line.contains(&format!("{client}::")) {
                    wrong.push(format!("src/{}:{number}: {client}", source.name));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn only_the_owner_names_the_tables_in_builders_database() {
    let mut wrong = Vec::new();
    for source in sources() {
        if NAMES_SPARE_TABLES.contains(&source.name.as_str()) {
            continue;
        }
        for (number, line) in &source.lines {
            for table in SPARE_TABLES {
                if line.contains(table) {
                    wrong.push(format!("src/{}:{number}: {table}", source.name));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn no_file_is_longer_than_a_reader_can_hold() {
    let mut wrong = Vec::new();
    let src = root().join("src");
    for path in files(&src, "rs") {
        let name = path
            .strip_prefix(&src)
            .expect("below src")
            .to_string_lossy();
        let lines = fs::read_to_string(&path)
            .expect("a text file")
            .lines()
            .count();
        let listed = LONGER.iter().any(|(known, _)| *known == name);
        if lines > LINES_MAX && !listed {
            wrong.push(format!(
                "src/{name} has {lines} lines of at most {LINES_MAX}"
            ));
        }
        if lines <= LINES_MAX && listed {
            wrong.push(format!(
                "src/{name} is short enough, and is still in LONGER"
            ));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A test program is a folder with a `main.rs`, which names every file beside it.
#[test]
fn no_test_file_is_forgotten() {
    let mut wrong = Vec::new();
    for entry in fs::read_dir(root().join("tests")).expect("the folder of tests") {
        let folder = entry.expect("an entry").path();
        if !folder.is_dir() {
            wrong.push(format!("{} belongs into a folder", folder.display()));
            continue;
        }
        let kit = folder.join("mod.rs");
        let main = folder.join("main.rs");
        let list = if kit.exists() { kit } else { main };
        let text = fs::read_to_string(&list).unwrap_or_default();
        let named: BTreeSet<&str> = words_after(&text, "mod ").collect();
        for file in fs::read_dir(&folder).expect("a folder of tests") {
            let file = file.expect("an entry").path();
            let stem = file.file_stem().and_then(|stem| stem.to_str());
            let is_source = file.extension().is_some_and(|end| end == "rs") && file != list;
            if is_source && !stem.is_some_and(|stem| named.contains(stem)) {
                wrong.push(format!(
                    "{} is not named in {}",
                    file.display(),
                    list.display()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
