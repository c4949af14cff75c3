//! The documentation describes configuration, command line, refusals, status, health, metrics and events as the code
//! has them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use clap::CommandFactory;
use serde_json::Value;
use strum::VariantArray;
use tokio::sync::watch;
use warm_spare::cluster::{
    Confirmation, DrillRecord, Event, Footprint, Generation, Node, NodeTold, RecoveryPoint,
    Throttle, VerificationRecord,
};
use warm_spare::command::Arguments;
use warm_spare::config::{Config, Direction, WantedRole};
use warm_spare::domain::{
    Asker, ErrorCode, EventKind, HealthCode, HoldReason, Isolated, Lease, LeaseLine, LeaseState,
    LeaseTerms, PreflightCheck, Role, StateName, Step, Transition, TransitionKind, Verdict,
};
use warm_spare::observe::{
    ArchiveFacts, ArchiveProof, ArchiveTrouble, Artifacts, Baseline, Check, Clock, Counters, Held,
    Hold, LeaseFacts, Listener, Meter, Mode, NewestGeneration, PairFacts, Phase, Preflight,
    Reachability, ServiceState, ServiceView, SideStatus, Verified, Work,
};

/// Cells of a row of the keys' tables: key, type, default, meaning.
type Row = [String; 4];

fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The part of `docs/reference.md` under a heading, up to the next of its rank.
fn section(heading: &str) -> String {
    part("docs/reference.md", &format!("## {heading}"))
}

/// The part of a document under a heading, up to the next of its rank or a higher one.
fn part(document: &str, heading: &str) -> String {
    let text = read(document);
    let (_, rest) = text
        .split_once(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("{document}: no heading {heading}"));
    let rank = heading.chars().take_while(|c| *c == '#').count();
    let ends = |line: &&str| {
        let marks = line.chars().take_while(|c| *c == '#').count();
        (1..=rank).contains(&marks) && line[marks..].starts_with(' ')
    };
    let lines: Vec<&str> = rest.lines().take_while(|line| !ends(line)).collect();
    lines.join("\n")
}

/// Rows of the tables there that begin with a name in code: that name, and the other cells. The head must be `columns`.
fn table(document: &str, heading: &str, columns: &[&str]) -> BTreeMap<String, Vec<String>> {
    let part = part(document, heading);
    let head = format!("| {} |", columns.join(" | "));
    let (_, body) = part
        .split_once(&head)
        .unwrap_or_else(|| panic!("{document}, {heading}: no table {head}"));
    let mut rows = BTreeMap::new();
    for line in body
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'))
    {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        assert_eq!(cells.len(), columns.len(), "{document}: cells of {line}");
        let name = cells[0].trim_matches('`').to_string();
        let others = cells[1..].iter().map(|cell| cell.to_string()).collect();
        let old = rows.insert(name, others);
        assert!(old.is_none(), "{document}: twice: {line}");
    }
    rows
}

/// Both directions at once.
fn assert_same(what: &str, described: &BTreeSet<String>, in_code: &BTreeSet<String>) {
    let missing: Vec<_> = in_code.difference(described).collect();
    let unknown: Vec<_> = described.difference(in_code).collect();
    assert!(
        missing.is_empty() && unknown.is_empty(),
        "{what}: not described: {missing:?}; described, and unknown to the code: {unknown:?}"
    );
}

fn names<T>(rows: &BTreeMap<String, T>) -> BTreeSet<String> {
    rows.keys().cloned().collect()
}

fn owned<'a>(names: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
    names.into_iter().map(String::from).collect()
}

/// The words of a closed list of the code.
fn words<W>() -> impl Iterator<Item = &'static str>
where
    W: VariantArray + Copy + 'static,
    &'static str: From<W>,
{
    W::VARIANTS.iter().map(|word| (*word).into())
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
        let [_, _, default, _] =
            row.unwrap_or_else(|| panic!("{} is not in docs/reference.md", key.name));
        if !key.default.is_empty() {
            assert_eq!(default, format!("`{}`", key.default_text()), "{}", key.name);
        }
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

#[test]
fn every_state_hold_reason_and_health_code_is_described() {
    let states = table("docs/reference.md", "### States", &["state", "means"]);
    let in_code = owned(words::<StateName>());
    assert_same("states", &names(&states), &in_code);

    let reasons = owned(words::<HoldReason>());
    let columns = ["reason", "health", "tried again"];
    let described = table("docs/reference.md", "### Hold reasons", &columns);
    assert_same("hold reasons", &names(&described), &reasons);

    let codes = owned(words::<HealthCode>());
    let columns = ["code", "level", "when"];
    let described = table("docs/reference.md", "### Health", &columns);
    assert_same("health codes", &names(&described), &codes);
    assert!(reasons.is_disjoint(&codes), "a code has two meanings");
}

/// What an operator is told at night has an entry that says what to do.
#[test]
fn every_hold_reason_and_health_code_has_its_entry_for_operators() {
    let reasons = owned(words::<HoldReason>());
    for (heading, in_code) in [
        ("## Hold reasons", reasons),
        ("## Health codes", owned(words::<HealthCode>())),
    ] {
        let part = part("docs/troubleshoot.md", heading);
        let mut described = BTreeSet::new();
        for entry in part.split("\n### `").skip(1) {
            let (name, text) = entry.split_once("`\n").expect("a heading of one name");
            for label in ["*Means:*", "*Do:*", "*Ends:*"] {
                assert!(
                    text.contains(label),
                    "docs/troubleshoot.md, {name}: no {label}"
                );
            }
            assert!(described.insert(name.to_string()), "{name} twice");
        }
        assert_same(heading, &described, &in_code);
    }
}

fn at(text: &str) -> DateTime<Utc> {
    text.parse().expect("a time")
}

const START: &str = "2026-11-24T06:40:00Z";

/// Everything that a service may know.
/// Returns the lease of another cluster.
fn a_lease(now: DateTime<Utc>) -> Lease {
    let line = LeaseLine {
        holder: "91b2c3d4".into(),
        site: "dc1".into(),
        epoch: 1,
        promotion: "root-7".into(),
        parent: String::new(),
    };
    let terms = LeaseTerms {
        ttl: Duration::from_secs(15),
        fence_bound: Duration::from_secs(15),
        isolated: Isolated::GoOn,
    };
    let mut lease = Lease::first(line, terms, "8f3c0a77".into(), now);
    lease.state = LeaseState::Asked;
    lease.asked_by = Some(Asker {
        cluster: "4f0c91aa".into(),
        epoch: 2,
    });
    lease.last_lsn = "0/16B3748".into();
    lease.reason = "cannot fence".into();
    lease
}

fn a_node() -> Node {
    Node {
        heard: Some(std::time::Instant::now()),
        told: NodeTold {
            direction: Direction::Push,
            name: "node:9640".into(),
            site: "dc1".into(),
            role: WantedRole::Spare,
            force_epoch: 0,
            serves: false,
            hold: "paused: by configuration".into(),
            checks: String::new(),
            disk: None,
        },
    }
}

fn an_archive(now: DateTime<Utc>) -> ArchiveFacts {
    ArchiveFacts {
        due: Some(now),
        making: Some(now),
        generations: Some(3),
        newest: Some(NewestGeneration {
            name: "2026-12-01T03-00-00-000Z".into(),
            time: now,
            made: now,
            joint: true,
        }),
        trouble: Some(ArchiveTrouble {
            code: ErrorCode::ArchiveUnreachable,
            text: "the mount is gone".into(),
            next_step: "look".into(),
            since: now,
        }),
        proof: ArchiveProof {
            verified: Some(now),
            faults: 1,
            example: Some("lists/x: it is not there".into()),
            oldest: Some(now),
        },
        ..ArchiveFacts::new("archive", now)
    }
}

fn full() -> ServiceState {
    let now = at(START);
    let mut state = ServiceState::new(now);
    state.settings.site = "dc2".into();
    for addresses in [&mut state.settings.local, &mut state.settings.peer] {
        addresses.datastore = "10.0.0.1:5432".into();
        addresses.datastore_source = "configuration";
        addresses.s3 = "http://10.0.0.1:9000/packages".into();
        addresses.s3_source = "configuration";
    }
    state.config.error = Some("role: unknown".into());
    state.cluster.id = Some("4f0c91aa".into());
    state.cluster.role = Some(Role::Spare);
    state.lock.holder = Some("server process 7".into());
    state.cluster.epoch = Some(1);
    state.cluster.since = Some(now);
    state.lock.active = true;
    state.work = Work::Following;
    state.hold = Some(Hold {
        reason: HoldReason::Fuse,
        detail: "much would vanish".into(),
        next_step: "look".into(),
        since: now,
        passing: false,
    });
    state.spare.point = Some(RecoveryPoint {
        lsn: "0/1".into(),
        commit_time: now,
        system_id: "1".into(),
        timeline: 1,
        transactions: "1:1:".into(),
        server_started: "then".into(),
        sequences: String::new(),
        stream: Some(warm_spare::cluster::StreamSource {
            slot: "warm_spare_4f0c91aa".into(),
            schema: "form".into(),
        }),
        peer_cluster: None,
    });
    state.spare.mode = Some(Mode {
        stream: true,
        reason: "the primary is prepared".into(),
    });
    state.spare.gate_waiting = Some(1);
    state.lease = LeaseFacts {
        lease: Some(a_lease(now)),
        trouble: Some("the store does not answer".into()),
        permitted: Some(true),
        builder_api: Some("127.0.0.1:9636".into()),
    };
    state.pair = PairFacts {
        looked: true,
        other: Some(a_node()),
        told_to_serve: None,
    };
    state.on_primary.held = Some(Held {
        bytes: 3,
        bound: Some(4),
        unconfirmed: 1,
        oldest_writer: Some("a transaction of hab".into()),
    });
    state.checks.compared = Some(now);
    state.on_primary.footprint = Some(Footprint {
        sessions: 2,
        walsenders: 1,
        transaction_seconds: Some(0.1),
        xmin_age: Some(3),
        locks: 1,
        temporary_slots: 0,
    });
    state.on_primary.ours = Some(vec!["slot warm_spare_4f0c91aa".into()]);
    state.on_primary.orphans = Some(vec!["89abcdef: slot warm_spare_89abcdef".into()]);
    state.spare.confirmation = Some(Confirmation {
        time: now,
        clock_offset_seconds: 0.5,
    });
    state.spare.waiting = Some(true);
    state.spare.lag_bytes = Some(1);
    state.spare.baseline = Some(Baseline { started: now });
    state.spare.artifacts = Some(Artifacts {
        missing: 1,
        damaged: 1,
        staged: Some(1),
        retired: Some(1),
        examples: vec![(
            "core/x.hart".into(),
            warm_spare::domain::MissingReason::Missing,
        )],
    });
    state.spare.not_replicated = Some((1, "a/b.hart".into()));
    state.spare.unproven.count(3);
    state.spare.arrivals.awaits("c/d.hart");
    state
        .spare
        .arrivals
        .arrived(std::time::Duration::from_secs(2));
    state.spare.sampled = Some(warm_spare::domain::Sampled {
        looked_for: 40,
        absent: Vec::new(),
    });
    let down = || {
        Some(Reachability {
            error: Some("refused".into()),
            since: now,
        })
    };
    let seen = SideStatus {
        datastore: down(),
        s3: down(),
        version: Some("15.18".into()),
        tls: Some(true),
        fenced: Some(true),
    };
    state.peer = seen.clone();
    state.local = seen;
    state.generations.kept = Some(vec![Generation {
        name: "builder_1".into(),
        created: now,
        pinned: false,
    }]);
    state.generations.bytes = Some(1);
    state.archives = vec![an_archive(now)];
    state.checks.verified = Some(Verified {
        record: VerificationRecord {
            time: now,
            deep: false,
            differences: 1,
            lsn: "0/1".into(),
        },
        examples: vec!["table public.origins: has 3 rows, 4 were copied".into()],
    });
    state.checks.verification_error = Some("no answer".into());
    state.peer_record.role = Some(Role::Primary);
    state.peer_record.epoch = Some(1);
    state.handover.transition = Some(Transition {
        kind: TransitionKind::Switchover,
        epoch: 2,
        step: Some(Step::Drain),
        started: now,
        asked: String::new(),
        undone: None,
    });
    state.checks.preflight = Some(Preflight {
        time: now,
        planned: Verdict::Warn,
        unplanned: Verdict::Warn,
        checks: vec![Check {
            name: PreflightCheck::Lag,
            result: Verdict::Warn,
            reason: "2 min".into(),
            next_step: "let the service follow".into(),
            primary_lives: false,
        }],
    });
    state.checks.drill = Some(DrillRecord {
        time: now,
        ok: true,
        text: String::new(),
        write_seconds: Some(0.4),
        answer_seconds: Some(7.1),
    });
    state.builder_keys = Some(vec!["20260103101500".into()]);
    state.remember(Event {
        time: now,
        kind: "hold".into(),
        text: "fuse".into(),
        change: String::new(),
    });
    state
}

fn watched(state: ServiceState) -> ServiceView {
    let (clock, _) = Clock::simulated(at(START));
    let counters = Counters::default();
    counters.baseline("done");
    counters.error("peer", "datastore");
    let meter = Arc::new(Meter::new(
        clock.clone(),
        counters.clone(),
        Throttle::default(),
    ));
    if state.spare.baseline.is_some() {
        Listener::phase(&*meter, Phase::Tables, 2);
        meter.step(Phase::Tables, 1, 2);
    }
    ServiceView::new(
        watch::channel(state).1,
        Default::default(),
        meter,
        counters,
        clock,
    )
}

/// The paths of a document's leaves, as `events[].kind`; true: there is null.
fn leaves(value: &Value, path: &str, found: &mut BTreeMap<String, bool>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = match path {
                    "" => name.clone(),
                    path => format!("{path}.{name}"),
                };
                leaves(value, &path, found);
            }
        }
        Value::Array(items) if items.iter().any(Value::is_object) => {
            found.insert(path.to_string(), false);
            for item in items {
                leaves(item, &format!("{path}[]"), found);
            }
        }
        value => {
            found.insert(path.to_string(), value.is_null());
        }
    }
}

fn fields(status: &Value) -> BTreeMap<String, bool> {
    let mut found = BTreeMap::new();
    leaves(status, "", &mut found);
    found
}

#[test]
fn every_field_of_the_status_is_described() {
    let columns = ["field", "type, unit", "meaning", "`null` means"];
    let described = table("docs/reference.md", "## Status document", &columns);
    let fresh = fields(&watched(ServiceState::new(at(START))).status());
    let full = fields(&watched(full()).status());
    let in_code: BTreeSet<String> = fresh.keys().chain(full.keys()).cloned().collect();
    assert_same("status", &names(&described), &in_code);
    for (name, cells) in &described {
        let [_, meaning, null] = cells.as_slice() else {
            panic!("{name}: {cells:?}");
        };
        let always_null = full.get(name) == Some(&true);
        let marked = meaning.contains("*Not built yet.*");
        assert_eq!(marked, always_null, "{name}: the mark \"Not built yet\"");
        assert_eq!(null == "always", always_null, "{name}: when it is null");
        let at_first = fresh.get(name) == Some(&true);
        assert!(!at_first || null != "never", "{name} is null at first");
    }
    let part = section("Status document");
    let example: String = part
        .lines()
        .skip_while(|line| !line.starts_with("    {"))
        .take_while(|line| line.starts_with("    "))
        .collect();
    let example: Value = serde_json::from_str(&example).expect("the example is JSON");
    for name in fields(&example).keys() {
        assert!(in_code.contains(name), "the example has {name}");
    }
    let whole = watched(ServiceState::new(at(START))).status();
    for name in whole.as_object().expect("an object").keys() {
        assert!(example.get(name).is_some(), "the example lacks {name}");
    }
}

/// Name to type and labels, as a page of metrics shows them; counters with their `_total`.
fn metrics_of(page: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
    let mut found: BTreeMap<String, (String, BTreeSet<String>)> = BTreeMap::new();
    for line in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').expect("name and type");
        let end = if kind == "counter" { "_total" } else { "" };
        found.insert(format!("{name}{end}"), (kind.to_string(), BTreeSet::new()));
    }
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, labels)) = line.split_once('{') else {
            continue;
        };
        let Some((_, known)) = found.get_mut(name) else {
            continue;
        };
        let labels = labels.split('}').next().unwrap_or_default();
        let labels = labels.split(',').filter_map(|label| label.split_once('='));
        known.extend(labels.map(|(label, _)| label.to_string()));
    }
    found
}

/// String literals that follow one of the `makers` in the source.
fn literals(text: &str, makers: &[&str]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for maker in makers {
        for after in text.split(maker).skip(1) {
            let literal = after.trim_start().strip_prefix('"');
            found.extend(literal.and_then(|l| l.split('"').next()).map(String::from));
        }
    }
    found
}

#[test]
fn every_metric_is_described() {
    let page = watched(full()).metrics().expect("a page");
    let in_code = metrics_of(&page);
    let source = read("src/observe/metrics.rs") + &read("src/observe/counters.rs");
    let made = literals(&source, &[".gauge(", ".plain(", "register("]);
    let shown = in_code.keys().map(|name| {
        let name = name.strip_prefix("warm_spare_").unwrap_or(name);
        name.strip_suffix("_total").unwrap_or(name).to_string()
    });
    assert_same("metrics that a full state shows", &shown.collect(), &made);

    let columns = ["metric", "type", "labels", "unit", "meaning"];
    let described = table("docs/reference.md", "## Metrics", &columns);
    assert_same("metrics", &names(&described), &names(&in_code));
    for (name, cells) in &described {
        let (kind, labels) = &in_code[name];
        assert_eq!(&cells[0], kind, "{name}");
        let words = cells[1].split('`').skip(1).step_by(2);
        assert_same(name, &owned(words), labels);
    }
}

#[test]
fn every_metric_that_an_alert_uses_exists() {
    let in_code = metrics_of(&watched(full()).metrics().expect("a page"));
    let text = read("docs/monitor.md");
    let of_a_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    for after in text.split("warm_spare_").skip(1) {
        let end = after.find(|c| !of_a_name(c)).unwrap_or(after.len());
        let name = format!("warm_spare_{}", &after[..end]);
        assert!(in_code.contains_key(&name), "docs/monitor.md: {name}");
    }
}

#[test]
fn every_kind_of_event_is_described() {
    let described = table("docs/reference.md", "## Events", &["kind", "tells of"]);
    let kinds = owned(words::<EventKind>());
    assert_same("kinds of events", &names(&described), &kinds);
}

#[test]
fn every_error_code_is_explained() {
    let text = read("docs/troubleshoot.md");
    for name in words::<ErrorCode>() {
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

#[test]
fn every_preflight_check_is_described() {
    let described = table(
        "docs/reference.md",
        "### Checks of preflight",
        &["check", "planned", "unplanned", "looks at"],
    );
    let checks = owned(words::<PreflightCheck>());
    assert_same("preflight checks", &names(&described), &checks);
}

/// Links between the documents lead to files and headings that are there.
#[test]
fn links_lead_somewhere() {
    let documents = documents();
    for known in [
        "README.md",
        "CONTRIBUTING.md",
        "docs/architecture.md",
        "docs/design/stream.md",
        "docs/decisions/README.md",
        "habitat/README.md",
    ] {
        assert!(documents.contains(known), "{known} was not found");
    }
    for document in &documents {
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
                let path = folder.join(file);
                let there = Path::new(env!("CARGO_MANIFEST_DIR")).join(&path).is_file();
                assert!(there, "{document}: {link} leads to no file");
                read(path.to_str().unwrap())
            };
            let found = anchor.is_empty() || anchors(&target).contains(anchor);
            assert!(found, "{document}: {link} leads nowhere");
        }
    }
}

/// Returns all Markdown files of the repository. Folders that git ignores hold none of its documents.
fn documents() -> BTreeSet<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeSet::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            let name = entry.file_name().to_string_lossy().into_owned();
            let ignored = name.starts_with('.') || name == "target" || name == "results";
            if kind.is_dir() && !ignored {
                folders.push(path);
            } else if kind.is_file() && name.ends_with(".md") {
                let document = path.strip_prefix(root).unwrap();
                found.insert(document.to_str().unwrap().to_string());
            }
        }
    }
    found
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
