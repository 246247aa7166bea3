//! Signatures on the commands of our own API.
