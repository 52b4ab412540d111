//! One connection to libvirtd and its domains, with ownership in Rust's hands: closed and freed on drop.
//!
//! libvirt's client library may be called from any thread; errors are per thread and fetched at once after a call.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_ulong, c_void},
    ptr,
};

use vmseal_model::{id::DomainUuid, metadata};

use super::library::{CloseCallback, ConnectPtr, DomainPtr, Library};
use crate::ports::HypervisorError;

/// `VIR_ERR_NO_DOMAIN`.
const NO_DOMAIN: c_int = 42;
/// `VIR_ERR_XML_INVALID_SCHEMA`.
const INVALID_SCHEMA: c_int = 92;
/// `VIR_DOMAIN_DEFINE_VALIDATE`.
const DEFINE_VALIDATE: c_uint = 1;
/// `VIR_DOMAIN_METADATA_ELEMENT`.
const METADATA_ELEMENT: c_int = 2;
/// `VIR_DOMAIN_AFFECT_LIVE`.
const AFFECT_LIVE: c_uint = 1;
/// `VIR_DOMAIN_AFFECT_CONFIG`.
const AFFECT_CONFIG: c_uint = 2;
/// A keep-alive every so many seconds, and so many unanswered ones end the connection.
const KEEP_ALIVE: (c_int, c_uint) = (5, 3);

/// An open connection.
pub(super) struct Connection {
    library: &'static Library,
    raw: ConnectPtr,
    uri: String,
    events: Vec<c_int>,
    on_close: Option<CloseCallback>,
}

// SAFETY: "libvirt is thread safe": virConnectPtr may be used from many threads at once (libvirt's documentation of
// the C API); we hold one reference and give it back on drop.
unsafe impl Send for Connection {}
// SAFETY: as above.
unsafe impl Sync for Connection {}

impl Connection {
    pub(super) fn open(library: &'static Library, uri: &str) -> Result<Self, HypervisorError> {
        let unreachable = |reason: String| HypervisorError::Unreachable { uri: uri.to_owned(), reason };
        let c_uri = CString::new(uri).map_err(|_| unreachable("the URI holds a NUL".to_owned()))?;
        // SAFETY: the URI is terminated and outlives the call.
        let raw = unsafe { (library.connect_open)(c_uri.as_ptr()) };
        if raw.is_null() {
            return Err(unreachable(library.error_text()));
        }
        // SAFETY: the connection is open. A driver within this process has no keep-alive: its refusal is no error.
        unsafe { (library.connect_set_keep_alive)(raw, KEEP_ALIVE.0, KEEP_ALIVE.1) };
        Ok(Self { library, raw, uri: uri.to_owned(), events: Vec::new(), on_close: None })
    }

    /// Asks for a callback when the connection is lost.
    ///
    /// # Safety
    ///
    /// `opaque` must be what `callback` expects, from any thread, for as long as the process lives.
    pub(super) unsafe fn on_close(
        &mut self,
        callback: CloseCallback,
        opaque: *mut c_void,
    ) -> Result<(), HypervisorError> {
        // SAFETY: the connection is open; the caller vouches for `opaque`; there is nothing to free.
        if unsafe { (self.library.connect_register_close)(self.raw, callback, opaque, None) } != 0 {
            return Err(self.failed("watch the connection"));
        }
        self.on_close = Some(callback);
        Ok(())
    }

    /// Asks for a callback on events of one kind, of all domains.
    ///
    /// # Safety
    ///
    /// `callback` must be a function of the type libvirt's documentation gives for `event`; `opaque` as in
    /// [`Connection::on_close`].
    pub(super) unsafe fn on_event(
        &mut self,
        event: c_int,
        callback: *const c_void,
        opaque: *mut c_void,
    ) -> Result<(), HypervisorError> {
        let all = ptr::null_mut();
        // SAFETY: the connection is open, a null domain means all; the caller vouches for the rest.
        let id =
            unsafe { (self.library.connect_event_register)(self.raw, all, event, callback, opaque, None) };
        if id < 0 {
            return Err(self.failed("watch events"));
        }
        self.events.push(id);
        Ok(())
    }

    pub(super) fn is_alive(&self) -> bool {
        // SAFETY: the connection is open.
        unsafe { (self.library.connect_is_alive)(self.raw) == 1 }
    }

    /// Versions of libvirtd and of QEMU, as major × 1,000,000 + minor × 1,000 + release.
    pub(super) fn versions(&self) -> Result<(u64, u64), HypervisorError> {
        let (mut libvirt, mut qemu): (c_ulong, c_ulong) = (0, 0);
        // SAFETY: the connection is open; both numbers outlive the calls.
        let good = unsafe {
            (self.library.connect_lib_version)(self.raw, &mut libvirt) == 0
                && (self.library.connect_hypervisor_version)(self.raw, &mut qemu) == 0
        };
        if good { Ok((libvirt, qemu)) } else { Err(self.failed("say its version")) }
    }

    pub(super) fn domains(&self) -> Result<Vec<Domain<'_>>, HypervisorError> {
        let mut list: *mut DomainPtr = ptr::null_mut();
        // SAFETY: the connection is open; `list` outlives the call.
        let count = unsafe { (self.library.connect_list_all_domains)(self.raw, &mut list, 0) };
        let Ok(count) = usize::try_from(count) else { return Err(self.failed("list domains")) };
        // SAFETY: on success libvirt allocated an array of `count` domains; each is ours to free, and so is the array.
        Ok(unsafe {
            let domains = (0..count).map(|i| Domain { connection: self, raw: *list.add(i) }).collect();
            libc::free(list.cast());
            domains
        })
    }

    pub(super) fn domain(&self, uuid: DomainUuid) -> Result<Domain<'_>, HypervisorError> {
        let text = CString::new(uuid.to_string()).expect("a UUID has no NUL");
        // SAFETY: the connection is open; the text is terminated.
        let raw = unsafe { (self.library.domain_lookup)(self.raw, text.as_ptr()) };
        if !raw.is_null() {
            return Ok(Domain { connection: self, raw });
        }
        Err(match self.library.error_code() {
            NO_DOMAIN => HypervisorError::NoDomain { domain: uuid.to_string() },
            _ => self.failed("find a domain"),
        })
    }

    /// Defines a domain, checked against libvirt's schema. What only the schema refuses, libvirt's own parser decides:
    /// its own output does not always pass its schema, and such a VM must not be shut out from encryption.
    pub(super) fn define(&self, xml: &str) -> Result<Domain<'_>, HypervisorError> {
        let c_xml = CString::new(xml).map_err(|_| self.refused("define a domain", "the XML holds a NUL"))?;
        // SAFETY: the connection is open; the text is terminated and outlives the call.
        let define = |flags| unsafe { (self.library.domain_define_xml)(self.raw, c_xml.as_ptr(), flags) };
        let mut raw = define(DEFINE_VALIDATE);
        if raw.is_null() && self.library.error_code() == INVALID_SCHEMA {
            tracing::warn!("defining a domain that libvirt's schema refuses: {}", self.library.error_text());
            raw = define(0);
        }
        if raw.is_null() {
            Err(self.failed("define the domain"))
        } else {
            Ok(Domain { connection: self, raw })
        }
    }

    /// The error of the call that just failed.
    fn failed(&self, action: &'static str) -> HypervisorError {
        let reason = self.library.error_text();
        if self.is_alive() {
            HypervisorError::Refused { action, reason }
        } else {
            HypervisorError::Unreachable { uri: self.uri.clone(), reason }
        }
    }

    fn refused(&self, action: &'static str, reason: &str) -> HypervisorError {
        HypervisorError::Refused { action, reason: reason.to_owned() }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // SAFETY: the connection is open and nobody else holds it. Callbacks hold references of their own: without
        // taking them back the connection would stay. On a dead connection these calls fail, which is no matter.
        unsafe {
            if let Some(callback) = self.on_close {
                (self.library.connect_unregister_close)(self.raw, callback);
            }
            for id in &self.events {
                (self.library.connect_event_deregister)(self.raw, *id);
            }
            (self.library.connect_close)(self.raw);
        }
    }
}

/// A domain on a connection.
pub(super) struct Domain<'a> {
    connection: &'a Connection,
    raw: DomainPtr,
}

impl Domain<'_> {
    pub(super) fn uuid(&self) -> Result<DomainUuid, HypervisorError> {
        uuid_of(self.connection.library, self.raw)
            .ok_or_else(|| self.connection.failed("say a domain's UUID"))
    }

    pub(super) fn name(&self) -> Result<String, HypervisorError> {
        // SAFETY: the domain is ours; the text belongs to it and is copied before it can go.
        unsafe {
            let name = (self.connection.library.domain_name)(self.raw);
            if name.is_null() {
                return Err(self.connection.failed("say a domain's name"));
            }
            Ok(CStr::from_ptr(name).to_string_lossy().into_owned())
        }
    }

    /// `virDomainState` and the reason that goes with it.
    pub(super) fn state(&self) -> Result<(c_int, c_int), HypervisorError> {
        let (mut state, mut reason) = (0, 0);
        // SAFETY: the domain is ours; both numbers outlive the call.
        let done = unsafe { (self.connection.library.domain_state)(self.raw, &mut state, &mut reason, 0) };
        self.number("say a domain's state", done).map(|_| (state, reason))
    }

    pub(super) fn is_persistent(&self) -> Result<bool, HypervisorError> {
        // SAFETY: the domain is ours.
        self.number("say whether a domain is persistent", unsafe {
            (self.connection.library.domain_is_persistent)(self.raw)
        })
        .map(|n| n != 0)
    }

    pub(super) fn is_active(&self) -> Result<bool, HypervisorError> {
        // SAFETY: the domain is ours.
        self.number("say whether a domain runs", unsafe {
            (self.connection.library.domain_is_active)(self.raw)
        })
        .map(|n| n != 0)
    }

    pub(super) fn autostart(&self) -> Result<bool, HypervisorError> {
        let mut autostart = 0;
        // SAFETY: the domain is ours; the number outlives the call.
        let done = unsafe { (self.connection.library.domain_autostart)(self.raw, &mut autostart) };
        self.number("say whether a domain starts by itself", done).map(|_| autostart != 0)
    }

    pub(super) fn xml(&self, flags: c_uint) -> Result<String, HypervisorError> {
        // SAFETY: the domain is ours; the text is ours to free once it is copied.
        unsafe {
            let text = (self.connection.library.domain_xml)(self.raw, flags);
            if text.is_null() {
                return Err(self.connection.failed("give a domain's definition"));
            }
            let xml = CStr::from_ptr(text).to_string_lossy().into_owned();
            libc::free(text.cast());
            Ok(xml)
        }
    }

    pub(super) fn start(&self) -> Result<(), HypervisorError> {
        // SAFETY: the domain is ours.
        self.number("start the domain", unsafe { (self.connection.library.domain_create)(self.raw) })
            .map(drop)
    }

    pub(super) fn resume(&self) -> Result<(), HypervisorError> {
        // SAFETY: the domain is ours.
        self.number("resume the domain", unsafe { (self.connection.library.domain_resume)(self.raw) })
            .map(drop)
    }

    pub(super) fn has_managed_save(&self) -> Result<bool, HypervisorError> {
        // SAFETY: the domain is ours.
        let done = unsafe { (self.connection.library.domain_has_managed_save)(self.raw, 0) };
        self.number("say whether a saved image waits", done).map(|n| n != 0)
    }

    pub(super) fn snapshots(&self) -> Result<u32, HypervisorError> {
        // SAFETY: the domain is ours.
        let done = unsafe { (self.connection.library.domain_snapshots)(self.raw, 0) };
        self.number("count snapshots", done)
    }

    pub(super) fn checkpoints(&self) -> Result<u32, HypervisorError> {
        // SAFETY: the domain is ours; with a null list libvirt counts and allocates nothing.
        let done = unsafe { (self.connection.library.domain_list_checkpoints)(self.raw, ptr::null_mut(), 0) };
        self.number("count checkpoints", done)
    }

    /// Writes or removes our metadata element, in the live definition, the persistent one, or both.
    pub(super) fn set_metadata(
        &self,
        element: Option<&str>,
        live: bool,
        config: bool,
    ) -> Result<(), HypervisorError> {
        let action = "write the domain's metadata";
        let element = element
            .map(CString::new)
            .transpose()
            .map_err(|_| self.connection.refused(action, "the element holds a NUL"))?;
        let text: *const c_char = element.as_ref().map_or(ptr::null(), |e| e.as_ptr());
        let key = CString::new(metadata::PREFIX).expect("our prefix has no NUL");
        let uri = CString::new(metadata::NAMESPACE).expect("our namespace has no NUL");
        let flags = if live { AFFECT_LIVE } else { 0 } | if config { AFFECT_CONFIG } else { 0 };
        // SAFETY: the domain is ours; all texts are terminated and outlive the call; null removes the element.
        let done = unsafe {
            (self.connection.library.domain_set_metadata)(
                self.raw,
                METADATA_ELEMENT,
                text,
                key.as_ptr(),
                uri.as_ptr(),
                flags,
            )
        };
        self.number(action, done).map(drop)
    }

    fn number(&self, action: &'static str, result: c_int) -> Result<u32, HypervisorError> {
        u32::try_from(result).map_err(|_| self.connection.failed(action))
    }
}

impl Drop for Domain<'_> {
    fn drop(&mut self) {
        // SAFETY: the domain is ours and freed once, before its connection.
        unsafe { (self.connection.library.domain_free)(self.raw) };
    }
}

/// The UUID of a domain that somebody else owns, as in a callback.
pub(super) fn uuid_of(library: &Library, domain: DomainPtr) -> Option<DomainUuid> {
    let mut bytes = [0u8; 16];
    // SAFETY: the caller has a live domain; libvirt writes VIR_UUID_BUFLEN = 16 bytes.
    let done = unsafe { (library.domain_uuid)(domain, bytes.as_mut_ptr()) };
    (done == 0).then(|| DomainUuid::from_bytes(bytes))
}
