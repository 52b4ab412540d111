//! libvirt's callbacks: events of all domains in, [`HypervisorEvent`]s on a channel out. Never blocks, calls nothing.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    sync::mpsc::Sender,
};

use vmseal_model::{id::DomainUuid, metadata::NAMESPACE};

use super::{
    connection::{Connection, uuid_of},
    library::{ConnectPtr, DomainPtr, Library},
};
use crate::ports::HypervisorError;

/// What happened at the hypervisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HypervisorEvent {
    /// A connection stands, the first or a new one: events may have been missed, so look at everything.
    Connected,
    /// The connection is gone; a new one is being tried.
    Lost,
    /// A domain was defined or changed.
    Defined(DomainUuid),
    /// A definition is gone.
    Undefined(DomainUuid),
    /// QEMU runs.
    Started(DomainUuid),
    /// QEMU ended.
    Stopped {
        /// Whose.
        domain: DomainUuid,
        /// Whether somebody ended it by force.
        destroyed: bool,
    },
    /// It was paused, resumed, or something of that kind.
    Changed(DomainUuid),
    /// Somebody, perhaps we, wrote our metadata element.
    Metadata(DomainUuid),
    /// A device was plugged in; no hook is called for that.
    DeviceAdded(DomainUuid),
}

/// What the callbacks get. Leaked, since libvirt may call them as long as the process lives.
pub(super) struct Sink {
    pub(super) library: &'static Library,
    pub(super) events: Sender<HypervisorEvent>,
    /// Tells the connecting thread.
    pub(super) closed: Sender<()>,
}

// virDomainEventID
const LIFECYCLE: c_int = 0;
const DEVICE_ADDED: c_int = 19;
const METADATA_CHANGE: c_int = 23;
/// `VIR_DOMAIN_EVENT_STOPPED_DESTROYED`.
const STOPPED_DESTROYED: c_int = 1;

/// Has the callbacks called for everything on this connection.
pub(super) fn subscribe(connection: &mut Connection, sink: &'static Sink) -> Result<(), HypervisorError> {
    let opaque: *mut c_void = std::ptr::from_ref(sink).cast_mut().cast();
    let lifecycle: LifecycleCallback = on_lifecycle;
    let device_added: DeviceCallback = on_device_added;
    let metadata: MetadataCallback = on_metadata;
    // SAFETY: `sink` lives for ever and is Sync, and every callback takes it as a `*const Sink`; the three event
    // callbacks have the types libvirt-domain.h gives for these events.
    unsafe {
        connection.on_event(LIFECYCLE, lifecycle as *const c_void, opaque)?;
        connection.on_event(METADATA_CHANGE, metadata as *const c_void, opaque)?;
        connection.on_event(DEVICE_ADDED, device_added as *const c_void, opaque)?;
        connection.on_close(on_close, opaque)
    }
}

type LifecycleCallback = unsafe extern "C" fn(ConnectPtr, DomainPtr, c_int, c_int, *mut c_void) -> c_int;
type DeviceCallback = unsafe extern "C" fn(ConnectPtr, DomainPtr, *const c_char, *mut c_void);
type MetadataCallback = unsafe extern "C" fn(ConnectPtr, DomainPtr, c_int, *const c_char, *mut c_void);

impl Sink {
    /// # Safety
    ///
    /// `opaque` is the pointer given to [`subscribe`].
    unsafe fn from_opaque(opaque: *mut c_void) -> &'static Self {
        // SAFETY: the caller says so, and the sink was leaked.
        unsafe { &*opaque.cast_const().cast() }
    }

    fn send(&self, domain: DomainPtr, event: impl FnOnce(DomainUuid) -> HypervisorEvent) {
        if let Some(uuid) = uuid_of(self.library, domain) {
            // A receiver that has gone means that the agent is ending.
            let _ = self.events.send(event(uuid));
        }
    }
}

unsafe extern "C" fn on_lifecycle(
    _: ConnectPtr,
    domain: DomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt hands back what `subscribe` gave.
    let sink = unsafe { Sink::from_opaque(opaque) };
    sink.send(domain, |domain| match event {
        0 => HypervisorEvent::Defined(domain),
        1 => HypervisorEvent::Undefined(domain),
        2 => HypervisorEvent::Started(domain),
        5 => HypervisorEvent::Stopped { domain, destroyed: detail == STOPPED_DESTROYED },
        _ => HypervisorEvent::Changed(domain),
    });
    0
}

unsafe extern "C" fn on_device_added(
    _: ConnectPtr,
    domain: DomainPtr,
    _alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt hands back what `subscribe` gave.
    unsafe { Sink::from_opaque(opaque) }.send(domain, HypervisorEvent::DeviceAdded);
}

unsafe extern "C" fn on_metadata(
    _: ConnectPtr,
    domain: DomainPtr,
    _kind: c_int,
    uri: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: a non-null `uri` is terminated and stays during the callback.
    let ours = !uri.is_null() && unsafe { CStr::from_ptr(uri) }.to_bytes() == NAMESPACE.as_bytes();
    if ours {
        // SAFETY: libvirt hands back what `subscribe` gave.
        unsafe { Sink::from_opaque(opaque) }.send(domain, HypervisorEvent::Metadata);
    }
}

unsafe extern "C" fn on_close(_: ConnectPtr, _reason: c_int, opaque: *mut c_void) {
    // SAFETY: libvirt hands back what `subscribe` gave.
    let _ = unsafe { Sink::from_opaque(opaque) }.closed.send(());
}
