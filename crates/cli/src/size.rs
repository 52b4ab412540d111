//! Sizes as administrators write and read them. `10G` is 10 GiB, as for qemu-img; shown in binary units.

use std::{fmt, str::FromStr};

/// A size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

/// Why a text is no size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ParseSizeError {
    /// Neither a number of bytes nor a number with a unit.
    #[error("'{0}' is no size: write 10G, 512M, 1.5T or a number of bytes")]
    Form(String),
    /// `GB` means 1000³ to some and 1024³ to others.
    #[error("'{0}' could mean two sizes: write {1} or {1}iB for powers of 1024")]
    Ambiguous(String, String),
    /// Does not fit, or is no whole number of bytes.
    #[error("'{0}' is no whole number of bytes below 16 EiB")]
    Range(String),
}

const UNITS: [(char, u32); 6] = [('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50), ('E', 60)];

impl FromStr for Size {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, ParseSizeError> {
        let form = || ParseSizeError::Form(text.chars().take(40).collect());
        let range = || ParseSizeError::Range(text.to_owned());
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let shift = match unit {
            "" | "B" => 0,
            _ => {
                let first = unit.chars().next().map(|c| c.to_ascii_uppercase()).ok_or_else(form)?;
                let (_, shift) = UNITS.into_iter().find(|(letter, _)| *letter == first).ok_or_else(form)?;
                match &unit[1..] {
                    "" | "iB" => shift,
                    "B" | "b" => {
                        return Err(ParseSizeError::Ambiguous(text.to_owned(), format!("{number}{first}")));
                    }
                    _ => return Err(form()),
                }
            }
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || whole.len() > 20 || fraction.len() > 9 || number.ends_with('.') {
            return Err(form());
        }
        let digits: u128 = format!("{whole}{fraction}").parse().map_err(|_| form())?;
        let scaled = digits << shift;
        let divisor = 10u128.pow(fraction.len() as u32);
        if !scaled.is_multiple_of(divisor) {
            return Err(range());
        }
        u64::try_from(scaled / divisor).map(Size).map_err(|_| range())
    }
}

impl fmt::Display for Size {
    /// Three significant digits and a binary unit: `10 GiB`, `1.46 TiB`, `512 B`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((letter, shift)) = UNITS.into_iter().rev().find(|(_, shift)| self.0 >> shift != 0) else {
            return write!(f, "{} B", self.0);
        };
        let value = self.0 as f64 / (1u64 << shift) as f64;
        let exact = self.0 & ((1u64 << shift) - 1) == 0;
        match value {
            _ if exact => write!(f, "{value:.0} {letter}iB"),
            v if v < 10.0 => write!(f, "{v:.2} {letter}iB"),
            v if v < 100.0 => write!(f, "{v:.1} {letter}iB"),
            v => write!(f, "{v:.0} {letter}iB"),
        }
    }
}

/// A disk's size on the command line: `vda=10G`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TargetSize {
    /// Target device name.
    pub(crate) target: String,
    /// Its size.
    pub(crate) size: Size,
}

impl FromStr for TargetSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (target, size) = text
            .split_once('=')
            .filter(|(target, _)| !target.is_empty())
            .ok_or_else(|| format!("'{text}' is not TARGET=SIZE, such as vda=10G"))?;
        Ok(Self { target: target.to_owned(), size: size.parse().map_err(|e: ParseSizeError| e.to_string())? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_reads_binary_units_as_qemu_img_does() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("1K", 1024),
            ("10g", 10 << 30),
            ("10GiB", 10 << 30),
            ("1.5T", (1u64 << 40) + (1 << 39)),
            ("0.5K", 512),
            ("15.999999999E", 0),
        ] {
            match text.parse::<Size>() {
                Ok(size) => assert_eq!(size.0, bytes, "{text}"),
                Err(e) => assert!(bytes == 0 && matches!(e, ParseSizeError::Range(_)), "{text}: {e}"),
            }
        }
    }

    #[test]
    fn size_refuses_what_could_be_misread() {
        for bad in
            ["", "G", "10GB", "-1", "1..5G", "1.G", "10 G", "10X", "ten", "10GiBB", "16E", "1ä", "0.3K"]
        {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
        assert_eq!(
            "10GB".parse::<Size>().unwrap_err().to_string(),
            "'10GB' could mean two sizes: write 10G or 10GiB for powers of 1024"
        );
    }

    #[test]
    fn size_is_shown_with_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (10 << 30, "10 GiB"),
            ((10 << 30) + 1, "10.0 GiB"),
            (1_610_612_737, "1.50 GiB"),
            (u64::MAX, "16.0 EiB"),
            (700 << 20, "700 MiB"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }

    #[test]
    fn disk_size_needs_a_target() {
        assert_eq!("vda=1G".parse(), Ok(TargetSize { target: "vda".into(), size: Size(1 << 30) }));
        assert!("=1G".parse::<TargetSize>().is_err());
        assert!("1G".parse::<TargetSize>().is_err());
    }
}
