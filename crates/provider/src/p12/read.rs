//! Reads the file, which may come from anybody.
//!
//! Shape, algorithms and the sum of all iterations are judged first; only then is the password worked on, first for
//! the MAC, which covers everything that is decrypted, then for the safe. A file therefore costs its reader at most
//! [`MAX_ITERATIONS`] iterations and a few times its own size, which [`MAX_FILE_BYTES`] bounds.

use std::num::NonZeroU32;

use aws_lc_rs::{
    cipher::{AES_256, DecryptionContext, PaddedBlockDecryptingKey, UnboundCipherKey},
    hmac,
    iv::FixedLength,
};
use der::{
    AnyRef, Decode, ErrorKind, Tag, Tagged,
    asn1::{BmpString, ObjectIdentifier, SetOfVec},
};
use vmseal_keys::SecretBytes;
use zeroize::Zeroizing;

use super::{
    MAX_BAGS, MAX_FILE_BYTES, MAX_ITERATIONS, SecretBag,
    asn1::{
        AlgorithmIdentifier, Attribute, ContentInfo, EncryptedData, MacData, Pbes2Params, Pbkdf2Params, Pfx,
        SafeBag, SecretBagValue, oid,
    },
    kdf,
};
use crate::backup_error::BackupError;

/// The secret bags of a file.
///
/// # Errors
///
/// [`BackupError`] says whether the file is cut off, is something else, asks for too much work, or whether the
/// password is wrong.
pub(crate) fn read(file: &[u8], password: &str) -> Result<Vec<SecretBag>, BackupError> {
    if file.len() > MAX_FILE_BYTES {
        return Err(BackupError::TooLarge { bytes: file.len() });
    }
    let pfx = Pfx::from_der(file).map_err(outer_error)?;
    let sealed = Sealed::of(&pfx)?;
    sealed.check_mac(password)?;
    sealed.open(password)
}

/// A file whose shape, algorithms and iterations are acceptable; nothing in it is authenticated yet.
struct Sealed<'a> {
    auth_safe: &'a [u8],
    mac: &'a [u8],
    mac_salt: &'a [u8],
    mac_iterations: NonZeroU32,
    ciphertext: &'a [u8],
    iv: [u8; 16],
    salt: &'a [u8],
    iterations: NonZeroU32,
}

impl<'a> Sealed<'a> {
    fn of(pfx: &Pfx<'a>) -> Result<Self, BackupError> {
        if pfx.version != 3 {
            return Err(not("it is not PKCS#12 of version 3"));
        }
        let auth_safe =
            octets(&pfx.auth_safe, oid::DATA).ok_or(not("its integrity does not come from a password"))?;
        let mac = pfx.mac_data.as_ref().ok_or(not("it has no integrity code"))?;
        let safe = only_safe(auth_safe)?;
        let data: EncryptedData<'a> = decode(safe.content, "its safe is not EncryptedData")?;
        if data.version > 2 || data.content.content_type != oid::DATA {
            return Err(not("its safe holds something other than data"));
        }
        let pbes2 = pbes2(&data.content.algorithm)?;
        let pbkdf2 = pbkdf2(&pbes2.kdf)?;
        let (mac_iterations, iterations) = iterations(mac, &pbkdf2)?;
        Ok(Self {
            auth_safe,
            mac: mac_value(mac)?,
            mac_salt: mac.salt.as_bytes(),
            mac_iterations,
            ciphertext: data.content.ciphertext.as_bytes(),
            iv: iv(&pbes2.cipher)?,
            salt: pbkdf2.salt.value(),
            iterations,
        })
    }

    /// Constant-time in the code; a wrong password is noticed here.
    fn check_mac(&self, password: &str) -> Result<(), BackupError> {
        let key = kdf::mac_key(password, self.mac_salt, self.mac_iterations);
        hmac::verify(&key, self.auth_safe, self.mac).map_err(|_| BackupError::WrongPassword)
    }

    /// The bags. After the MAC: whoever made a file that fails here knew its password.
    fn open(&self, password: &str) -> Result<Vec<SecretBag>, BackupError> {
        let key = kdf::safe_key(password, self.salt, self.iterations);
        let key = PaddedBlockDecryptingKey::cbc_pkcs7(UnboundCipherKey::new(&AES_256, key.as_slice())?)?;
        let mut plain = Zeroizing::new(self.ciphertext.to_vec());
        let iv = DecryptionContext::Iv128(FixedLength::from(self.iv));
        let plain =
            key.decrypt(&mut plain, iv).map_err(|_| not("its safe does not decrypt under its password"))?;
        let bags = Vec::<SafeBag<'_>>::from_der(plain).map_err(|_| not("its safe does not hold bags"))?;
        if bags.is_empty() || bags.len() > MAX_BAGS {
            return Err(not("its safe holds no bag, or more than a backup may have"));
        }
        bags.iter().map(secret_bag).collect()
    }
}

/// The one safe, encrypted by password.
fn only_safe(auth_safe: &[u8]) -> Result<ContentInfo<'_>, BackupError> {
    let safes = Vec::<ContentInfo<'_>>::from_der(auth_safe).map_err(|_| not("it does not hold safes"))?;
    match <[ContentInfo<'_>; 1]>::try_from(safes) {
        Ok([safe]) if safe.content_type == oid::ENCRYPTED_DATA => Ok(safe),
        Ok(_) => Err(not("its safe is not encrypted by a password")),
        Err(_) => Err(not("it does not hold exactly one safe")),
    }
}

fn pbes2<'a>(algorithm: &AlgorithmIdentifier<'a>) -> Result<Pbes2Params<'a>, BackupError> {
    expect(algorithm, oid::PBES2, "encryption", "PBES2")?;
    decode(parameters(algorithm)?, "it has bad encryption parameters")
}

fn pbkdf2<'a>(algorithm: &AlgorithmIdentifier<'a>) -> Result<Pbkdf2Params<'a>, BackupError> {
    expect(algorithm, oid::PBKDF2, "key derivation", "PBKDF2")?;
    let params: Pbkdf2Params<'a> = decode(parameters(algorithm)?, "it has bad key derivation parameters")?;
    match &params.prf {
        Some(prf) => expect(prf, oid::HMAC_SHA_256, "key derivation function", "HMAC-SHA-256")?,
        None => {
            let (what, expected) = ("key derivation function", "HMAC-SHA-256");
            return Err(BackupError::Unsupported { what, oid: "HMAC-SHA-1 (by default)".into(), expected });
        }
    }
    if params.salt.tag() != Tag::OctetString || params.key_bytes.is_some_and(|n| n != 32) {
        return Err(not("it has bad key derivation parameters"));
    }
    Ok(params)
}

fn iv(algorithm: &AlgorithmIdentifier<'_>) -> Result<[u8; 16], BackupError> {
    expect(algorithm, oid::AES_256_CBC, "cipher", "AES-256-CBC")?;
    let iv = parameters(algorithm)?;
    let bytes = (iv.tag() == Tag::OctetString).then(|| iv.value().try_into().ok()).flatten();
    bytes.ok_or(not("its initialisation vector does not have 16 bytes"))
}

fn mac_value<'a>(mac: &MacData<'a>) -> Result<&'a [u8], BackupError> {
    expect(&mac.mac.algorithm, oid::SHA_256, "integrity code", "HMAC-SHA-256")?;
    Ok(mac.mac.digest.as_bytes())
}

/// Both counts, if neither is zero and their sum is bearable.
fn iterations(mac: &MacData<'_>, safe: &Pbkdf2Params<'_>) -> Result<(NonZeroU32, NonZeroU32), BackupError> {
    let sum = mac.iterations.saturating_add(safe.iterations);
    if sum > MAX_ITERATIONS {
        return Err(BackupError::TooManyIterations { iterations: sum });
    }
    let count = |n: u64| u32::try_from(n).ok().and_then(NonZeroU32::new);
    count(mac.iterations).zip(count(safe.iterations)).ok_or(not("it asks for no iteration of key derivation"))
}

fn secret_bag(bag: &SafeBag<'_>) -> Result<SecretBag, BackupError> {
    if bag.bag_id != oid::SECRET_BAG {
        return Err(not("it holds a bag that is no secret bag: a certificate or a private key"));
    }
    let value: SecretBagValue<'_> = decode(bag.value, "it has a bad secret bag")?;
    if value.secret_type != oid::DATA || value.secret.tag() != Tag::OctetString {
        return Err(not("its secret is not plain data"));
    }
    let bytes: &[u8; 32] =
        value.secret.value().try_into().map_err(|_| not("its secret does not have 32 bytes"))?;
    let mut secret = SecretBytes::try_zeroed()?;
    secret.expose_mut().copy_from_slice(bytes);
    let no_attributes = SetOfVec::new();
    let attributes = bag.attributes.as_ref().unwrap_or(&no_attributes);
    Ok(SecretBag {
        secret,
        friendly_name: friendly_name(attributes).ok_or(not("its bag has no friendlyName"))?,
        local_key_id: local_key_id(attributes).ok_or(not("its bag has no localKeyID"))?,
    })
}

fn friendly_name(attributes: &SetOfVec<Attribute>) -> Option<String> {
    let value = only_value(attributes, oid::FRIENDLY_NAME)?;
    Some(value.decode_as::<BmpString>().ok()?.chars().collect())
}

fn local_key_id(attributes: &SetOfVec<Attribute>) -> Option<Vec<u8>> {
    let value = only_value(attributes, oid::LOCAL_KEY_ID)?;
    (value.tag() == Tag::OctetString).then(|| value.value().to_vec())
}

/// The value of an attribute that is there once, with one value.
fn only_value(attributes: &SetOfVec<Attribute>, oid: ObjectIdentifier) -> Option<AnyRef<'_>> {
    let mut found = attributes.iter().filter(|attribute| attribute.oid == oid);
    let attribute = found.next()?;
    let value = attribute.values.get(0)?;
    (found.next().is_none() && attribute.values.len() == 1).then(|| value.to_ref())
}

fn expect(
    algorithm: &AlgorithmIdentifier<'_>,
    right: ObjectIdentifier,
    what: &'static str,
    expected: &'static str,
) -> Result<(), BackupError> {
    if algorithm.oid == right {
        return Ok(());
    }
    Err(BackupError::Unsupported { what, oid: algorithm.oid.to_string(), expected })
}

fn parameters<'a>(algorithm: &AlgorithmIdentifier<'a>) -> Result<AnyRef<'a>, BackupError> {
    algorithm.parameters.ok_or(not("an algorithm has no parameters"))
}

fn octets<'a>(info: &ContentInfo<'a>, content_type: ObjectIdentifier) -> Option<&'a [u8]> {
    let right = info.content_type == content_type && info.content.tag() == Tag::OctetString;
    right.then(|| info.content.value())
}

fn decode<'a, T: der::DecodeValue<'a, Error = der::Error> + der::FixedTag + 'a>(
    any: AnyRef<'a>,
    why: &'static str,
) -> Result<T, BackupError> {
    any.decode_as::<T>().map_err(|_| not(why))
}

fn outer_error(error: der::Error) -> BackupError {
    match error.kind() {
        ErrorKind::Incomplete { .. } => BackupError::Truncated,
        ErrorKind::TrailingData { .. } => not("bytes follow its end"),
        _ => not("it is not PKCS#12 in DER"),
    }
}

fn not(why: &'static str) -> BackupError {
    BackupError::NotABackup { why }
}
