//! The command blocks of the documents are ones that an operator can paste: known verbs and options, known keys, the
//! group that the documents use. `scripts/try-docs` runs them.

use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use support::blocks::{Block, difference, parse};
use support::habitat::ROOT;
use warm_spare::command::Arguments;
use warm_spare::config::Config;

const HOSTS: [&str; 4] = ["dc1", "dc2", "dc2b", "build"];
const USERS: [&str; 3] = ["root", "hab", "postgres"];

/// The documents for operators.
fn documents() -> Vec<PathBuf> {
    let root = Path::new(ROOT);
    let mut found = vec![root.join("README.md")];
    for folder in ["docs", "docs/topologies"] {
        let entries = fs::read_dir(root.join(folder)).expect("a folder");
        let paths = entries.map(|entry| entry.expect("an entry").path());
        found.extend(paths.filter(|path| path.extension().is_some_and(|end| end == "md")));
    }
    found.sort();
    found
}

fn blocks() -> Vec<Block> {
    let mut all = Vec::new();
    for path in documents() {
        let text = fs::read_to_string(&path).expect("it is read");
        let name = path.strip_prefix(ROOT).unwrap_or(&path).display();
        all.extend(parse(&text, &name.to_string()).unwrap_or_else(|error| panic!("{error}")));
    }
    all
}

/// Returns what is wrong with a block. Empty: nothing that can be seen without running it.
fn faults(block: &Block) -> Vec<String> {
    let mut found = Vec::new();
    if !HOSTS.contains(&block.host.as_str()) || !USERS.contains(&block.user.as_str()) {
        found.push(format!(
            "unknown host or user: {} {}",
            block.host, block.user
        ));
    }
    let command = block.command.replace("\\\n", " ");
    for line in command.lines() {
        for part in line.split([';', '|', '&', '(', ')', '\'', '"']) {
            found.extend(wrong_verb(part));
        }
        // hab takes these two for itself.
        if line.contains("hab pkg exec") && (line.contains(" -h ") || line.contains(" -V ")) {
            found.push(format!("hab takes -h and -V for itself: {line}"));
        }
        for verb in ["hab config apply ", "hab file upload "] {
            let Some((before, rest)) = line.split_once(verb) else {
                continue;
            };
            let group = rest.split_whitespace().next().unwrap_or_default();
            if !group.ends_with(".default") {
                found.push(format!(
                    "group {group}: stock services are in group default"
                ));
            }
            if !rest.contains("date +%s") {
                found.push(format!("the version of an apply must grow: {line}"));
            }
            if group.starts_with("warm-spare.") {
                found.extend(unknown_keys(&applied(before)));
            }
        }
    }
    if let Some((_, rest)) = command.split_once("warm-spare/config/user.toml <<'END'\n")
        && let Some((text, _)) = rest.split_once("\nEND")
    {
        found.extend(unknown_keys(text));
    }
    found
}

/// Tries a part of a line as a command of ours.
fn wrong_verb(part: &str) -> Option<String> {
    let words: Vec<&str> = part.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "warm-spare")?;
    let leading = ["until", "while", "if", "then", "do", "!", "exec"];
    if !words[..at].iter().all(|word| leading.contains(word)) {
        return None;
    }
    let own = words[at..].iter().take_while(|word| !word.contains('>'));
    // The operator replaces these.
    let own = own.map(|word| match *word {
        "EPOCH" => "2",
        "ID" | "OLDID" => "0123abcd",
        word => word,
    });
    let tried = Arguments::command().try_get_matches_from(own);
    let error = tried.err().filter(|error| error.exit_code() != 0)?;
    let text = error.to_string();
    Some(format!(
        "{}: {part}",
        text.lines().next().unwrap_or_default()
    ))
}

/// The text that `echo` or `printf` gives to an apply.
fn applied(before: &str) -> String {
    let text = before.split('\'').nth(1).unwrap_or_default();
    text.replace("\\n", "\n").replace("EPOCH", "2")
}

fn unknown_keys(text: &str) -> Vec<String> {
    let table: toml::Table = match text.parse() {
        Ok(table) => table,
        Err(error) => return vec![format!("no TOML: {error}: {text}")],
    };
    let mut names = Vec::new();
    flatten("", &table, &mut names);
    let known = |name: &String| Config::known_keys().iter().any(|key| key.name == *name);
    let unknown = names.into_iter().filter(|name| !known(name));
    unknown.map(|name| format!("unknown key {name}")).collect()
}

fn flatten(before: &str, table: &toml::Table, names: &mut Vec<String>) {
    for (name, value) in table {
        match value {
            toml::Value::Table(inner) => flatten(&format!("{before}{name}."), inner, names),
            _ => names.push(format!("{before}{name}")),
        }
    }
}

#[test]
fn every_command_block_can_be_pasted() {
    let blocks = blocks();
    assert!(blocks.len() > 100, "only {} blocks", blocks.len());
    let mut wrong = Vec::new();
    for block in &blocks {
        let found = faults(block);
        wrong.extend(
            found
                .iter()
                .map(|fault| format!("{}: {fault}", block.place)),
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Each of these breaks is found, in the block of the documents that has the words.
#[test]
fn a_broken_block_is_found() {
    let blocks = blocks();
    for (words, broken) in [
        ("warm-spare status", "warm-spare stat"),
        ("warm-spare verify --deep", "warm-spare verify --all"),
        (
            "warm-spare preflight --for unplanned",
            "warm-spare preflight --for now",
        ),
        (
            "warm-spare promote --epoch EPOCH",
            "warm-spare promote EPOCH",
        ),
        ("warm-spare fence --peer", "warm-spare fence peer"),
        ("warm-spare release --local", "warm-spare release local"),
        ("until warm-spare health ", "until warm-spare healthy "),
        (
            "config apply warm-spare.default",
            "config apply warm-spare.dc2",
        ),
        (
            "config apply warm-spare.default $(date +%s)",
            "config apply warm-spare.default 1",
        ),
        (
            "role = \"primary\"\\nforce_epoch",
            "rolle = \"primary\"\\nforce_epoch",
        ),
        ("nforce_epoch = EPOCH", "nforced_epoch = EPOCH"),
        ("[peer.datastore]", "[datastore.peer]"),
        ("key_id_file = ", "key_file = "),
        ("password_file = ", "password = password_file = "),
        ("psql builder", "psql -h 127.0.0.1 builder"),
        (
            "file upload builder-api.default",
            "file upload builder-api.dc2",
        ),
    ] {
        let block = blocks.iter().find(|block| block.command.contains(words));
        let mut block = block
            .unwrap_or_else(|| panic!("no block has {words}"))
            .clone();
        block.command = block.command.replacen(words, broken, 1);
        assert!(
            !faults(&block).is_empty(),
            "not found: {broken}\n{}",
            block.command
        );
    }
}

const PAGE: &str = "Text.\n\n```sh host=dc2 user=root exit=1\none\ntwo\n```\n\n```text\nout\n```\n\n\
                    ```sh host=dc1 user=hab exit=0 skip=\"why\"\nthree\n```\n\nText.\n\n```text\nno output\n```\n";

#[test]
fn a_block_has_its_host_and_its_output() {
    let blocks = parse(PAGE, "page.md").expect("two blocks");
    assert_eq!(blocks.len(), 2);
    assert_eq!((blocks[0].host.as_str(), blocks[0].exit), ("dc2", 1));
    assert_eq!(blocks[0].command, "one\ntwo");
    assert_eq!(blocks[0].place, "page.md:3");
    let shown = blocks[0].shown.as_ref().expect("an output");
    assert_eq!((shown.text.as_str(), shown.lines.clone()), ("out", 7..10));
    assert_eq!(blocks[1].skip.as_deref(), Some("why"));
    assert_eq!(blocks[1].shown, None, "text stands between them");
}

#[test]
fn a_wrong_first_line_is_an_error() {
    for info in [
        "sh",
        "sh host=dc2",
        "sh host=dc2 user=root exit=x",
        "sh user=root host=dc2 exit=0",
        "sh host=dc2 user=root exit=0 skip=\"\"",
        "sh host=dc2 user=root exit=0 more",
    ] {
        let text = format!("```{info}\na\n```\n");
        assert!(parse(&text, "page.md").is_err(), "{info}");
    }
    assert!(parse("```sh host=a user=b exit=0\na\n", "page.md").is_err());
}

#[test]
fn an_output_is_compared_by_its_words() {
    let same = |shown: &str, output: &str| difference(shown, output).is_none();
    assert!(same("lag 4.2 s, 2026-11-24", "lag  17 s, 2027-01-02\n"));
    assert!(same("…\nplanned: ok", "one\ntwo\nplanned: ok\n"));
    assert!(same("id 4f0c91aa here", "id 00000000 here"));
    assert!(same(
        "at 0/1A4DAE0 by slot_4f0c91aa,",
        "at 0/2 by slot_00000000,"
    ));
    assert!(same("Wrong: nothing …", "Wrong: nothing at all"));
    assert!(same("one\n…", "one\ntwo\nthree"));
    assert!(!same("planned: ok", "planned: warn"));
    assert!(!same("one\nthree", "one\ntwo\nthree"));
    assert!(!same("planned: ok", ""));
    assert!(!same("a\n…\nb", "b\na"));
}
