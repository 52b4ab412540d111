//! Bytes that must not be seen: in pages no other process can read, zeroed when dropped, never printed.
//!
//! In goes a size; out comes [`SecretBytes`], a handle that moves without copying the key. It has no `Clone`, no
//! `PartialEq`, no `Serialize`. Memory that two processes share is in [`crate::share`].

use std::{fmt, io};

use zeroize::Zeroize;

use crate::{
    arena::{self, MAX_PIECE, Piece},
    mapping, random,
};

/// How keys in this process are kept from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// `memfd_secret(2)`: gone from the kernel's own map, so neither ptrace, `/proc/pid/mem` nor gcore reads it.
    MemfdSecret,
    /// `mlock(2)` and `MADV_DONTDUMP`: never in swap or a core file, but root can read it.
    Mlock,
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MemfdSecret => "memfd_secret",
            Self::Mlock => "mlock",
        })
    }
}

/// The protection in use. The kernel is asked once.
pub fn protection() -> Protection {
    mapping::probe()
}

/// Maps room for `bytes` more bytes of keys now (each key takes whole 64-byte slots).
///
/// For a process that is about to give up the right to map memory.
///
/// # Errors
///
/// [`SecretError`] if the kernel or a limit refuses.
pub fn reserve(bytes: usize) -> Result<(), SecretError> {
    arena::reserve(bytes)
}

/// `N` secret bytes, at most 4096. A move copies a handle and not the bytes; drop zeroes them.
pub struct SecretBytes<const N: usize> {
    piece: Piece,
}

impl<const N: usize> SecretBytes<N> {
    const FITS: () = assert!(N > 0 && N <= MAX_PIECE, "a secret has 1 to 4096 bytes");

    /// All zero.
    ///
    /// # Errors
    ///
    /// [`SecretError`] if the kernel or a limit refuses more secret memory.
    pub fn try_zeroed() -> Result<Self, SecretError> {
        let () = Self::FITS;
        Ok(Self { piece: Piece::take(N)? })
    }

    /// All zero.
    ///
    /// # Panics
    ///
    /// If there is no more secret memory; the text names the limit. Where that can happen, [`Self::try_zeroed`] is
    /// the one to call: there is no falling back to ordinary memory.
    pub fn zeroed() -> Self {
        match Self::try_zeroed() {
            Ok(secret) => secret,
            Err(error) => panic!("{error}"),
        }
    }

    /// Random bytes from the system, written straight into secret memory.
    ///
    /// # Errors
    ///
    /// [`SecretError`] if there is no memory or no randomness.
    pub fn random() -> Result<Self, SecretError> {
        let mut secret = Self::try_zeroed()?;
        random::fill(secret.expose_mut())?;
        Ok(secret)
    }

    /// Copies `bytes` and then zeroes them where they were.
    ///
    /// # Errors
    ///
    /// [`SecretError`] if there is no memory; the source is zeroed all the same.
    pub fn try_take_from(bytes: &mut [u8; N]) -> Result<Self, SecretError> {
        let taken = Self::try_zeroed().map(|mut secret| {
            secret.expose_mut().copy_from_slice(bytes);
            secret
        });
        bytes.zeroize();
        taken
    }

    /// Copies `bytes` and then zeroes them where they were.
    ///
    /// # Panics
    ///
    /// As [`Self::zeroed`].
    pub fn take_from(bytes: &mut [u8; N]) -> Self {
        match Self::try_take_from(bytes) {
            Ok(secret) => secret,
            Err(error) => panic!("{error}"),
        }
    }

    /// The bytes. Whoever copies them answers for the copy.
    pub fn expose(&self) -> &[u8; N] {
        self.piece.as_slice().first_chunk().expect("a piece has at least the bytes asked for")
    }

    /// The bytes, to be filled in place.
    pub fn expose_mut(&mut self) -> &mut [u8; N] {
        self.piece.as_mut_slice().first_chunk_mut().expect("a piece has at least the bytes asked for")
    }

    /// Whether both hold the same bytes; the time taken does not depend on them.
    pub fn ct_eq(&self, other: &Self) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(self.expose(), other.expose()).is_ok()
    }
}

impl<const N: usize> fmt::Debug for SecretBytes<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBytes<{N}>(..)")
    }
}

/// Why there is no secret memory, or nothing to put into it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SecretError {
    /// The process may not lock more memory.
    #[error(
        "cannot lock {bytes} more bytes of memory for keys: RLIMIT_MEMLOCK is {limit} bytes; raise it with \
         LimitMEMLOCK= in the systemd unit, or with ulimit -l"
    )]
    Limit {
        /// How much was asked for.
        bytes: usize,
        /// The limit in bytes.
        limit: u64,
    },
    /// A system call failed.
    #[error("no secret memory: {call} failed")]
    Kernel {
        /// Which.
        call: &'static str,
        /// How.
        #[source]
        source: io::Error,
    },
    /// The descriptor that was passed is no secret memory, or not enough.
    #[error("the descriptor passed is not key memory of at least {wanted} bytes with a fixed size")]
    NotAShare {
        /// Bytes expected.
        wanted: usize,
    },
    /// A region of no bytes was asked for.
    #[error("key memory of zero bytes was asked for")]
    Empty,
    /// The system's random generator failed.
    #[error("the system gives no random bytes")]
    Random,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secret_says_nothing_in_debug() {
        let mut bytes = *b"VMSEAL-TEST-SECRET-debug-0123456";
        let secret = SecretBytes::take_from(&mut bytes);
        assert_eq!(bytes, [0; 32]);
        assert_eq!(secret.expose(), b"VMSEAL-TEST-SECRET-debug-0123456");
        assert_eq!(format!("{secret:?}"), "SecretBytes<32>(..)");
    }

    #[test]
    fn random_secrets_differ_and_compare() {
        let a = SecretBytes::<64>::random().unwrap();
        let b = SecretBytes::<64>::random().unwrap();
        assert!(!a.ct_eq(&b));
        let mut copy = *a.expose();
        assert!(a.ct_eq(&SecretBytes::take_from(&mut copy)));
        assert_eq!(SecretBytes::<3>::zeroed().expose(), &[0; 3]);
        assert_eq!(SecretBytes::<4096>::zeroed().expose().len(), 4096);
    }

    #[test]
    fn secret_memory_is_not_readable_through_proc_where_the_kernel_has_memfd_secret() {
        use std::os::unix::fs::FileExt;
        let secret = SecretBytes::<32>::random().unwrap();
        let memory = std::fs::File::open("/proc/self/mem").unwrap();
        let read = memory.read_at(&mut [0u8; 32], secret.expose().as_ptr() as u64);
        match protection() {
            Protection::MemfdSecret => {
                assert!(read.is_err(), "memfd_secret memory was read through /proc/self/mem")
            }
            Protection::Mlock => assert!(read.is_ok()),
        }
    }
}
