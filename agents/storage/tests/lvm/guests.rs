//! Guests of this host for volumes of a machine: the test inside asks by files in a shared folder.
//!
//! | file | from | holds |
//! |---|---|---|
//! | `ask-<n>` | the machine | how to reach the volume, and what the guest is to do |
//! | `said-<n>` | the host | what the guest has told so far |
//! | `done-<n>` | the host | all that it told; it is off |

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stackhand_model::Connection;
use stackhand_testkit::{Spawned, wait_for_sync};

use crate::machine::{Guest, Iscsi};

/// What a guest is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Ask {
    pub(crate) connection: Connection,
    pub(crate) script: String,
}

/// Writes a file that appears as a whole.
pub(crate) fn put(folder: &Path, name: &str, text: &str) {
    let fresh = folder.join("fresh");
    fs::write(&fresh, text).unwrap();
    fs::rename(fresh, folder.join(name)).unwrap();
}

/// Runs guests for as long as the machine runs, one after another.
pub(crate) fn serve(machine: &mut Spawned, folder: &Path) {
    for number in 1.. {
        let ask = folder.join(format!("ask-{number}"));
        let asked = wait_for_sync(Duration::from_secs(540), "a guest to be asked for", || {
            let text = fs::read_to_string(&ask).ok();
            // The machine may end without another one.
            (text.is_some() || !machine.is_running()).then_some(text)
        });
        let Some(text) = asked else { return };
        let ask: Ask = serde_json::from_str(&text).unwrap();
        let disk = Iscsi::new(&ask.connection);
        let info = disk.info();
        assert!(info.status.success(), "{}", String::from_utf8_lossy(&info.stderr));
        let guest = Guest::start(&disk, &ask.script);
        wait_for_sync(Duration::from_secs(180), "the guest to be done", || {
            let said = guest.output();
            put(folder, &format!("said-{number}"), &said);
            said.contains("done-").then_some(())
        });
        put(folder, &format!("done-{number}"), &guest.finish());
    }
}
