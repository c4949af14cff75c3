//! Output for people: a bar on a terminal, plain lines elsewhere, errors with the next step; JSON
//! for programs.

use crate::observe::{Listener, Phase, Progress};
use crate::replication::ReplicationError;
use bytesize::ByteSize;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

/// Interval between two progress lines of one phase.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);

static BARS: LazyLock<MultiProgress> =
    LazyLock::new(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));

/// Writer of the log lines. It hides the bar while it prints a line.
pub(super) struct AroundBar;

impl Write for AroundBar {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        BARS.suspend(|| std::io::stderr().write_all(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

pub(super) fn progress() -> Progress {
    if std::io::stderr().is_terminal() {
        Progress::new(Arc::new(Bar(Mutex::new(None))))
    } else {
        Progress::new(Arc::new(Lines(Mutex::new(Instant::now()))))
    }
}

struct Bar(Mutex<Option<ProgressBar>>);

impl Listener for Bar {
    fn phase(&self, phase: Phase, total: u64) {
        let bar = if total == 0 {
            ProgressBar::new_spinner().with_style(style("{spinner} {msg} {elapsed}"))
        } else if phase == Phase::Tables {
            ProgressBar::new(total).with_style(style(
                "{msg:20} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            ))
        } else {
            ProgressBar::new(total).with_style(style("{msg:20} {wide_bar} {pos}/{len} {eta}"))
        };
        let bar = BARS.add(bar.with_message(phase.name()));
        bar.enable_steady_tick(Duration::from_millis(200));
        if let Some(last) = self.0.lock().expect("no holder panics").replace(bar) {
            last.finish_and_clear();
        }
    }

    fn step(&self, _: Phase, done: u64, total: u64) {
        if let Some(bar) = self.0.lock().expect("no holder panics").as_ref() {
            // The total is the size on disk, which only estimates the length of the rows' text.
            bar.set_position(done.min(total));
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = self.0.lock().expect("no holder panics").take() {
            bar.finish_and_clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("our templates are sound")
}

struct Lines(Mutex<Instant>);

impl Listener for Lines {
    fn phase(&self, phase: Phase, total: u64) {
        *self.0.lock().expect("no holder panics") = Instant::now();
        match (phase, total) {
            (_, 0) => eprintln!("{}", phase.name()),
            (Phase::Tables, bytes) => eprintln!("tables: about {}", ByteSize(bytes)),
            (_, items) => eprintln!("{}: {items}", phase.name()),
        }
    }

    fn step(&self, phase: Phase, done: u64, total: u64) {
        let mut last = self.0.lock().expect("no holder panics");
        if last.elapsed() < PROGRESS_INTERVAL {
            return;
        }
        *last = Instant::now();
        match phase {
            Phase::Tables => eprintln!("tables: {} of about {}", ByteSize(done), ByteSize(total)),
            _ => eprintln!("{}: {done} of {total}", phase.name()),
        }
    }
}

pub(super) fn json(document: &serde_json::Value) {
    say!("{document:#}");
}

/// Prints the error and its next step, and returns the exit code.
pub(super) fn failure(error: &ReplicationError, as_json: bool) -> u8 {
    let next_step = error.next_step();
    eprintln!("error: {error}\nnext step: {next_step}");
    if as_json {
        json(&serde_json::json!({ "format": 1, "error": {
            "code": error.code().into_str(),
            "text": error.to_string(),
            "next_step": next_step,
            "exit_code": error.exit_code(),
        } }));
    }
    error.exit_code()
}

/// Returns the number and the noun: `1 package`, `2 packages`.
pub(super) fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}
