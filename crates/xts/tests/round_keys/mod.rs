//! All round keys of an XTS key, as the C library expands them, for tests that look where copies of them lie.

use aws_lc_sys::{AES_KEY, AES_set_decrypt_key, AES_set_encrypt_key};

/// Calls `each` with every schedule: data key for encryption and decryption, tweak key. They are gone afterwards.
pub(crate) fn for_each_schedule(key: &[u8; 64], mut each: impl FnMut(&[u8])) {
    let schedules: [(&[u8], unsafe extern "C" fn(*const u8, u32, *mut AES_KEY) -> i32); 3] = [
        (&key[..32], AES_set_encrypt_key),
        (&key[..32], AES_set_decrypt_key),
        (&key[32..], AES_set_encrypt_key),
    ];
    // SAFETY: plain integers.
    let mut schedule = Box::new(unsafe { std::mem::zeroed::<AES_KEY>() });
    for (half, expand) in schedules {
        // SAFETY: 32 bytes of key, a schedule to write to.
        assert_eq!(unsafe { expand(half.as_ptr(), 256, &mut *schedule) }, 0);
        // SAFETY: 15 round keys of 16 bytes, just written.
        each(unsafe { std::slice::from_raw_parts(schedule.rd_key.as_ptr().cast::<u8>(), 15 * 16) });
        // SAFETY: the whole structure, which is plain integers.
        unsafe { aws_lc_sys::OPENSSL_cleanse((&raw mut *schedule).cast(), size_of::<AES_KEY>()) };
    }
}
