//! What every agent shares: config, telemetry, ledger, reconcile loop, own API, lifecycle.
