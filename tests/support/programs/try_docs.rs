//! Tries the documents as an operator does: every command block of the pages below, as it is written,
//! on two stock sites, which are new for each story. `scripts/try-docs` builds what this needs, and runs it.
//!
//! Arguments: the names of stories (none: all of them); `--capture`: each output that was seen is written into the
//! document; `--broken`: the quickstart is tried with two blocks exchanged, several times, and each must be found out.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use support::api_clients::ApiClients;
use support::balancer::{Addresses, Balancer, Kind};
use support::blocks::{Block, difference, read, read_section};
use support::builder_keys::BuilderKey;
use support::habitat::ROOT;
use support::machine::{Machine, Network};
use support::service::SOON;
use support::stock::{Node, Parts, SCRIPTS};
use support::{Result, wait_until};

const ORIGIN: &str = "acme";

/// An act of a story that pages tell together.
#[derive(Clone, Copy)]
enum Act {
    /// Every block of a page.
    Page(&'static str),
    /// Every block of one section of a page.
    Section(&'static str, &'static str),
    /// The same, with the blocks that a page skips because they change what another page has made.
    Whole(&'static str, &'static str),
    /// What the operator does at a host because the text tells it, without a block.
    Do(&'static str, &'static str),
    /// dc1 loses its power, with a package that dc2 has not got.
    LoseDc1,
    /// dc1 gets its power back.
    StartDc1,
    /// A balancer that asks both sites stands before them, with clients. They need Builder's real API.
    Balance,
    /// The installer finds another release of Builder.
    Offer,
    /// A second machine at dc2's site, on which nothing is installed.
    AddDc2b,
}

use Act::{AddDc2b, Balance, Do, LoseDc1, Offer, Page, Section, StartDc1, Whole};

const STORIES: [(&str, &[Act]); 5] = [
    (
        "takeover",
        &[
            Page("quickstart"),
            Page("before-trouble"),
            Page("runbook-planned"),
            Page("failback"),
            LoseDc1,
            Page("runbook-unplanned"),
            StartDc1,
            Page("two-primaries"),
        ],
    ),
    (
        "upgrade",
        &[
            Page("quickstart"),
            Offer,
            Section("upgrade", "Upgrade both sites"),
        ],
    ),
    (
        "upgrade-through",
        &[
            Page("quickstart"),
            Page("before-trouble"),
            Balance,
            Offer,
            Page("upgrade-through-the-spare"),
        ],
    ),
    (
        "frontends",
        &[
            Page("quickstart"),
            AddDc2b,
            Section("frontends", "Add a frontend"),
            Page("runbook-planned"),
            Section("frontends", "After a takeover"),
        ],
    ),
    (
        "secrets",
        &[
            Page("quickstart"),
            Whole("rotate", "dc1's datastore password"),
            Do(
                "dc2",
                "printf '%s\\n' 'new-1' > /etc/warm-spare/peer-datastore-password",
            ),
            Do("dc2", FOLLOWS),
            Whole("rotate", "Local password"),
            Do(
                "dc2",
                "printf '\\n[local.datastore]\\npassword_file = \"/hab/svc/builder-datastore/config/pwfile\"\\n' >> /hab/user/warm-spare/config/user.toml",
            ),
            Do("dc2", FOLLOWS),
            Whole("primary", "Three levels of privilege"),
            Do("dc2", FOLLOWS),
            Do(
                "dc2",
                "printf '%s\\n' 'new-1' > /etc/warm-spare/peer-datastore-password; sed -i '/^user = /d' /hab/user/warm-spare/config/user.toml",
            ),
            Do("dc2", FOLLOWS),
            Whole("remove", "Decommission"),
        ],
    ),
];

/// Waits until dc2 is complete by the stream, and was asked just now.
const FOLLOWS: &str = r#"sleep 20; for n in $(seq 120); do
    if warm-spare health > /dev/null && warm-spare status --json | grep -q '"mode": *"stream"'; then exit 0; fi; sleep 1
done; warm-spare status; exit 1"#;

/// Blocks of the quickstart that are exchanged by `--broken`, by the beginning of each.
const EXCHANGES: [[&str; 2]; 6] = [
    ["mkdir -p /hab/cache/keys", "cd FOLDER"],
    ["cd FOLDER", "mkdir -p /hab/sup/default/config"],
    ["hab origin key import", "hab svc load OURS/warm-spare"],
    ["install -d -m 0750", "hab svc load OURS/warm-spare"],
    ["hab svc load OURS/warm-spare", "echo 'role = \"spare\"'"],
    ["echo 'role = \"spare\"'", "warm-spare prepare"],
];

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let capture = arguments.iter().any(|argument| argument == "--capture");
    let wanted: Vec<&String> = arguments.iter().filter(|a| !a.starts_with("--")).collect();
    let known = |name: &str| STORIES.iter().any(|(story, _)| *story == name);
    if let Some(unknown) = wanted.iter().find(|name| !known(name)) {
        let names = STORIES.map(|(name, _)| name).join(", ");
        eprintln!("error: there is no story {unknown}: {names}");
        return ExitCode::from(2);
    }
    let parts = match Parts::find() {
        Ok(parts) => parts,
        Err(reason) => {
            eprintln!("error: {reason}");
            return ExitCode::from(2);
        }
    };
    if arguments.iter().any(|argument| argument == "--broken") {
        return break_the_order(&parts).await;
    }
    let mut failed = 0;
    for (name, acts) in STORIES {
        if !wanted.is_empty() && !wanted.iter().any(|wanted| *wanted == name) {
            continue;
        }
        println!("==== {name}");
        match tell(&parts, acts, capture).await {
            Ok(differences) => failed += differences,
            Err(error) => {
                eprintln!("\nerror: {}", support::with_causes(&*error));
                return ExitCode::FAILURE;
            }
        }
    }
    println!("{failed} differences");
    ExitCode::from(u8::from(failed > 0))
}

/// Tries the quickstart with two blocks exchanged. Fails if one such break is not found out.
async fn break_the_order(parts: &Parts) -> ExitCode {
    let mut unnoticed = 0;
    for exchange in EXCHANGES {
        println!("==== exchanged: {exchange:?}");
        match is_noticed(parts, exchange).await {
            Ok(true) => println!("==== found out"),
            Ok(false) => {
                unnoticed += 1;
                println!("==== NOT FOUND OUT");
            }
            Err(error) => {
                eprintln!("\nerror: {}", support::with_causes(&*error));
                return ExitCode::FAILURE;
            }
        }
    }
    println!("{} exchanges, {unnoticed} not found out", EXCHANGES.len());
    ExitCode::from(u8::from(unnoticed > 0))
}

async fn is_noticed(parts: &Parts, exchange: [&str; 2]) -> Result<bool> {
    let mut stand = Stand::new(parts).await?;
    let mut blocks = read(&document("quickstart"), "docs/quickstart.md")?;
    let mut places = Vec::new();
    for title in exchange {
        let place = blocks.iter().position(|b| b.command.starts_with(title));
        places.push(place.ok_or_else(|| format!("there is no block {title:?}"))?);
    }
    blocks.swap(places[0], places[1]);
    for block in blocks {
        match stand.try_all("quickstart", vec![block], false).await {
            Ok(()) if stand.failed == 0 => {}
            Ok(()) => return Ok(true),
            // A block that waits for something that never comes.
            Err(error) if error.to_string().starts_with("still running") => {
                println!("   {error}");
                return Ok(true);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

async fn tell(parts: &Parts, acts: &[Act], capture: bool) -> Result<usize> {
    let mut stand = Stand::new(parts).await?;
    for act in acts {
        match *act {
            Page(page) => {
                println!("== docs/{page}.md");
                let blocks = read(&document(page), &format!("docs/{page}.md"))?;
                stand.try_all(page, blocks, capture).await?;
            }
            Section(page, heading) => {
                println!("== docs/{page}.md, {heading}");
                let name = format!("docs/{page}.md");
                let blocks = read_section(&document(page), &name, heading)?;
                stand.try_all(page, blocks, capture).await?;
            }
            Whole(page, heading) => {
                println!("== docs/{page}.md, {heading}, the whole");
                let name = format!("docs/{page}.md");
                let mut blocks = read_section(&document(page), &name, heading)?;
                for block in &mut blocks {
                    block.skip = None;
                }
                stand.try_all(page, blocks, capture).await?;
            }
            Do(host, script) => {
                println!("-- {host}: {}", script.lines().next().unwrap_or_default());
                let node = if host == "dc1" {
                    &stand.dc1
                } else {
                    &stand.dc2
                };
                node.machine.must(script).await?;
            }
            LoseDc1 => stand.lose_dc1().await?,
            StartDc1 => {
                println!("== dc1 gets its power back");
                stand.dc1.start_supervisor().await?;
                let fenced = until(r#"[ "$(warm-spare fence --peer > /dev/null; echo $?)" = 1 ]"#);
                stand.dc2.machine.must(&fenced).await?;
            }
            Balance => stand.balance().await?,
            AddDc2b => stand.add_dc2b(parts).await?,
            Offer => {
                stand.dc1.offer_upgrade().await?;
                stand.dc2.offer_upgrade().await?;
            }
        }
    }
    if let Some((_, clients)) = &stand.clients {
        println!(
            "== clients behind the balancer: {}",
            clients.report(stand.began)
        );
    }
    println!("{} blocks run, {} skipped", stand.run, stand.skipped);
    Ok(stand.failed)
}

fn document(page: &str) -> PathBuf {
    Path::new(ROOT).join(format!("docs/{page}.md"))
}

/// Returns a command that waits until another one succeeds.
fn until(command: &str) -> String {
    format!("for n in $(seq 300); do if {command}; then exit 0; fi; sleep 1; done; exit 1")
}

struct Stand {
    dc1: Node,
    dc2: Node,
    dc2b: Option<Node>,
    /// Words that a page has replaced by the operator, and their values.
    words: BTreeMap<&'static str, String>,
    run: usize,
    skipped: usize,
    failed: usize,
    key: BuilderKey,
    clients: Option<(Balancer, ApiClients)>,
    network: Network,
    began: Instant,
}

/// Every machine of a stand, with its number in the network.
const MACHINES: [(&str, u8); 3] = [("dc1", 1), ("dc2", 2), ("dc2b", 3)];

impl Stand {
    /// Starts a stock dc1 with packages, and a dc2 on which nothing is installed.
    async fn new(parts: &Parts) -> Result<Stand> {
        let network = Network::new()?;
        let dc1 = Machine::start(&network, "dc1", 1, &MACHINES).await?;
        let dc2 = Machine::start(&network, "dc2", 2, &MACHINES).await?;
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
            ("FOLDER", SCRIPTS.to_string()),
            ("NEWPASSWORD", "new-1".to_string()),
            ("ROLEPASSWORD", "new-2".to_string()),
            ("EPOCH", "0".to_string()),
        ];
        Ok(Stand {
            dc1,
            dc2,
            dc2b: None,
            words: words.into(),
            run: 0,
            skipped: 0,
            failed: 0,
            key,
            clients: None,
            network,
            began: Instant::now(),
        })
    }

    async fn add_dc2b(&mut self, parts: &Parts) -> Result<()> {
        let machine = Machine::start(&self.network, "dc2b", 3, &MACHINES).await?;
        let node = Node::new(machine, parts).await?;
        // The package is the one that dc2 has.
        let files = "/root/acme-warm-spare-*.hart /root/acme.pub";
        let listed = self.dc2.machine.must(&format!("ls {files}")).await?;
        for file in listed.split_whitespace() {
            std::fs::copy(self.dc2.machine.path(file), node.machine.path(file))?;
        }
        self.dc2b = Some(node);
        Ok(())
    }

    fn node(&self, host: &str) -> Result<&Node> {
        match host {
            "dc1" => Ok(&self.dc1),
            "dc2" => Ok(&self.dc2),
            "dc2b" => Ok(self.dc2b.as_ref().ok_or("there is no dc2b in this story")?),
            other => Err(format!("there is no host {other}").into()),
        }
    }

    async fn lose_dc1(&mut self) -> Result<()> {
        println!("== dc1 loses its power");
        let dc2 = &self.dc2.machine;
        let streams = r#"warm-spare status --json | grep -q '"mode": *"stream"'"#;
        dc2.must(&until(streams)).await?;
        dc2.must(&until("warm-spare status | grep -q ' following '"))
            .await?;
        self.dc1.cut_power().await?;
        dc2.must(&until("warm-spare status | grep -q peer_unreachable"))
            .await?;
        Ok(())
    }

    /// Lets a balancer ask both sites, starts it, and sends clients to it.
    async fn balance(&mut self) -> Result<()> {
        if !self.dc1.has_real_api() {
            println!("== no clients: WARM_SPARE_BLDR_API does not name Builder's real API");
            return Ok(());
        }
        for node in [&self.dc1, &self.dc2] {
            let listen = "printf '\n[http]\nlisten = \"0.0.0.0\"\n' >> /hab/user/warm-spare/config/user.toml\n\
                          hab svc stop acme/warm-spare && sleep 5 && hab svc start acme/warm-spare";
            node.machine.must(listen).await?;
        }
        let good = until("warm-spare health > /dev/null");
        self.dc1.machine.must(&good).await?;
        self.dc2.machine.must(&good).await?;
        let mut addresses = Vec::new();
        for node in [&self.dc1, &self.dc2] {
            let at = |port: u16| format!("{}:{port}", node.machine.address).parse();
            addresses.push(Addresses {
                builder: at(9636)?,
                warm_spare: at(9640)?,
            });
        }
        let balancer = Balancer::start(Kind::Nginx, [addresses[0], addresses[1]]).await?;
        let token = self.dc1.token(&self.key).await?;
        let clients = ApiClients::start(balancer.port(), &token, &self.dc1.first_ident());
        wait_until("the clients write", SOON, || async {
            match clients.accepted() {
                0 => Err(clients.report(self.began).into()),
                _ => Ok(()),
            }
        })
        .await;
        println!("== clients behind nginx: {}", clients.report(self.began));
        self.clients = Some((balancer, clients));
        Ok(())
    }

    async fn try_all(&mut self, page: &str, blocks: Vec<Block>, capture: bool) -> Result<()> {
        let path = document(page);
        let mut captured: Vec<(Block, String)> = Vec::new();
        for block in blocks {
            if let Some(reason) = &block.skip {
                self.skipped += 1;
                println!("-- {}: skipped: {reason}: {}", block.place, block.title());
                self.instead(&block).await?;
                continue;
            }
            let command = self.with_words(&block.command);
            let since = self.began.elapsed();
            println!(
                "-- {since:4.0?} {} ({}): {}",
                block.place,
                block.host,
                block.title()
            );
            let began = Instant::now();
            let node = self.node(&block.host)?;
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
        if block.command.contains("scp ") {
            let (from, to) = match block.host.as_str() {
                "dc1" => (&self.dc1, &self.dc2),
                _ if block.command.contains("for-dc2b") => (&self.dc2, self.node("dc2b")?),
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
        if let Some((_, rest)) = output.split_once("fuse.approve = \"")
            && let Some((id, _)) = rest.split_once('"')
        {
            self.words.insert("APPROVAL", id.to_string());
        }
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
/// out once, the same number of lines stays before and after. Where it does so more than once, and is right, it stays.
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
    let gaps = wanted.iter().filter(|line| line.trim() == "…").count();
    if gaps > 1 && difference(shown, output).is_none() {
        return wanted.into_iter().map(String::from).collect();
    }
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
