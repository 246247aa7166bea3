//! The nearest known name to a misspelt one.

/// The candidate most like `found`, if one is near enough to be a likely typing error.
#[must_use]
pub fn nearest<'a>(found: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = found.to_lowercase();
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(&lower, &name.to_lowercase()), name))
        .filter(|(distance, name)| *distance <= name.len().max(found.len()) / 3)
        .min()
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_near_names_are_suggested() {
        let known = ["fixed_ips", "mac", "network"];
        assert_eq!(nearest("fixed_ip", known), Some("fixed_ips"));
        assert_eq!(nearest("Netwrok", known), Some("network"));
        assert_eq!(nearest("volume", known), None);
    }
}
