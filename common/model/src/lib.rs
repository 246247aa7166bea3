//! Resource documents, typed ids, validation and JSON Schema.
