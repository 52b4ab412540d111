//! Writes the file.

use std::num::NonZeroU32;

use aws_lc_rs::{
    cipher::{AES_256, DecryptionContext, PaddedBlockEncryptingKey, UnboundCipherKey},
    error::Unspecified,
    hmac,
    iv::FixedLength,
};
use der::{
    Any, AnyRef, Decode, Encode, Tag,
    asn1::{BmpString, Null, ObjectIdentifier, OctetStringRef, SetOfVec},
};
use vmseal_keys::random_bytes;
use zeroize::Zeroizing;

use super::{
    Cost, SecretBagRef,
    asn1::{
        AlgorithmIdentifier, Attribute, ContentInfo, DigestInfo, EncryptedContentInfo, EncryptedData,
        MacData, Pbes2Params, Pbkdf2Params, Pfx, SafeBag, SecretBagValue, oid,
    },
    kdf,
};
use crate::backup_error::BackupError;

/// Bytes of both salts.
const SALT_LEN: usize = 32;
/// Bytes of a block of AES, which is the most that padding adds.
const BLOCK: usize = 16;
/// Why encoding cannot fail.
const ENCODES: &str = "every field is bounded and of the type its place wants";

/// The bags as a PKCS#12 file under `password`, which the caller has judged.
///
/// # Errors
///
/// Only what want of memory or randomness brings.
pub(crate) fn write(bags: &[SecretBagRef<'_>], password: &str, cost: Cost) -> Result<Vec<u8>, BackupError> {
    let pbes2_iterations = NonZeroU32::new(cost.pbes2).expect("a cost is not zero");
    let mac_iterations = NonZeroU32::new(cost.mac).expect("a cost is not zero");

    let mut safe = safe_contents(bags);
    let salt: [u8; SALT_LEN] = random_bytes()?;
    let iv = encrypt(&kdf::safe_key(password, &salt, pbes2_iterations), &mut safe)?;
    let auth_safe = authenticated_safe(&safe, &salt, pbes2_iterations, iv.as_ref());

    let mac_salt: [u8; SALT_LEN] = random_bytes()?;
    let tag = hmac::sign(&kdf::mac_key(password, &mac_salt, mac_iterations), &auth_safe);
    let pfx = Pfx {
        version: 3,
        auth_safe: ContentInfo { content_type: oid::DATA, content: octets(&auth_safe) },
        mac_data: Some(MacData {
            mac: DigestInfo { algorithm: with_null(oid::SHA_256), digest: octet_string(tag.as_ref()) },
            salt: octet_string(&mac_salt),
            iterations: mac_iterations.get().into(),
        }),
    };
    Ok(pfx.to_der().expect(ENCODES))
}

/// `SafeContents`: the plaintext of the safe.
fn safe_contents(bags: &[SecretBagRef<'_>]) -> Zeroizing<Vec<u8>> {
    let values: Vec<_> = bags
        .iter()
        .map(|bag| encode(&SecretBagValue { secret_type: oid::DATA, secret: octets(bag.secret) }))
        .collect();
    let safe: Vec<SafeBag<'_>> = bags
        .iter()
        .zip(&values)
        .map(|(bag, value)| SafeBag {
            bag_id: oid::SECRET_BAG,
            value: AnyRef::from_der(value).expect(ENCODES),
            attributes: Some(attributes(bag)),
        })
        .collect();
    encode(&safe)
}

fn attributes(bag: &SecretBagRef<'_>) -> SetOfVec<Attribute> {
    let name = BmpString::from_utf8(&bag.friendly_name).expect("a provider's name is ASCII");
    let one = |oid, tag, bytes: &[u8]| {
        let value = Any::new(tag, bytes).expect(ENCODES);
        Attribute { oid, values: SetOfVec::from_iter([value]).expect(ENCODES) }
    };
    SetOfVec::from_iter([
        one(oid::FRIENDLY_NAME, Tag::BmpString, name.as_bytes()),
        one(oid::LOCAL_KEY_ID, Tag::OctetString, &bag.local_key_id),
    ])
    .expect(ENCODES)
}

/// `AuthenticatedSafe`: the one encrypted safe.
fn authenticated_safe(ciphertext: &[u8], salt: &[u8], iterations: NonZeroU32, iv: &[u8]) -> Vec<u8> {
    let any = |bytes: &[u8]| Any::from_der(bytes).expect(ENCODES);
    let kdf = Pbkdf2Params {
        salt: octets(salt),
        iterations: iterations.get().into(),
        key_bytes: Some(32),
        prf: Some(with_null(oid::HMAC_SHA_256)),
    };
    let kdf = any(&encode(&kdf));
    let pbes2 = Pbes2Params {
        kdf: AlgorithmIdentifier { oid: oid::PBKDF2, parameters: Some((&kdf).into()) },
        cipher: AlgorithmIdentifier { oid: oid::AES_256_CBC, parameters: Some(octets(iv)) },
    };
    let pbes2 = any(&encode(&pbes2));
    let data = EncryptedData {
        version: 0,
        content: EncryptedContentInfo {
            content_type: oid::DATA,
            algorithm: AlgorithmIdentifier { oid: oid::PBES2, parameters: Some((&pbes2).into()) },
            ciphertext: octet_string(ciphertext),
        },
    };
    let data = any(&encode(&data));
    let safes = vec![ContentInfo { content_type: oid::ENCRYPTED_DATA, content: (&data).into() }];
    safes.to_der().expect(ENCODES)
}

/// AES-256-CBC with PKCS#7 padding, in place; the IV is random.
fn encrypt(key: &[u8; 32], safe: &mut Zeroizing<Vec<u8>>) -> Result<FixedLength<BLOCK>, Unspecified> {
    let key = PaddedBlockEncryptingKey::cbc_pkcs7(UnboundCipherKey::new(&AES_256, key)?)?;
    match key.encrypt(&mut **safe)? {
        DecryptionContext::Iv128(iv) => Ok(iv),
        _ => Err(Unspecified),
    }
}

/// DER in a buffer that zeroes itself and has room for the padding, so that growing leaves no copy behind.
fn encode(value: &impl Encode) -> Zeroizing<Vec<u8>> {
    let len = value.encoded_len().and_then(usize::try_from).expect(ENCODES);
    let mut out = Zeroizing::new(Vec::with_capacity(len + BLOCK));
    out.resize(len, 0);
    value.encode_to_slice(&mut out).expect(ENCODES);
    out
}

fn octets(bytes: &[u8]) -> AnyRef<'_> {
    AnyRef::new(Tag::OctetString, bytes).expect(ENCODES)
}

fn octet_string(bytes: &[u8]) -> &OctetStringRef {
    OctetStringRef::new(bytes).expect(ENCODES)
}

/// An algorithm with NULL as its parameters, as RFC 8018 §B.1.2 and RFC 8017 §A.2.4 want them.
fn with_null(oid: ObjectIdentifier) -> AlgorithmIdentifier<'static> {
    AlgorithmIdentifier { oid, parameters: Some(Null.into()) }
}
