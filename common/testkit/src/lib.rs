//! Fixtures for tests: namespaces, brokers, agents, guests.
