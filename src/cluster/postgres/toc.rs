//! The contents of an archive of `pg_dump`, and the entries that an ordinary owner may not create.

/// Entries that only a superuser may create, or the owner of the objects that they are made of:
/// above all extensions. The words are those of `pg_restore --list`.
const NOT_FOR_AN_OWNER: [&str; 12] = [
    "CAST ",
    "EXTENSION ",
    "EVENT TRIGGER ",
    "PROCEDURAL LANGUAGE ",
    "ACCESS METHOD ",
    "FOREIGN DATA WRAPPER ",
    "SERVER ",
    "USER MAPPING ",
    "TRANSFORM ",
    "TEXT SEARCH PARSER ",
    "TEXT SEARCH TEMPLATE ",
    "OPERATOR ",
];

/// Consecutive entries that the same user creates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    /// True: the owner of the database creates them; false: our own user.
    pub by_owner: bool,
    /// The entries in the form of `pg_restore --use-list`.
    pub list: String,
}

/// Splits the contents, as `pg_restore --list` prints them, without changing their order: a later
/// entry may need an earlier one.
pub(crate) fn runs(contents: &str) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for line in contents.lines().filter(|line| !line.starts_with(';')) {
        // The line is a number, two numbers of catalogs, and the entry.
        let Some(what) = line.splitn(4, ' ').nth(3) else {
            continue;
        };
        let what = what.strip_prefix("COMMENT - ").unwrap_or(what);
        let by_owner = !NOT_FOR_AN_OWNER.iter().any(|kind| what.starts_with(kind));
        match runs.last_mut() {
            Some(run) if run.by_owner == by_owner => run.list.push_str(&format!("{line}\n")),
            _ => runs.push(Run {
                by_owner,
                list: format!("{line}\n"),
            }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_owner_may_not_make_is_told_apart_in_order() {
        let contents = "\
;
; Archive created at 2026-01-01
;
6; 2615 16385 SCHEMA - odd hab
2; 3079 16386 EXTENSION - pg_stat_statements 
4001; 0 0 COMMENT - EXTENSION pg_stat_statements 
215; 1259 16390 TABLE public origins hab
4002; 0 0 COMMENT public TABLE origins hab
3900; 3466 16400 EVENT TRIGGER - logs_ddl hab
";
        let found = runs(contents);
        let by_owner: Vec<bool> = found.iter().map(|run| run.by_owner).collect();
        assert_eq!(by_owner, [true, false, true, false]);
        let lines: Vec<usize> = found.iter().map(|run| run.list.lines().count()).collect();
        assert_eq!(lines, [1, 2, 2, 1]);
    }
}
