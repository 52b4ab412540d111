//! AES-256-XTS on processors with VAES and VPCLMULQDQ but not AVX-512: 16 blocks, a quarter of a kilobyte, at a time.
//!
//! As [`crate::vaes512`]: the rounds are assembly, so that round keys are never the compiler's to put on the stack. There
//! are half as many registers, so tweaks go through a buffer.

use std::arch::{
    asm,
    x86_64::{
        __m256i, _mm_loadu_si128, _mm256_add_epi64, _mm256_broadcastsi128_si256, _mm256_bslli_epi128,
        _mm256_bsrli_epi128, _mm256_clmulepi64_epi128, _mm256_set_epi64x, _mm256_slli_epi64,
        _mm256_sllv_epi64, _mm256_srli_epi64, _mm256_srlv_epi64, _mm256_store_si256, _mm256_xor_si256,
    },
};

use crate::schedule::Schedules;

/// Bytes with one set of tweaks.
const CHUNK: usize = 512;
/// Bytes in the eight registers.
const HALF: usize = 256;
/// Units whose tweaks are made together.
const BATCH: usize = 16;

#[repr(C, align(32))]
struct Tweaks([u8; CHUNK]);

#[repr(C, align(32))]
struct Batch([u8; 16 * BATCH]);

/// Whether this processor has what the kernel needs.
pub(crate) fn is_available() -> bool {
    is_x86_feature_detected!("aes")
        && is_x86_feature_detected!("vaes")
        && is_x86_feature_detected!("vpclmulqdq")
        && is_x86_feature_detected!("avx2")
}

macro_rules! round {
    ($op:literal, $key:literal) => {
        concat!(
            "vmovdqa ymm8, [{keys} + 64*",
            $key,
            "]\n",
            $op,
            " ymm0, ymm0, ymm8\n",
            $op,
            " ymm1, ymm1, ymm8\n",
            $op,
            " ymm2, ymm2, ymm8\n",
            $op,
            " ymm3, ymm3, ymm8\n",
            $op,
            " ymm4, ymm4, ymm8\n",
            $op,
            " ymm5, ymm5, ymm8\n",
            $op,
            " ymm6, ymm6, ymm8\n",
            $op,
            " ymm7, ymm7, ymm8\n",
        )
    };
}

macro_rules! half {
    ($op:literal, $last:literal, $keys:expr, $src:expr, $dst:expr, $tweaks:expr) => {
        asm!(
            "vmovdqa ymm8, [{keys}]",
            "vpxor ymm0, ymm8, [{tweaks} + 0]",
            "vpxor ymm1, ymm8, [{tweaks} + 32]",
            "vpxor ymm2, ymm8, [{tweaks} + 64]",
            "vpxor ymm3, ymm8, [{tweaks} + 96]",
            "vpxor ymm4, ymm8, [{tweaks} + 128]",
            "vpxor ymm5, ymm8, [{tweaks} + 160]",
            "vpxor ymm6, ymm8, [{tweaks} + 192]",
            "vpxor ymm7, ymm8, [{tweaks} + 224]",
            "vpxor ymm0, ymm0, [{src} + 0]",
            "vpxor ymm1, ymm1, [{src} + 32]",
            "vpxor ymm2, ymm2, [{src} + 64]",
            "vpxor ymm3, ymm3, [{src} + 96]",
            "vpxor ymm4, ymm4, [{src} + 128]",
            "vpxor ymm5, ymm5, [{src} + 160]",
            "vpxor ymm6, ymm6, [{src} + 192]",
            "vpxor ymm7, ymm7, [{src} + 224]",
            round!($op, 1),
            round!($op, 2),
            round!($op, 3),
            round!($op, 4),
            round!($op, 5),
            round!($op, 6),
            round!($op, 7),
            round!($op, 8),
            round!($op, 9),
            round!($op, 10),
            round!($op, 11),
            round!($op, 12),
            round!($op, 13),
            "vmovdqa ymm8, [{keys} + 64*14]",
            "vpxor ymm9, ymm8, [{tweaks} + 0]",
            concat!($last, " ymm0, ymm0, ymm9"),
            "vpxor ymm10, ymm8, [{tweaks} + 32]",
            concat!($last, " ymm1, ymm1, ymm10"),
            "vpxor ymm11, ymm8, [{tweaks} + 64]",
            concat!($last, " ymm2, ymm2, ymm11"),
            "vpxor ymm12, ymm8, [{tweaks} + 96]",
            concat!($last, " ymm3, ymm3, ymm12"),
            "vpxor ymm9, ymm8, [{tweaks} + 128]",
            concat!($last, " ymm4, ymm4, ymm9"),
            "vpxor ymm10, ymm8, [{tweaks} + 160]",
            concat!($last, " ymm5, ymm5, ymm10"),
            "vpxor ymm11, ymm8, [{tweaks} + 192]",
            concat!($last, " ymm6, ymm6, ymm11"),
            "vpxor ymm12, ymm8, [{tweaks} + 224]",
            concat!($last, " ymm7, ymm7, ymm12"),
            "vmovdqu [{dst} + 0], ymm0",
            "vmovdqu [{dst} + 32], ymm1",
            "vmovdqu [{dst} + 64], ymm2",
            "vmovdqu [{dst} + 96], ymm3",
            "vmovdqu [{dst} + 128], ymm4",
            "vmovdqu [{dst} + 160], ymm5",
            "vmovdqu [{dst} + 192], ymm6",
            "vmovdqu [{dst} + 224], ymm7",
            keys = in(reg) $keys,
            src = in(reg) $src,
            dst = in(reg) $dst,
            tweaks = in(reg) $tweaks,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
            out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
            out("ymm12") _,
            options(nostack),
        )
    };
}

/// Encrypts or decrypts units of `chunks` half kilobytes; `chunks` is also what a unit adds to the sector number.
///
/// # Safety
///
/// [`is_available`]; both pointers are valid for `units` units, equal or without overlap.
#[target_feature(enable = "aes,vaes,vpclmulqdq,avx2")]
pub(crate) unsafe fn run(
    schedules: &Schedules,
    encrypt: bool,
    first_sector: u64,
    mut src: *const u8,
    mut dst: *mut u8,
    units: usize,
    chunks: usize,
) {
    let keys = schedules.data(encrypt);
    let step = chunks as u64;
    let mut batch = Batch([0; 16 * BATCH]);
    let mut tweaks = Tweaks([0; CHUNK]);
    for unit in 0..units {
        if unit % BATCH == 0 {
            let first = first_sector.wrapping_add(unit as u64 * step);
            // SAFETY: the buffer has room for a batch.
            unsafe { encrypt_sectors(schedules.tweak(), first, step, &mut batch) };
        }
        // SAFETY: the tweak of this unit is in the batch.
        let tweak = unsafe { _mm_loadu_si128(batch.0.as_ptr().add(16 * (unit % BATCH)).cast()) };
        let mut first = times_one_x(_mm256_broadcastsi128_si256(tweak));
        for _ in 0..chunks {
            derive(first, &mut tweaks);
            // SAFETY: a chunk from src to dst, in two halves; as many tweaks.
            unsafe {
                let t = tweaks.0.as_ptr();
                if encrypt {
                    half!("vaesenc", "vaesenclast", keys, src, dst, t);
                    half!("vaesenc", "vaesenclast", keys, src.add(HALF), dst.add(HALF), t.add(HALF));
                } else {
                    half!("vaesdec", "vaesdeclast", keys, src, dst, t);
                    half!("vaesdec", "vaesdeclast", keys, src.add(HALF), dst.add(HALF), t.add(HALF));
                }
                src = src.add(CHUNK);
                dst = dst.add(CHUNK);
            }
            first = times_bytes::<4, 12>(first);
        }
    }
}

/// All tweaks of a chunk from its first two.
#[inline]
#[target_feature(enable = "vpclmulqdq,avx2")]
fn derive(first: __m256i, tweaks: &mut Tweaks) {
    let second = times_bits::<2, 62>(first);
    let four = [first, second, times_bits::<4, 60>(first), times_bits::<4, 60>(second)];
    for (at, tweak) in four.into_iter().enumerate() {
        let all =
            [tweak, times_bytes::<1, 15>(tweak), times_bytes::<2, 14>(tweak), times_bytes::<3, 13>(tweak)];
        for (byte, tweak) in all.into_iter().enumerate() {
            // SAFETY: sixteen aligned places of 32 bytes.
            unsafe { _mm256_store_si256(tweaks.0.as_mut_ptr().add(32 * (4 * byte + at)).cast(), tweak) };
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn polynomial() -> __m256i {
    _mm256_set_epi64x(0, 0x87, 0, 0x87)
}

/// The upper lane times x.
#[inline]
#[target_feature(enable = "vpclmulqdq,avx2")]
fn times_one_x(tweak: __m256i) -> __m256i {
    let over = _mm256_srlv_epi64(tweak, _mm256_set_epi64x(63, 63, 64, 64));
    let shifted = _mm256_sllv_epi64(tweak, _mm256_set_epi64x(1, 1, 0, 0));
    carried(shifted, over)
}

/// Times x^BITS; REST is 64 less that.
#[inline]
#[target_feature(enable = "vpclmulqdq,avx2")]
fn times_bits<const BITS: i32, const REST: i32>(tweak: __m256i) -> __m256i {
    carried(_mm256_slli_epi64::<BITS>(tweak), _mm256_srli_epi64::<REST>(tweak))
}

/// What went over the low half comes into the high one; what went over that comes back by the polynomial.
#[inline]
#[target_feature(enable = "vpclmulqdq,avx2")]
fn carried(shifted: __m256i, over: __m256i) -> __m256i {
    let reduced = _mm256_clmulepi64_epi128::<0x01>(over, polynomial());
    _mm256_xor_si256(_mm256_xor_si256(shifted, reduced), _mm256_bslli_epi128::<8>(over))
}

/// Times x^(8·BYTES); REST is 16 less BYTES.
#[inline]
#[target_feature(enable = "vpclmulqdq,avx2")]
fn times_bytes<const BYTES: i32, const REST: i32>(tweak: __m256i) -> __m256i {
    let reduced = _mm256_clmulepi64_epi128::<0x00>(_mm256_bsrli_epi128::<REST>(tweak), polynomial());
    _mm256_xor_si256(_mm256_bslli_epi128::<BYTES>(tweak), reduced)
}

/// Sector numbers of a batch, encrypted with the tweak key.
///
/// # Safety
///
/// As [`run`]; `keys` is the tweak key's schedule.
#[inline]
#[target_feature(enable = "aes,vaes,avx2")]
unsafe fn encrypt_sectors(keys: *const u8, first: u64, step: u64, batch: &mut Batch) {
    let number = |unit: u64| first.wrapping_add(unit.wrapping_mul(step)).cast_signed();
    let mut blocks = [_mm256_set_epi64x(0, number(1), 0, number(0)); 8];
    let two = number(2).wrapping_sub(number(0));
    let two = _mm256_set_epi64x(0, two, 0, two);
    for at in 1..8 {
        // Only the low half of each block: the high one stays zero, as the number never carries into it.
        blocks[at] = _mm256_add_epi64(blocks[at - 1], two);
    }
    // SAFETY: reads the schedule, writes eight registers to the buffer.
    unsafe {
        asm!(
            "vmovdqa ymm8, [{keys}]",
            "vpxor ymm0, ymm0, ymm8",
            "vpxor ymm1, ymm1, ymm8",
            "vpxor ymm2, ymm2, ymm8",
            "vpxor ymm3, ymm3, ymm8",
            "vpxor ymm4, ymm4, ymm8",
            "vpxor ymm5, ymm5, ymm8",
            "vpxor ymm6, ymm6, ymm8",
            "vpxor ymm7, ymm7, ymm8",
            "mov {left}, 13",
            "2:",
            "add {keys}, 64",
            "vmovdqa ymm8, [{keys}]",
            "vaesenc ymm0, ymm0, ymm8",
            "vaesenc ymm1, ymm1, ymm8",
            "vaesenc ymm2, ymm2, ymm8",
            "vaesenc ymm3, ymm3, ymm8",
            "vaesenc ymm4, ymm4, ymm8",
            "vaesenc ymm5, ymm5, ymm8",
            "vaesenc ymm6, ymm6, ymm8",
            "vaesenc ymm7, ymm7, ymm8",
            "dec {left}",
            "jnz 2b",
            "vmovdqa ymm8, [{keys} + 64]",
            "vaesenclast ymm0, ymm0, ymm8",
            "vaesenclast ymm1, ymm1, ymm8",
            "vaesenclast ymm2, ymm2, ymm8",
            "vaesenclast ymm3, ymm3, ymm8",
            "vaesenclast ymm4, ymm4, ymm8",
            "vaesenclast ymm5, ymm5, ymm8",
            "vaesenclast ymm6, ymm6, ymm8",
            "vaesenclast ymm7, ymm7, ymm8",
            "vmovdqa [{to} + 0], ymm0",
            "vmovdqa [{to} + 32], ymm1",
            "vmovdqa [{to} + 64], ymm2",
            "vmovdqa [{to} + 96], ymm3",
            "vmovdqa [{to} + 128], ymm4",
            "vmovdqa [{to} + 160], ymm5",
            "vmovdqa [{to} + 192], ymm6",
            "vmovdqa [{to} + 224], ymm7",
            keys = inout(reg) keys => _,
            to = in(reg) batch.0.as_mut_ptr(),
            left = out(reg) _,
            inout("ymm0") blocks[0] => _,
            inout("ymm1") blocks[1] => _,
            inout("ymm2") blocks[2] => _,
            inout("ymm3") blocks[3] => _,
            inout("ymm4") blocks[4] => _,
            inout("ymm5") blocks[5] => _,
            inout("ymm6") blocks[6] => _,
            inout("ymm7") blocks[7] => _,
            out("ymm8") _,
            options(nostack),
        );
    }
}
