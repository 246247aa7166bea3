//! Where in a text each field of a document stands, so that errors can point at it.
//!
//! The text is walked a second time as parser events; JSON is read as the YAML that it is. A field
//! that is not written down is where what holds it is.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use granit_parser::{BorrowedInput, Event, Options, Parser};

/// Line and column, both counted from 1.
type Spot = (usize, usize);

/// Where a document was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    source: Arc<str>,
    number: usize,
    spots: Arc<BTreeMap<String, Spot>>,
    /// The field for whose sake the document was made, where nobody wrote it.
    within: Option<String>,
}

impl Origin {
    /// The origins of the documents of a text, in order: as many as it has documents.
    pub(crate) fn of_text(source: &str, text: &str, documents: usize) -> Vec<Self> {
        let source: Arc<str> = source.into();
        let mut spots = walk(text);
        // Told by its number alone is better than told at a wrong place.
        if spots.len() != documents {
            spots = vec![BTreeMap::new(); documents];
        }
        spots
            .into_iter()
            .enumerate()
            .map(|(index, spots)| Self {
                source: Arc::clone(&source),
                number: index + 1,
                spots: Arc::new(spots),
                within: None,
            })
            .collect()
    }

    /// The origin of a document that is made because of a field of this one.
    pub(crate) fn within(&self, field: &str) -> Self {
        Self { within: Some(field.to_owned()), ..self.clone() }
    }

    /// Where a field is, or what holds it: `web.yaml:12:5`.
    pub(crate) fn of(&self, field: &str) -> String {
        let mut path = self.within.as_deref().unwrap_or(field);
        loop {
            if let Some((line, column)) = self.spots.get(path) {
                return format!("{}:{line}:{column}", self.source);
            }
            if path.is_empty() {
                return format!("{}, document {}", self.source, self.number);
            }
            path = path.rfind(['.', '[']).map_or("", |end| &path[..end]);
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.of(""))
    }
}

/// The fields of each document of a text; of as many as could be read.
fn walk(text: &str) -> Vec<BTreeMap<String, Spot>> {
    let mut options = Options::default();
    options.set_emit_comments(false);
    let mut parser = Parser::new_from_str_with_options(text, options);
    let mut documents = Vec::new();
    while let Some(Ok((event, span))) = parser.next_event() {
        match event {
            Event::DocumentStart(..) | Event::DocumentEnd | Event::StreamStart => {}
            // A list counts as its elements, and nothing as nothing, as in `parse_values`.
            Event::SequenceStart(..) => {
                while let Some((event, span)) = next(&mut parser) {
                    if matches!(event, Event::SequenceEnd) {
                        break;
                    }
                    documents.push(document(&mut parser, &event, spot(&span)));
                }
            }
            Event::MappingStart(..) => documents.push(document(&mut parser, &event, spot(&span))),
            Event::Scalar(text, ..) if matches!(&*text, "" | "~" | "null") => {}
            Event::Scalar(..) => documents.push(BTreeMap::from([(String::new(), spot(&span))])),
            _ => {}
        }
    }
    documents
}

fn document<'a>(
    parser: &mut Parser<'a, impl BorrowedInput<'a>>,
    first: &Event<'a>,
    start: Spot,
) -> BTreeMap<String, Spot> {
    let mut spots = BTreeMap::new();
    node(parser, first, start, "", &mut spots);
    spots
}

/// Notes a node and all below it. Depth is bounded by the parser.
fn node<'a>(
    parser: &mut Parser<'a, impl BorrowedInput<'a>>,
    event: &Event<'a>,
    start: Spot,
    path: &str,
    spots: &mut BTreeMap<String, Spot>,
) {
    spots.entry(path.to_owned()).or_insert(start);
    match event {
        Event::SequenceStart(..) => {
            for index in 0.. {
                match next(parser) {
                    None | Some((Event::SequenceEnd, _)) => return,
                    Some((event, span)) => {
                        node(parser, &event, spot(&span), &format!("{path}[{index}]"), spots);
                    }
                }
            }
        }
        Event::MappingStart(..) => loop {
            let key = match next(parser) {
                None | Some((Event::MappingEnd, _)) => return,
                Some((Event::Scalar(key, ..), span)) => (key.into_owned(), spot(&span)),
                // A key that is no text is refused elsewhere.
                Some((event, span)) => {
                    node(parser, &event, spot(&span), "?", &mut BTreeMap::new());
                    ("?".to_owned(), spot(&span))
                }
            };
            let (key, at) = key;
            let path = &if path.is_empty() { key } else { format!("{path}.{key}") };
            let Some((event, span)) = next(parser) else { return };
            // Lists and maps begin below their key, which is where one looks.
            let at = if matches!(event, Event::Scalar(..)) { spot(&span) } else { at };
            node(parser, &event, at, path, spots);
        },
        _ => {}
    }
}

/// The next event that is of the document itself.
fn next<'a>(
    parser: &mut Parser<'a, impl BorrowedInput<'a>>,
) -> Option<(Event<'a>, granit_parser::Span)> {
    match parser.next_event()?.ok()? {
        (Event::StreamEnd | Event::DocumentEnd, _) => None,
        other => Some(other),
    }
}

fn spot(span: &granit_parser::Span) -> Spot {
    (span.start.line(), span.start.col() + 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TEXT: &str = "# first
kind: Port
spec:
  network: int1   # here
  fixed_ips: [10.0.0.1, {subnet: v4}]
  pairs:
    - address: 10.0.0.9
---
- kind: A
- kind: B
---
";

    #[test]
    fn a_field_is_told_by_line_and_column_and_what_is_missing_by_what_should_hold_it() {
        let origins = Origin::of_text("m.yaml", TEXT, 3);
        for (field, place) in [
            ("", "m.yaml:2:1"),
            ("kind", "m.yaml:2:7"),
            ("spec", "m.yaml:3:1"),
            ("spec.network", "m.yaml:4:12"),
            ("spec.fixed_ips[0].address", "m.yaml:5:15"),
            ("spec.fixed_ips[1].subnet", "m.yaml:5:34"),
            ("spec.pairs[0].address", "m.yaml:7:16"),
            ("spec.mac", "m.yaml:3:1"),
            ("name", "m.yaml:2:1"),
        ] {
            assert_eq!(origins[0].of(field), place, "{field}");
        }
        assert_eq!(origins[2].of("kind"), "m.yaml:10:9");
        assert_eq!(origins[0].within("spec.pairs[0]").of("spec.network"), "m.yaml:7:7");
    }

    #[test]
    fn json_is_read_too_and_a_text_that_is_counted_otherwise_is_told_by_number() {
        let json = "{\"kind\": \"Port\",\n \"spec\": {\"a\": [1, 2]}}";
        assert_eq!(Origin::of_text("m.json", json, 1)[0].of("spec.a[1]"), "m.json:2:20");
        assert_eq!(Origin::of_text("m", TEXT, 2)[1].of("kind"), "m, document 2");
    }

    proptest! {
        #[test]
        fn any_text_is_walked_to_its_end(text in "[-a:{}\\[\\],&*!?|>'\"% \n]{0,60}") {
            let _spots = walk(&text);
        }
    }
}
