//! libvirt's event loop and domain events, for which the bindings have no safe wrapper.
#![expect(unsafe_code, reason = "callbacks of a C library")]

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

use uuid::Uuid;
use virt::connect::Connect;
use virt::sys;

/// Called with the UUID of a domain whose state changed, on the event loop's thread.
type Heard = Box<dyn Fn(Uuid) + Send + Sync>;

/// Starts the thread that runs libvirt's event loop, once per process. Must come before the first
/// connection.
///
/// # Errors
///
/// Tells why there is no loop.
pub(super) fn start_loop() -> Result<(), String> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    STARTED
        .get_or_init(|| {
            // libvirt prints its errors on standard error unless told not to.
            virt::error::clear_error_callback();
            virt::event::event_register_default_impl()
                .map_err(|error| format!("cannot set up its event loop: {}", error.message()))?;
            std::thread::Builder::new()
                .name("libvirt-events".into())
                .spawn(|| {
                    loop {
                        if let Err(error) = virt::event::event_run_default_impl() {
                            tracing::warn!(%error, "libvirt's event loop");
                            std::thread::sleep(std::time::Duration::from_secs(1));
                        }
                    }
                })
                .map(drop)
                .map_err(|error| format!("cannot start the thread of its event loop: {error}"))
        })
        .clone()
}

/// Registrations for events of all domains of a connection: their lifecycle, and devices that they
/// let go of.
#[derive(Debug)]
pub(super) struct Listener {
    ids: Vec<c_int>,
}

impl Listener {
    /// Calls `heard` for every event from now on; `None` if the connection has no events.
    pub(super) fn begin(
        connect: &Connect,
        heard: impl Fn(Uuid) + Clone + Send + Sync + 'static,
    ) -> Option<Self> {
        // SAFETY: libvirt takes callbacks of all kinds of event as one function type and calls
        // this one, for lifecycle events, with the arguments of `Lifecycle`.
        let lifecycle = unsafe { std::mem::transmute::<Lifecycle, Callback>(on_lifecycle) };
        // SAFETY: as before, for events about one device, with the arguments of `Device`.
        let device = unsafe { std::mem::transmute::<Device, Callback>(on_device) };
        let wanted = [
            (sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
            (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, device),
            (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, device),
        ];
        let ids: Vec<c_int> = wanted
            .into_iter()
            .filter_map(|(event, callback)| register(connect, event, callback, heard.clone()))
            .collect();
        (!ids.is_empty()).then_some(Self { ids })
    }

    /// Ends the registrations.
    pub(super) fn end(self, connect: &Connect) {
        for id in self.ids {
            // SAFETY: the connection is not closed yet, and the id is one it gave.
            unsafe { sys::virConnectDomainEventDeregisterAny(connect.as_ptr(), id) };
        }
    }
}

/// All kinds of callback, to libvirt.
type Callback = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);

/// The kind for lifecycle events.
type Lifecycle =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int;

/// The kind for events about a device.
type Device =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *const c_char, *mut c_void);

fn register(
    connect: &Connect,
    event: sys::virDomainEventID,
    callback: Callback,
    heard: impl Fn(Uuid) + Send + Sync + 'static,
) -> Option<c_int> {
    let heard: Heard = Box::new(heard);
    let opaque: *mut Heard = Box::into_raw(Box::new(heard));
    let event = c_int::try_from(event).unwrap_or_default();
    // SAFETY: the connection is open; a null domain means all; `opaque` stays valid until
    // libvirt calls `free`, which it does once, when the registration ends.
    let id = unsafe {
        sys::virConnectDomainEventRegisterAny(
            connect.as_ptr(),
            std::ptr::null_mut(),
            event,
            Some(callback),
            opaque.cast(),
            Some(free),
        )
    };
    if id < 0 {
        // SAFETY: on failure libvirt has not taken `opaque`, and nobody else has it.
        drop(unsafe { Box::from_raw(opaque) });
        return None;
    }
    Some(id)
}

unsafe extern "C" fn on_lifecycle(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _event: c_int,
    _detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt passes what it was given and a live domain.
    unsafe { hear(domain, opaque) };
    0
}

unsafe extern "C" fn on_device(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes what it was given and a live domain.
    unsafe { hear(domain, opaque) };
}

/// Tells about a domain.
///
/// # Safety
///
/// The domain is live and `opaque` what was registered.
unsafe fn hear(domain: sys::virDomainPtr, opaque: *mut c_void) {
    let mut bytes = [0_u8; 16];
    // SAFETY: libvirt passes a live domain; a UUID has 16 bytes.
    let result = unsafe { sys::virDomainGetUUID(domain, bytes.as_mut_ptr()) };
    if result == 0 {
        // SAFETY: `opaque` is the box that `register` leaked; it lives until `free`.
        let heard = unsafe { &*opaque.cast::<Heard>() };
        // A panic must not cross into C.
        let _caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            heard(Uuid::from_bytes(bytes));
        }));
    }
}

unsafe extern "C" fn free(opaque: *mut c_void) {
    // SAFETY: libvirt calls this once, with the box that `register` leaked, and not the callback after.
    drop(unsafe { Box::from_raw(opaque.cast::<Heard>()) });
}
