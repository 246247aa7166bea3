//! Fuzzes DHCPv6 messages of guests and relays.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stackhand_tests::hostile::dhcp6(bytes));
