//! Fuzzes the beginnings and ends of images.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stackhand_tests::hostile::image(bytes));
