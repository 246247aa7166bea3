//! Both ends in one process, for tests.
