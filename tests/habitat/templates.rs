//! The package's templates, rendered as the Supervisor renders them: for every bind situation the program finds the
//! addresses that it should, and nothing that is gossiped reaches it half.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use support::habitat::{HOOKS, Rendered, default_toml};
use support::process::bound;
use support::{Output, Running};
use warm_spare::config::Config;

/// What an operator configures where the binds give every address.
const SECRETS: &str = r#"
    [local]
    builder_api_config = ""
    [local.datastore]
    password = "hunter2-local"
    [local.s3]
    key_id = "depot"
    secret_key = "hunter2 \"quoted\" \\ and more"
    [peer.datastore]
    password = "hunter2-peer"
    [peer.s3]
    key_id = "depot"
    secret_key = "hunter2-s3"
"#;

const LOCAL: &str = r#"
    [local.datastore]
    host = "db.dc2"
    port = 6432
    [local.s3]
    endpoint = "https://minio.dc2:9000"
    bucket_name = "here"
"#;

const PEER: &str = r#"
    [peer.datastore]
    host = "db.dc1"
    [peer.s3]
    endpoint = "https://minio.dc1:9000"
"#;

fn rendered(configured: &[&str]) -> Rendered {
    let mut rendered = Rendered::new(Path::new(env!("CARGO_BIN_EXE_warm-spare")));
    rendered.set(SECRETS);
    for toml in configured {
        rendered.set(toml);
    }
    rendered
}

async fn check(rendered: &Rendered) -> Output {
    rendered.write();
    let mut command = bound(env!("CARGO_BIN_EXE_warm-spare"));
    command
        .arg("--config")
        .arg(rendered.config_file())
        .args(["--json", "check-config"]);
    let running = Running::start(command).expect("the program starts");
    let ended = running.wait(std::time::Duration::from_secs(60)).await;
    ended.expect("the program ends")
}

/// The four addresses and where they come from, as the program understands them.
async fn addresses(rendered: &Rendered) -> Vec<String> {
    let found = check(rendered).await.ok().json();
    let mut lines = Vec::new();
    for side in ["local", "peer"] {
        for store in ["datastore", "s3"] {
            let found = &found[side][store];
            let address = found["address"].as_str().expect("an address");
            let source = found["source"].as_str().expect("a source");
            lines.push(format!("{address} from {source}"));
        }
    }
    lines
}

async fn refusal(rendered: &Rendered) -> String {
    let ended = check(rendered).await;
    assert_eq!(ended.code, Some(2), "{ended}");
    let text = ended.json()["error"]["text"]
        .as_str()
        .unwrap_or("")
        .to_string();
    assert!(!ended.to_string().contains("hunter2"), "{ended}");
    text
}

fn minio() -> Value {
    json!({"port": 9001, "bucket-name": "of-the-bind", "minio-access-key": "depot", "minio-secret-key": "password"})
}

#[tokio::test]
async fn without_binds_everything_is_configured() {
    assert_eq!(
        addresses(&rendered(&[LOCAL, PEER])).await,
        [
            "hab@db.dc2:6432/builder (ssl_mode prefer) from configuration",
            "https://minio.dc2:9000 bucket here from configuration",
            "hab@db.dc1:5432/builder (ssl_mode prefer) from configuration",
            "https://minio.dc1:9000 bucket here from configuration",
        ]
    );
}

#[tokio::test]
async fn each_local_bind_gives_its_store_and_leaves_the_other_alone() {
    let endpoint = r#"local.s3 = { endpoint = "https://minio.dc2", bucket_name = "here" }"#;
    let mut datastore = rendered(&[PEER, endpoint]);
    datastore.bind("datastore", "10.2.0.5", json!({"port": 6432}));
    let found = addresses(&datastore).await;
    assert_eq!(
        found[0],
        "hab@10.2.0.5:6432/builder (ssl_mode prefer) from bind"
    );
    assert_eq!(found[1], "https://minio.dc2 bucket here from configuration");

    let mut store = rendered(&[PEER, r#"local.datastore.host = "db.dc2""#]);
    store.bind("minio", "10.2.0.6", minio());
    let found = addresses(&store).await;
    assert_eq!(
        found[0],
        "hab@db.dc2:5432/builder (ssl_mode prefer) from configuration"
    );
    assert_eq!(
        found[1],
        "http://10.2.0.6:9001 bucket of-the-bind from bind"
    );
}

#[tokio::test]
async fn all_four_binds_give_every_address() {
    let mut all = rendered(&[]);
    all.bind("datastore", "10.2.0.5", json!({"port": 6432}))
        .bind("minio", "10.2.0.6", minio())
        .bind("peer-datastore", "10.1.0.5", json!({"port": 7432}))
        .bind(
            "peer-minio",
            "fd00::6",
            json!({"port": 9002, "bucket-name": "there"}),
        );
    assert_eq!(
        addresses(&all).await,
        [
            "hab@10.2.0.5:6432/builder (ssl_mode prefer) from bind",
            "http://10.2.0.6:9001 bucket of-the-bind from bind",
            "hab@10.1.0.5:7432/builder (ssl_mode prefer) from bind",
            "http://[fd00::6]:9002 bucket there from bind",
        ]
    );
}

#[tokio::test]
async fn what_is_configured_goes_before_the_binds() {
    let mut both = rendered(&[LOCAL, PEER]);
    for (name, exports) in [
        ("datastore", json!({"port": 1})),
        ("minio", minio()),
        ("peer-datastore", json!({"port": 1})),
        ("peer-minio", minio()),
    ] {
        both.bind(name, "10.9.9.9", exports);
    }
    let found = addresses(&both).await;
    assert!(
        found
            .iter()
            .all(|line| line.ends_with("from configuration")),
        "{found:?}"
    );
    // The exported secrets are not believed, and not even rendered.
    assert!(
        !both.config().contains("minio-secret-key"),
        "{}",
        both.config()
    );
}

/// Mapped but not satisfied: the key is absent. Satisfied in a moment: a group without members, a member without exports.
#[tokio::test]
async fn a_bind_without_a_member_is_as_none() {
    for members in [
        None,
        Some(json!({"members": [], "first": null, "leader": null})),
        Some(
            json!({"members": [{"member_id": "0a", "alive": true, "sys": {"ip": "10.2.0.5"}, "cfg": {}}]}),
        ),
    ] {
        let mut unsatisfied = rendered(&[LOCAL, PEER]);
        if let Some(members) = members {
            for name in ["datastore", "minio", "peer-datastore", "peer-minio"] {
                unsatisfied.binds.insert(name.into(), members.clone());
            }
        }
        let text = unsatisfied.config();
        let text: toml::Table = text.parse().expect("it is TOML");
        assert_eq!(text["bind"], toml::Value::Table(toml::Table::new()));
        assert!(addresses(&unsatisfied).await[0].ends_with("from configuration"));
    }
    let nothing = refusal(&rendered(&[PEER])).await;
    assert!(nothing.starts_with("local.s3."), "{nothing}");
}

#[tokio::test]
async fn a_bind_that_vanishes_under_the_service_keeps_its_address() {
    let mut all = rendered(&[PEER]);
    all.bind("datastore", "10.2.0.5", json!({"port": 6432}))
        .bind("minio", "10.2.0.6", minio());
    let before = addresses(&all).await;
    // What the service keeps of it.
    let kept = format!(
        "# Kept by warm-spare, which overwrites it: do not edit.\n{}\n# This line is the last one.\n",
        all.config()
    );
    let file = all.svc().join("data/last-good.toml");
    support::site::write_secret(&file, &kept).expect("it is written");
    all.binds.clear();
    assert_eq!(addresses(&all).await, before);
}

#[tokio::test]
async fn what_the_program_does_not_know_reaches_it_and_is_refused_by_name() {
    for (gossip, problem) in [
        ("rple = \"spare\"", "rple: unknown key; did you mean role?"),
        (
            "peer.datastore.prot = 1",
            "peer.datastore.prot: unknown key; did you mean",
        ),
        (
            "role = \"boss\"",
            "role: expected one of keep, spare, primary",
        ),
        ("peer = \"db\"", "peer: expected a table"),
        ("role = [\"spare\"]", "role: expected one of"),
        ("[[hosts]]\nname = \"x\"", "hosts: unknown key"),
        ("[a.b.c]\nd = 1", "a: unknown key"),
    ] {
        let found = refusal(&rendered(&[LOCAL, PEER, gossip])).await;
        assert!(found.starts_with(problem), "{gossip}: {found}");
    }
}

/// They are the Supervisor's: whoever may gossip a configuration could name another server by them.
#[tokio::test]
async fn binds_cannot_be_configured_whether_there_are_real_ones_or_not() {
    for bind in [
        "bind.datastore = { host = \"x\", port = 1 }",
        "bind.peer-minio.bucket_name = \"x\"",
        "bind.else = 1",
        "bind = 1",
        "bind = \"x\"",
        "bind = [1]",
        "bind = []",
        "bind = \"\"",
    ] {
        for real in [false, true] {
            let mut configured = rendered(&[LOCAL, PEER, bind]);
            if real {
                configured.bind("datastore", "10.2.0.5", json!({"port": 6432}));
            }
            let found = refusal(&configured).await;
            assert!(
                found.contains("bind") || found.contains("duplicate key"),
                "{bind}: {found}"
            );
        }
    }
    let found = refusal(&rendered(&[LOCAL, PEER, "bind.minio.port = 1"])).await;
    assert!(found.contains("nothing to be configured"), "{found}");
}

/// The leader before others, then the first that is alive, then the first that is suspected; and each must export a port.
#[tokio::test]
async fn of_a_group_with_several_members_one_is_taken() {
    let port = || json!({"port": 6432, "bucket-name": "of-the-bind"});
    let member = |ip: &str| Rendered::member(ip, port());
    let suspect = |ip: &str| {
        let mut member = member(ip);
        member["alive"] = false.into();
        member["suspect"] = true.into();
        member
    };
    let mute = |ip: &str| Rendered::member(ip, json!({}));
    let leader = || Some(member("10.2.0.3"));
    for (members, leader, taken) in [
        (
            vec![member("10.2.0.1"), member("10.2.0.2")],
            None,
            "10.2.0.1",
        ),
        (vec![mute("10.2.0.1"), member("10.2.0.2")], None, "10.2.0.2"),
        (
            vec![suspect("10.2.0.1"), member("10.2.0.2")],
            None,
            "10.2.0.2",
        ),
        (
            vec![suspect("10.2.0.1"), suspect("10.2.0.2")],
            None,
            "10.2.0.1",
        ),
        (vec![suspect("10.2.0.1")], None, "10.2.0.1"),
        (
            vec![member("10.2.0.1"), member("10.2.0.3")],
            leader(),
            "10.2.0.3",
        ),
        (
            vec![member("10.2.0.1")],
            Some(suspect("10.2.0.3")),
            "10.2.0.1",
        ),
        (vec![member("10.2.0.1")], Some(mute("10.2.0.3")), "10.2.0.1"),
    ] {
        let mut several = rendered(&[PEER]);
        for name in ["datastore", "minio"] {
            several.bind_members(name, members.clone(), leader.clone());
        }
        let found = addresses(&several).await;
        let (datastore, store) = (
            format!("hab@{taken}:6432/builder (ssl_mode prefer) from bind"),
            format!("http://{taken}:6432 bucket of-the-bind from bind"),
        );
        assert_eq!(found[..2], [datastore, store], "{}", several.config());
    }
    // That one is suspected for a moment changes no text, so nothing runs.
    let text = |member| {
        let mut one = rendered(&[PEER]);
        one.bind_members("datastore", vec![member], None);
        one.config()
    };
    assert_eq!(text(member("10.2.0.1")), text(suspect("10.2.0.1")));
}

#[tokio::test]
async fn odd_texts_arrive_as_they_were_written() {
    for odd in ["a\"b", "a\\b", "{{cfg.role}}", "<&>'", "ä # ö", "= [x]"] {
        let text = toml::Value::String(odd.into()).to_string();
        let odd_one = rendered(&[LOCAL, PEER, &format!("site = {text}\nchange = {text}")]);
        check(&odd_one).await.ok();
        let found: toml::Table = odd_one.config().parse().expect("it is TOML");
        assert_eq!(found["site"].as_str(), Some(odd));
    }
}

/// Each key that may differ from its default, set by gossip and dropped by the next one.
#[tokio::test]
async fn a_second_apply_that_drops_a_key_leaves_what_was_before_it() {
    let before = rendered(&[LOCAL, PEER]).config();
    for key in Config::known_keys().iter().filter(|key| !is_bind(key.name)) {
        let mut with = rendered(&[LOCAL, PEER]);
        with.set(&format!("{} = 4711", key.name));
        assert_ne!(
            with.config(),
            before,
            "{} does not reach the program",
            key.name
        );
    }
    assert_eq!(rendered(&[LOCAL, PEER]).config(), before);
}

/// A list with everything that a Supervisor could render wrong: tables inside of its elements, a secret, odd texts, and a
/// key of an element that sorts behind its table.
const ARCHIVES: &str = r#"
    [[archive]]
    name = "near"
    location = "/srv/archive {{cfg.role}} # \"x\""
    schedule = "30 4 * * *"
    [archive.keep]
    last = 3
    within = "5d"

    [[archive]]
    name = "far"
    endpoint = "https://archive:9000"
    bucket_name = "generations"
    prefix = "builder/"
    key_id = "depot"
    secret_key = "hunter2 \"quoted\" \\ and more"
    keep = { daily = 7 }
"#;

#[tokio::test]
async fn a_list_of_archives_arrives_as_it_was_written() {
    let mut with = rendered(&[LOCAL, PEER, ARCHIVES]);
    let written: toml::Table = ARCHIVES.parse().expect("it is TOML");
    for bound in [false, true] {
        if bound {
            with.bind("minio", "10.2.0.6", minio());
        }
        let found: toml::Table = with.config().parse().expect("it is TOML");
        assert_eq!(found["archive"], written["archive"]);
        assert_eq!(found["bind"].get("minio").is_some(), bound);
        assert_eq!(found["site"].as_str(), Some(""));
        check(&with).await.ok();
    }
    // The next list replaces the first one whole, and so does a table.
    with.set("[[archive]]\nlocation = \"/srv/a\"\n[[archive]]\nlocation = \"/srv/b\"");
    let found = refusal(&with).await;
    assert!(found.starts_with("archive[2].name: "), "{found}");
    with.set("[archive]\nlocation = \"srv\"");
    let found = refusal(&with).await;
    assert!(found.starts_with("archive.location: expected"), "{found}");
    with.set("archive = []");
    check(&with).await.ok();
}

/// Returns the part of default.toml that an operator switches on by removing the `#` in front.
fn commented_out() -> String {
    let text = default_toml();
    let keys = text.lines().filter_map(|line| line.strip_prefix('#'));
    let keys = keys.filter(|line| !line.is_empty() && !line.starts_with(' '));
    keys.collect::<Vec<_>>().join("\n")
}

/// A list cannot have defaults, so default.toml shows the keys of a place and sets none of them.
#[tokio::test]
async fn default_toml_shows_every_key_of_an_archive_with_its_default() {
    let example = commented_out();
    let mut found = BTreeMap::new();
    flat("", &example.parse().expect("it is TOML"), &mut found);
    let location = found.insert("archive.location".into(), "\"\"".into());
    assert_eq!(
        location.as_deref(),
        Some("\"/hab/svc/warm-spare/data/archive\"")
    );
    assert_eq!(found, defaults(is_archive));
    check(&rendered(&[LOCAL, PEER, &example])).await.ok();
}

fn is_bind(name: &str) -> bool {
    name.starts_with("bind.")
}

fn is_archive(name: &str) -> bool {
    name.starts_with("archive.")
}

/// Returns the keys of which `is_wanted` is true, each with the program's default as default.toml writes it.
fn defaults(is_wanted: impl Fn(&str) -> bool) -> BTreeMap<String, String> {
    let keys = Config::known_keys().iter();
    keys.filter(|key| is_wanted(key.name))
        // An integer without a default is an empty text: not set.
        .map(|key| match key.default {
            "" => (key.name.to_string(), "\"\"".to_string()),
            _ => (key.name.to_string(), key.default_text()),
        })
        .collect()
}

fn flat(prefix: &str, table: &toml::Table, into: &mut BTreeMap<String, String>) {
    for (name, value) in table {
        match value {
            toml::Value::Table(inner) => flat(&format!("{prefix}{name}."), inner, into),
            value => drop(into.insert(format!("{prefix}{name}"), value.to_string())),
        }
    }
}

#[test]
fn default_toml_has_every_key_with_the_programs_default() {
    let mut found = BTreeMap::new();
    flat("", &default_toml().parse().expect("it is TOML"), &mut found);
    let known = defaults(|name| !is_bind(name) && !is_archive(name));
    for (key, default) in &known {
        assert_eq!(found.get(key), Some(default), "{key}");
    }
    assert_eq!(
        found.len(),
        known.len(),
        "a key that the program does not know"
    );
}

/// A key may share the comment of the one above it, and no group of keys is without.
#[test]
fn default_toml_says_what_each_key_is() {
    let mut said = false;
    for line in default_toml().lines() {
        match line {
            "" => said = false,
            line if line.starts_with('#') => said = true,
            line if line.starts_with('[') => {}
            line => assert!(said, "no comment: {line}"),
        }
    }
}

/// Or the Supervisor would restart the service, and show secrets to every user.
#[test]
fn hooks_are_the_same_whatever_is_configured_or_bound() {
    let mut other = rendered(&[LOCAL, PEER, "log_level = \"debug\"\nhttp.port = 1"]);
    for name in ["datastore", "minio", "peer-datastore", "peer-minio"] {
        other.bind(name, "10.9.9.9", minio());
    }
    let text = |name: &str, rendered: &Rendered| {
        let place = rendered.dir.path().display().to_string();
        rendered.hook(name).replace(&place, "")
    };
    for name in HOOKS {
        let hook = text(name, &other);
        assert_eq!(hook, text(name, &rendered(&[])), "{name}");
        assert!(
            !hook.contains("{{") && !hook.contains("hunter2"),
            "{name}: {hook}"
        );
        assert!(
            hook.starts_with("#!/bin/bash\n") && hook.contains("exec 2>&1"),
            "{name}"
        );
    }
}
