//! Tries the documents as an operator does: every command block of the pages below, as it is written,
//! on two stock sites. `scripts/try-docs` builds what this needs, and runs it.
//!
//! With `--capture` it writes each output that it saw into the document.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use support::Result;
use support::blocks::{Block, difference, read};
use support::builder_keys::BuilderKey;
use support::habitat::ROOT;
use support::machine::{Machine, Network};
use support::stock::{Node, Parts};

const ORIGIN: &str = "acme";

/// An act of the story that the pages tell together.
enum Act {
    /// Every block of a page.
    Page(&'static str),
    /// dc1 loses its power, with a package that dc2 has not got.
    LoseDc1,
    /// dc1 gets its power back.
    StartDc1,
}

const STORY: [Act; 8] = [
    Act::Page("quickstart"),
    Act::Page("before-trouble"),
    Act::Page("runbook-planned"),
    Act::Page("failback"),
    Act::LoseDc1,
    Act::Page("runbook-unplanned"),
    Act::StartDc1,
    Act::Page("two-primaries"),
];

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let capture = arguments.iter().any(|argument| argument == "--capture");
    let parts = match Parts::find() {
        Ok(parts) => parts,
        Err(reason) => {
            eprintln!("error: {reason}");
            return ExitCode::from(2);
        }
    };
    match tell(&parts, capture).await {
        Ok(failed) => {
            println!("{failed} differences");
            ExitCode::from(u8::from(failed > 0))
        }
        Err(error) => {
            eprintln!("\nerror: {}", support::with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

async fn tell(parts: &Parts, capture: bool) -> Result<usize> {
    let mut stand = Stand::new(parts).await?;
    for act in STORY {
        match act {
            Act::Page(page) => stand.page(page, capture).await?,
            Act::LoseDc1 => {
                println!("== dc1 loses its power");
                let dc2 = &stand.dc2.machine;
                dc2.must(&until(
                    "warm-spare status --json | grep -q '\"mode\": *\"stream\"'",
                ))
                .await?;
                dc2.must(&until("warm-spare status | grep -q ' following '"))
                    .await?;
                stand.dc1.cut_power().await?;
                dc2.must(&until("warm-spare status | grep -q peer_unreachable"))
                    .await?;
            }
            Act::StartDc1 => {
                println!("== dc1 gets its power back");
                stand.dc1.start_supervisor().await?;
                let fenced = until(r#"[ "$(warm-spare fence --peer > /dev/null; echo $?)" = 1 ]"#);
                stand.dc2.machine.must(&fenced).await?;
            }
        }
    }
    println!("{} blocks run, {} skipped", stand.run, stand.skipped);
    Ok(stand.failed)
}

/// Returns a command that waits until another one succeeds.
fn until(command: &str) -> String {
    format!("for n in $(seq 300); do if {command}; then exit 0; fi; sleep 1; done; exit 1")
}

struct Stand {
    dc1: Node,
    dc2: Node,
    /// Words that a page has replaced by the operator, and their values.
    words: BTreeMap<&'static str, String>,
    run: usize,
    skipped: usize,
    failed: usize,
    _network: Network,
}

impl Stand {
    /// Starts a stock dc1 with packages, and a dc2 on which nothing is installed.
    async fn new(parts: &Parts) -> Result<Stand> {
        let network = Network::new()?;
        let all = [("dc1", 1), ("dc2", 2)];
        let dc1 = Machine::start(&network, "dc1", 1, &all).await?;
        let dc2 = Machine::start(&network, "dc2", 2, &all).await?;
        let mut dc1 = Node::new(dc1, parts).await?;
        let dc2 = Node::new(dc2, parts).await?;
        let key = BuilderKey::new("20260103101500");
        key.write(&dc1.machine.path("/hab/cache/keys"))?;
        println!("== dc1 is installed: {}", dc1.install().await?);
        for number in 0..5 {
            dc1.upload(&format!("package{number}")).await?;
        }
        dc1.seal(&key).await?;
        for node in [&dc1, &dc2] {
            node.build_package(parts, ORIGIN).await?;
        }
        let words = [
            ("OURS", ORIGIN.to_string()),
            ("DC1", "dc1".to_string()),
            ("DC2", "dc2".to_string()),
            ("CHANGE", "CHG1".to_string()),
            ("EPOCH", "0".to_string()),
        ];
        Ok(Stand {
            dc1,
            dc2,
            words: words.into(),
            run: 0,
            skipped: 0,
            failed: 0,
            _network: network,
        })
    }

    async fn page(&mut self, page: &str, capture: bool) -> Result<()> {
        println!("== docs/{page}.md");
        let path = Path::new(ROOT).join(format!("docs/{page}.md"));
        let mut captured: Vec<(Block, String)> = Vec::new();
        for block in read(&path, &format!("docs/{page}.md"))? {
            if let Some(reason) = &block.skip {
                self.skipped += 1;
                println!("-- {}: skipped: {reason}: {}", block.place, block.title());
                self.instead(&block).await?;
                continue;
            }
            let command = self.with_words(&block.command);
            println!("-- {} ({}): {}", block.place, block.host, block.title());
            let began = Instant::now();
            let node = match block.host.as_str() {
                "dc1" => &self.dc1,
                _ => &self.dc2,
            };
            let output = node.machine.run(&block.user, &command).await?;
            self.run += 1;
            let text = plain(&output.stdout);
            self.learn(&text);
            let wrong = match (output.code == Some(block.exit), &block.shown) {
                (false, _) => Some(format!(
                    "exit code {:?}, and the document says {}",
                    output.code, block.exit
                )),
                (true, Some(shown)) => difference(&self.with_words(&shown.text), &text),
                (true, None) => None,
            };
            if let Some(wrong) = wrong {
                self.failed += 1;
                println!(
                    "   DIFFERS after {:.1?}: {wrong}\n{}",
                    began.elapsed(),
                    indented(&text)
                );
            }
            captured.push((block, self.without_words(&text)));
        }
        if capture {
            write_captured(&path, &captured)?;
        }
        Ok(())
    }

    /// Does what a block would do that cannot be run as it is.
    async fn instead(&mut self, block: &Block) -> Result<()> {
        if block.command.contains("./install.sh") && block.host == "dc2" {
            println!("   {}", self.dc2.install().await?);
        }
        if block.command.contains("scp ") {
            let (from, to) = match block.host.as_str() {
                "dc1" => (&self.dc1, &self.dc2),
                _ => (&self.dc2, &self.dc1),
            };
            let folder = format!("/root/for-{}", to.machine.name);
            let source = from.machine.path(&folder);
            let target = to.machine.path("/root/");
            let copied = std::process::Command::new("cp")
                .arg("-a")
                .args([&source, &target])
                .status()?;
            assert!(copied.success());
        }
        if block.place.contains("quickstart") && block.command.contains("hab pkg upload") {
            let node = match block.host.as_str() {
                "dc1" => &mut self.dc1,
                _ => &mut self.dc2,
            };
            node.upload("uploaded").await?;
            // An operator looks a moment later.
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
        Ok(())
    }

    /// Takes from an output the numbers that a later block needs.
    fn learn(&mut self, output: &str) {
        if let Some((_, rest)) = output.split_once("\"next_epoch\":") {
            let number: String = rest
                .trim()
                .chars()
                .take_while(char::is_ascii_digit)
                .collect();
            self.words.insert("EPOCH", number);
        }
    }

    fn with_words(&self, text: &str) -> String {
        let mut text = text.to_string();
        for (word, value) in &self.words {
            text = replace_word(&text, word, value);
        }
        text
    }

    fn without_words(&self, text: &str) -> String {
        text.replace(ORIGIN, "OURS").replace("CHG1", "CHANGE")
    }
}

/// Replaces a word, but no part of a longer one.
fn replace_word(text: &str, word: &str, value: &str) -> String {
    let part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let (mut done, mut rest) = (String::new(), text);
    while let Some(at) = rest.find(word) {
        let (before, after) = (&rest[..at], &rest[at + word.len()..]);
        let alone = !before.ends_with(part) && !after.starts_with(part);
        done.push_str(before);
        done.push_str(if alone { value } else { word });
        rest = after;
    }
    done + rest
}

/// Returns an output without the colours of a terminal.
fn plain(output: &str) -> String {
    let (mut text, mut rest) = (String::new(), output);
    while let Some((before, after)) = rest.split_once('\u{1b}') {
        text.push_str(before);
        rest = after
            .split_once(|c: char| c.is_ascii_alphabetic())
            .map_or("", |(_, rest)| rest);
    }
    text.push_str(rest);
    text.lines()
        .map(|line| line.trim_end().to_string() + "\n")
        .collect()
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("   | {line}\n")).collect()
}

/// Writes the outputs into the document, each in place of the shown one. Where the document leaves lines
/// out, the same number of lines stays before and after.
fn write_captured(path: &PathBuf, captured: &[(Block, String)]) -> Result<()> {
    let document = fs::read_to_string(path)?;
    let mut lines: Vec<String> = document.lines().map(String::from).collect();
    for (block, output) in captured.iter().rev() {
        let Some(shown) = &block.shown else { continue };
        let mut text = vec!["```text".to_string()];
        text.extend(shortened(&shown.text, output));
        text.push("```".into());
        lines.splice(shown.lines.clone(), text);
    }
    Ok(fs::write(path, lines.join("\n") + "\n")?)
}

fn shortened(shown: &str, output: &str) -> Vec<String> {
    let wanted: Vec<&str> = shown.lines().collect();
    let found: Vec<String> = output.lines().map(String::from).collect();
    let Some(gap) = wanted.iter().position(|line| line.trim() == "…") else {
        return found;
    };
    let (before, after) = (gap, wanted.len() - gap - 1);
    if found.len() <= before + after {
        return found;
    }
    let mut text = found[..before].to_vec();
    text.push("…".into());
    text.extend_from_slice(&found[found.len() - after..]);
    text
}
