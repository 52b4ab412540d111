//! AES-256-XTS (IEEE Std 1619, NIST SP 800-38E) over many data units, as dm-crypt's `aes-xts-plain64`.
//!
//! In go a 64-byte key, the number of the first 512-byte sector, and whole data units; out come the same number of
//! bytes. No I/O, no authentication, and no idea of what the bytes mean. Contexts and expanded keys lie in memory that
//! no other process can read.

mod cipher;
#[cfg(all(target_arch = "x86_64", not(feature = "fips")))]
mod cold;
mod context;
mod kernel;
mod memory;
#[cfg(all(target_arch = "x86_64", not(feature = "fips")))]
mod own;
mod pool;
#[cfg(all(target_arch = "x86_64", not(feature = "fips")))]
mod schedule;
mod scrub;

pub use cipher::{Cipher, XtsError};
pub use kernel::{Kernel, UnknownKernel};
pub use memory::Protection;
