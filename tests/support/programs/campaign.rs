//! A thousand faults and more: `scripts/campaign` builds the program and runs this.
//!
//! Arguments: how many faults, the first seed, the mode (`auto`, `snapshot`, `roles`: so many handovers, or `shared`: so
//! many cuts between two sites with one bucket; `front`: so many switchovers behind nginx and HAProxy, `front-plain`: the same
//! without the files of `docs/balancer`; `upgrade`: so many upgrades of both sites), and, to look
//! into one kind of fault, how its name begins. One pair of clusters per `FAULTS_PER_SITE`, each with the next
//! seed; it ends at the first violation, with everything that is needed to see it again.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

use support::balancer::{Kind, PLAIN, WITH_SNIPPET};
use support::campaign::{Plan, Summary, trial};
use support::postgres::other_version;
use support::{cuts, exchanges, handovers, upgrades};

/// Few enough that a violation is seen again in minutes.
const FAULTS_PER_SITE: usize = 40;

#[tokio::main]
async fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let mut number = |or: u64| match arguments.next() {
        Some(text) => text.parse().expect("a number"),
        None => or,
    };
    let (faults, first) = (number(1000) as usize, number(1));
    let mode = arguments.next().unwrap_or_else(|| "auto".into());
    let only = arguments.next().unwrap_or_default();
    if mode == "roles" {
        return change_roles(first, faults).await;
    }
    if mode == "shared" {
        return cut_sites(first, faults).await;
    }
    match &*mode {
        "front" => return exchange_roles(first, faults, &WITH_SNIPPET, &mode).await,
        "front-plain" => return exchange_roles(first, faults, &PLAIN, &mode).await,
        "upgrade" => return upgrade_sites(first, faults).await,
        _ => {}
    }
    let began = Instant::now();
    let (mut all, mut seeds) = (Summary::default(), Vec::new());
    let mut seed = first;
    while all.faults < faults {
        let mut plan = Plan::new(&mode, seed);
        plan.only = only.clone();
        plan.faults = FAULTS_PER_SITE.min(faults - all.faults);
        seeds.push(seed);
        match trial(&plan).await {
            Ok(summary) => all.add(summary),
            Err(error) => {
                println!("\n{error}\n");
                println!(
                    "VIOLATED after {} faults more, mode {mode}, seed {seed}: {}",
                    all.faults,
                    error.to_string().lines().next().unwrap_or_default()
                );
                println!(
                    "again: scripts/campaign {} {seed} {mode} {only}",
                    plan.faults
                );
                return ExitCode::FAILURE;
            }
        }
        seed += 1;
    }
    let missed = missed(&all, &mode, &only, faults);
    if !missed.is_empty() {
        println!("\n{all}");
        println!("NEVER REACHED: {}", missed.join(", "));
        return ExitCode::FAILURE;
    }
    println!(
        "\n{all}  mode {mode}, seeds {} to {}, {:.0?}: no invariant was violated",
        first,
        seeds.last().expect("there was one"),
        began.elapsed()
    );
    ExitCode::SUCCESS
}

/// Runs rounds of cuts on sites that share one bucket.
async fn cut_sites(first: u64, wanted: usize) -> ExitCode {
    let began = Instant::now();
    let (mut all, mut done, mut seed) = (BTreeMap::new(), 0, first);
    while done < wanted {
        let rounds = CUTS_PER_SITE.min(wanted - done);
        match cuts::trial(seed, rounds, true).await {
            Ok(kinds) => {
                for (kind, count) in kinds {
                    *all.entry(kind).or_insert(0) += count;
                }
            }
            Err(error) => {
                println!("\nVIOLATED after {done} cuts more, seed {seed}: {error}");
                println!("again: scripts/campaign {rounds} {seed} shared");
                return ExitCode::FAILURE;
            }
        }
        done += rounds;
        seed += 1;
    }
    println!(
        "\n{all:#?}\n{done} cuts, seeds {first} to {}, {:.0?}: no moment with two writers",
        seed - 1,
        began.elapsed()
    );
    ExitCode::SUCCESS
}

/// Few enough that a violation is seen again in minutes.
const CUTS_PER_SITE: usize = 10;

/// Few enough that what a trial left behind does not slow the next one down.
const HANDOVERS_PER_SITE: usize = 12;

async fn change_roles(first: u64, wanted: usize) -> ExitCode {
    let began = Instant::now();
    let (mut all, mut done, mut seed) = (BTreeMap::new(), 0, first);
    while done < wanted {
        let rounds = HANDOVERS_PER_SITE.min(wanted - done);
        match handovers::trial(seed, rounds).await {
            Ok(kinds) => {
                for (kind, count) in kinds {
                    *all.entry(kind).or_default() += count;
                }
            }
            Err(error) => {
                println!("\n{error}\n");
                println!("VIOLATED after {done} handovers more, seed {seed}");
                println!("again: scripts/campaign {rounds} {seed} roles");
                return ExitCode::FAILURE;
            }
        }
        done += rounds;
        seed += 1;
    }
    let all: BTreeMap<String, usize> = all;
    println!();
    for (kind, count) in &all {
        println!("  {count:5} {kind}");
    }
    println!(
        "{done} handovers, seeds {first} to {}, {:.0?}: never two primaries, and no row lost without a record",
        seed - 1,
        began.elapsed()
    );
    ExitCode::SUCCESS
}

/// Few enough that the old databases of a trial do not slow the next one down.
const SWITCHOVERS_PER_SITE: usize = 20;

/// Counts what clients see during switchovers. Fails if it is not what docs/balancer promises.
async fn exchange_roles(first: u64, wanted: usize, kinds: &[Kind], mode: &str) -> ExitCode {
    let began = Instant::now();
    let (mut all, mut done, mut seed) = (Vec::<exchanges::Counts>::new(), 0, first);
    while done < wanted {
        let rounds = SWITCHOVERS_PER_SITE.min(wanted - done);
        match exchanges::trial(seed, rounds, kinds, true).await {
            Ok(counts) if all.is_empty() => all = counts,
            Ok(counts) => all
                .iter_mut()
                .zip(counts)
                .for_each(|(sum, counts)| sum.add(counts)),
            Err(error) => {
                println!("\nVIOLATED after {done} switchovers more, seed {seed}: {error}");
                println!("again: scripts/campaign {rounds} {seed} {mode}");
                return ExitCode::FAILURE;
            }
        }
        done += rounds;
        seed += 1;
    }
    println!();
    let mut kept = true;
    for counts in &all {
        println!("{counts}");
        let faults = counts.faults();
        if counts.kind.has_snippet() && !faults.is_empty() {
            kept = false;
            println!("VIOLATED: {}", faults.join("; "));
        }
    }
    println!(
        "{done} switchovers, seeds {first} to {}, {:.0?}",
        seed - 1,
        began.elapsed()
    );
    if kept {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// So many faults come by every point of the program, or the campaign has proved less than it says.
const ENOUGH_FOR_EVERY_POINT: usize = 300;

/// The points at which no service was killed.
fn missed(all: &Summary, mode: &str, only: &str, faults: usize) -> Vec<&'static str> {
    if faults < ENOUGH_FOR_EVERY_POINT || mode == "snapshot" || !only.is_empty() {
        return Vec::new();
    }
    let points = warm_spare::killpoint::REPLICATION.iter().copied();
    points
        .filter(|point| !all.kinds.contains_key(&format!("ServiceKilledAt({point})")))
        .collect()
}

/// Upgrades a new pair of sites each time, with one balancer and then with the other.
async fn upgrade_sites(first: u64, wanted: usize) -> ExitCode {
    let Some(newer) = other_version(18) else {
        println!("no PostgreSQL 18 here (scripts/setup: pip)");
        return ExitCode::FAILURE;
    };
    let kinds = WITH_SNIPPET.iter().cycle();
    for (seed, kind) in (first..).zip(kinds).take(wanted) {
        match upgrades::trial(seed, *kind, &newer).await {
            Ok(upgrade) => {
                println!("seed {seed}: {upgrade}");
                if !upgrade.counts.faults().is_empty() || upgrade.strays > 0 {
                    println!("VIOLATED: {:?}", upgrade.counts.faults());
                    return ExitCode::FAILURE;
                }
            }
            Err(error) => {
                println!("VIOLATED with seed {seed}, {kind:?}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
