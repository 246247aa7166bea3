//! iSCSI by tgtd, a target in user space: for hosts whose kernel has no LIO.
//!
//! The daemon is spoken to on its management socket, as tgtadm does, and not through tgtadm:
//! passwords would show up in the list of processes, and a process a call is slow. What the daemon
//! holds is gone when it ends; the next pass puts it back.
//!
//! Its limits: a LUN keeps the size that it was made with, so a volume that grows is seen by
//! its host once nobody is logged in; and a LUN is read-only for all or for nobody.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stackhand_model::VolumeId;

use super::{ExportError, Exporter, SeenAdmission, SeenTarget, Target, target_name, volume_of};

mod text;

use text::Shown;

/// Number of a volume at its target: tgtd has 0 for itself.
const LUN: u32 = 1;

/// How long tgtd may take to answer. It has one thread, which waits for disks.
const PATIENCE: Duration = Duration::from_secs(30);

/// Most bytes of an answer: some thousand targets.
const MOST_ANSWER: usize = 16 << 20;

/// tgtd's words on its socket, in its numbering.
#[derive(Clone, Copy)]
enum Mode {
    Target = 1,
    Unit = 2,
    Account = 7,
}

#[derive(Clone, Copy)]
enum Act {
    New = 0,
    Delete = 1,
    Show = 2,
    Bind = 3,
    Unbind = 4,
    Update = 5,
}

/// tgtd's answers that are expected.
const ACCOUNT_EXISTS: u32 = 14;
const NO_SUCH_ACCOUNT: u32 = 15;

/// The tgtd of this host.
#[derive(Debug)]
pub struct Tgt {
    socket: PathBuf,
    portals: Vec<SocketAddr>,
    /// Numbers of targets are chosen by looking: one change at a time.
    turn: Mutex<()>,
}

/// One request.
struct Request {
    mode: Mode,
    act: Act,
    target: i32,
    unit: u32,
    force: bool,
    params: String,
}

impl Tgt {
    /// The tgtd with this management socket. `portals` are where it listens, as others reach it.
    #[must_use]
    pub fn new(socket: &Path, portals: Vec<SocketAddr>) -> Self {
        Self { socket: socket.to_owned(), portals, turn: Mutex::new(()) }
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn away(&self, why: impl std::fmt::Display) -> ExportError {
        let reason = format!(
            "tgtd does not answer on {} ({why}): start it (systemctl start tgt); it answers only \
             to root",
            self.socket.display()
        );
        ExportError::Away { reason }
    }

    /// Asks tgtd; answers its error number and what it said.
    fn ask(&self, request: &Request) -> Result<(u32, String), ExportError> {
        let talk = || {
            let mut stream = UnixStream::connect(&self.socket)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            stream.write_all(&request.encode())?;
            let mut head = [0; 8];
            stream.read_exact(&mut head)?;
            let number = |at: usize| {
                u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
            };
            let length = usize::try_from(number(4)).unwrap_or(usize::MAX).saturating_sub(8);
            if length > MOST_ANSWER {
                return Err(std::io::ErrorKind::FileTooLarge.into());
            }
            let mut said = vec![0; length];
            stream.read_exact(&mut said)?;
            Ok((number(0), String::from_utf8_lossy(&said).into_owned()))
        };
        talk().map_err(|error: std::io::Error| self.away(error))
    }

    /// Asks tgtd for a change of a target.
    fn change(&self, name: &str, action: &str, request: &Request) -> Result<(), ExportError> {
        self.change_unless(name, action, request, 0)
    }

    /// The same; one error number is as good.
    fn change_unless(
        &self,
        name: &str,
        action: &str,
        request: &Request,
        fine: u32,
    ) -> Result<(), ExportError> {
        match self.ask(request)?.0 {
            0 => Ok(()),
            error if error == fine => Ok(()),
            error => Err(ExportError::Unable {
                target: name.to_owned(),
                reason: format!("tgtd refuses to {action} (error {error}), see its log"),
            }),
        }
    }

    fn show(&self) -> Result<Vec<Shown>, ExportError> {
        let (error, said) = self.ask(&Request::new(Mode::Target, Act::Show, -1))?;
        if error != 0 {
            return Err(self.away(format!("it refuses to list targets, error {error}")));
        }
        Ok(text::parse(&said))
    }

    /// Deletes an account, which unbinds it from its targets.
    fn forget_user(&self, name: &str, user: &str) -> Result<(), ExportError> {
        let request = Request::new(Mode::Account, Act::Delete, 0).params(format!("user={user}"));
        self.change_unless(name, "delete an account", &request, NO_SUCH_ACCOUNT)
    }

    fn make_unit(&self, name: &str, id: i32, target: &Target) -> Result<(), ExportError> {
        let path = target.path.display().to_string();
        // A comma would end the value.
        if path.contains(',') {
            let reason = format!("{path} has a comma, which tgtd cannot take");
            return Err(ExportError::Unable { target: name.to_owned(), reason });
        }
        let unit = |act| Request::new(Mode::Unit, act, id).unit(LUN);
        let params = format!("path={path},bstype=rdwr");
        self.change(name, "make the LUN", &unit(Act::New).params(params))?;
        // Made from the volume's id: others must never take one volume for another.
        let volume = target.volume;
        let read_only = u8::from(is_read_only(target));
        let params =
            format!("scsi_id={volume},scsi_sn={volume},thin_provisioning=1,readonly={read_only}");
        self.change(name, "name the LUN", &unit(Act::Update).params(params))
    }
}

impl Request {
    fn new(mode: Mode, act: Act, target: i32) -> Self {
        Self { mode, act, target, unit: 0, force: false, params: String::new() }
    }

    fn unit(mut self, unit: u32) -> Self {
        self.unit = unit;
        self
    }

    fn force(mut self) -> Self {
        self.force = true;
        self
    }

    fn params(mut self, params: impl Into<String>) -> Self {
        self.params = params.into();
        self
    }

    /// As tgtd reads it: a C structure in the host's byte order, then the parameters.
    fn encode(&self) -> Vec<u8> {
        const HEAD: u32 = 120;
        let mut bytes = Vec::with_capacity(256);
        let number = |bytes: &mut Vec<u8>, number: u32| bytes.extend(number.to_ne_bytes());
        let params_length = u32::try_from(self.params.len()).unwrap_or(0);
        let length = if self.params.is_empty() { HEAD } else { HEAD + params_length + 1 };
        number(&mut bytes, self.mode as u32);
        number(&mut bytes, self.act as u32);
        let mut driver = [0; 64];
        driver[..5].copy_from_slice(b"iscsi");
        bytes.extend(driver);
        number(&mut bytes, length);
        bytes.extend(self.target.to_ne_bytes());
        bytes.extend(0_u64.to_ne_bytes()); // session
        bytes.extend(u64::from(self.unit).to_ne_bytes());
        // Connection, host, type of device, direction of the account, pack.
        for _ in 0..5 {
            number(&mut bytes, 0);
        }
        number(&mut bytes, u32::from(self.force));
        if !self.params.is_empty() {
            bytes.extend(self.params.as_bytes());
            bytes.push(0);
        }
        bytes
    }
}

fn is_read_only(target: &Target) -> bool {
    target.admitted.values().all(|admission| admission.read_only)
}

impl Exporter for Tgt {
    fn observe(&self) -> Result<BTreeMap<VolumeId, SeenTarget>, ExportError> {
        let shown = self.show()?;
        Ok(shown
            .into_iter()
            .filter_map(|shown| Some((volume_of(&shown.name)?, seen(&shown))))
            .collect())
    }

    fn publish(&self, target: &Target) -> Result<(), ExportError> {
        let _turn = self.turn();
        let name = target_name(target.volume);
        let mixed = target.admitted.values().any(|admission| admission.read_only);
        if mixed && !is_read_only(target) {
            let reason = "tgtd cannot let one host write and another only read".to_owned();
            return Err(ExportError::Unable { target: name, reason });
        }
        let shown = self.show()?;
        let (id, found) = if let Some(found) = shown.iter().find(|shown| shown.name == name) {
            (found.id, found.clone())
        } else {
            let id = (1..).find(|id| shown.iter().all(|shown| shown.id != *id)).unwrap_or(1);
            let params = format!("targetname={name}");
            let request = Request::new(Mode::Target, Act::New, id).params(params);
            self.change(&name, "make the target", &request)?;
            (id, Shown::default())
        };
        // Who must not get in goes first, then the bytes, then who may.
        for user in &found.users {
            if target.admitted.values().all(|admission| admission.user != *user) {
                self.forget_user(&name, user)?;
            }
        }
        for initiator in &found.initiators {
            if !target.admitted.contains_key(initiator) {
                let params = format!("initiator-name={initiator}");
                let request = Request::new(Mode::Target, Act::Unbind, id).params(params);
                self.change(&name, "unbind an initiator", &request)?;
            }
        }
        let right = found.unit.as_ref().is_some_and(|unit| {
            unit.path == target.path
                && unit.is_ours(target.volume)
                && unit.read_only == is_read_only(target)
                && (unit.most_bytes() >= target.bytes || !found.sessions.is_empty())
        });
        if !right {
            if found.unit.is_some() {
                let request = Request::new(Mode::Unit, Act::Delete, id).unit(LUN);
                self.change(&name, "replace the LUN (is a host logged in?)", &request)?;
            }
            self.make_unit(&name, id, target)?;
        }
        for (initiator, admission) in &target.admitted {
            if !found.users.contains(&admission.user) {
                let params = format!("user={},password={}", admission.user, admission.password.0);
                let make = Request::new(Mode::Account, Act::New, 0).params(params);
                self.change_unless(&name, "make an account", &make, ACCOUNT_EXISTS)?;
                let params = format!("user={}", admission.user);
                let bind = Request::new(Mode::Account, Act::Bind, id).params(params);
                self.change(&name, "bind an account", &bind)?;
            }
            if !found.initiators.contains(initiator) {
                let params = format!("initiator-name={initiator}");
                let bind = Request::new(Mode::Target, Act::Bind, id).params(params);
                self.change(&name, "bind an initiator", &bind)?;
            }
        }
        Ok(())
    }

    fn withdraw(&self, volume: VolumeId) -> Result<(), ExportError> {
        let _turn = self.turn();
        let name = target_name(volume);
        let Some(found) = self.show()?.into_iter().find(|shown| shown.name == name) else {
            return Ok(());
        };
        for initiator in &found.initiators {
            let params = format!("initiator-name={initiator}");
            let request = Request::new(Mode::Target, Act::Unbind, found.id).params(params);
            self.change(&name, "unbind an initiator", &request)?;
        }
        let request = Request::new(Mode::Target, Act::Delete, found.id).force();
        self.change(&name, "delete the target", &request)?;
        for user in &found.users {
            self.forget_user(&name, user)?;
        }
        Ok(())
    }

    fn portals(&self) -> &[SocketAddr] {
        &self.portals
    }

    fn lun(&self) -> u32 {
        LUN
    }
}

/// tgtd keeps users and initiators apart.
fn seen(shown: &Shown) -> SeenTarget {
    let unit = shown.unit.as_ref();
    let volume = volume_of(&shown.name);
    let read_only = unit.is_some_and(|unit| unit.read_only);
    let admission = SeenAdmission { user: None, password: None, read_only };
    SeenTarget {
        path: unit.map(|unit| unit.path.clone()),
        fixed_bytes: unit.map(text::Unit::most_bytes),
        admitted: shown.initiators.iter().map(|name| (name.clone(), admission.clone())).collect(),
        users: Some(shown.users.clone()),
        sessions: shown.sessions.clone(),
        complete: unit
            .zip(volume)
            .is_some_and(|(unit, volume)| unit.is_ours(volume) && unit.online),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_the_layout_that_tgtd_reads() {
        let request = Request::new(Mode::Unit, Act::New, 3).unit(1).params("path=/x");
        let bytes = request.encode();
        assert_eq!(bytes.len(), 120 + 8);
        assert_eq!(bytes[0..8], [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&bytes[8..13], b"iscsi");
        assert_eq!(bytes[72..80], [128, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(bytes[88..96], [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&bytes[120..], b"path=/x\0");
    }
}
