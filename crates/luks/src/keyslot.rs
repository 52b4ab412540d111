//! Keyslots under the slot secret: for recovery by stock tools, and for a reencryption. At rest there need be none.
//!
//! In go a volume's file and its disk key, or a secret; out comes a keyslot of type `luks2` that cryptsetup opens with
//! `--key-file`, or the 64-byte key in secret memory. Argon2 is not computed here.

use std::{fs::File, io, os::unix::fs::FileExt};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Number;
use vmseal_keys::{Dek, SecretBytes, random_bytes};
use vmseal_xts::Cipher;

use crate::{
    af::{self, AfError, MATERIAL},
    digest,
    error::{Defect, LuksError},
    header::Header,
    json::Json,
    metadata::{Extent, Kdf, KeyslotKind, MAX_KEYSLOTS, Metadata},
    policy::{CIPHER, STRIPES},
    rewrite,
};

/// Bytes of a keyslot's area: the split key, up to the next multiple of 4096.
const AREA_BYTES: u64 = (MATERIAL as u64).next_multiple_of(4096);
const HASH: &str = "sha256";

impl Header {
    /// Adds a keyslot that the disk key's slot secret opens (its 32 raw bytes are the passphrase).
    ///
    /// The key material is on the disk before the metadata names it. Returns its number.
    ///
    /// # Errors
    ///
    /// [`LuksError::WrongKey`] if the header is for another key, [`LuksError::Keyslot`] if there is no room.
    pub fn add_keyslot(file: &File, detached: bool, dek: &Dek) -> Result<u32, LuksError> {
        let loaded = rewrite::load(file, detached)?;
        let header = Self::judge(loaded.metadata.clone())?;
        if !header.digest_matches(dek) {
            return Err(LuksError::WrongKey);
        }
        let metadata = &loaded.metadata;
        let (digest, _) = metadata.digest_of_segment(0).ok_or_else(|| missing("digests.0"))?;
        let free = |number: &u32| !metadata.keyslots.contains_key(number);
        let slot = (0..MAX_KEYSLOTS).find(free).ok_or_else(|| cannot(0, "all keyslots are taken"))?;
        let area = free_area(metadata).ok_or_else(|| cannot(slot, "the keyslots area is full"))?;
        let salt: [u8; 32] = random_bytes()?;
        let cipher = area_cipher(HASH, digest::ITERATIONS.into(), &salt, dek.slot_secret(), slot)?;
        let diffuser = af::hash(HASH).ok_or_else(|| cannot(slot, "no hash"))?;
        let mut material = af::split(dek.data_key(), diffuser, &cipher)?;
        material.resize(AREA_BYTES as usize, 0);
        rewrite::write_through(file, area.offset, &material).map_err(LuksError::io("write a keyslot"))?;
        let mut json = metadata.json.clone();
        let slots = json.object_mut("keyslots").ok_or_else(|| missing("keyslots"))?;
        slots.push((slot.to_string(), slot_json(area, &salt)));
        let of_digest =
            references(&mut json, "digests", digest).ok_or_else(|| missing("digests.keyslots"))?;
        of_digest.push(Json::text(slot.to_string()));
        rewrite::replace(file, &loaded, &json)?;
        Ok(slot)
    }

    /// Opens a keyslot and proves the key by the digest. `secret` is a passphrase as cryptsetup takes it.
    ///
    /// # Errors
    ///
    /// [`LuksError::WrongSecret`]; [`LuksError::Keyslot`] if there is none, or of a kind that is not opened here.
    pub fn open_keyslot(&self, file: &File, slot: u32, secret: &[u8]) -> Result<SecretBytes<64>, LuksError> {
        let cannot = |reason| cannot(slot, reason);
        let found = self.metadata.keyslots.get(&slot).ok_or_else(|| cannot("there is none"))?;
        let KeyslotKind::Luks2 { area_key_size, af_hash, kdf, .. } = &found.kind else {
            return Err(cannot("it is not of type luks2"));
        };
        if found.key_size != 64 || *area_key_size != 64 {
            return Err(cannot("its key has not 512 bits"));
        }
        let Kdf::Pbkdf2 { hash, iterations, salt } = kdf else {
            return Err(cannot("its key derivation is not PBKDF2; open it with cryptsetup"));
        };
        let diffuser = af::hash(af_hash).ok_or_else(|| cannot("its splitter's hash is not known here"))?;
        let cipher = area_cipher(hash, *iterations, salt, secret, slot)?;
        let mut material = Box::new([0; MATERIAL]);
        file.read_exact_at(&mut material[..], found.area.offset).map_err(LuksError::io("read a keyslot"))?;
        let key = af::merge(&material, diffuser, &cipher)?;
        if self.key_matches(key.expose()) { Ok(key) } else { Err(LuksError::WrongSecret { slot }) }
    }

    /// Removes a keyslot: its area is overwritten with random bytes first, then the metadata forgets it.
    ///
    /// # Errors
    ///
    /// [`LuksError::Keyslot`] if there is none.
    pub fn remove_keyslot(file: &File, detached: bool, slot: u32) -> Result<(), LuksError> {
        let loaded = rewrite::load(file, detached)?;
        let metadata = &Self::judge(loaded.metadata.clone())?.metadata;
        let found = metadata.keyslots.get(&slot).ok_or_else(|| cannot(slot, "there is none"))?;
        wipe(file, found.area).map_err(LuksError::io("wipe a keyslot"))?;
        let name = slot.to_string();
        let mut json = metadata.json.clone();
        let slots = json.object_mut("keyslots").ok_or_else(|| missing("keyslots"))?;
        slots.retain(|(number, _)| *number != name);
        let digests = metadata.digests.keys().map(|&number| ("digests", number));
        for (part, number) in digests.chain(metadata.tokens.keys().map(|&number| ("tokens", number))) {
            if let Some(list) = references(&mut json, part, number) {
                list.retain(|item| item.as_text() != Some(&name));
            }
        }
        // A digest of no keyslot and no segment proves nothing.
        if let Some(digests) = json.object_mut("digests") {
            let empty = |digest: &Json, list| digest.get(list).and_then(Json::as_list) == Some(&[]);
            digests.retain(|(_, digest)| !(empty(digest, "keyslots") && empty(digest, "segments")));
        }
        rewrite::replace(file, &loaded, &json)
    }
}

/// Overwrites an area with random bytes and waits for the disk.
fn wipe(file: &File, area: Extent) -> io::Result<()> {
    let end = area.offset + area.bytes;
    let mut at = area.offset;
    while at < end {
        let noise: [u8; 4096] = random_bytes().map_err(io::Error::other)?;
        let len = (end - at).min(noise.len() as u64);
        file.write_all_at(&noise[..len as usize], at)?;
        at += len;
    }
    file.sync_all()
}

/// A part that sound metadata always has.
fn missing(part: &str) -> LuksError {
    LuksError::Frozen(Defect::new(format!("{part} is missing")))
}

fn cannot(slot: u32, reason: &str) -> LuksError {
    LuksError::Keyslot { slot, reason: Defect::new(reason) }
}

/// The list `keyslots` of a digest or token.
fn references<'a>(json: &'a mut Json, part: &str, number: u32) -> Option<&'a mut Vec<Json>> {
    let members = json.object_mut(part)?;
    let (_, value) = members.iter_mut().find(|(name, _)| *name == number.to_string())?;
    let Json::Object(inner) = value else { return None };
    match inner.iter_mut().find(|(name, _)| name == "keyslots") {
        Some((_, Json::List(list))) => Some(list),
        _ => None,
    }
}

/// The first gap in the keyslots area that holds one more.
fn free_area(metadata: &Metadata) -> Option<Extent> {
    let mut taken: Vec<Extent> = metadata.keyslots.values().map(|slot| slot.area).collect();
    taken.sort_by_key(|area| area.offset);
    let end = metadata.area_offset() + metadata.keyslots_bytes;
    let mut at = metadata.area_offset();
    for area in taken.into_iter().chain([Extent { offset: end, bytes: 0 }]) {
        if area.offset.checked_sub(at).is_some_and(|gap| gap >= AREA_BYTES) {
            return Some(Extent { offset: at, bytes: AREA_BYTES });
        }
        at = (area.offset + area.bytes).next_multiple_of(4096);
    }
    None
}

/// The cipher of a keyslot's area, its key derived from the secret.
fn area_cipher(
    hash: &str,
    iterations: u64,
    salt: &[u8],
    secret: &[u8],
    slot: u32,
) -> Result<Cipher, LuksError> {
    let mut key = SecretBytes::<64>::try_zeroed()?;
    digest::derive(hash, iterations, salt, secret, key.expose_mut())
        .ok_or_else(|| cannot(slot, "its key derivation is not computed here"))?;
    Cipher::new(key.expose(), 512).map_err(LuksError::Cipher)
}

fn slot_json(area: Extent, salt: &[u8; 32]) -> Json {
    let number = |value: u64| Json::Number(Number::from(value));
    Json::object([
        ("type", Json::text("luks2")),
        ("key_size", number(64)),
        (
            "af",
            Json::object([
                ("type", Json::text("luks1")),
                ("stripes", number(STRIPES)),
                ("hash", Json::text(HASH)),
            ]),
        ),
        (
            "area",
            Json::object([
                ("type", Json::text("raw")),
                ("offset", Json::text(area.offset.to_string())),
                ("size", Json::text(area.bytes.to_string())),
                ("encryption", Json::text(CIPHER)),
                ("key_size", number(64)),
            ]),
        ),
        (
            "kdf",
            Json::object([
                ("type", Json::text("pbkdf2")),
                ("hash", Json::text(HASH)),
                ("iterations", number(digest::ITERATIONS.into())),
                ("salt", Json::text(STANDARD.encode(salt))),
            ]),
        ),
    ])
}

impl From<AfError> for LuksError {
    fn from(error: AfError) -> Self {
        match error {
            AfError::Secret(error) => Self::Secret(error),
            AfError::Cipher(error) => Self::Cipher(error),
        }
    }
}
