//! Ids of our own: random 128-bit values, written as UUIDs, never mixed up with one another.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not an id: 32 hexadecimal digits, with or without hyphens, are expected")]
pub struct ParseIdError {
    /// The text, shortened to 64 characters.
    pub text: String,
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 16]);

        impl $name {
            /// The id with exactly these bytes.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// An id from 16 random bytes; six bits are set so that tools see a version 4 UUID (RFC 9562 §5.4).
            pub const fn from_random(mut bytes: [u8; 16]) -> Self {
                bytes[6] = bytes[6] & 0x0f | 0x40;
                bytes[8] = bytes[8] & 0x3f | 0x80;
                Self(bytes)
            }

            /// The 16 raw bytes, as they stand in a key record.
            pub const fn to_bytes(self) -> [u8; 16] {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt_uuid(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "("))?;
                fmt_uuid(&self.0, f)?;
                f.write_str(")")
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                parse_uuid(text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

ids! {
    /// A virtual machine, under our own name for it. Bound to a libvirt UUID by the agent's store and the server.
    VmId;
    /// A disk; equal to the UUID in its LUKS2 header.
    DiskId;
    /// One key record. A record with another head has another id.
    RecordId;
    /// A host that runs an agent.
    HostId;
    /// A long operation.
    TaskId;
    /// A key provider, as it enters key derivation. Its id in records is its name.
    ProviderUuid;
    /// One KEK of the native provider.
    KeyUuid;
    /// libvirt's UUID of a domain.
    DomainUuid;
}

fn fmt_uuid(bytes: &[u8; 16], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for (i, byte) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            f.write_str("-")?;
        }
        write!(f, "{byte:02x}")?;
    }
    Ok(())
}

fn parse_uuid(text: &str) -> Result<[u8; 16], ParseIdError> {
    let wrong = || ParseIdError { text: text.chars().take(64).collect() };
    let mut bytes = [0u8; 16];
    let mut digits = 0usize;
    for c in text.chars() {
        if c == '-' {
            continue;
        }
        let digit = c.to_digit(16).ok_or_else(wrong)? as u8;
        let slot = bytes.get_mut(digits / 2).ok_or_else(wrong)?;
        *slot = *slot << 4 | digit;
        digits += 1;
    }
    if digits == 32 { Ok(bytes) } else { Err(wrong()) }
}

/// The id of a KEK within its provider: text for KMIP, generation ‖ key uuid (20 bytes) for the native provider.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KekId(Vec<u8>);

impl KekId {
    /// Longest accepted id in bytes.
    pub const MAX_LEN: usize = 1024;

    /// An id from its bytes as they stand in a record; `None` if empty or longer than [`KekId::MAX_LEN`].
    pub fn from_bytes(bytes: Vec<u8>) -> Option<Self> {
        (!bytes.is_empty() && bytes.len() <= Self::MAX_LEN).then_some(Self(bytes))
    }

    /// The native provider's id: KDK generation (u32, little-endian) ‖ key uuid.
    pub fn native(generation: u32, key: KeyUuid) -> Self {
        let mut bytes = generation.to_le_bytes().to_vec();
        bytes.extend_from_slice(&key.to_bytes());
        Self(bytes)
    }

    /// Generation and key uuid, if this has the shape of a native id.
    pub fn as_native(&self) -> Option<(u32, KeyUuid)> {
        let generation = u32::from_le_bytes(self.0.get(..4)?.try_into().ok()?);
        let key = self.0.get(4..)?.try_into().ok()?;
        Some((generation, KeyUuid::from_bytes(key)))
    }

    /// The bytes as they stand in a record.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for KekId {
    /// Native ids as `<key uuid>/g<generation>`, printable text as it is, all else as `hex:…`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((generation, key)) = self.as_native() {
            return write!(f, "{key}/g{generation}");
        }
        match std::str::from_utf8(&self.0) {
            Ok(text) if text.chars().all(|c| c.is_ascii_graphic()) => f.write_str(text),
            _ => {
                f.write_str("hex:")?;
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }
    }
}

impl fmt::Debug for KekId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KekId({self})")
    }
}

/// The name by which a key provider stands in records: 1 to 64 of `a-z A-Z 0-9 . _ -`, starting with a letter or digit.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct ProviderId(String);

/// Why a text is no provider name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is no provider name: 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit"
)]
pub struct ParseProviderIdError {
    /// The text, shortened to 80 characters, control characters escaped.
    pub text: String,
}

impl FromStr for ProviderId {
    type Err = ParseProviderIdError;
    fn from_str(text: &str) -> Result<Self, ParseProviderIdError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let good = (1..=64).contains(&text.len())
            && text.chars().all(plain)
            && text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(ParseProviderIdError { text: text.escape_debug().take(80).collect() })
        }
    }
}

impl ProviderId {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ProviderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ProviderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProviderId({})", self.0)
    }
}

impl<'de> Deserialize<'de> for ProviderId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_reads_back_with_and_without_hyphens() {
        let id = DiskId::from_bytes(*b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff");
        assert_eq!(id.to_string(), "00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!("00112233445566778899AABBCCDDEEFF".parse(), Ok(id));
        assert!("00112233445566778899aabbccddeef".parse::<DiskId>().is_err());
        assert!("00112233445566778899aabbccddeeff0".parse::<DiskId>().is_err());
        assert!("g0112233445566778899aabbccddeeff".parse::<DiskId>().is_err());
    }

    #[test]
    fn native_kek_id_keeps_generation_and_key() {
        let key = KeyUuid::from_random([7; 16]);
        let id = KekId::native(3, key);
        assert_eq!(id.as_native(), Some((3, key)));
        assert_eq!(id.to_string(), format!("{key}/g3"));
        assert_eq!(KekId::from_bytes(b"17".to_vec()).unwrap().to_string(), "17");
    }

    #[test]
    fn provider_name_refuses_what_could_confuse_a_path_or_a_log() {
        for bad in ["", "-a", "a b", "a/b", "a\n", "ä", &"x".repeat(65)] {
            assert!(bad.parse::<ProviderId>().is_err(), "{bad:?}");
        }
        assert!("main".parse::<ProviderId>().is_ok());
    }
}
