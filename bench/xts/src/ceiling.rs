//! What the processor's AES units can do at most: fourteen rounds on eight independent registers, again and again,
//! without loads, tweaks or stores.

use vmseal_xts::Kernel;

/// The register width a kernel uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ceiling {
    Zmm,
    Ymm,
}

impl Ceiling {
    /// That of a kernel of ours, which this processor can run; aws-lc picks its own.
    pub(crate) fn of(kernel: Kernel) -> Option<Self> {
        match kernel {
            Kernel::Vaes512 => Some(Self::Zmm),
            Kernel::Vaes256 => Some(Self::Ymm),
            Kernel::AwsLc => None,
        }
    }

    /// As many rounds as that many bytes take.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn run(self, bytes: usize) {
        use std::arch::asm;

        macro_rules! rounds {
            ($register:literal, $count:expr) => {
                asm!(
                    "2:",
                    ".rept 14",
                    concat!("vaesenc ", $register, "mm0, ", $register, "mm0, ", $register, "mm8"),
                    concat!("vaesenc ", $register, "mm1, ", $register, "mm1, ", $register, "mm8"),
                    concat!("vaesenc ", $register, "mm2, ", $register, "mm2, ", $register, "mm8"),
                    concat!("vaesenc ", $register, "mm3, ", $register, "mm3, ", $register, "mm8"),
                    concat!("vaesenc ", $register, "mm4, ", $register, "mm4, ", $register, "mm8"),
                    concat!("vaesenc ", $register, "mm5, ", $register, "mm5, ", $register, "mm8"),
                    concat!("vaesenc ", $register, "mm6, ", $register, "mm6, ", $register, "mm8"),
                    concat!("vaesenc ", $register, "mm7, ", $register, "mm7, ", $register, "mm8"),
                    ".endr",
                    "dec {count}",
                    "jnz 2b",
                    "vzeroall",
                    count = inout(reg) $count => _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                    out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                    options(nomem, nostack),
                )
            };
        }
        // SAFETY: the kernel of this width is available, so its instructions are; counts are above 0.
        unsafe {
            match self {
                Self::Zmm => rounds!("z", bytes.div_ceil(8 * 64)),
                Self::Ymm => rounds!("y", bytes.div_ceil(8 * 32)),
            }
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn run(self, _: usize) {
        unreachable!("no kernel of ours runs here, so there is no ceiling");
    }
}
