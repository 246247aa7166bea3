//! Documents from text: YAML (several documents, `---` between them) or JSON.

use serde_json::Value;

use crate::{Document, DocumentError, resolve_names};

/// Reads documents from YAML or JSON text, with names in place of ids resolved within `cloud`.
///
/// `source` names the text in errors, usually a path. A top-level list counts as its elements;
/// empty YAML documents are passed over.
///
/// # Errors
///
/// Every problem found, not just the first; each names the source, the document and the field.
pub fn parse(source: &str, text: &str, cloud: &str) -> Result<Vec<Document>, Vec<DocumentError>> {
    let values = parse_values(source, text).map_err(|error| vec![error])?;
    let mut documents = Vec::new();
    let mut errors = Vec::new();
    for (index, mut value) in values.into_iter().enumerate() {
        resolve_names(cloud, &mut value);
        match Document::from_value(&value) {
            Ok(document) => documents.push(document),
            Err(mut error) => {
                error.location = Some(format!("{source}, document {}", index + 1));
                errors.push(error);
            }
        }
    }
    if errors.is_empty() { Ok(documents) } else { Err(errors) }
}

/// Reads plain values from YAML or JSON text, without looking at what they are.
///
/// # Errors
///
/// Text that is neither: names the source, line and column.
pub fn parse_values(source: &str, text: &str) -> Result<Vec<Value>, DocumentError> {
    let fail = |problem: String| DocumentError {
        document: source.to_owned(),
        field: String::new(),
        problem,
        location: None,
    };
    // Whoever writes JSON expects JSON's errors, and JSON is YAML's fastest subset.
    let values: Vec<Value> = if text.trim_start().starts_with(['{', '[']) {
        serde_json::Deserializer::from_str(text)
            .into_iter::<Value>()
            .collect::<Result<_, _>>()
            .map_err(|error| fail(format!("not valid JSON: {error}")))?
    } else {
        // A name may be `no`, `on` or `y`.
        let options = serde_saphyr::options! { strict_booleans: true };
        serde_saphyr::from_multiple_with_options(text, options)
            .map_err(|error| fail(format!("not valid YAML: {error}")))?
    };
    Ok(values
        .into_iter()
        .flat_map(|value| match value {
            Value::Array(items) => items,
            Value::Null => Vec::new(),
            other => vec![other],
        })
        .collect())
}

/// Reads the documents of a list that arrived as JSON, as requests carry them.
///
/// # Errors
///
/// The first wrong document, with its place in the list.
pub fn parse_json(values: &[Value]) -> Result<Vec<Document>, DocumentError> {
    values
        .iter()
        .enumerate()
        .map(|(index, value)| {
            Document::from_value(value).map_err(|mut error| {
                error.location = Some(format!("resources[{index}]"));
                error
            })
        })
        .collect()
}

#[cfg(test)]
mod tests;
