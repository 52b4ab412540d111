//! A reencryption that was begun is accepted only in the shape that libcryptsetup gives it, from key to key.
//!
//! The genuine metadata below is what cryptsetup 2.6.1 left when it was killed half-way; each fake changes one thing in
//! it, with the checksum right. The worst of them is CVE-2021-4122: "finish" a decryption that nobody asked for.

mod sealed;

use sealed::Volume;
use serde_json::{Value, json};
use vmseal_luks::inspect;

const VOLUME_BYTES: u64 = 400 << 20;

fn genuine() -> Value {
    let digest = |keyslot: &str, segments: Value| {
        json!({"type": "pbkdf2", "keyslots": [keyslot], "segments": segments, "hash": "sha256", "iterations": 1000,
            "salt": "duai1+AjdC9NSY5gOubovIsbfGRqVB/hZzTtvmDdgYc=",
            "digest": "KnCMml3E90LI0DSM/X3CLh2rrVSLYEvHWKf4iX7/RxE="})
    };
    let keyslot = |offset: &str| {
        json!({"type": "luks2", "key_size": 64, "af": {"type": "luks1", "stripes": 4000, "hash": "sha256"},
            "area": {"type": "raw", "offset": offset, "size": "258048", "encryption": "aes-xts-plain64",
                "key_size": 64},
            "kdf": {"type": "pbkdf2", "hash": "sha256", "iterations": 1000,
                "salt": "Y3etMHvBpC4hpTCTWlcI13H4zyaBfXjSbJsXrU5vwf4="}})
    };
    let segment = |offset: &str, size: &str, tweak: &str, flags: Value| {
        let mut segment = json!({"type": "crypt", "offset": offset, "size": size, "iv_tweak": tweak,
            "encryption": "aes-xts-plain64", "sector_size": 4096});
        if !flags.is_null() {
            segment["flags"] = flags;
        }
        segment
    };
    json!({
        "keyslots": {"0": keyslot("32768"), "1": keyslot("290816"),
            "2": {"area": {"offset": "548864", "size": "16228352", "type": "journal"}, "type": "reencrypt",
                "key_size": 1, "mode": "reencrypt", "direction": "forward", "priority": 0}},
        "tokens": {},
        "segments": {
            "0": segment("16777216", "9437184", "0", Value::Null),
            "1": segment("26214400", "dynamic", "18432", Value::Null),
            "2": segment("16777216", "dynamic", "0", json!(["backup-previous"])),
            "3": segment("16777216", "dynamic", "0", json!(["backup-final"]))},
        "digests": {"0": digest("0", json!(["1", "2"])), "1": digest("1", json!(["0", "3"])),
            "2": digest("2", json!([]))},
        "config": {"json_size": "12288", "keyslots_size": "16744448",
            "requirements": {"mandatory": ["online-reencrypt-v2"]}}
    })
}

fn verdict(json: &Value) -> String {
    let bytes = sealed::header(json.to_string().as_bytes(), 16 << 10, 9);
    inspect(&mut Volume::new(bytes, VOLUME_BYTES), Some(false)).unwrap().to_string()
}

/// Changes the genuine metadata at JSON pointers; `Null` removes.
fn changed(changes: &[(&str, Value)]) -> Value {
    let mut json = genuine();
    for (at, value) in changes {
        let (parent, key) = at.rsplit_once('/').expect("a pointer has a slash");
        let parent =
            json.pointer_mut(parent).expect("the parent is there").as_object_mut().expect("an object");
        if value.is_null() {
            assert!(parent.remove(key).is_some(), "{at} was there");
        } else {
            parent.insert(key.to_owned(), value.clone());
        }
    }
    json
}

const GENUINE: &str = "accept (reencryption unfinished, needs the key)";

#[test]
fn genuine_shapes_are_accepted() {
    assert_eq!(verdict(&genuine()), GENUINE);
    // Just begun: everything is still under the old key.
    let begun = [
        ("/segments/0/size", json!("dynamic")),
        ("/segments/1", genuine()["segments"]["2"].clone()),
        ("/segments/2", genuine()["segments"]["3"].clone()),
        ("/segments/3", Value::Null),
        ("/digests/0/segments", json!(["0", "1"])),
        ("/digests/1/segments", json!(["2"])),
    ];
    assert_eq!(verdict(&changed(&begun)), GENUINE);
    assert_eq!(verdict(&changed(&hot())), GENUINE);
    // Nothing done yet, the first piece is being written.
    let first_piece =
        [("/segments/0/flags", json!(["in-reencryption"])), ("/digests/0/segments", json!(["0", "1", "2"]))];
    assert_eq!(verdict(&changed(&first_piece)), GENUINE);
    // All done, and the backups not yet taken away.
    let done = [
        ("/segments/0/size", json!("dynamic")),
        ("/segments/1", genuine()["segments"]["2"].clone()),
        ("/segments/2", genuine()["segments"]["3"].clone()),
        ("/segments/3", Value::Null),
        ("/digests/0/segments", json!(["1"])),
        ("/digests/1/segments", json!(["0", "2"])),
    ];
    assert_eq!(verdict(&changed(&done)), GENUINE);
    // The same key with another unit: one digest vouches for all.
    let same_key = [
        ("/segments/0/sector_size", json!(512)),
        ("/segments/3/sector_size", json!(512)),
        ("/digests/0/segments", json!(["0", "1", "2", "3"])),
        ("/digests/1/segments", json!([])),
    ];
    assert_eq!(verdict(&changed(&same_key)), GENUINE);
    for resilience in ["checksum", "none"] {
        assert_eq!(verdict(&changed(&[("/keyslots/2/area/type", json!(resilience))])), GENUINE);
    }
}

/// A piece between done and not done is being written: both digests vouch for it.
fn hot() -> Vec<(&'static str, Value)> {
    vec![
        ("/segments/2", genuine()["segments"]["1"].clone()),
        ("/segments/2/offset", json!("30408704")),
        ("/segments/2/iv_tweak", json!("26624")),
        ("/segments/1/size", json!("4194304")),
        ("/segments/1/flags", json!(["in-reencryption"])),
        ("/segments/3", genuine()["segments"]["2"].clone()),
        ("/segments/4", genuine()["segments"]["3"].clone()),
        ("/digests/0/segments", json!(["1", "2", "3"])),
        ("/digests/1/segments", json!(["1", "0", "4"])),
    ]
}

#[test]
fn hot_piece_that_is_not_between_old_and_new_is_refused() {
    for (name, change) in [
        ("vouched for by the old key only", ("/digests/1/segments", json!(["0", "4"]))),
        ("vouched for by the new key only", ("/digests/0/segments", json!(["2", "3"]))),
        ("vouched for by the reencryption's own digest too", ("/digests/2/segments", json!(["1"]))),
        ("of another unit", ("/segments/1/sector_size", json!(512))),
        ("two of them", ("/segments/2/flags", json!(["in-reencryption"]))),
        ("before what is done", ("/keyslots/2/direction", json!("backward"))),
        ("with another cipher", ("/segments/1/encryption", json!("cipher_null-ecb"))),
    ] {
        let mut changes = hot();
        changes.push(change);
        let verdict = verdict(&changed(&changes));
        assert!(verdict.starts_with("reject: "), "{name}: {verdict}");
    }
}

#[test]
fn every_fake_is_refused() {
    let linear = |flags: Value| {
        let mut segment = json!({"type": "linear", "offset": "16777216", "size": "dynamic"});
        if !flags.is_null() {
            segment["flags"] = flags;
        }
        segment
    };
    let fakes: &[(&str, &[(&str, Value)])] = &[
        (
            "cve-2021-4122: decrypt to a linear segment",
            &[
                ("/keyslots/2/mode", json!("decrypt")),
                ("/segments/3", linear(json!(["backup-final"]))),
                ("/digests/1/segments", json!(["0"])),
            ],
        ),
        ("linear backup-final, mode left alone", &[("/segments/3", linear(json!(["backup-final"])))]),
        ("linear backup-previous", &[("/segments/2", linear(json!(["backup-previous"])))]),
        ("mode decrypt", &[("/keyslots/2/mode", json!("decrypt"))]),
        ("mode encrypt", &[("/keyslots/2/mode", json!("encrypt"))]),
        ("mode unknown", &[("/keyslots/2/mode", json!("rewind"))]),
        ("direction unknown", &[("/keyslots/2/direction", json!("sideways"))]),
        ("direction turned round", &[("/keyslots/2/direction", json!("backward"))]),
        ("key_size of the reencrypt slot", &[("/keyslots/2/key_size", json!(64))]),
        ("resilience with data shift", &[("/keyslots/2/area/type", json!("datashift"))]),
        ("no requirement", &[("/config/requirements", Value::Null)]),
        ("no requirement in the list", &[("/config/requirements/mandatory", json!([]))]),
        ("requirement without a digest", &[("/config/requirements/mandatory", json!(["online-reencrypt"]))]),
        ("requirement of decryption", &[("/config/requirements/mandatory", json!(["online-reencrypt-v3"]))]),
        (
            "a further requirement",
            &[("/config/requirements/mandatory", json!(["online-reencrypt-v2", "from-the-future"]))],
        ),
        (
            "requirement twice",
            &[("/config/requirements/mandatory", json!(["online-reencrypt-v2", "online-reencrypt-v2"]))],
        ),
        ("no reencrypt slot", &[("/keyslots/2", Value::Null), ("/digests/2", Value::Null)]),
        ("reencrypt slot without its digest", &[("/digests/2", Value::Null)]),
        (
            "reencrypt slot under the volume key's digest",
            &[("/digests/2", Value::Null), ("/digests/0/keyslots", json!(["0", "2"]))],
        ),
        ("reencrypt digest with a segment", &[("/digests/2/segments", json!(["0"]))]),
        (
            "two reencrypt slots",
            &[
                ("/keyslots/3", genuine()["keyslots"]["2"].clone()),
                ("/keyslots/2/area/size", json!("4096")),
                ("/keyslots/3/area/offset", json!("552960")),
                ("/keyslots/3/area/size", json!("4096")),
            ],
        ),
        ("no backup-final", &[("/segments/3", Value::Null), ("/digests/1/segments", json!(["0"]))]),
        ("backup-previous renamed", &[("/segments/2/flags", json!(["backup-final"]))]),
        ("backup moves data", &[("/segments/3/offset", json!("20971520"))]),
        ("backup of another size", &[("/segments/3/size", json!("4194304"))]),
        ("backup with a tweak", &[("/segments/3/iv_tweak", json!("8"))]),
        ("backup with two flags", &[("/segments/3/flags", json!(["backup-final", "in-reencryption"]))]),
        ("backup-final null cipher", &[("/segments/3/encryption", json!("cipher_null-ecb"))]),
        ("segment in use null cipher", &[("/segments/0/encryption", json!("cipher_null-ecb"))]),
        (
            "segment in use linear",
            &[("/segments/0", linear(Value::Null)), ("/segments/0/size", json!("9437184"))],
        ),
        ("gap between segments", &[("/segments/1/offset", json!("27262976"))]),
        ("tweak does not fit", &[("/segments/1/iv_tweak", json!("0"))]),
        ("tweak of the first segment", &[("/segments/0/iv_tweak", json!("8"))]),
        ("end is open in the middle", &[("/segments/0/size", json!("dynamic"))]),
        ("end is fixed", &[("/segments/1/size", json!("4194304"))]),
        ("sector size of neither side", &[("/segments/0/sector_size", json!(512))]),
        ("segment in use without digest", &[("/digests/1/segments", json!(["3"]))]),
        ("segment in use with two digests", &[("/digests/0/segments", json!(["0", "1", "2"]))]),
        (
            "segment under the reencrypt digest",
            &[("/digests/1/segments", json!(["3"])), ("/digests/2/segments", json!(["0"]))],
        ),
        (
            "both sides swapped",
            &[("/digests/0/segments", json!(["0", "2"])), ("/digests/1/segments", json!(["1", "3"]))],
        ),
        (
            "two segments hot",
            &[
                ("/segments/0/flags", json!(["in-reencryption"])),
                ("/segments/1/flags", json!(["in-reencryption"])),
            ],
        ),
        ("unknown flag", &[("/segments/0/flags", json!(["hot"]))]),
        ("volume key slot for a null cipher", &[("/keyslots/1/area/encryption", json!("cipher_null-ecb"))]),
        ("a further backup in clear", &[("/segments/4", linear(json!(["backup-moved-segment"])))]),
        (
            "backups only",
            &[
                ("/segments/0", genuine()["segments"]["2"].clone()),
                ("/segments/1", genuine()["segments"]["3"].clone()),
                ("/segments/2", Value::Null),
                ("/segments/3", Value::Null),
                ("/digests/0/segments", json!(["0"])),
                ("/digests/1/segments", json!(["1"])),
            ],
        ),
        (
            "two plain segments and no reencryption at all",
            &[
                ("/config/requirements", Value::Null),
                ("/keyslots/2", Value::Null),
                ("/digests/2", Value::Null),
                ("/segments/2", Value::Null),
                ("/segments/3", Value::Null),
                ("/digests/0/segments", json!(["1"])),
                ("/digests/1/segments", json!(["0"])),
            ],
        ),
    ];
    let taken: Vec<String> = fakes
        .iter()
        .map(|(name, changes)| (name, verdict(&changed(changes))))
        .filter(|(_, verdict)| !verdict.starts_with("reject: "))
        .map(|(name, verdict)| format!("{name}: {verdict}"))
        .collect();
    assert!(taken.is_empty(), "fakes were accepted:\n{}", taken.join("\n"));
    // The attack is named for what it is, and not refused for some other slip in the fake.
    assert_eq!(
        verdict(&changed(fakes[0].1)),
        "reject: keyslots.2.mode is 'decrypt': the volume would be partly in clear text"
    );
}
