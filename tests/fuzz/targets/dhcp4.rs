//! Fuzzes DHCPv4 messages of guests.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stackhand_tests::hostile::dhcp4(bytes));
