//! Metadata edited anywhere, with the checksum right: no panic, and nothing accepted but encryption as we serve it.

mod sealed;

use proptest::prelude::*;
use sealed::Volume;
use serde_json::{Value, json};
use vmseal_keys::Dek;
use vmseal_luks::{Geometry, VmsealToken, create, inspect};
use vmseal_model::id::DiskId;

/// The JSON of a header made here, with a keyslot in the shape of one, so that every part there can be is edited.
fn metadata() -> Value {
    let dek = Dek::generate().unwrap();
    let token = VmsealToken { records: vec![vec![5; 30]] };
    let bytes = create(&dek, DiskId::from_bytes([6; 16]), &Geometry::attached(512), &token).unwrap();
    let text = bytes[4096..].split(|&b| b == 0).next().unwrap();
    let mut json: Value = serde_json::from_slice(text).unwrap();
    json["keyslots"]["0"] = json!({"type": "luks2", "key_size": 64,
        "af": {"type": "luks1", "stripes": 4000, "hash": "sha256"},
        "area": {"type": "raw", "offset": "131072", "size": "258048", "encryption": "aes-xts-plain64",
            "key_size": 64},
        "kdf": {"type": "pbkdf2", "hash": "sha256", "iterations": 1000,
            "salt": "Y3etMHvBpC4hpTCTWlcI13H4zyaBfXjSbJsXrU5vwf4="}});
    json["digests"]["0"]["keyslots"] = json!(["0"]);
    json
}

/// All places in a tree, as JSON pointers.
fn places(value: &Value, at: &str, out: &mut Vec<String>) {
    out.push(at.to_owned());
    match value {
        Value::Object(members) => members.iter().for_each(|(key, v)| places(v, &format!("{at}/{key}"), out)),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(n, v)| places(v, &format!("{at}/{n}"), out));
        }
        _ => {}
    }
}

fn all_places() -> Vec<String> {
    let mut out = Vec::new();
    places(&metadata(), "", &mut out);
    out
}

/// Values that are wrong, extreme, or right elsewhere.
fn values() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!(true)),
        Just(json!([])),
        Just(json!({})),
        Just(json!(-1)),
        Just(json!(1.5)),
        Just(json!("dynamic")),
        Just(json!("linear")),
        Just(json!("reencrypt")),
        Just(json!("cipher_null-ecb")),
        Just(json!("18446744073709551615")),
        Just(json!("9223372036854775808")),
        Just(json!(["0", "0"])),
        Just(json!(["4294967296"])),
        any::<u64>().prop_map(|n| json!(n)),
        any::<u64>().prop_map(|n| json!(n.to_string())),
        ".{0,12}".prop_map(|text| json!(text)),
    ]
}

fn verdict_of(json: &[u8]) -> vmseal_luks::Verdict {
    let bytes = sealed::header(json, 64 << 10, 3);
    inspect(&mut Volume::new(bytes, 32 << 20), Some(false)).unwrap()
}

#[test]
fn unedited_metadata_is_accepted() {
    assert_eq!(verdict_of(metadata().to_string().as_bytes()).to_string(), "accept");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn edited_metadata_is_refused_or_still_what_we_serve(
        edits in proptest::collection::vec((proptest::sample::select(all_places()), values(), any::<bool>()), 1..4)
    ) {
        let mut json = metadata();
        for (at, value, remove) in &edits {
            let (parent, key) = at.rsplit_once('/').unwrap_or(("", ""));
            match json.pointer_mut(parent) {
                Some(Value::Object(members)) if *remove => { members.remove(key); }
                _ => if let Some(place) = json.pointer_mut(at) { *place = value.clone(); }
            }
        }
        let verdict = verdict_of(json.to_string().as_bytes());
        prop_assert!(!verdict.to_string().contains('\u{1b}'), "an escape sequence reaches the terminal");
        if let (true, Some(header)) = (verdict.accepted(), verdict.description()) {
            prop_assert_eq!(header.segments.len(), 1);
            prop_assert!(header.segments[0].starts_with("0: crypt, aes-xts-plain64, units of "), "{:?}", header);
            let _ = header.to_string();
        }
    }

    #[test]
    fn text_edited_at_any_byte_gets_a_verdict(
        at in 0usize..2000, bytes in proptest::collection::vec(any::<u8>(), 0..6), cut in 0usize..6
    ) {
        let mut text = metadata().to_string().into_bytes();
        let at = at.min(text.len());
        let end = (at + cut).min(text.len());
        text.splice(at..end, bytes);
        let _ = verdict_of(&text).to_string();
    }
}
