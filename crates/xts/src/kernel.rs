//! Which code does the work, and which this processor can run.

use std::{fmt, str::FromStr};

/// An implementation of the cipher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Own code for VAES, VPCLMULQDQ and AVX-512.
    Vaes512,
    /// Own code for VAES and VPCLMULQDQ with AVX2.
    Vaes256,
    /// aws-lc: every other processor, and every one where a validated module is wanted.
    AwsLc,
}

impl Kernel {
    /// All, the fastest first.
    pub const ALL: [Self; 3] = [Self::Vaes512, Self::Vaes256, Self::AwsLc];

    /// Whether this processor, and this build, can run it.
    pub fn is_available(self) -> bool {
        match self {
            Self::AwsLc => true,
            #[cfg(all(target_arch = "x86_64", not(feature = "fips")))]
            own => crate::own::is_available(own),
            #[cfg(not(all(target_arch = "x86_64", not(feature = "fips"))))]
            _ => false,
        }
    }

    /// The fastest that is available.
    pub fn detected() -> Self {
        Self::ALL.into_iter().find(|kernel| kernel.is_available()).unwrap_or(Self::AwsLc)
    }
}

impl FromStr for Kernel {
    type Err = UnknownKernel;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let named = Self::ALL.into_iter().find(|kernel| kernel.to_string() == name);
        named.ok_or_else(|| UnknownKernel { name: name.into() })
    }
}

/// Not the name of a kernel.
#[derive(Debug, thiserror::Error)]
#[error("there is no kernel '{name}'; there are vaes-avx512, vaes-avx2 and aws-lc")]
pub struct UnknownKernel {
    name: String,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vaes512 => "vaes-avx512",
            Self::Vaes256 => "vaes-avx2",
            Self::AwsLc => "aws-lc",
        })
    }
}
