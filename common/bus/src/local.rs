//! A Unix socket on one host: one JSON object a line.
