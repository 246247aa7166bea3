//! How two JSON trees differ, field by field.

use serde_json::Value;

use crate::api::FieldChange;

/// Most differences told of one document.
const MOST: usize = 200;

/// The fields in which `to` differs from `from`, in order of their paths. Values of fields whose
/// names tell that they are secret are masked.
pub(super) fn diff(from: &Value, to: &Value) -> Vec<FieldChange> {
    let mut changes = Vec::new();
    compare(String::new(), from, to, &mut changes);
    changes
}

fn compare(path: String, from: &Value, to: &Value, changes: &mut Vec<FieldChange>) {
    if from == to || changes.len() >= MOST {
        return;
    }
    match (from, to) {
        (Value::Object(old), Value::Object(new)) => {
            let mut keys: Vec<_> = old.keys().chain(new.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                let at = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let side = |map: &serde_json::Map<String, Value>| {
                    map.get(key).cloned().unwrap_or(Value::Null)
                };
                compare(at, &side(old), &side(new), changes);
            }
        }
        (Value::Array(old), Value::Array(new)) if old.len() == new.len() => {
            for (index, (old, new)) in old.iter().zip(new).enumerate() {
                compare(format!("{path}[{index}]"), old, new, changes);
            }
        }
        _ => changes.push(FieldChange {
            from: masked(&path, from),
            to: masked(&path, to),
            field: path,
        }),
    }
}

fn masked(path: &str, value: &Value) -> Value {
    let name = path.rsplit('.').next().unwrap_or_default();
    let secret = ["password", "secret", "private_key"].iter().any(|word| name.contains(word));
    if secret && !value.is_null() { Value::from("***") } else { value.clone() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_the_fields_that_differ_are_told() {
        let from = json!({"name": "a", "spec": {"mtu": 1450, "ips": [{"a": 1}], "old": true}});
        let to = json!({"name": "a", "spec": {"mtu": 1500, "ips": [{"a": 2}], "new": [1]}});
        let told: Vec<_> =
            diff(&from, &to).into_iter().map(|it| (it.field, it.from, it.to)).collect();
        let expected = [
            ("spec.ips[0].a", json!(1), json!(2)),
            ("spec.mtu", json!(1450), json!(1500)),
            ("spec.new", json!(null), json!([1])),
            ("spec.old", json!(true), json!(null)),
        ];
        assert_eq!(told, expected.map(|(field, from, to)| (field.to_owned(), from, to)));
        assert_eq!(diff(&from, &from), []);
    }

    #[test]
    fn lists_of_other_lengths_are_told_whole_and_secrets_not_at_all() {
        let from = json!({"list": [1, 2], "connection": {"password": "one"}});
        let to = json!({"list": [1], "connection": {"password": "two"}});
        let told = diff(&from, &to);
        assert_eq!((&told[1].from, &told[1].to), (&json!([1, 2]), &json!([1])));
        assert_eq!((&told[0].from, &told[0].to), (&json!("***"), &json!("***")));
    }
}
