//! Every picture of the documents can be read: by a browser, by a screen reader, in light and in dark.

use std::fs;
use std::path::Path;

#[test]
fn every_picture_is_well_formed_and_says_what_it_shows() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/pictures");
    let mut found = 0;
    for entry in fs::read_dir(folder).expect("the folder of pictures") {
        let path = entry.expect("an entry").path();
        let text = fs::read_to_string(&path).expect("a text file");
        let elements = elements(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(elements[0].0, "svg", "{}", path.display());
        for name in ["title", "desc"] {
            let mut of_that_name = elements.iter().filter(|(element, _)| element == name);
            let said = of_that_name.next().map(|(_, text)| text.trim().len());
            assert!(said > Some(10), "{}: no {name}", path.display());
        }
        for part in ["role=\"img\"", "viewBox=", "prefers-color-scheme: dark"] {
            assert!(text.contains(part), "{}: no {part}", path.display());
        }
        found += 1;
    }
    assert!(found >= 6, "only {found} pictures");
}

/// Returns each element with its own text before its first child. The pictures have no comments and no CDATA sections.
fn elements(text: &str) -> Result<Vec<(String, String)>, String> {
    let (mut found, mut open) = (Vec::new(), Vec::new());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('<') {
        if open.is_empty() && !before.trim().is_empty() {
            return Err(format!("text outside of the root: {before}"));
        }
        let (tag, after) = after.split_once('>').ok_or("a tag without an end")?;
        rest = after;
        if tag.matches('"').count() % 2 == 1 {
            return Err(format!("a value without an end in <{tag}>"));
        }
        let name = tag.trim_start_matches('/').trim_end_matches('/');
        let name = name.split_whitespace().next().unwrap_or_default();
        if tag.starts_with('/') {
            let opened = open.pop();
            if opened.as_deref() != Some(name) {
                return Err(format!("</{name}> ends {opened:?}"));
            }
            continue;
        }
        let own = rest.split('<').next().unwrap_or_default();
        let ends = own.split('&').skip(1);
        for entity in ends {
            let known = ["amp;", "lt;", "gt;", "quot;"];
            if !known.iter().any(|known| entity.starts_with(known)) {
                return Err(format!("& without an entity: {own}"));
            }
        }
        found.push((name.to_string(), own.to_string()));
        if !tag.ends_with('/') {
            open.push(name.to_string());
        }
    }
    match (open.is_empty(), rest.trim().is_empty()) {
        (true, true) if !found.is_empty() => Ok(found),
        _ => Err(format!("open at the end: {open:?}, {rest}")),
    }
}
