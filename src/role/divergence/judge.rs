//! Judges the packages among the changed rows: each as both sides have it now.

use super::book::Book;
use crate::cluster::{LocalSession, PeerSession, Row, Session};
use crate::config::Config;
use crate::package::{Ident, Target, object_key};
use crate::replication::PassError;
use std::collections::HashMap;

const PAGE_ROWS: i64 = 1000;
const PACKAGES: &str = "public.origin_packages";

type Name = (String, String);

pub(super) async fn judge_packages(config: &Config, book: &mut Book) -> Result<(), PassError> {
    book.flush().await?;
    let local =
        LocalSession::open(&config.local.datastore, &config.local.datastore.database).await?;
    let peer = PeerSession::open(&config.peer.datastore).await?;
    touch_written(book).await?;
    touch_deleted(book, &peer).await?;
    let mut after = (String::new(), String::new());
    loop {
        let page = touched(book, &after).await?;
        let Some((last, _)) = page.last() else {
            return Ok(());
        };
        after = last.clone();
        let names: Vec<&Name> = page.iter().map(|(name, _)| name).collect();
        let ours = checksums(&local, &names).await?;
        let theirs = checksums(&peer, &names).await?;
        let judged = page.iter().filter_map(|(name, deleted)| {
            let (ours, theirs) = (ours.get(name), theirs.get(name));
            let class = class(ours, theirs, *deleted)?;
            Some(Judged {
                name,
                ours,
                theirs,
                class,
            })
        });
        write(book, judged.collect()).await?;
    }
}

struct Judged<'a> {
    name: &'a Name,
    ours: Option<&'a String>,
    theirs: Option<&'a String>,
    class: &'static str,
}

impl Judged<'_> {
    /// Returns the key of the artifact; empty: ident and target give no key.
    fn key(&self) -> String {
        let (ident, target) = self.name;
        match (ident.parse::<Ident>(), target.parse::<Target>()) {
            (Ok(ident), Ok(target)) => object_key(&ident, &target),
            _ => String::new(),
        }
    }
}

/// Returns the class of a package. None: neither side has it any more, or the successor made it by
/// itself.
fn class(ours: Option<&String>, theirs: Option<&String>, deleted: bool) -> Option<&'static str> {
    match (ours, theirs) {
        (Some(ours), Some(theirs)) if ours == theirs => Some("same"),
        (Some(_), Some(_)) => Some("other_bytes"),
        (Some(_), None) => Some("only_here"),
        (None, Some(_)) if deleted => Some("gone_here"),
        (None, _) => None,
    }
}

async fn touch_written(book: &Book) -> Result<(), PassError> {
    let sql = "INSERT INTO touched SELECT DISTINCT new->>'ident', new->>'target', false FROM diverged_row \
               WHERE epoch = $1 AND table_name = $2 AND new->>'ident' IS NOT NULL AND new->>'target' IS NOT NULL";
    let doing = "looking for packages";
    book.session()
        .execute(doing, sql, &[&book.epoch, &PACKAGES])
        .await?;
    Ok(())
}

/// Notes the packages of deleted rows. The stream sends only the key of a deleted row; the
/// successor still has the package of that key.
async fn touch_deleted(book: &Book, peer: &PeerSession) -> Result<(), PassError> {
    let doing = "looking for deleted packages";
    let page = "SELECT id, (old->>'id')::int8 FROM diverged_row WHERE epoch = $1 AND table_name = $2 \
                  AND change = 'delete' AND old->>'id' IS NOT NULL AND id > $3 ORDER BY id LIMIT $4";
    let mut after = 0_i64;
    loop {
        let session = book.session();
        let rows = session
            .rows(doing, page, &[&book.epoch, &PACKAGES, &after, &PAGE_ROWS])
            .await?;
        let Some(last) = rows.last() else {
            return Ok(());
        };
        after = last.get(0)?;
        let ids: Vec<i64> = rows
            .iter()
            .map(|row| row.get(1))
            .collect::<Result<_, _>>()?;
        let sql =
            "SELECT ident::text, target::text FROM public.origin_packages WHERE id = ANY ($1)";
        let known = peer.rows(doing, sql, &[&ids]).await?;
        let idents: Vec<String> = known
            .iter()
            .map(|row| row.get(0))
            .collect::<Result<_, _>>()?;
        let targets: Vec<String> = known
            .iter()
            .map(|row| row.get(1))
            .collect::<Result<_, _>>()?;
        let sql = "INSERT INTO touched SELECT i, t, true FROM unnest($1::text[], $2::text[]) u(i, t) \
                   ON CONFLICT (ident, target) DO UPDATE SET deleted = true";
        session.execute(doing, sql, &[&idents, &targets]).await?;
    }
}

async fn touched(book: &Book, after: &Name) -> Result<Vec<(Name, bool)>, PassError> {
    let sql = "SELECT ident, target, deleted FROM touched WHERE (ident, target) > ($1, $2) \
               ORDER BY ident, target LIMIT $3";
    let (ident, target) = after;
    let rows = book
        .session()
        .rows("reading the packages", sql, &[ident, target, &PAGE_ROWS])
        .await?;
    let named = |row: &Row| Ok(((row.get(0)?, row.get(1)?), row.get(2)?));
    rows.iter().map(named).collect()
}

async fn checksums(session: &Session, names: &[&Name]) -> Result<HashMap<Name, String>, PassError> {
    let idents: Vec<&str> = names.iter().map(|(ident, _)| ident.as_str()).collect();
    let targets: Vec<&str> = names.iter().map(|(_, target)| target.as_str()).collect();
    let sql = "SELECT ident::text, target::text, checksum::text FROM public.origin_packages \
               WHERE (ident, target) IN (SELECT * FROM unnest($1::text[], $2::text[]))";
    let rows = session
        .rows("reading package rows", sql, &[&idents, &targets])
        .await?;
    let known = |row: &Row| Ok(((row.get(0)?, row.get(1)?), row.get(2)?));
    rows.iter().map(known).collect()
}

async fn write(book: &Book, judged: Vec<Judged<'_>>) -> Result<(), PassError> {
    let idents: Vec<&str> = judged.iter().map(|j| j.name.0.as_str()).collect();
    let targets: Vec<&str> = judged.iter().map(|j| j.name.1.as_str()).collect();
    let ours: Vec<Option<&String>> = judged.iter().map(|j| j.ours).collect();
    let theirs: Vec<Option<&String>> = judged.iter().map(|j| j.theirs).collect();
    let classes: Vec<&str> = judged.iter().map(|j| j.class).collect();
    let keys: Vec<String> = judged.iter().map(Judged::key).collect();
    let sql = "INSERT INTO diverged_package (epoch, ident, target, checksum, their_checksum, class, key) \
               SELECT $1, i, t, coalesce(o, ''), th, c, k FROM unnest($2::text[], $3::text[], $4::text[], $5::text[], \
                 $6::text[], $7::text[]) u(i, t, o, th, c, k)";
    book.session()
        .execute(
            "recording diverged packages",
            sql,
            &[
                &book.epoch,
                &idents,
                &targets,
                &ours,
                &theirs,
                &classes,
                &keys,
            ],
        )
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_judged_by_what_both_sides_have_now() {
        let (a, b) = ("a".to_string(), "b".to_string());
        for deleted in [false, true] {
            assert_eq!(class(Some(&a), Some(&a), deleted), Some("same"));
            assert_eq!(class(Some(&a), Some(&b), deleted), Some("other_bytes"));
            assert_eq!(class(Some(&a), None, deleted), Some("only_here"));
            assert_eq!(class(None, None, deleted), None);
        }
        assert_eq!(class(None, Some(&b), true), Some("gone_here"));
        assert_eq!(class(None, Some(&b), false), None);
    }
}
