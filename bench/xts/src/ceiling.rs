//! The most bytes a core can take through the 14 rounds of AES-256: eight independent 512-bit registers, no loads, no
//! tweaks, no stores.

use std::arch::{asm, x86_64::_mm512_setzero_si512};

/// Bytes of one pass through the eight registers.
pub(crate) const BYTES: usize = 512;

/// So many passes.
///
/// # Safety
///
/// The processor has VAES and AVX-512.
#[target_feature(enable = "avx512f,vaes")]
pub(crate) unsafe fn run(passes: usize) {
    let zero = _mm512_setzero_si512();
    // SAFETY: touches registers only.
    unsafe {
        asm!(
            "2:",
            ".rept 14",
            "vaesenc zmm0, zmm0, zmm8",
            "vaesenc zmm1, zmm1, zmm8",
            "vaesenc zmm2, zmm2, zmm8",
            "vaesenc zmm3, zmm3, zmm8",
            "vaesenc zmm4, zmm4, zmm8",
            "vaesenc zmm5, zmm5, zmm8",
            "vaesenc zmm6, zmm6, zmm8",
            "vaesenc zmm7, zmm7, zmm8",
            ".endr",
            "dec {passes}",
            "jnz 2b",
            passes = inout(reg) passes.max(1) => _,
            inout("zmm0") zero => _, inout("zmm1") zero => _, inout("zmm2") zero => _, inout("zmm3") zero => _,
            inout("zmm4") zero => _, inout("zmm5") zero => _, inout("zmm6") zero => _, inout("zmm7") zero => _,
            in("zmm8") zero,
            options(nomem, nostack),
        );
    }
}
