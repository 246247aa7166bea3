//! Fuzzes DHCP options as tenants write them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stackhand_tests::hostile::extra_options(bytes));
