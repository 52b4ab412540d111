//! Keys are not cloned, compared with `==`, hashed, printed or serialised: the types do not allow it.
//!
//! An inherent constant whose bounds hold wins over one of a trait; so each question is answered by the compiler.

use std::{
    fmt::{Debug, Display, LowerHex},
    hash::Hash,
    marker::PhantomData,
};

use vmseal_keys::{Dek, HomeKey, Kdk, Kek, Opened, SecretBytes, SecretShare, SessionKey};

struct Probe<T>(PhantomData<T>);

macro_rules! questions {
    ($($name:ident: $bound:path, $fallback:ident;)*) => {$(
        impl<T: $bound> Probe<T> { const $name: bool = true; }
        trait $fallback { const $name: bool = false; }
        impl<T> $fallback for Probe<T> {}
    )*};
}

questions! {
    CLONE: Clone, NoClone;
    COPY: Copy, NoCopy;
    EQUAL: PartialEq, NoEqual;
    HASH: Hash, NoHash;
    DISPLAY: Display, NoDisplay;
    HEX: LowerHex, NoHex;
    SERIALIZE: serde::Serialize, NoSerialize;
    DEREF: std::ops::Deref, NoDeref;
    AS_BYTES: AsRef<[u8]>, NoAsBytes;
}

#[test]
fn keys_cannot_be_cloned_compared_hashed_shown_or_serialised() {
    macro_rules! key {
        ($($key:ty),* $(,)?) => {$(
            let answers = [
                ("Clone", Probe::<$key>::CLONE),
                ("Copy", Probe::<$key>::COPY),
                ("PartialEq", Probe::<$key>::EQUAL),
                ("Hash", Probe::<$key>::HASH),
                ("Display", Probe::<$key>::DISPLAY),
                ("LowerHex", Probe::<$key>::HEX),
                ("Serialize", Probe::<$key>::SERIALIZE),
                ("Deref", Probe::<$key>::DEREF),
                ("AsRef<[u8]>", Probe::<$key>::AS_BYTES),
            ];
            for (name, has) in answers {
                assert!(!has, "{} has {name}", stringify!($key));
            }
            has_what_keys_need::<$key>();
        )*};
    }
    fn has_what_keys_need<T: Debug + Send + Sync>() {}
    key!(Dek, HomeKey, Kek, Kdk, SessionKey, SecretBytes<32>, SecretShare, Opened<Dek>, Opened<HomeKey>);
}

#[test]
fn question_is_answered_yes_where_it_should_be() {
    let answers = [
        Probe::<Vec<u8>>::CLONE,
        Probe::<u8>::COPY,
        Probe::<Vec<u8>>::EQUAL,
        Probe::<Vec<u8>>::HASH,
        Probe::<u8>::DISPLAY,
        Probe::<u8>::HEX,
        Probe::<u8>::SERIALIZE,
        Probe::<Box<u8>>::DEREF,
        Probe::<[u8; 4]>::AS_BYTES,
    ];
    assert_eq!(answers, [true; 9]);
}
