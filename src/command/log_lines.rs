//! The form of the log lines: text for people, or one JSON document on each line.

use super::show;
use crate::config::LogFormat;
use env_logger::{Builder, Target};
use log::{LevelFilter, Record};
use std::io::Write;

/// Starts the log: lines of `warm_spare` at the given level, lines of libraries from warnings up.
pub(super) fn start(level: LevelFilter, form: LogFormat) {
    let mut builder = Builder::new();
    builder
        .filter_level(LevelFilter::Warn.min(level))
        .filter_module("warm_spare", level)
        .format_target(false)
        .target(Target::Pipe(Box::new(show::AroundBar)));
    match form {
        LogFormat::Json => builder.format(|out, record| writeln!(out, "{}", json(record))),
        LogFormat::Text => builder.format(|out, record| {
            let time = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
            let text = printable(&record.args().to_string());
            writeln!(out, "[{time} {:<5}] {text}", record.level())
        }),
    };
    // Only a library could have started a logger before; its first logger still prints the lines.
    if builder.try_init().is_err() {
        eprintln!("warning: a library started a logger first; the log has the form of that logger");
    }
}

/// Replaces control characters by spaces. The text of another server may hold line breaks and
/// terminal commands; a record must stay one line and must not control the terminal.
fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(shown).collect()
}

fn json(record: &Record) -> serde_json::Value {
    let text = record.args().to_string();
    serde_json::json!({
        "time": chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true),
        "level": record.level().as_str().to_lowercase(),
        "side": side(&text),
        "text": text,
    })
}

/// Returns the side that a line is about. Such a line begins with the name of the side.
fn side(text: &str) -> Option<&'static str> {
    let first = text.split([' ', ':']).next();
    ["local", "peer"]
        .into_iter()
        .find(|side| first == Some(side))
}

#[cfg(test)]
mod tests {
    use super::{printable, side};

    #[test]
    fn a_record_is_one_line_and_commands_no_terminal() {
        assert_eq!(printable("a\n[x WARN ] b\x1b[2J"), "a [x WARN ] b [2J");
    }

    #[test]
    fn the_side_is_the_lines_first_word() {
        assert_eq!(
            side("peer datastore 10.0.0.1:5432: connecting: refused"),
            Some("peer")
        );
        assert_eq!(side("local: the fence had been lifted"), Some("local"));
        assert_eq!(side("locally made"), None);
        assert_eq!(side("stopped"), None);
    }
}
