//! The C library's cipher contexts for the two directions, placed in one page of secret memory.
//!
//! In goes a key, once; then tweaks and data. This is the only file that calls the C library for data.

use std::{ffi::c_int, io, mem::size_of, ptr};

use aws_lc_sys::{
    EVP_CIPHER_CTX, EVP_CIPHER_CTX_cleanup, EVP_CIPHER_CTX_init, EVP_CipherInit_ex, EVP_CipherUpdate,
    EVP_aes_256_xts, OPENSSL_free,
};

use crate::memory::{PAGE, Page, Protection};

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Encrypt = 1,
    Decrypt = 0,
}

/// Room for the library's `EVP_AES_XTS_CTX`: two schedules of 244 bytes, four pointers, a flag. Twice what it needs,
/// so that a library that adds fields still fits; `expanded_keys_end_well_inside_their_room` watches.
const DATA_ROOM: usize = 1152;
/// Bytes that the contexts of one direction take.
const SIDE: usize = PAGE / 2;
const DATA_AT: usize = size_of::<EVP_CIPHER_CTX>().next_multiple_of(64);
const _: () = assert!(DATA_AT + DATA_ROOM <= SIDE);

/// Both contexts, set up with one key.
pub(crate) struct Contexts {
    page: Page,
}

/// The C library did not do what it was asked for.
#[derive(Debug)]
pub(crate) struct LibraryFailed;

impl Contexts {
    /// Expands `key` for both directions, in secret memory.
    pub(crate) fn new(key: &[u8; 64]) -> Result<Result<Self, LibraryFailed>, io::Error> {
        let contexts = Self { page: Page::new()? };
        for direction in [Direction::Encrypt, Direction::Decrypt] {
            // SAFETY: the page is zeroed and not used yet.
            if unsafe { contexts.set_up(direction, key) }.is_err() {
                return Ok(Err(LibraryFailed));
            }
        }
        Ok(Ok(contexts))
    }

    /// # Safety
    ///
    /// Once per direction, on a fresh page.
    unsafe fn set_up(&self, direction: Direction, key: &[u8; 64]) -> Result<(), LibraryFailed> {
        let (context, data) = (self.context(direction), self.data(direction));
        // SAFETY: `context` is aligned, inside the page and large enough for a context; it is initialised first. With
        // neither key nor IV the library only allocates its cipher data, on its own heap.
        unsafe {
            EVP_CIPHER_CTX_init(context);
            let enc = direction as c_int;
            if EVP_CipherInit_ex(context, EVP_aes_256_xts(), ptr::null_mut(), ptr::null(), ptr::null(), enc)
                != 1
            {
                return Err(LibraryFailed);
            }
            // Now, before there is a key, the cipher data moves into secret memory. Its initial state is all zero but
            // for what the page holds already: no pointers, no unit processed.
            OPENSSL_free((*context).cipher_data);
            (*context).cipher_data = data.cast();
            if EVP_CipherInit_ex(context, ptr::null(), ptr::null_mut(), key.as_ptr(), ptr::null(), enc) != 1 {
                return Err(LibraryFailed);
            }
        }
        Ok(())
    }

    /// Encrypts or decrypts one data unit of at least 16 bytes from `src` to `dst`, which may be the same.
    ///
    /// # Safety
    ///
    /// Both are valid for `len` bytes, `dst` for writing; they are equal or do not overlap. Not from two threads.
    pub(crate) unsafe fn unit(
        &self,
        direction: Direction,
        tweak: &[u8; 16],
        src: *const u8,
        dst: *mut u8,
        len: usize,
    ) -> Result<(), LibraryFailed> {
        let context = self.context(direction);
        let len = c_int::try_from(len).map_err(|_| LibraryFailed)?;
        let mut written = 0;
        // SAFETY: the context was set up with a key; the tweak is 16 bytes; the caller vouches for src and dst. Block
        // size of XTS is 1, so exactly `len` bytes are written.
        let done = unsafe {
            EVP_CipherInit_ex(
                context,
                ptr::null(),
                ptr::null_mut(),
                ptr::null(),
                tweak.as_ptr(),
                direction as c_int,
            ) == 1
                && EVP_CipherUpdate(context, dst, &mut written, src, len) == 1
        };
        if done && written == len { Ok(()) } else { Err(LibraryFailed) }
    }

    /// How the page they lie in is protected.
    pub(crate) fn protection(&self) -> Protection {
        self.page.protection()
    }

    fn side(&self, direction: Direction) -> *mut u8 {
        let at = if direction == Direction::Encrypt { 0 } else { SIDE };
        // SAFETY: at is inside the page.
        unsafe { self.page.base().as_ptr().add(at) }
    }

    fn context(&self, direction: Direction) -> *mut EVP_CIPHER_CTX {
        self.side(direction).cast()
    }

    fn data(&self, direction: Direction) -> *mut u8 {
        // SAFETY: DATA_AT + DATA_ROOM is inside the side, by the assertion above.
        unsafe { self.side(direction).add(DATA_AT) }
    }
}

impl Drop for Contexts {
    fn drop(&mut self) {
        for direction in [Direction::Encrypt, Direction::Decrypt] {
            let context = self.context(direction);
            // SAFETY: the context is initialised, or all zero, which is the same. The library must not free cipher
            // data that lies in our page; the page itself is cleansed when it is dropped.
            unsafe {
                if (*context).cipher_data == self.data(direction).cast() {
                    (*context).cipher_data = ptr::null_mut();
                }
                EVP_CIPHER_CTX_cleanup(context);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expanded_keys_end_well_inside_their_room() {
        let key: [u8; 64] = std::array::from_fn(|i| i as u8);
        let contexts = Contexts::new(&key).unwrap().unwrap();
        let mut unit = [7u8; 64];
        for direction in [Direction::Encrypt, Direction::Decrypt] {
            // SAFETY: 64 bytes, in place, one thread.
            unsafe { contexts.unit(direction, &[1; 16], unit.as_ptr(), unit.as_mut_ptr(), 64) }.unwrap();
            // SAFETY: the room is inside the page and initialised.
            let room = unsafe { std::slice::from_raw_parts(contexts.data(direction), DATA_ROOM) };
            let used = room.iter().rposition(|b| *b != 0).unwrap() + 1;
            assert!((480..=DATA_ROOM / 2).contains(&used), "{used} bytes in use");
        }
        assert_eq!(unit, [7; 64]);
    }
}
