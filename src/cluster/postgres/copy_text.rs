//! COPY's text form: one line a row, one field a column.

/// Decodes a field. NULL is read as an empty text. Only escapes that the server writes are known.
pub(in crate::cluster) fn unescape(field: &str) -> String {
    if field == "\\N" {
        return String::new();
    }
    let mut text = String::with_capacity(field.len());
    let mut chars = field.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('n') => text.push('\n'),
                Some('t') => text.push('\t'),
                Some('r') => text.push('\r'),
                Some('b') => text.push('\u{8}'),
                Some('f') => text.push('\u{c}'),
                Some('v') => text.push('\u{b}'),
                Some(other) => text.push(other),
                None => {}
            },
            c => text.push(c),
        }
    }
    text
}

/// Encodes a field.
pub fn escape(field: &str) -> String {
    field
        .replace('\\', "\\\\")
        .replace('\t', "\\t")
        .replace('\n', "\\n")
        .replace('\r', "\\r")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_characters_survive_the_copy_form() {
        for odd in ["a\tb", "a\\b", "line\nbreak", "plain", "\\N", ""] {
            assert_eq!(unescape(&escape(odd)), odd);
        }
        assert_eq!(unescape("\\N"), "");
    }
}
