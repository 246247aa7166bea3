//! Netlink attributes: length, kind, value, padded to four bytes.

/// Set on attributes that hold attributes.
const NESTED: u16 = 0x8000;
/// The bits that are the kind.
const KIND: u16 = 0x3fff;

/// Attributes being written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    pub(super) fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        // A value is at most 64 KiB; the callers keep well below.
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub(super) fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    pub(super) fn number(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(super) fn nested(self, kind: u16, inner: &Self) -> Self {
        self.bytes(kind | NESTED, &inner.0)
    }

    /// Adds attributes that are written already.
    pub(super) fn written(mut self, attributes: &[u8]) -> Self {
        self.0.extend(attributes);
        self
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Reads attributes: kinds and values. Ends early at what makes no sense.
pub(super) fn read(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [a, b, c, d] = *rest.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([c, d]) & KIND, value))
    })
}

/// The value of the first attribute of a kind.
pub(super) fn find(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    read(attributes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// The value of an attribute of 32 bits.
pub(super) fn number(attributes: &[u8], kind: u16) -> Option<u32> {
    find(attributes, kind)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

/// The value of an attribute as text, without the final zero.
pub(super) fn text(attributes: &[u8], kind: u16) -> Option<&str> {
    let value = find(attributes, kind)?;
    std::str::from_utf8(value.strip_suffix(&[0]).unwrap_or(value)).ok()
}

/// The attributes of the given kinds, as they were written.
pub(super) fn keep(attributes: &[u8], kinds: &[u16]) -> Vec<u8> {
    let mut rest = attributes;
    let mut kept = Vec::new();
    while let Some([a, b, c, d]) = rest.first_chunk() {
        let length = usize::from(u16::from_ne_bytes([*a, *b]));
        if length < 4 || length > rest.len() {
            break;
        }
        let end = length.next_multiple_of(4).min(rest.len());
        if kinds.contains(&(u16::from_ne_bytes([*c, *d]) & KIND)) {
            kept.extend(&rest[..end]);
            kept.resize(kept.len().next_multiple_of(4), 0);
        }
        rest = &rest[end..];
    }
    kept
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn attributes_read_back_as_they_were_written(
            values in prop::collection::vec((1..100_u16, prop::collection::vec(any::<u8>(), 0..40)), 0..10)
        ) {
            let written = values
                .iter()
                .fold(Attributes::default(), |all, (kind, value)| all.bytes(*kind, value))
                .into_bytes();
            let back: Vec<_> = read(&written).map(|(kind, value)| (kind, value.to_vec())).collect();
            prop_assert_eq!(&back, &values);
            let kinds: Vec<u16> = values.iter().map(|(kind, _)| *kind).collect();
            prop_assert_eq!(keep(&written, &kinds), written);
        }

        #[test]
        fn any_bytes_are_read_to_an_end(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(read(&bytes).count() <= bytes.len() / 4 + 1);
            prop_assert!(keep(&bytes, &[1, 2, 3]).len() <= bytes.len() + 4);
        }
    }
}
