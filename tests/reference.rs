//! `docs/reference.md` describes the configuration as the code has it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use warm_spare::config::Config;

/// Cells of a row of one of the tables: key, type, default, meaning.
type Row = [String; 4];

fn documented() -> BTreeMap<String, Row> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference.md");
    let text = fs::read_to_string(path).unwrap();
    let (_, section) = text
        .split_once("\n## Configuration\n")
        .expect("a section Configuration");
    let section = section.split("\n## ").next().unwrap_or(section);
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
