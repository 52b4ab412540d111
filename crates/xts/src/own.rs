//! Kernels of our own, for processors with VAES and VPCLMULQDQ: with AVX-512, and with AVX2 only.
//!
//! In go round keys in secret memory, a range of units and the number of the first; out comes the other text. They are
//! assembly, so that no round key is ever a value of the compiler's, which would put it on the stack.
//!
//! Tweaks (IEEE Std 1619, 5.2): block j of a unit has T·x^j in GF(2^128), T being the unit's number encrypted with the
//! tweak key. A register holds the tweaks of consecutive blocks. All of them times x^8n is a byte shift; what it pushes
//! out comes back by one carry-less multiplication with 0x87, which x^128 is. Between the rounds of one piece the tweaks
//! of the next are derived, and every few units the next numbers are encrypted; so the units that do the rounds, of which
//! a processor has one or two, are never without work.

use std::arch::naked_asm;

use crate::{cold::Distance, kernel::Kernel, schedule::Schedules};

/// Bytes that the tweaks of a unit are counted in.
const CHUNK: usize = 512;
/// From here on it is worth a look whether the destination is far.
const LARGE: usize = 64 << 10;

/// What to encrypt or decrypt. The assembly knows this layout.
#[repr(C)]
pub(crate) struct Job {
    /// Number of the first unit, little-endian. Only the low half is counted up.
    number: [u64; 2],
    units: usize,
    /// Half kilobytes of a unit, and what one adds to the number.
    chunks: usize,
}

impl Job {
    /// `len` bytes in units of `unit`, a multiple of 512 not above 64 KiB.
    pub(crate) fn new(number: u128, unit: usize, len: usize) -> Self {
        debug_assert!(unit.is_multiple_of(CHUNK) && len.is_multiple_of(unit));
        Self { number: [number as u64, (number >> 64) as u64], units: len / unit, chunks: unit / CHUNK }
    }

    fn bytes(&self) -> usize {
        self.units * self.chunks * CHUNK
    }
}

type Code = unsafe extern "sysv64" fn(*const u8, *const u8, *mut u8, *const Job, *const u8);

macro_rules! code {
    ($name:ident, $file:literal, $call:literal) => {
        /// Round keys of the data key; source; destination; job; round keys of the tweak key.
        ///
        /// # Safety
        ///
        /// As [`run`], the job not empty, and a destination for `vmovntdq` on a multiple of 64.
        #[unsafe(naked)]
        unsafe extern "sysv64" fn $name(
            keys: *const u8,
            src: *const u8,
            dst: *mut u8,
            job: *const Job,
            tweak_keys: *const u8,
        ) {
            naked_asm!(include_str!($file), $call, options(raw))
        }
    };
}

code!(encrypt_512, "vaes512.s", "vmseal512_units vaesenc, vaesenclast, vmovdqu64");
code!(decrypt_512, "vaes512.s", "vmseal512_units vaesdec, vaesdeclast, vmovdqu64");
code!(encrypt_512_past_cache, "vaes512.s", "vmseal512_units vaesenc, vaesenclast, vmovntdq");
code!(decrypt_512_past_cache, "vaes512.s", "vmseal512_units vaesdec, vaesdeclast, vmovntdq");
code!(encrypt_256, "vaes256.s", "vmseal256_units vaesenc, vaesenclast, vmovdqu");
code!(decrypt_256, "vaes256.s", "vmseal256_units vaesdec, vaesdeclast, vmovdqu");
code!(encrypt_256_past_cache, "vaes256.s", "vmseal256_units vaesenc, vaesenclast, vmovntdq");
code!(decrypt_256_past_cache, "vaes256.s", "vmseal256_units vaesdec, vaesdeclast, vmovntdq");

/// Whether this processor, and its operating system, can run the kernel; only for kernels of our own.
pub(crate) fn is_available(kernel: Kernel) -> bool {
    let both = is_x86_feature_detected!("aes")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("vaes")
        && is_x86_feature_detected!("vpclmulqdq");
    match kernel {
        Kernel::Vaes512 => {
            both && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
        }
        Kernel::Vaes256 => both,
        Kernel::AwsLc => false,
    }
}

/// Encrypts or decrypts from `src` to `dst`. All vector registers are zero afterwards.
///
/// # Safety
///
/// [`is_available`] says so of `kernel`; both pointers are valid for the job's bytes, `dst` for writing; they are equal
/// or do not overlap. Others may change the memory meanwhile: each byte is read once.
pub(crate) unsafe fn run(
    kernel: Kernel,
    schedules: &Schedules,
    distance: &Distance,
    encrypt: bool,
    job: &Job,
    src: *const u8,
    dst: *mut u8,
) {
    if job.units == 0 {
        return;
    }
    // A store past the cache saves reading what it overwrites: a third of the traffic, if that is far away.
    let past_cache = job.bytes() >= LARGE
        && !std::ptr::eq(src, dst)
        && dst.addr().is_multiple_of(64)
        // SAFETY: the destination is that long.
        && unsafe { distance.is_far(dst, job.bytes()) };
    // SAFETY: passed on.
    unsafe { code(kernel, encrypt, past_cache)(schedules.data(encrypt), src, dst, job, schedules.tweak()) };
}

fn code(kernel: Kernel, encrypt: bool, past_cache: bool) -> Code {
    match (kernel == Kernel::Vaes512, encrypt, past_cache) {
        (true, true, false) => encrypt_512,
        (true, false, false) => decrypt_512,
        (true, true, true) => encrypt_512_past_cache,
        (true, false, true) => decrypt_512_past_cache,
        (false, true, false) => encrypt_256,
        (false, false, false) => decrypt_256,
        (false, true, true) => encrypt_256_past_cache,
        (false, false, true) => decrypt_256_past_cache,
    }
}

#[cfg(test)]
mod tests {
    use std::arch::asm;

    use super::*;

    /// 32 registers of 64 bytes.
    #[repr(C, align(64))]
    struct Registers([u8; 2048]);

    #[repr(C, align(64))]
    struct Aligned([u8; 8 * 4096]);

    /// Runs `code` and returns the registers as it left them.
    ///
    /// # Safety
    ///
    /// As the code's own.
    unsafe fn registers_after(
        code: Code,
        schedules: &Schedules,
        encrypt: bool,
        src: *const u8,
        dst: *mut u8,
        job: &Job,
    ) -> Registers {
        let mut registers = Registers([0; 2048]);
        let with_512 = is_x86_feature_detected!("avx512f");
        // SAFETY: passed on; kernels of our own need AVX2, and keep r12 and r13; stores stay within the array.
        unsafe {
            if with_512 {
                // What other code left there must go too.
                asm!("vpternlogd zmm7, zmm7, zmm7, 0xff", "vpternlogd zmm29, zmm29, zmm29, 0xff", out("xmm7") _, out("xmm29") _);
                asm!(
                    "call r12",
                    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
                    "vmovdqu64 [r13 + 64*\\n], zmm\\n",
                    ".endr",
                    in("r12") code,
                    in("r13") registers.0.as_mut_ptr(),
                    in("rdi") schedules.data(encrypt),
                    in("rsi") src,
                    in("rdx") dst,
                    in("rcx") job,
                    in("r8") schedules.tweak(),
                    clobber_abi("sysv64"),
                );
            } else {
                asm!(
                    "call r12",
                    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                    "vmovdqu [r13 + 64*\\n], ymm\\n",
                    ".endr",
                    in("r12") code,
                    in("r13") registers.0.as_mut_ptr(),
                    in("rdi") schedules.data(encrypt),
                    in("rsi") src,
                    in("rdx") dst,
                    in("rcx") job,
                    in("r8") schedules.tweak(),
                    clobber_abi("sysv64"),
                );
            }
        }
        registers
    }

    #[test]
    fn stores_past_the_cache_write_the_same_and_all_code_leaves_its_registers_zero() {
        let key: [u8; 64] = std::array::from_fn(|i| (i as u8).wrapping_mul(57) ^ 0x33);
        for kernel in [Kernel::Vaes512, Kernel::Vaes256].into_iter().filter(|kernel| is_available(*kernel)) {
            // SAFETY: available.
            let schedules = unsafe { Schedules::new(&key) }.unwrap();
            let (mut plain, mut near, mut far) =
                (Aligned([0; 8 * 4096]), Aligned([0; 8 * 4096]), Aligned([0; 8 * 4096]));
            plain.0.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * i) as u8);
            for (unit, units) in [(512, 1), (512, 5), (512, 64), (1024, 3), (4096, 1), (4096, 8), (32768, 1)]
            {
                let job = Job::new(u128::from(u64::MAX) << 40, unit, unit * units);
                for encrypt in [true, false] {
                    for (past_cache, to) in [(false, &mut near), (true, &mut far)] {
                        to.0.fill(0xa5);
                        let code = code(kernel, encrypt, past_cache);
                        let (from, to) = (plain.0.as_ptr(), to.0.as_mut_ptr());
                        // SAFETY: available; both are long enough, aligned, and not one.
                        let registers = unsafe { registers_after(code, &schedules, encrypt, from, to, &job) };
                        let used = if kernel == Kernel::Vaes512 { 2048 } else { 1024 };
                        assert!(
                            registers.0[..used].iter().all(|byte| *byte == 0),
                            "{kernel}, {unit} × {units}"
                        );
                    }
                    assert!(near.0 == far.0, "{kernel}, {unit} × {units}, encrypt {encrypt}");
                    assert!(near.0[job.bytes()..].iter().all(|byte| *byte == 0xa5));
                    assert!(near.0[..job.bytes()].chunks(16).all(|block| block != [0xa5; 16]));
                }
            }
        }
    }
}
