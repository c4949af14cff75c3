//! What the benchmarks share: their arguments, medians, and the kernel's figures for a process.
#![allow(dead_code)] // Each uses a part.

pub(crate) mod uploads;

pub(crate) struct Plan {
    pub smoke: bool,
    pub runs: usize,
    pub which: Vec<String>,
}

impl Plan {
    pub(crate) fn read() -> Plan {
        Plan::read_with(3)
    }

    /// With so many runs if none are given.
    pub(crate) fn read_with(runs: usize) -> Plan {
        let mut plan = Plan {
            smoke: false,
            runs,
            which: Vec::new(),
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--smoke" => plan.smoke = true,
                "--runs" => {
                    plan.runs = arguments
                        .next()
                        .and_then(|n| n.parse().ok())
                        .expect("--runs N")
                }
                // Cargo's own.
                "--bench" => {}
                name => plan.which.push(name.into()),
            }
        }
        if plan.smoke {
            plan.runs = 1;
        }
        plan
    }

    /// Whether this one was named, or none was.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.which.is_empty() || self.which.iter().any(|which| which == name)
    }
}

/// In KiB: `VmHWM` the most it ever held, `VmRSS` what it holds now.
pub(crate) fn memory(pid: u32, which: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(which));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .unwrap_or(0)
}

pub(crate) fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

pub(crate) fn line(what: &str, times: &mut [f64]) -> f64 {
    let middle = median(times);
    println!(
        "  {what:<34} {middle:8.2} s   ({:.2} to {:.2})",
        times[0],
        times[times.len() - 1]
    );
    middle
}

/// Processor time in ticks of a hundredth of a second: user's and system's.
pub(crate) fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let field = |number: usize| fields.get(number).and_then(|text| text.parse::<u64>().ok());
    field(11).unwrap_or(0) + field(12).unwrap_or(0)
}
