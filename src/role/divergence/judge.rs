//! Judges the packages among the changed rows: each as both sides have it now.

use crate::cluster::{
    BuilderDb, DivergedPackage, DivergenceBook, LocalCluster, PACKAGES, PackageName, PeerCluster,
    ReadSession, Session,
};
use crate::config::Config;
use crate::domain::DivergedClass;
use crate::package::key_of_package;
use crate::replication::ReplicationError;
use std::collections::HashMap;

const PAGE_ROWS: i64 = 1000;

pub(super) async fn judge_packages(
    config: &Config,
    book: &mut DivergenceBook,
) -> Result<(), ReplicationError> {
    book.flush().await?;
    let local = LocalCluster::of(config).builder().await?;
    let peer = PeerCluster::of(config).builder().await?;
    book.note_written(PACKAGES).await?;
    note_deleted(book, &peer).await?;
    let mut after = (String::new(), String::new());
    loop {
        let page = book.noted_packages(&after, PAGE_ROWS).await?;
        let Some((last, _)) = page.last() else {
            return Ok(());
        };
        after = last.clone();
        let names: Vec<&PackageName> = page.iter().map(|(name, _)| name).collect();
        let ours = checksums(&local, &names).await?;
        let theirs = checksums(&peer, &names).await?;
        let judged = page.iter().filter_map(|(name, deleted)| {
            let (ours, theirs) = (ours.get(name), theirs.get(name));
            let class = class(ours, theirs, *deleted)?;
            let (ident, target) = name.clone();
            Some(DivergedPackage {
                // Empty: ident and target give no key.
                key: key_of_package(&ident, &target).unwrap_or_default(),
                ident,
                target,
                checksum: ours.cloned().unwrap_or_default(),
                class,
                their_checksum: theirs.cloned(),
            })
        });
        let judged: Vec<DivergedPackage> = judged.collect();
        book.record_packages(&judged).await?;
    }
}

/// Returns the class of a package. None: neither side has it any more, or the successor made it by
/// itself.
fn class(ours: Option<&String>, theirs: Option<&String>, deleted: bool) -> Option<DivergedClass> {
    match (ours, theirs) {
        (Some(ours), Some(theirs)) if ours == theirs => Some(DivergedClass::Same),
        (Some(_), Some(_)) => Some(DivergedClass::OtherBytes),
        (Some(_), None) => Some(DivergedClass::OnlyHere),
        (None, Some(_)) if deleted => Some(DivergedClass::GoneHere),
        (None, _) => None,
    }
}

/// Notes the packages of deleted rows. The stream sends only the key of a deleted row; the
/// successor still has the package of that key.
async fn note_deleted(book: &DivergenceBook, peer: &ReadSession) -> Result<(), ReplicationError> {
    let mut after = 0_i64;
    while let Some((ids, last)) = book.deleted_ids(PACKAGES, after, PAGE_ROWS).await? {
        after = last;
        let known = BuilderDb::of(peer).packages_with_ids(&ids).await?;
        book.note_deleted(&known).await?;
    }
    Ok(())
}

async fn checksums(
    session: &Session,
    names: &[&PackageName],
) -> Result<HashMap<PackageName, String>, ReplicationError> {
    let idents: Vec<&str> = names.iter().map(|(ident, _)| ident.as_str()).collect();
    let targets: Vec<&str> = names.iter().map(|(_, target)| target.as_str()).collect();
    let rows = BuilderDb::of(session)
        .packages_named(&idents, &targets)
        .await?;
    let named = rows
        .into_iter()
        .map(|row| ((row.ident, row.target), row.checksum));
    Ok(named.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_judged_by_what_both_sides_have_now() {
        let (a, b) = ("a".to_string(), "b".to_string());
        for deleted in [false, true] {
            assert_eq!(
                class(Some(&a), Some(&a), deleted),
                Some(DivergedClass::Same)
            );
            assert_eq!(
                class(Some(&a), Some(&b), deleted),
                Some(DivergedClass::OtherBytes)
            );
            assert_eq!(
                class(Some(&a), None, deleted),
                Some(DivergedClass::OnlyHere)
            );
            assert_eq!(class(None, None, deleted), None);
        }
        assert_eq!(class(None, Some(&b), true), Some(DivergedClass::GoneHere));
        assert_eq!(class(None, Some(&b), false), None);
    }
}
