//! JSON as Python writes it: `NaN`, `Infinity` and `-Infinity` may stand where a number does.

use serde_json::Value;

/// Parses JSON; on failure tries once more with non-finite numbers read as null.
pub(super) fn parse(text: &str) -> Result<Value, serde_json::Error> {
    serde_json::from_str(text).or_else(|error| match without_non_finite(text) {
        Some(plain) => serde_json::from_str(&plain),
        None => Err(error),
    })
}

/// `text` with every non-finite number outside of strings replaced by `null`; `None` if there
/// is none.
fn without_non_finite(text: &str) -> Option<String> {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    let mut replaced = false;
    while let Some(at) = rest.find(['"', 'N', 'I', '-']) {
        let (before, from) = rest.split_at(at);
        plain.push_str(before);
        let word = ["NaN", "Infinity", "-Infinity"].into_iter().find(|w| from.starts_with(w));
        let taken = if let Some(word) = word {
            plain.push_str("null");
            replaced = true;
            word.len()
        } else if from.starts_with('"') {
            let end = end_of_string(from);
            plain.push_str(&from[..end]);
            end
        } else {
            plain.push_str(&from[..1]);
            1
        };
        rest = &from[taken..];
    }
    plain.push_str(rest);
    replaced.then_some(plain)
}

/// Length of the string literal that `text` starts with, quotes included.
fn end_of_string(text: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}
