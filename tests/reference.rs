//! The documentation describes configuration, command line and refusals as the code has them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use clap::CommandFactory;
use warm_spare::command::Arguments;
use warm_spare::config::Config;

/// Cells of a row of one of the tables: key, type, default, meaning.
type Row = [String; 4];

fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The part of `docs/reference.md` under a heading, up to the next of its rank.
fn section(heading: &str) -> String {
    let text = read("docs/reference.md");
    let (_, section) = text
        .split_once(&format!("\n## {heading}\n"))
        .unwrap_or_else(|| panic!("no section {heading}"));
    section.split("\n## ").next().unwrap_or(section).to_string()
}

fn documented() -> BTreeMap<String, Row> {
    let section = section("Configuration");
    let mut rows = BTreeMap::new();
    for line in section.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<String> = line
            .trim_matches('|')
            .split('|')
            .map(|cell| cell.trim().to_string())
            .collect();
        let row: Row = cells
            .try_into()
            .unwrap_or_else(|_| panic!("not four cells: {line}"));
        let key = row[0].trim_matches('`').to_string();
        assert!(
            rows.insert(key.clone(), row).is_none(),
            "{key} stands there twice"
        );
    }
    rows
}

#[test]
fn every_key_is_described_and_every_description_has_a_key() {
    let mut documented = documented();
    for key in Config::known_keys() {
        let row = documented.remove(key.name);
        let [_, _, default, meaning] =
            row.unwrap_or_else(|| panic!("{} is not in docs/reference.md", key.name));
        if !key.default.is_empty() {
            assert_eq!(default, format!("`{}`", key.default_text()), "{}", key.name);
        }
        let marked = meaning.contains("*Not built yet");
        assert_eq!(
            marked,
            key.is_not_built(),
            "{}: the mark \"Not built yet\"",
            key.name
        );
    }
    let left: Vec<&String> = documented.keys().collect();
    assert!(left.is_empty(), "unknown to the code: {left:?}");
}

#[test]
fn every_verb_and_option_is_described() {
    let section = section("Verbs");
    let described: Vec<&str> = section
        .split('`')
        .skip(1)
        .step_by(2)
        .flat_map(|code| code.split([' ', '[', ']']))
        .collect();
    let command = Arguments::command();
    let mut names = 0;
    for part in std::iter::once(&command).chain(command.get_subcommands()) {
        let verb = part.get_name();
        assert!(
            verb == "warm-spare" || described.contains(&verb),
            "verb {verb} is not in docs/reference.md"
        );
        for option in part.get_arguments().filter_map(|a| a.get_long()) {
            names += 1;
            assert!(
                described.contains(&format!("--{option}").as_str()),
                "--{option} of {verb} is not in docs/reference.md"
            );
        }
    }
    assert!(names >= 5, "only {names} options were found");
}

/// Every file of the program itself, as text.
fn sources(folder: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push(fs::read_to_string(path).unwrap());
        }
    }
}

/// The names in front of the colon of a refusal, where one is made: `rule: "…"`, `check: "…"`, `unfit("…"`; and those
/// that stand in an error's own text.
fn refusals() -> BTreeSet<String> {
    let mut files = Vec::new();
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut files,
    );
    let mut names = BTreeSet::new();
    for text in &files {
        for maker in ["rule:", "check:", "unfit("] {
            for after in text.split(maker).skip(1) {
                let literal = after.trim_start().strip_prefix('"');
                names.extend(literal.and_then(|l| l.split('"').next()).map(String::from));
            }
        }
        for name in ["same_server", "same_bucket", "unsupported_store"] {
            if text.contains(&format!("\"{name}: ")) {
                names.insert(name.to_string());
            }
        }
    }
    names
}

#[test]
fn every_refusal_is_explained() {
    let names = refusals();
    for known in [
        "role_unset",
        "fuse",
        "row_count",
        "disk_full",
        "same_server",
    ] {
        assert!(names.contains(known), "{known} was not found in src");
    }
    let text = read("docs/troubleshoot.md");
    for name in names {
        let explained = [
            format!("### `{name}`"),
            format!("| `{name}` |"),
            format!("- `{name}: "),
        ];
        assert!(
            explained.iter().any(|form| text.contains(form)),
            "{name} is not explained in docs/troubleshoot.md"
        );
    }
}

/// Links between the documents lead to files and headings that are there.
#[test]
fn links_lead_somewhere() {
    let documents = [
        "README.md",
        "docs/architecture.md",
        "docs/dependencies.md",
        "docs/deploy.md",
        "docs/reference.md",
        "docs/troubleshoot.md",
        "habitat/README.md",
        "hooks/README.md",
    ];
    for document in documents {
        let text = read(document);
        let folder = Path::new(document).parent().unwrap_or(Path::new(""));
        for link in text.split("](").skip(1) {
            let link = link.split(')').next().unwrap_or_default();
            if link.contains("://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() {
                text.clone()
            } else {
                read(folder.join(file).to_str().unwrap())
            };
            let found = anchor.is_empty() || anchors(&target).contains(anchor);
            assert!(found, "{document}: {link} leads nowhere");
        }
    }
}

/// As GitHub makes them of headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let heading = |line: &str| {
        let title = line.strip_prefix('#')?.trim_start_matches('#').trim();
        let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
        let kept: String = title.to_lowercase().chars().filter(kept).collect();
        Some(kept.replace(' ', "-"))
    };
    text.lines().filter_map(heading).collect()
}
