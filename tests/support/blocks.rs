//! The command blocks of the documents: what an operator types, where, and what he then sees.
//!
//! The first line of a block says so, as in `sh host=dc2 user=root exit=0`, with `skip="reason"` where a
//! block cannot be tried. A block `text` right after it shows the output.

use std::fs;
use std::ops::Range;
use std::path::Path;

use super::Result;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The document, and the number of its line that opens the block.
    pub place: String,
    /// The number of that line, from 0.
    pub line: usize,
    pub host: String,
    pub user: String,
    pub exit: i32,
    /// Why it cannot be tried.
    pub skip: Option<String>,
    pub command: String,
    /// The block `text` after it. None: there is none.
    pub shown: Option<Shown>,
}

/// An output, as a document shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Numbers of its lines in the document, its fences included.
    pub lines: Range<usize>,
    pub text: String,
}

impl Block {
    /// Returns the first line of its command, for people.
    pub fn title(&self) -> &str {
        self.command.lines().next().unwrap_or_default()
    }
}

/// Reads the blocks of a document, in their order. `name`: its path, for errors.
pub fn read(path: &Path, name: &str) -> Result<Vec<Block>> {
    parse(&fs::read_to_string(path)?, name)
}

/// Reads the blocks of one section, from its heading `## …` to the next one.
pub fn read_section(path: &Path, name: &str, heading: &str) -> Result<Vec<Block>> {
    let text = fs::read_to_string(path)?;
    let lines: Vec<&str> = text.lines().collect();
    let heading = format!("## {heading}");
    let from = lines.iter().position(|line| *line == heading);
    let from = from.ok_or_else(|| format!("{name}: there is no heading {heading:?}"))?;
    let after = lines[from + 1..]
        .iter()
        .position(|line| line.starts_with("## "));
    let to = after.map_or(lines.len(), |after| from + 1 + after);
    let mut blocks = parse(&text, name)?;
    blocks.retain(|block| (from..to).contains(&block.line));
    Ok(blocks)
}

/// Reads the blocks of a text.
pub fn parse(text: &str, name: &str) -> Result<Vec<Block>> {
    let lines: Vec<&str> = text.lines().collect();
    let mut blocks: Vec<Block> = Vec::new();
    // The command block that the next block may belong to.
    let mut open = false;
    let mut at = 0;
    while at < lines.len() {
        let Some(info) = lines[at].strip_prefix("```") else {
            open &= lines[at].is_empty();
            at += 1;
            continue;
        };
        let place = format!("{name}:{}", at + 1);
        let length = lines[at + 1..].iter().position(|line| *line == "```");
        let length = length.ok_or_else(|| format!("{place}: the block has no end"))?;
        let body = lines[at + 1..at + 1 + length].join("\n");
        let end = at + length + 2;
        if info == "sh" || info.starts_with("sh ") {
            blocks.push(block(place, at, info, body)?);
            open = true;
        } else {
            if open && (info == "text" || info == "text sample") {
                let shown = Shown {
                    lines: at..end,
                    text: body,
                };
                if let Some(block) = blocks.last_mut() {
                    block.shown = Some(shown);
                }
            }
            open = false;
        }
        at = end;
    }
    Ok(blocks)
}

fn block(place: String, line: usize, info: &str, command: String) -> Result<Block> {
    let (info, skip) = match info.split_once(" skip=\"") {
        Some((info, reason)) => match reason.strip_suffix('"') {
            Some(reason) if !reason.is_empty() => (info, Some(reason.to_string())),
            _ => return Err(format!("{place}: skip has no reason in quotes").into()),
        },
        None => (info, None),
    };
    let words: Vec<&str> = info.split(' ').collect();
    let value = |at: usize, name: &str| -> Result<String> {
        let word = words.get(at).and_then(|word| word.strip_prefix(name));
        let wanted = "sh host=HOST user=USER exit=CODE, and then skip=\"REASON\"";
        Ok(word
            .ok_or_else(|| format!("{place}: expected {wanted}, found {info}"))?
            .to_string())
    };
    if words.len() != 4 {
        return Err(format!("{place}: four words were expected, found {info}").into());
    }
    Ok(Block {
        host: value(1, "host=")?,
        user: value(2, "user=")?,
        exit: value(3, "exit=")?
            .parse()
            .map_err(|_| format!("{place}: exit is no number: {info}"))?,
        skip,
        command,
        shown: None,
        place,
        line,
    })
}

/// Returns how the output differs from what a document shows. None: the document is right. Numbers,
/// times and identifiers are not compared, and a line `…` stands for any lines.
pub fn difference(shown: &str, output: &str) -> Option<String> {
    let found: Vec<String> = output.lines().map(skeleton).collect();
    let mut at = 0;
    let mut anywhere = false;
    for line in shown.lines().filter(|line| !line.trim().is_empty()) {
        if line.trim() == "…" {
            anywhere = true;
            continue;
        }
        let wanted = skeleton(line);
        let rest = found.get(at..).unwrap_or_default();
        let place = match anywhere {
            true => rest.iter().position(|line| matches(&wanted, line)),
            false => rest
                .iter()
                .position(|line| !line.is_empty())
                .filter(|first| matches(&wanted, &rest[*first])),
        };
        let Some(place) = place else {
            return Some(format!("the document shows the line\n    {line}"));
        };
        at += place + 1;
        anywhere = false;
    }
    None
}

/// Returns whether a line is the shown one, of which `…` stands for any text.
fn matches(wanted: &str, line: &str) -> bool {
    let mut rest = line;
    let parts: Vec<&str> = wanted.split('…').collect();
    for (n, part) in parts.iter().enumerate() {
        match rest.find(part) {
            Some(0) => rest = &rest[part.len()..],
            Some(found) if n > 0 => rest = &rest[found + part.len()..],
            _ => return false,
        }
    }
    rest.is_empty() || wanted.ends_with('…')
}

/// Returns the line without what differs from run to run: numbers, identifiers, and spaces.
fn skeleton(line: &str) -> String {
    let mut text = String::new();
    for word in line.split_whitespace() {
        if !text.is_empty() {
            text.push(' ');
        }
        let mut rest = word;
        while !rest.is_empty() {
            let at = rest.find(|c: char| !c.is_ascii_alphanumeric());
            let (part, after) = rest.split_at(at.unwrap_or(rest.len()));
            text.push_str(&number_or_name(part));
            let mut others = after.chars();
            text.extend(others.next());
            rest = others.as_str();
        }
    }
    // A time may have any number of parts, and a size any unit.
    for (from, to) in [("#.#", "#"), ("#:#", "#"), ("#-#", "#"), ("#ms", "# s")] {
        while text.contains(from) {
            text = text.replace(from, to);
        }
    }
    text
}

/// Returns `#` for a number or an identifier, and a name with `#` for each number in it.
fn number_or_name(part: &str) -> String {
    let has_digit = part.contains(|c: char| c.is_ascii_digit());
    if has_digit && part.chars().all(|c| c.is_ascii_hexdigit()) {
        return "#".into();
    }
    let mut text = String::new();
    for c in part.chars() {
        match c.is_ascii_digit() {
            true if text.ends_with('#') => {}
            true => text.push('#'),
            false => text.push(c),
        }
    }
    text
}
