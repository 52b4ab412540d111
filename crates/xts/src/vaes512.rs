//! AES-256-XTS on processors with VAES, VPCLMULQDQ and AVX-512: 32 blocks, half a kilobyte, at a time.
//!
//! The rounds are written out in assembly. So round keys are operands that the compiler never sees and never puts on the
//! stack, and the tweaks of the next half kilobyte are derived between the rounds of this one, on units of the
//! processor that the rounds leave idle.
//!
//! Tweaks (IEEE Std 1619, 5.2): block j of a unit has T·x^j in GF(2^128). Register r of eight holds blocks 4r to 4r+3;
//! multiplying by x^8n is a byte shift whose overflow, at most 24 bits, comes back by one carry-less multiplication with
//! the polynomial's 0x87.

use std::arch::{
    asm,
    x86_64::{__m512i, _mm512_add_epi64, _mm512_set_epi64},
};

use crate::schedule::{Schedules, WIDE};

/// Bytes worked on at a time.
const CHUNK: usize = 512;
/// Units whose tweaks are made together.
const BATCH: usize = 16;

/// Encrypted sector numbers of a batch.
#[repr(C, align(64))]
struct Tweaks([u8; 16 * BATCH + WIDE]);

/// Whether this processor has what the kernel needs.
pub(crate) fn is_available() -> bool {
    is_x86_feature_detected!("aes")
        && is_x86_feature_detected!("vaes")
        && is_x86_feature_detected!("vpclmulqdq")
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

/// dst = src · x^(8·bytes) in each 128-bit lane; `rest` is 16 less `bytes`.
macro_rules! times_bytes {
    ($dst:literal, $src:literal, $bytes:literal, $rest:literal) => {
        concat!(
            "vpsrldq zmm24, zmm",
            $src,
            ", ",
            $rest,
            "\n",
            "vpclmulqdq zmm24, zmm24, zmm28, 0\n",
            "vpslldq zmm",
            $dst,
            ", zmm",
            $src,
            ", ",
            $bytes,
            "\n",
            "vpxorq zmm",
            $dst,
            ", zmm",
            $dst,
            ", zmm24\n",
        )
    };
}

/// dst = src · x^4 in each lane.
macro_rules! times_x4 {
    ($dst:literal, $src:literal) => {
        concat!(
            "vpsrlq zmm24, zmm",
            $src,
            ", 60\n",
            "vpclmulqdq zmm25, zmm24, zmm28, 1\n",
            "vpslldq zmm24, zmm24, 8\n",
            "vpsllq zmm",
            $dst,
            ", zmm",
            $src,
            ", 4\n",
            "vpternlogq zmm",
            $dst,
            ", zmm24, zmm25, 0x96\n",
        )
    };
}

/// dst = the tweak at `next`, times x^0 to x^3 in its lanes.
macro_rules! from_tweak {
    ($dst:literal) => {
        concat!(
            "vbroadcasti32x4 zmm",
            $dst,
            ", [{next}]\n",
            "vpsrlvq zmm24, zmm",
            $dst,
            ", zmm30\n",
            "vpclmulqdq zmm25, zmm24, zmm28, 1\n",
            "vpslldq zmm24, zmm24, 8\n",
            "vpsllvq zmm",
            $dst,
            ", zmm",
            $dst,
            ", zmm29\n",
            "vpternlogq zmm",
            $dst,
            ", zmm24, zmm25, 0x96\n",
        )
    };
}

/// One round of the eight registers.
macro_rules! round {
    ($op:literal, $key:literal) => {
        concat!(
            "vmovdqa64 zmm26, [{keys} + 64*",
            $key,
            "]\n",
            $op,
            " zmm0, zmm0, zmm26\n",
            $op,
            " zmm1, zmm1, zmm26\n",
            $op,
            " zmm2, zmm2, zmm26\n",
            $op,
            " zmm3, zmm3, zmm26\n",
            $op,
            " zmm4, zmm4, zmm26\n",
            $op,
            " zmm5, zmm5, zmm26\n",
            $op,
            " zmm6, zmm6, zmm26\n",
            $op,
            " zmm7, zmm7, zmm26\n",
        )
    };
}

/// Half a kilobyte with the tweaks in registers `$c*`, and the next one's tweaks into `$n*`: `$first` makes the first
/// register of these, `$second` the second.
macro_rules! chunk {
    ($op:literal, $last:literal, $first:expr, $second:expr,
     [$c0:literal $c1:literal $c2:literal $c3:literal $c4:literal $c5:literal $c6:literal $c7:literal],
     [$n0:literal $n1:literal $n2:literal $n3:literal $n4:literal $n5:literal $n6:literal $n7:literal]) => {
        concat!(
            "vmovdqa64 zmm26, [{keys}]\n",
            "vmovdqu64 zmm0, [{src} + 0]\n",
            "vmovdqu64 zmm1, [{src} + 64]\n",
            "vmovdqu64 zmm2, [{src} + 128]\n",
            "vmovdqu64 zmm3, [{src} + 192]\n",
            "vmovdqu64 zmm4, [{src} + 256]\n",
            "vmovdqu64 zmm5, [{src} + 320]\n",
            "vmovdqu64 zmm6, [{src} + 384]\n",
            "vmovdqu64 zmm7, [{src} + 448]\n",
            "vpternlogq zmm0, zmm26, zmm",
            $c0,
            ", 0x96\n",
            "vpternlogq zmm1, zmm26, zmm",
            $c1,
            ", 0x96\n",
            "vpternlogq zmm2, zmm26, zmm",
            $c2,
            ", 0x96\n",
            "vpternlogq zmm3, zmm26, zmm",
            $c3,
            ", 0x96\n",
            "vpternlogq zmm4, zmm26, zmm",
            $c4,
            ", 0x96\n",
            "vpternlogq zmm5, zmm26, zmm",
            $c5,
            ", 0x96\n",
            "vpternlogq zmm6, zmm26, zmm",
            $c6,
            ", 0x96\n",
            "vpternlogq zmm7, zmm26, zmm",
            $c7,
            ", 0x96\n",
            round!($op, 1),
            $first,
            round!($op, 2),
            round!($op, 3),
            $second,
            round!($op, 4),
            round!($op, 5),
            times_bytes!($n2, $n0, 1, 15),
            round!($op, 6),
            times_bytes!($n3, $n1, 1, 15),
            round!($op, 7),
            times_bytes!($n4, $n0, 2, 14),
            round!($op, 8),
            times_bytes!($n5, $n1, 2, 14),
            round!($op, 9),
            times_bytes!($n6, $n0, 3, 13),
            round!($op, 10),
            times_bytes!($n7, $n1, 3, 13),
            round!($op, 11),
            round!($op, 12),
            round!($op, 13),
            "vmovdqa64 zmm26, [{keys} + 64*14]\n",
            "vpxorq zmm",
            $c0,
            ", zmm",
            $c0,
            ", zmm26\n",
            "vpxorq zmm",
            $c1,
            ", zmm",
            $c1,
            ", zmm26\n",
            "vpxorq zmm",
            $c2,
            ", zmm",
            $c2,
            ", zmm26\n",
            "vpxorq zmm",
            $c3,
            ", zmm",
            $c3,
            ", zmm26\n",
            "vpxorq zmm",
            $c4,
            ", zmm",
            $c4,
            ", zmm26\n",
            "vpxorq zmm",
            $c5,
            ", zmm",
            $c5,
            ", zmm26\n",
            "vpxorq zmm",
            $c6,
            ", zmm",
            $c6,
            ", zmm26\n",
            "vpxorq zmm",
            $c7,
            ", zmm",
            $c7,
            ", zmm26\n",
            $last,
            " zmm0, zmm0, zmm",
            $c0,
            "\n",
            $last,
            " zmm1, zmm1, zmm",
            $c1,
            "\n",
            $last,
            " zmm2, zmm2, zmm",
            $c2,
            "\n",
            $last,
            " zmm3, zmm3, zmm",
            $c3,
            "\n",
            $last,
            " zmm4, zmm4, zmm",
            $c4,
            "\n",
            $last,
            " zmm5, zmm5, zmm",
            $c5,
            "\n",
            $last,
            " zmm6, zmm6, zmm",
            $c6,
            "\n",
            $last,
            " zmm7, zmm7, zmm",
            $c7,
            "\n",
            "vmovdqu64 [{dst} + 0], zmm0\n",
            "vmovdqu64 [{dst} + 64], zmm1\n",
            "vmovdqu64 [{dst} + 128], zmm2\n",
            "vmovdqu64 [{dst} + 192], zmm3\n",
            "vmovdqu64 [{dst} + 256], zmm4\n",
            "vmovdqu64 [{dst} + 320], zmm5\n",
            "vmovdqu64 [{dst} + 384], zmm6\n",
            "vmovdqu64 [{dst} + 448], zmm7\n",
        )
    };
}

/// Two chunks: the tweaks of the first lie in zmm8 to zmm15, those of the second in zmm16 to zmm23, and back.
macro_rules! chunk_here {
    ($op:literal, $last:literal, unit) => {
        chunk!($op, $last, from_tweak!(16), times_x4!(17, 16), [8 9 10 11 12 13 14 15], [16 17 18 19 20 21 22 23])
    };
    ($op:literal, $last:literal, step) => {
        chunk!(
            $op, $last, times_bytes!(16, 8, 4, 12), times_bytes!(17, 9, 4, 12),
            [8 9 10 11 12 13 14 15], [16 17 18 19 20 21 22 23]
        )
    };
}
macro_rules! chunk_there {
    ($op:literal, $last:literal, unit) => {
        chunk!($op, $last, from_tweak!(8), times_x4!(9, 8), [16 17 18 19 20 21 22 23], [8 9 10 11 12 13 14 15])
    };
    ($op:literal, $last:literal, step) => {
        chunk!(
            $op, $last, times_bytes!(8, 16, 4, 12), times_bytes!(9, 17, 4, 12),
            [16 17 18 19 20 21 22 23], [8 9 10 11 12 13 14 15]
        )
    };
}

/// The whole loop over `pairs` of chunks. In: tweak of the first chunk at `next` less 16; out: everything else clobbered.
macro_rules! run_pairs {
    ($op:literal, $last:literal, $how:ident, $keys:expr, $src:expr, $dst:expr, $next:expr, $count:expr, $c:expr, $advance:literal) => {
        asm!(
            // Tweaks of the first chunk.
            from_tweak!(8),
            times_x4!(9, 8),
            times_bytes!(10, 8, 1, 15),
            times_bytes!(11, 9, 1, 15),
            times_bytes!(12, 8, 2, 14),
            times_bytes!(13, 9, 2, 14),
            times_bytes!(14, 8, 3, 13),
            times_bytes!(15, 9, 3, 13),
            "2:",
            $advance,
            chunk_here!($op, $last, $how),
            "add {src}, 512",
            "add {dst}, 512",
            "dec {count}",
            "jz 3f",
            $advance,
            chunk_there!($op, $last, $how),
            "add {src}, 512",
            "add {dst}, 512",
            "dec {count}",
            "jnz 2b",
            "3:",
            keys = in(reg) $keys,
            src = inout(reg) $src => _,
            dst = inout(reg) $dst => _,
            next = inout(reg) $next => _,
            count = inout(reg) $count => _,
            in("zmm28") $c.polynomial,
            in("zmm29") $c.left,
            in("zmm30") $c.right,
            out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
            out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
            out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _, out("zmm16") _, out("zmm17") _,
            out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
            out("zmm24") _, out("zmm25") _, out("zmm26") _,
            options(nostack),
        )
    };
}

struct Constants {
    polynomial: __m512i,
    /// By how much each lane of a first register is multiplied, as shifts.
    left: __m512i,
    right: __m512i,
}

/// Encrypts or decrypts units of `chunks` half kilobytes; `step` is what a unit adds to the sector number.
///
/// # Safety
///
/// [`is_available`]; both pointers are valid for `units` units, equal or without overlap.
#[target_feature(enable = "aes,vaes,vpclmulqdq,avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) unsafe fn run(
    schedules: &Schedules,
    encrypt: bool,
    first_sector: u64,
    mut src: *const u8,
    mut dst: *mut u8,
    units: usize,
    chunks: usize,
) {
    let constants = Constants {
        polynomial: _mm512_set_epi64(0, 0x87, 0, 0x87, 0, 0x87, 0, 0x87),
        left: _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0),
        right: _mm512_set_epi64(61, 61, 62, 62, 63, 63, 64, 64),
    };
    let keys = schedules.data(encrypt);
    let mut tweaks = Tweaks([0; 16 * BATCH + WIDE]);
    let mut done = 0;
    while done < units {
        let batch = (units - done).min(BATCH);
        let step = chunks as u64;
        // SAFETY: the buffer has room for a batch.
        unsafe {
            encrypt_sectors(
                schedules.tweak(),
                first_sector.wrapping_add(done as u64 * step),
                step,
                &mut tweaks,
            )
        };
        if chunks == 1 {
            let next = tweaks.0.as_ptr();
            // SAFETY: `batch` chunks from src to dst; a tweak for each, and one more place that is read and not used.
            unsafe {
                if encrypt {
                    run_pairs!(
                        "vaesenc",
                        "vaesenclast",
                        unit,
                        keys,
                        src,
                        dst,
                        next,
                        batch,
                        constants,
                        "add {next}, 16"
                    );
                } else {
                    run_pairs!(
                        "vaesdec",
                        "vaesdeclast",
                        unit,
                        keys,
                        src,
                        dst,
                        next,
                        batch,
                        constants,
                        "add {next}, 16"
                    );
                }
                src = src.add(batch * CHUNK);
                dst = dst.add(batch * CHUNK);
            }
        } else {
            for unit in 0..batch {
                // SAFETY: `chunks` chunks of this unit, and its tweak.
                unsafe {
                    let next = tweaks.0.as_ptr().add(16 * unit);
                    if encrypt {
                        run_pairs!(
                            "vaesenc",
                            "vaesenclast",
                            step,
                            keys,
                            src,
                            dst,
                            next,
                            chunks,
                            constants,
                            ""
                        );
                    } else {
                        run_pairs!(
                            "vaesdec",
                            "vaesdeclast",
                            step,
                            keys,
                            src,
                            dst,
                            next,
                            chunks,
                            constants,
                            ""
                        );
                    }
                    src = src.add(chunks * CHUNK);
                    dst = dst.add(chunks * CHUNK);
                }
            }
        }
        done += batch;
    }
}

/// Sector numbers of a batch, encrypted with the tweak key.
///
/// # Safety
///
/// As [`run`]; `keys` is the tweak key's schedule.
#[inline]
#[target_feature(enable = "aes,vaes,avx512f")]
unsafe fn encrypt_sectors(keys: *const u8, first: u64, step: u64, tweaks: &mut Tweaks) {
    let (first, step) = (first.cast_signed(), step.cast_signed());
    let lanes = _mm512_set_epi64(
        0,
        step.wrapping_mul(3).wrapping_add(first),
        0,
        step.wrapping_mul(2).wrapping_add(first),
        0,
        step.wrapping_add(first),
        0,
        first,
    );
    // Only the low half of each block: the high one stays zero, as the number never carries into it.
    let four = step.wrapping_mul(4);
    let by = _mm512_set_epi64(0, four, 0, four, 0, four, 0, four);
    let two = _mm512_add_epi64(by, by);
    let blocks = [
        lanes,
        _mm512_add_epi64(lanes, by),
        _mm512_add_epi64(lanes, two),
        _mm512_add_epi64(_mm512_add_epi64(lanes, two), by),
    ];
    // SAFETY: reads the schedule, writes four registers to the buffer.
    unsafe {
        asm!(
            "vmovdqa64 zmm26, [{keys}]",
            "vpxorq zmm0, zmm0, zmm26",
            "vpxorq zmm1, zmm1, zmm26",
            "vpxorq zmm2, zmm2, zmm26",
            "vpxorq zmm3, zmm3, zmm26",
            "mov {left}, 13",
            "2:",
            "add {keys}, 64",
            "vmovdqa64 zmm26, [{keys}]",
            "vaesenc zmm0, zmm0, zmm26",
            "vaesenc zmm1, zmm1, zmm26",
            "vaesenc zmm2, zmm2, zmm26",
            "vaesenc zmm3, zmm3, zmm26",
            "dec {left}",
            "jnz 2b",
            "vmovdqa64 zmm26, [{keys} + 64]",
            "vaesenclast zmm0, zmm0, zmm26",
            "vaesenclast zmm1, zmm1, zmm26",
            "vaesenclast zmm2, zmm2, zmm26",
            "vaesenclast zmm3, zmm3, zmm26",
            "vmovdqa64 [{to}], zmm0",
            "vmovdqa64 [{to} + 64], zmm1",
            "vmovdqa64 [{to} + 128], zmm2",
            "vmovdqa64 [{to} + 192], zmm3",
            keys = inout(reg) keys => _,
            to = in(reg) tweaks.0.as_mut_ptr(),
            left = out(reg) _,
            inout("zmm0") blocks[0] => _,
            inout("zmm1") blocks[1] => _,
            inout("zmm2") blocks[2] => _,
            inout("zmm3") blocks[3] => _,
            out("zmm26") _,
            options(nostack),
        );
    }
}
