//! Calls for which the bindings have no safe wrapper, or none that is sound.
#![expect(unsafe_code, reason = "calls of a C library")]

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_int};
use std::time::Duration;

use stackhand_model::InstanceId;
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::stream::Stream;
use virt::sys;

use crate::domain::domain_name;

/// What moving bytes over a stream that does not block came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    /// So many bytes; none from the other end: it is closed.
    Bytes(usize),
    /// Nothing can be moved now.
    Later,
}

/// Asks a running domain to let go of a device.
pub(super) fn detach(domain: &Domain, alias: &str) -> Result<(), Error> {
    let alias = CString::new(alias).unwrap_or_default();
    // SAFETY: the domain is live and the alias a C string; both are only borrowed.
    let result = unsafe {
        sys::virDomainDetachDeviceAlias(
            domain.as_ptr(),
            alias.as_ptr(),
            sys::VIR_DOMAIN_AFFECT_LIVE,
        )
    };
    checked(result)
}

/// Begins to copy disks as they are now, into files that are there.
pub(super) fn begin_backup(domain: &Domain, xml: &str) -> Result<(), Error> {
    let xml = CString::new(xml).unwrap_or_default();
    // SAFETY: the domain is live and the XML a C string; without a checkpoint there is no second.
    let result = unsafe {
        sys::virDomainBackupBegin(
            domain.as_ptr(),
            xml.as_ptr(),
            std::ptr::null(),
            sys::VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL,
        )
    };
    checked(result)
}

/// Ends the job of a domain.
pub(super) fn abort_job(domain: &Domain) -> Result<(), Error> {
    // SAFETY: the domain is live.
    checked(unsafe { sys::virDomainAbortJob(domain.as_ptr()) })
}

/// Kind of a domain's job: the one under way, or the last one that ended.
pub(super) fn job(domain: &Domain, ended: bool) -> Result<sys::virDomainJobType, Error> {
    let flags = if ended { sys::VIR_DOMAIN_JOB_STATS_COMPLETED } else { 0 };
    let (mut kind, mut count): (c_int, c_int) = (0, 0);
    let mut params: sys::virTypedParameterPtr = std::ptr::null_mut();
    // SAFETY: the domain is live; libvirt allocates the parameters and tells how many there are.
    let result = unsafe {
        sys::virDomainGetJobStats(
            domain.as_ptr(),
            &raw mut kind,
            &raw mut params,
            &raw mut count,
            flags,
        )
    };
    checked(result)?;
    // SAFETY: they are the parameters that libvirt has just allocated, or null and none.
    unsafe { sys::virTypedParamsFree(params, count) };
    Ok(u32::try_from(kind).unwrap_or_default())
}

/// What libvirt counts of a domain, by name.
pub(super) type Numbers = BTreeMap<String, u64>;

/// What is known of the domains of ours that are on without a question to their QEMUs: the devices'
/// traffic, and what libvirt says of a domain itself. Whose a domain is, its name says: it is the one
/// that we give to its UUID.
pub(super) fn kernel_stats(connect: &Connect) -> Result<BTreeMap<Uuid, (Info, Numbers)>, Error> {
    // Those that stand still count, too.
    let flags = sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE
        | sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT;
    let kinds = sys::VIR_DOMAIN_STATS_INTERFACE;
    let mut list: *mut sys::virDomainStatsRecordPtr = std::ptr::null_mut();
    // SAFETY: the connection is open; libvirt allocates the list, which ends with a null.
    let count =
        unsafe { sys::virConnectGetAllDomainStats(connect.as_ptr(), kinds, &raw mut list, flags) };
    let records = Records::new(list, count)?;
    let mut all = BTreeMap::new();
    for record in records.iter() {
        let mut uuid = [0_u8; 16];
        // SAFETY: the record holds a domain; a UUID has 16 bytes.
        if unsafe { sys::virDomainGetUUID(record.dom, uuid.as_mut_ptr()) } != 0 {
            continue;
        }
        let uuid = Uuid::from_bytes(uuid);
        // SAFETY: the record holds a domain, which keeps its name as long as it lives.
        let name = unsafe {
            let name = sys::virDomainGetName(record.dom);
            if name.is_null() { continue } else { CStr::from_ptr(name) }
        };
        if name.to_bytes() != domain_name(InstanceId(uuid)).as_bytes() {
            continue;
        }
        let mut info = std::mem::MaybeUninit::<sys::virDomainInfo>::zeroed();
        // SAFETY: the record holds a domain; the structure has room, and zeros are a value of it.
        let info = unsafe {
            if sys::virDomainGetInfo(record.dom, info.as_mut_ptr()) != 0 {
                // It went away since the list was made.
                continue;
            }
            info.assume_init()
        };
        let info = Info { cpu_nanoseconds: info.cpuTime, memory_kib: info.memory };
        all.insert(uuid, (info, numbers(record)));
    }
    Ok(all)
}

/// What libvirt says of a domain itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Info {
    pub(super) cpu_nanoseconds: u64,
    pub(super) memory_kib: u64,
}

/// How long a question to a domain's QEMU has been waiting for its answer; none if there is none.
pub(super) fn unanswered(domain: &Domain) -> Result<Option<Duration>, Error> {
    let mut info = std::mem::MaybeUninit::<sys::virDomainControlInfo>::zeroed();
    // SAFETY: the domain is live; the structure has room, and zeros are a value of it.
    let info = unsafe {
        checked(sys::virDomainGetControlInfo(domain.as_ptr(), info.as_mut_ptr(), 0))?;
        info.assume_init()
    };
    let waits = info.state == sys::VIR_DOMAIN_CONTROL_OCCUPIED;
    Ok(waits.then(|| Duration::from_millis(info.stateTime)))
}

/// A list of records that libvirt allocated.
struct Records {
    list: *mut sys::virDomainStatsRecordPtr,
    count: usize,
}

impl Records {
    /// Of a list that libvirt has just filled in, with what the call gave back.
    fn new(list: *mut sys::virDomainStatsRecordPtr, count: c_int) -> Result<Self, Error> {
        checked(count)?;
        Ok(Self { list, count: usize::try_from(count).unwrap_or(0) })
    }

    fn iter(&self) -> impl Iterator<Item = &sys::virDomainStatsRecord> {
        // SAFETY: the list has `count` records, which live until the list is freed.
        (0..self.count).map(|index| unsafe { &**self.list.add(index) })
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        // SAFETY: it is a list that libvirt allocated, and nobody looks at it any more.
        unsafe { sys::virDomainStatsRecordListFree(self.list) };
    }
}

/// The numbers of a record.
fn numbers(record: &sys::virDomainStatsRecord) -> Numbers {
    let count = usize::try_from(record.nparams).unwrap_or(0);
    let params: &[sys::virTypedParameter] = if record.params.is_null() {
        &[]
    } else {
        // SAFETY: the record has so many parameters, which live as long as it does.
        unsafe { std::slice::from_raw_parts(record.params, count) }
    };
    params.iter().filter_map(number).collect()
}

/// A parameter's name and value, if it is a number.
fn number(param: &sys::virTypedParameter) -> Option<(String, u64)> {
    // SAFETY: the name is an array of bytes, which are looked at whatever they are.
    let name: &[u8; 80] = unsafe { &*(&raw const param.field).cast() };
    let name = CStr::from_bytes_until_nul(name).ok()?.to_str().ok()?.to_owned();
    // SAFETY: the type tells which member of the union was written.
    let value = unsafe {
        match u32::try_from(param.type_).ok()? {
            sys::VIR_TYPED_PARAM_UINT => u64::from(param.value.ui),
            sys::VIR_TYPED_PARAM_INT => u64::try_from(param.value.i).ok()?,
            sys::VIR_TYPED_PARAM_ULLONG => param.value.ul,
            sys::VIR_TYPED_PARAM_LLONG => u64::try_from(param.value.l).ok()?,
            _ => return None,
        }
    };
    Some((name, value))
}

/// Takes what a stream has, without waiting.
pub(super) fn receive(stream: &Stream, buffer: &mut [u8]) -> Result<Moved, Error> {
    // SAFETY: the stream is live and the buffer has the length that is told.
    let result =
        unsafe { sys::virStreamRecv(stream.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
    moved(result)
}

/// Gives a stream what it takes, without waiting.
pub(super) fn send(stream: &Stream, bytes: &[u8]) -> Result<Moved, Error> {
    // SAFETY: the stream is live; libvirt only reads the bytes, whose number is told.
    let result = unsafe { sys::virStreamSend(stream.as_ptr(), bytes.as_ptr().cast(), bytes.len()) };
    moved(result)
}

fn moved(result: c_int) -> Result<Moved, Error> {
    match result {
        -2 => Ok(Moved::Later),
        bytes => usize::try_from(bytes).map(Moved::Bytes).map_err(|_| Error::last_error()),
    }
}

fn checked(result: c_int) -> Result<(), Error> {
    if result < 0 { Err(Error::last_error()) } else { Ok(()) }
}
