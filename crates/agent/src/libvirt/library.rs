//! libvirt's C library, loaded when the agent starts: a table of the functions we call, and nothing around them.
//!
//! Loaded by name, so that the agent builds without libvirt's headers and says what to install where it is missing.
//! Signatures follow libvirt 11.3 `include/libvirt/*.h`; all are older than libvirt 6.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_ulong, c_void},
    sync::OnceLock,
};

/// `virConnectPtr`, opaque.
pub(super) type ConnectPtr = *mut c_void;
/// `virDomainPtr`, opaque.
pub(super) type DomainPtr = *mut c_void;
/// `virFreeCallback`.
pub(super) type FreeCallback = Option<unsafe extern "C" fn(*mut c_void)>;
/// `virConnectCloseFunc`.
pub(super) type CloseCallback = unsafe extern "C" fn(ConnectPtr, c_int, *mut c_void);
/// `virErrorFunc`.
type ErrorCallback = unsafe extern "C" fn(*mut c_void, *mut c_void);

/// Where the library is found.
const SONAME: &str = "libvirt.so.0";

/// Why the library is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// Not installed, or not loadable.
    #[error("cannot load {name} ({reason}); install libvirt's client library (Debian: libvirt0)")]
    Library {
        /// Its name.
        name: String,
        /// The loader's words.
        reason: String,
    },
    /// Too old.
    #[error("{SONAME} has no function {symbol}; libvirt 11.3 or later is needed")]
    Symbol {
        /// What it lacks.
        symbol: &'static str,
    },
    /// It does not initialise.
    #[error("libvirt's client library does not initialise: {reason}")]
    Initialise {
        /// Its words.
        reason: String,
    },
}

macro_rules! functions {
    ($($field:ident = $symbol:literal ($($arg:ty),*) $(-> $ret:ty)?;)*) => {
        /// The functions we call, all resolved.
        pub(super) struct Library {
            $(pub(super) $field: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)*
        }

        impl Library {
            fn resolve(handle: Handle) -> Result<Self, LoadError> {
                Ok(Self {$(
                    // SAFETY: the symbol is the C function of that name, whose signature in libvirt's headers is the
                    // field's type; the library is never unloaded, so the pointer stays good.
                    $field: unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) $(-> $ret)?>(
                            handle.symbol($symbol)?,
                        )
                    },
                )*})
            }
        }
    };
}

functions! {
    initialize = "virInitialize"() -> c_int;
    set_error_func = "virSetErrorFunc"(*mut c_void, Option<ErrorCallback>);
    last_error_code = "virGetLastErrorCode"() -> c_int;
    last_error_message = "virGetLastErrorMessage"() -> *const c_char;
    event_register_default = "virEventRegisterDefaultImpl"() -> c_int;
    event_run_default = "virEventRunDefaultImpl"() -> c_int;
    connect_open = "virConnectOpen"(*const c_char) -> ConnectPtr;
    connect_close = "virConnectClose"(ConnectPtr) -> c_int;
    connect_is_alive = "virConnectIsAlive"(ConnectPtr) -> c_int;
    connect_set_keep_alive = "virConnectSetKeepAlive"(ConnectPtr, c_int, c_uint) -> c_int;
    connect_register_close = "virConnectRegisterCloseCallback"(ConnectPtr, CloseCallback, *mut c_void, FreeCallback) -> c_int;
    connect_unregister_close = "virConnectUnregisterCloseCallback"(ConnectPtr, CloseCallback) -> c_int;
    connect_lib_version = "virConnectGetLibVersion"(ConnectPtr, *mut c_ulong) -> c_int;
    connect_hypervisor_version = "virConnectGetVersion"(ConnectPtr, *mut c_ulong) -> c_int;
    connect_list_all_domains = "virConnectListAllDomains"(ConnectPtr, *mut *mut DomainPtr, c_uint) -> c_int;
    connect_event_register = "virConnectDomainEventRegisterAny"(ConnectPtr, DomainPtr, c_int, *const c_void, *mut c_void, FreeCallback) -> c_int;
    connect_event_deregister = "virConnectDomainEventDeregisterAny"(ConnectPtr, c_int) -> c_int;
    domain_define_xml = "virDomainDefineXMLFlags"(ConnectPtr, *const c_char, c_uint) -> DomainPtr;
    domain_lookup = "virDomainLookupByUUIDString"(ConnectPtr, *const c_char) -> DomainPtr;
    domain_free = "virDomainFree"(DomainPtr) -> c_int;
    domain_uuid = "virDomainGetUUID"(DomainPtr, *mut u8) -> c_int;
    domain_name = "virDomainGetName"(DomainPtr) -> *const c_char;
    domain_state = "virDomainGetState"(DomainPtr, *mut c_int, *mut c_int, c_uint) -> c_int;
    domain_is_persistent = "virDomainIsPersistent"(DomainPtr) -> c_int;
    domain_is_active = "virDomainIsActive"(DomainPtr) -> c_int;
    domain_autostart = "virDomainGetAutostart"(DomainPtr, *mut c_int) -> c_int;
    domain_xml = "virDomainGetXMLDesc"(DomainPtr, c_uint) -> *mut c_char;
    domain_create = "virDomainCreate"(DomainPtr) -> c_int;
    domain_resume = "virDomainResume"(DomainPtr) -> c_int;
    domain_set_metadata = "virDomainSetMetadata"(DomainPtr, c_int, *const c_char, *const c_char, *const c_char, c_uint) -> c_int;
    domain_has_managed_save = "virDomainHasManagedSaveImage"(DomainPtr, c_uint) -> c_int;
    domain_snapshots = "virDomainSnapshotNum"(DomainPtr, c_uint) -> c_int;
    domain_list_checkpoints = "virDomainListAllCheckpoints"(DomainPtr, *mut *mut *mut c_void, c_uint) -> c_int;
}

impl Library {
    /// The library, loaded and initialised once in this process, its messages on standard error silenced.
    pub(super) fn get() -> Result<&'static Self, LoadError> {
        static LIBRARY: OnceLock<Result<Library, LoadError>> = OnceLock::new();
        LIBRARY.get_or_init(Self::load).as_ref().map_err(Clone::clone)
    }

    fn load() -> Result<Self, LoadError> {
        let library = Self::resolve(Handle::open(SONAME)?)?;
        // SAFETY: no connection exists yet; the callback is a function that ignores its arguments. The default event
        // loop is registered before any connection is opened, as libvirt demands.
        let ready = unsafe {
            (library.set_error_func)(std::ptr::null_mut(), Some(say_nothing));
            (library.initialize)() == 0 && (library.event_register_default)() == 0
        };
        if ready { Ok(library) } else { Err(LoadError::Initialise { reason: library.error_text() }) }
    }

    /// What went wrong last on this thread, in libvirt's words.
    pub(super) fn error_text(&self) -> String {
        // SAFETY: libvirt gives a pointer to a terminated text that stays until the next call on this thread.
        unsafe {
            let text = (self.last_error_message)();
            if text.is_null() {
                "no reason given".to_owned()
            } else {
                CStr::from_ptr(text).to_string_lossy().into_owned()
            }
        }
    }

    /// `virErrorNumber` of what went wrong last on this thread.
    pub(super) fn error_code(&self) -> c_int {
        // SAFETY: takes nothing and reads a thread's own variable.
        unsafe { (self.last_error_code)() }
    }
}

/// A loaded library; never unloaded.
#[derive(Clone, Copy)]
struct Handle(*mut c_void);

impl Handle {
    fn open(name: &str) -> Result<Self, LoadError> {
        let c_name = CString::new(name).expect("library names have no NUL");
        // SAFETY: the name is terminated; libvirt's initialisers may run on any thread.
        let handle = unsafe { libc::dlopen(c_name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if !handle.is_null() {
            return Ok(Self(handle));
        }
        // SAFETY: after a failed dlopen, dlerror gives a terminated text or null.
        let reason = unsafe {
            let text = libc::dlerror();
            if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
        };
        Err(LoadError::Library { name: name.to_owned(), reason })
    }

    fn symbol(self, symbol: &'static str) -> Result<*mut c_void, LoadError> {
        let name = CString::new(symbol).expect("symbols have no NUL");
        // SAFETY: the handle is open and the name terminated.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        if address.is_null() { Err(LoadError::Symbol { symbol }) } else { Ok(address) }
    }
}

/// libvirt's default would print every error on standard error.
unsafe extern "C" fn say_nothing(_user: *mut c_void, _error: *mut c_void) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_library_says_what_to_install() {
        let error = Handle::open("libvirt-that-is-missing.so.0").err().unwrap();
        assert!(error.to_string().contains("install libvirt's client library"), "{error}");
    }

    #[test]
    fn missing_function_is_named() {
        let handle = Handle::open(SONAME).unwrap();
        assert_eq!(handle.symbol("virNoSuchThing"), Err(LoadError::Symbol { symbol: "virNoSuchThing" }));
    }
}
