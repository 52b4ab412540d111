//! librbd and librados, loaded at run time: a host without Ceph needs neither.
//!
//! Only the functions used here, with the types of their C headers (`rados/librados.h`, `rbd/librbd.h`).

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    mem,
};

/// Why the libraries cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LibraryError {
    /// Not installed, or not loadable.
    #[error("{name} cannot be loaded ({cause}): install the package {package}")]
    Missing {
        /// Its file.
        name: &'static str,
        /// Debian's and Ubuntu's package.
        package: &'static str,
        /// The loader's words.
        cause: String,
    },
    /// Too old.
    #[error("{library} has no function {function}: Ceph 14 or later is needed")]
    TooOld {
        /// Which library.
        library: &'static str,
        /// What is missing.
        function: String,
    },
}

/// `rados_t`, `rados_ioctx_t`, `rbd_image_t`, `rbd_completion_t`: all opaque pointers.
pub(crate) type Handle = *mut c_void;
/// `rbd_callback_t`.
pub(crate) type Callback = extern "C" fn(Handle, *mut c_void);

/// `rbd_image_watcher_t`.
#[repr(C)]
pub(crate) struct Watcher {
    pub(crate) addr: *mut c_char,
    pub(crate) id: i64,
    pub(crate) cookie: u64,
}

macro_rules! functions {
    ($($library:ident { $($name:ident: fn($($argument:ty),*) $(-> $result:ty)?;)* })*) => {
        /// The functions.
        #[allow(missing_docs)]
        pub struct Library {
            $($(pub(crate) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*)*
        }

        impl Library {
            /// Loads both libraries; they stay loaded.
            ///
            /// # Errors
            ///
            /// [`LibraryError`]: what to install.
            pub fn load() -> Result<Self, LibraryError> {
                $(let $library = open(stringify!($library))?;)*
                Ok(Self {
                    $($($name: {
                        let symbol = find($library, stringify!($library), stringify!($name))?;
                        // SAFETY: a function of this name has this type in the library's header, which keeps its
                        // interface within the version that is part of the file's name.
                        unsafe {
                            mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) $(-> $result)?>(symbol)
                        }
                    },)*)*
                })
            }
        }
    };
}

functions! {
    librados {
        rados_create: fn(*mut Handle, *const c_char) -> c_int;
        rados_conf_read_file: fn(Handle, *const c_char) -> c_int;
        rados_conf_set: fn(Handle, *const c_char, *const c_char) -> c_int;
        rados_connect: fn(Handle) -> c_int;
        rados_shutdown: fn(Handle);
        rados_ioctx_create: fn(Handle, *const c_char, *mut Handle) -> c_int;
        rados_ioctx_set_namespace: fn(Handle, *const c_char);
        rados_ioctx_destroy: fn(Handle);
    }
    librbd {
        rbd_open: fn(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
        rbd_open_read_only: fn(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
        rbd_close: fn(Handle) -> c_int;
        rbd_create2: fn(Handle, *const c_char, u64, u64, *mut c_int) -> c_int;
        rbd_rename: fn(Handle, *const c_char, *const c_char) -> c_int;
        rbd_remove: fn(Handle, *const c_char) -> c_int;
        rbd_read: fn(Handle, u64, usize, *mut c_char) -> isize;
        rbd_get_id: fn(Handle, *mut c_char, usize) -> c_int;
        rbd_get_features: fn(Handle, *mut u64) -> c_int;
        rbd_get_create_timestamp: fn(Handle, *mut libc::timespec) -> c_int;
        rbd_get_modify_timestamp: fn(Handle, *mut libc::timespec) -> c_int;
        rbd_snap_list: fn(Handle, *mut c_void, *mut c_int) -> c_int;
        rbd_watchers_list: fn(Handle, *mut Watcher, *mut usize) -> c_int;
        rbd_watchers_list_cleanup: fn(*mut Watcher, usize);
        rbd_get_size: fn(Handle, *mut u64) -> c_int;
        rbd_lock_acquire: fn(Handle, c_int) -> c_int;
        rbd_lock_get_owners: fn(Handle, *mut c_int, *mut *mut c_char, *mut usize) -> c_int;
        rbd_lock_get_owners_cleanup: fn(*mut *mut c_char, usize);
        rbd_lock_break: fn(Handle, c_int, *const c_char) -> c_int;
        rbd_aio_create_completion: fn(*mut c_void, Callback, *mut Handle) -> c_int;
        rbd_aio_get_return_value: fn(Handle) -> isize;
        rbd_aio_release: fn(Handle);
        rbd_aio_read: fn(Handle, u64, usize, *mut c_char, Handle) -> c_int;
        rbd_aio_write: fn(Handle, u64, usize, *const c_char, Handle) -> c_int;
        rbd_aio_discard: fn(Handle, u64, u64, Handle) -> c_int;
        rbd_aio_flush: fn(Handle, Handle) -> c_int;
    }
}

/// File and package of each library.
fn names(library: &str) -> (&'static CStr, &'static str, &'static str) {
    match library {
        "librados" => (c"librados.so.2", "librados.so.2", "librados2"),
        _ => (c"librbd.so.1", "librbd.so.1", "librbd1"),
    }
}

fn open(library: &str) -> Result<*mut c_void, LibraryError> {
    let (file, name, package) = names(library);
    // SAFETY: a NUL-terminated name; the library's own initialisers run, as for any program linked with it.
    let handle = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if handle.is_null() { Err(LibraryError::Missing { name, package, cause: reason() }) } else { Ok(handle) }
}

fn find(handle: *mut c_void, library: &str, function: &str) -> Result<*mut c_void, LibraryError> {
    let name = format!("{function}\0");
    // SAFETY: the handle is open for the life of the process, the name NUL-terminated.
    let symbol = unsafe { libc::dlsym(handle, name.as_ptr().cast()) };
    if symbol.is_null() {
        return Err(LibraryError::TooOld { library: names(library).1, function: function.into() });
    }
    Ok(symbol)
}

fn reason() -> String {
    // SAFETY: dlerror gives null or a string that lasts until the next call of this thread.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() {
            "no reason given".into()
        } else {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    }
}
