//! A disk's cipher: key set up once, then any number of data units.

use std::{fmt, io};

#[cfg(all(target_arch = "x86_64", not(feature = "fips")))]
use crate::{
    cold::Distance,
    own::{self, Job},
    schedule::Schedules,
};
use crate::{
    context::{Contexts, Direction, LibraryFailed},
    kernel::Kernel,
    memory::Protection,
    pool::Pool,
    scrub::clear_registers,
};

/// Bytes of a sector, which the tweak counts whatever the unit is (dm-crypt's `plain64` without `iv_large_sectors`).
const SECTOR: u64 = 512;
/// Bytes of the largest unit.
const MOST_UNIT: usize = 64 << 10;

/// AES-256-XTS of one disk, for any number of threads at a time.
///
/// Round keys lie in secret memory, which is mapped when the cipher is made and needs no system call afterwards.
pub struct Cipher {
    engine: Engine,
    kernel: Kernel,
    unit: usize,
}

enum Engine {
    #[cfg(all(target_arch = "x86_64", not(feature = "fips")))]
    Own(Schedules, Distance),
    Library(Pool),
}

impl Cipher {
    /// A cipher with this key: data key (32 bytes), then tweak key (32 bytes). `unit` is 512 or 4096.
    ///
    /// # Errors
    ///
    /// [`XtsError::EqualHalves`] (SP 800-38E via IEEE Std 1619), [`XtsError::Unit`], or no secret memory.
    pub fn new(key: &[u8; 64], unit: usize) -> Result<Self, XtsError> {
        if unit != 512 && unit != 4096 {
            return Err(XtsError::Unit { bytes: unit });
        }
        Self::with_kernel(key, unit, Kernel::detected())
    }

    /// The same with a kernel of the caller's choice. `unit` may be any multiple of 512 up to 64 KiB: the format has two,
    /// tests and benchmarks have more.
    ///
    /// # Errors
    ///
    /// As [`Cipher::new`], and [`XtsError::NotHere`].
    pub fn with_kernel(key: &[u8; 64], unit: usize, kernel: Kernel) -> Result<Self, XtsError> {
        if unit == 0 || unit > MOST_UNIT || !unit.is_multiple_of(SECTOR as usize) {
            return Err(XtsError::Unit { bytes: unit });
        }
        if !kernel.is_available() {
            return Err(XtsError::NotHere { kernel });
        }
        let (data, tweak) = key.split_at(32);
        // SAFETY: both halves are 32 bytes. The comparison's time does not depend on them.
        if unsafe { aws_lc_sys::CRYPTO_memcmp(data.as_ptr().cast(), tweak.as_ptr().cast(), 32) } == 0 {
            return Err(XtsError::EqualHalves);
        }
        let engine = match kernel {
            Kernel::AwsLc => Engine::Library(Pool::new(key)?.map_err(|LibraryFailed| XtsError::Library)?),
            #[cfg(all(target_arch = "x86_64", not(feature = "fips")))]
            Kernel::Vaes512 | Kernel::Vaes256 => {
                // SAFETY: no kernel of our own is available without AES-NI and AVX.
                let schedules = unsafe { Schedules::new(key)? };
                Engine::Own(schedules, Distance::default())
            }
            #[cfg(not(all(target_arch = "x86_64", not(feature = "fips"))))]
            kernel => return Err(XtsError::NotHere { kernel }),
        };
        clear_registers();
        Ok(Self { engine, kernel, unit })
    }

    /// The kernel [`Cipher::new`] takes on this processor.
    pub fn detected() -> Kernel {
        Kernel::detected()
    }

    /// How this cipher's round keys are kept from others.
    pub fn protection(&self) -> Protection {
        match &self.engine {
            #[cfg(all(target_arch = "x86_64", not(feature = "fips")))]
            Engine::Own(schedules, _) => schedules.protection(),
            Engine::Library(pool) => pool.protection(),
        }
    }

    /// The code that does the work.
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// Encrypts whole units in place. `first_sector` is the number of the first unit's first 512-byte sector.
    ///
    /// # Errors
    ///
    /// [`XtsError::Length`], [`XtsError::Sector`]; nothing was changed then.
    pub fn encrypt(&self, first_sector: u64, data: &mut [u8]) -> Result<(), XtsError> {
        self.in_place(Direction::Encrypt, first_sector, data)
    }

    /// Decrypts whole units in place.
    ///
    /// # Errors
    ///
    /// As [`Cipher::encrypt`].
    pub fn decrypt(&self, first_sector: u64, data: &mut [u8]) -> Result<(), XtsError> {
        self.in_place(Direction::Decrypt, first_sector, data)
    }

    /// Encrypts whole units from `src` to `dst`.
    ///
    /// # Errors
    ///
    /// As [`Cipher::encrypt`]; [`XtsError::Copy`] if the lengths differ.
    pub fn encrypt_copy(&self, first_sector: u64, src: &[u8], dst: &mut [u8]) -> Result<(), XtsError> {
        self.copy(Direction::Encrypt, first_sector, src, dst)
    }

    /// Decrypts whole units from `src` to `dst`.
    ///
    /// # Errors
    ///
    /// As [`Cipher::encrypt_copy`].
    pub fn decrypt_copy(&self, first_sector: u64, src: &[u8], dst: &mut [u8]) -> Result<(), XtsError> {
        self.copy(Direction::Decrypt, first_sector, src, dst)
    }

    /// Encrypts whole units from `src` to `dst`, which may be the same memory, and may be a guest's.
    ///
    /// # Errors
    ///
    /// As [`Cipher::encrypt`].
    ///
    /// # Safety
    ///
    /// Both are valid for `len` bytes, `dst` for writing; they are equal or do not overlap. Others may change them
    /// meanwhile: no reference to them is made.
    pub unsafe fn encrypt_raw(
        &self,
        first_sector: u64,
        src: *const u8,
        dst: *mut u8,
        len: usize,
    ) -> Result<(), XtsError> {
        // SAFETY: passed on.
        unsafe { self.run(Direction::Encrypt, first_sector, src, dst, len) }
    }

    /// Decrypts whole units from `src` to `dst`.
    ///
    /// # Errors
    ///
    /// As [`Cipher::encrypt`].
    ///
    /// # Safety
    ///
    /// As [`Cipher::encrypt_raw`].
    pub unsafe fn decrypt_raw(
        &self,
        first_sector: u64,
        src: *const u8,
        dst: *mut u8,
        len: usize,
    ) -> Result<(), XtsError> {
        // SAFETY: passed on.
        unsafe { self.run(Direction::Decrypt, first_sector, src, dst, len) }
    }

    /// Bytes of a data unit.
    pub fn unit(&self) -> usize {
        self.unit
    }

    fn in_place(&self, direction: Direction, first_sector: u64, data: &mut [u8]) -> Result<(), XtsError> {
        let base = data.as_mut_ptr();
        // SAFETY: source and destination are the same exclusive slice.
        unsafe { self.run(direction, first_sector, base, base, data.len()) }
    }

    fn copy(
        &self,
        direction: Direction,
        first_sector: u64,
        src: &[u8],
        dst: &mut [u8],
    ) -> Result<(), XtsError> {
        if src.len() != dst.len() {
            return Err(XtsError::Copy { src: src.len(), dst: dst.len() });
        }
        // SAFETY: a shared and an exclusive slice of the same length do not overlap.
        unsafe { self.run(direction, first_sector, src.as_ptr(), dst.as_mut_ptr(), src.len()) }
    }

    /// # Safety
    ///
    /// Both pointers are valid for `len` bytes, `dst` for writing; they are equal or do not overlap.
    unsafe fn run(
        &self,
        direction: Direction,
        first_sector: u64,
        src: *const u8,
        dst: *mut u8,
        len: usize,
    ) -> Result<(), XtsError> {
        if !len.is_multiple_of(self.unit) {
            return Err(XtsError::Length { bytes: len, unit: self.unit });
        }
        let step = self.unit as u64 / SECTOR;
        let sectors = len as u64 / SECTOR;
        // Every sector's number must fit, checked before the first byte changes.
        if sectors > 0 && first_sector.checked_add(sectors - 1).is_none() {
            return Err(XtsError::Sector { first: first_sector, sectors });
        }
        // A 4096-byte unit that does not begin at a multiple of eight sectors lies across two units of the disk.
        if !first_sector.is_multiple_of(step) {
            return Err(XtsError::Sector { first: first_sector, sectors });
        }
        match &self.engine {
            #[cfg(all(target_arch = "x86_64", not(feature = "fips")))]
            Engine::Own(schedules, distance) => {
                let job = Job::new(first_sector.into(), self.unit, len);
                let encrypt = direction == Direction::Encrypt;
                // SAFETY: the kernel was available when the cipher was made; the caller vouches for both ranges.
                unsafe { own::run(self.kernel, schedules, distance, encrypt, &job, src, dst) };
                Ok(())
            }
            Engine::Library(pool) => {
                // SAFETY: passed on; nobody else has these contexts meanwhile.
                let result = pool.with(|contexts| unsafe {
                    self.unit_by_unit(contexts, direction, first_sector, src, dst, len)
                });
                clear_registers();
                result
            }
        }
    }

    /// # Safety
    ///
    /// As [`Cipher::run`]; the contexts are the calling thread's alone.
    unsafe fn unit_by_unit(
        &self,
        contexts: &Contexts,
        direction: Direction,
        mut sector: u64,
        src: *const u8,
        dst: *mut u8,
        len: usize,
    ) -> Result<(), XtsError> {
        let mut tweak = [0; 16];
        for at in (0..len).step_by(self.unit) {
            tweak[..8].copy_from_slice(&sector.to_le_bytes());
            // SAFETY: at + unit ≤ len; the caller vouches for both ranges.
            let done = unsafe { contexts.unit(direction, &tweak, src.add(at), dst.add(at), self.unit) };
            done.map_err(|LibraryFailed| XtsError::Library)?;
            // The last step may go past the end of what u64 holds; that number is not used.
            sector = sector.wrapping_add(self.unit as u64 / SECTOR);
        }
        Ok(())
    }
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cipher(aes-xts-plain64, {}-byte units, {})", self.unit, self.kernel)
    }
}

/// Why nothing was encrypted or decrypted. Holds lengths, never data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum XtsError {
    /// With equal halves XTS is not secure; the key is damaged or was not made by a random generator.
    #[error("the two halves of the XTS key are equal; the key is not used")]
    EqualHalves,
    /// Neither 512 nor 4096.
    #[error("data units of {bytes} bytes are not supported, only 512 and 4096")]
    Unit {
        /// Bytes asked for.
        bytes: usize,
    },
    /// This processor, or this build, cannot run it.
    #[error(
        "the cipher kernel {kernel} does not run here; without one being named, {} does",
        Kernel::detected()
    )]
    NotHere {
        /// The one asked for.
        kernel: Kernel,
    },
    /// Not a whole number of units.
    #[error("{bytes} bytes are not a whole number of {unit}-byte data units")]
    Length {
        /// Bytes given.
        bytes: usize,
        /// Bytes of a unit.
        unit: usize,
    },
    /// Sector numbers pass 2^64, or the first is not where a unit begins.
    #[error(
        "no data unit begins at sector {first}, or {sectors} sectors from there pass the largest sector number"
    )]
    Sector {
        /// First sector.
        first: u64,
        /// How many.
        sectors: u64,
    },
    /// Source and destination differ in length.
    #[error("source has {src} bytes and destination {dst}")]
    Copy {
        /// Bytes of the source.
        src: usize,
        /// Bytes of the destination.
        dst: usize,
    },
    /// No page for the expanded keys.
    #[error("no secret memory for the cipher; check RLIMIT_MEMLOCK (LimitMEMLOCK= in the systemd unit)")]
    Memory(#[from] io::Error),
    /// The cipher library failed, which it does for no input that passed the checks.
    #[error("the cipher library failed")]
    Library,
}
