//! Inputs that reach something of a parser, tried again: whole, cut, and damaged.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::Path;

use stackhand_tests::hostile::PARSERS;

/// How many damaged ones are made of each input.
const DAMAGED: usize = 300;

/// The inputs of a parser.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut files: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

#[test]
fn every_parser_comes_back_from_its_corpus_and_from_parts_of_it() {
    for (name, parse) in PARSERS {
        let mut tried = 0;
        for bytes in corpus(name) {
            // Cut in the middle of everything, for the small ones.
            let step = (bytes.len() / 64).max(1);
            for end in (0..bytes.len()).step_by(step).chain([bytes.len()]) {
                parse(&bytes[..end]);
                tried += 1;
            }
        }
        assert!(tried > 20, "the corpus of {name} is empty");
    }
}

#[test]
fn every_parser_comes_back_from_damaged_bytes() {
    let mut random = Random(0x5ead_beef_cafe_f00d);
    for (name, parse) in PARSERS {
        let inputs = corpus(name);
        for bytes in &inputs {
            for _ in 0..DAMAGED {
                parse(&damaged(bytes, &inputs, &mut random));
            }
        }
    }
}

/// An input with a few bytes changed, repeated, left out, or taken from another input.
fn damaged(bytes: &[u8], others: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len() + 1);
        let length = random.below(9).min(bytes.len() - at);
        match random.below(5) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            // What lengths and counts are broken by.
            1 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            2 => drop(bytes.drain(at..at + length)),
            3 => {
                let part = bytes[at..at + length].to_vec();
                drop(bytes.splice(at..at, part));
            }
            _ => {
                let other = &others[random.below(others.len())];
                let from = random.below(other.len() + 1);
                let part = other[from..(from + 16).min(other.len())].to_vec();
                drop(bytes.splice(at..at + length, part));
            }
        }
    }
    bytes
}

/// Marsaglia's xorshift: the same numbers in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap_or(0) % limit.max(1)
    }
}
