//! Memory on page boundaries, as disks and guests have it.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};

const PAGE: usize = 4096;

/// Bytes that are all mapped.
pub(crate) struct Buffer {
    base: *mut u8,
    layout: Layout,
}

impl Buffer {
    /// `len` bytes, not zero: every page is touched, and none is the one shared page of zeroes.
    pub(crate) fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len, PAGE).expect("a size in reason");
        // SAFETY: no size is 0 here.
        let base = unsafe { alloc(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        // SAFETY: just allocated, that long.
        unsafe { base.write_bytes(7, len) };
        Self { base, layout }
    }

    pub(crate) fn base(&self) -> *const u8 {
        self.base
    }

    pub(crate) fn base_mut(&mut self) -> *mut u8 {
        self.base
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, freed once.
        unsafe { dealloc(self.base, self.layout) };
    }
}
