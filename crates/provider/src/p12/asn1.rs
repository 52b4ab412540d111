//! The ASN.1 of RFC 7292 (PFX), RFC 5652 (ContentInfo, EncryptedData) and RFC 8018 (PBES2), in DER.
//!
//! Everything borrows from the bytes it was read from: a decoded secret lies where it was decrypted and nowhere else.
//! Types hold one level each, so no input makes the reader recurse.

use der::{
    Any, AnyRef, Sequence, ValueOrd,
    asn1::{ObjectIdentifier, OctetStringRef, SetOfVec},
};

/// Object identifiers, under their specifications' names.
pub(super) mod oid {
    use der::asn1::ObjectIdentifier;

    const fn oid(text: &str) -> ObjectIdentifier {
        ObjectIdentifier::new_unwrap(text)
    }

    pub(crate) const DATA: ObjectIdentifier = oid("1.2.840.113549.1.7.1");
    pub(crate) const ENCRYPTED_DATA: ObjectIdentifier = oid("1.2.840.113549.1.7.6");
    pub(crate) const SECRET_BAG: ObjectIdentifier = oid("1.2.840.113549.1.12.10.1.5");
    pub(crate) const FRIENDLY_NAME: ObjectIdentifier = oid("1.2.840.113549.1.9.20");
    pub(crate) const LOCAL_KEY_ID: ObjectIdentifier = oid("1.2.840.113549.1.9.21");
    pub(crate) const PBES2: ObjectIdentifier = oid("1.2.840.113549.1.5.13");
    pub(crate) const PBKDF2: ObjectIdentifier = oid("1.2.840.113549.1.5.12");
    pub(crate) const HMAC_SHA_256: ObjectIdentifier = oid("1.2.840.113549.2.9");
    pub(crate) const AES_256_CBC: ObjectIdentifier = oid("2.16.840.1.101.3.4.1.42");
    pub(crate) const SHA_256: ObjectIdentifier = oid("2.16.840.1.101.3.4.2.1");
}

/// `PFX`, RFC 7292 §4.
#[derive(Sequence)]
pub(super) struct Pfx<'a> {
    pub(super) version: u8,
    pub(super) auth_safe: ContentInfo<'a>,
    pub(super) mac_data: Option<MacData<'a>>,
}

/// `ContentInfo`, RFC 5652 §3.
#[derive(Sequence)]
pub(super) struct ContentInfo<'a> {
    pub(super) content_type: ObjectIdentifier,
    #[asn1(context_specific = "0", tag_mode = "EXPLICIT")]
    pub(super) content: AnyRef<'a>,
}

/// `MacData`, RFC 7292 §4.
#[derive(Sequence)]
pub(super) struct MacData<'a> {
    pub(super) mac: DigestInfo<'a>,
    pub(super) salt: &'a OctetStringRef,
    #[asn1(default = "one")]
    pub(super) iterations: u64,
}

fn one() -> u64 {
    1
}

/// `DigestInfo`, RFC 8017 §9.2.
#[derive(Sequence)]
pub(super) struct DigestInfo<'a> {
    pub(super) algorithm: AlgorithmIdentifier<'a>,
    pub(super) digest: &'a OctetStringRef,
}

/// `AlgorithmIdentifier`, RFC 5280 §4.1.1.2.
#[derive(Sequence)]
pub(super) struct AlgorithmIdentifier<'a> {
    pub(super) oid: ObjectIdentifier,
    pub(super) parameters: Option<AnyRef<'a>>,
}

/// `EncryptedData`, RFC 5652 §8.
#[derive(Sequence)]
pub(super) struct EncryptedData<'a> {
    pub(super) version: u8,
    pub(super) content: EncryptedContentInfo<'a>,
}

/// `EncryptedContentInfo`, RFC 5652 §6.1.
#[derive(Sequence)]
pub(super) struct EncryptedContentInfo<'a> {
    pub(super) content_type: ObjectIdentifier,
    pub(super) algorithm: AlgorithmIdentifier<'a>,
    #[asn1(context_specific = "0", tag_mode = "IMPLICIT")]
    pub(super) ciphertext: &'a OctetStringRef,
}

/// `PBES2-params`, RFC 8018 §A.4.
#[derive(Sequence)]
pub(super) struct Pbes2Params<'a> {
    pub(super) kdf: AlgorithmIdentifier<'a>,
    pub(super) cipher: AlgorithmIdentifier<'a>,
}

/// `PBKDF2-params`, RFC 8018 §A.2. An absent `prf` means HMAC-SHA-1, which is not read.
#[derive(Sequence)]
pub(super) struct Pbkdf2Params<'a> {
    pub(super) salt: AnyRef<'a>,
    pub(super) iterations: u64,
    pub(super) key_bytes: Option<u64>,
    pub(super) prf: Option<AlgorithmIdentifier<'a>>,
}

/// `SafeBag`, RFC 7292 §4.2.
#[derive(Sequence)]
pub(super) struct SafeBag<'a> {
    pub(super) bag_id: ObjectIdentifier,
    #[asn1(context_specific = "0", tag_mode = "EXPLICIT")]
    pub(super) value: AnyRef<'a>,
    pub(super) attributes: Option<SetOfVec<Attribute>>,
}

/// `SecretBag`, RFC 7292 §4.2.5.
#[derive(Sequence)]
pub(super) struct SecretBagValue<'a> {
    pub(super) secret_type: ObjectIdentifier,
    #[asn1(context_specific = "0", tag_mode = "EXPLICIT")]
    pub(super) secret: AnyRef<'a>,
}

/// `PKCS12Attribute`, RFC 7292 §4.2. Owned: attributes are not secret.
#[derive(Clone, Sequence, ValueOrd)]
pub(super) struct Attribute {
    pub(super) oid: ObjectIdentifier,
    pub(super) values: SetOfVec<Any>,
}
