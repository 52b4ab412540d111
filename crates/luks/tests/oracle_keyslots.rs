//! Keyslots, with cryptsetup as judge: it opens ours, and we open its own.

mod tool;

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
};

use tool::{Scratch, available, cryptsetup, cryptsetup_does, luks_format, text};
use vmseal_keys::{Dek, SecretBytes};
use vmseal_luks::{Geometry, HEADER_BYTES, Header, LuksError, VmsealToken, create};
use vmseal_model::id::DiskId;

fn dek(seed: u8) -> Dek {
    let mut payload = [0u8; 96];
    (seed..).zip(&mut payload).for_each(|(n, byte)| *byte = n);
    Dek::from_secret(SecretBytes::take_from(&mut payload))
}

fn volume(path: &Path, geometry: &Geometry) -> File {
    let token = VmsealToken { records: vec![b"record".to_vec()] };
    let header = create(&dek(1), DiskId::from_random([7; 16]), geometry, &token).unwrap();
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
    file.write_all_at(&header, 0).unwrap();
    file.set_len(HEADER_BYTES + (1 << 20)).unwrap();
    file
}

/// Whether cryptsetup opens a keyslot with a secret out of a file.
fn opens(secret: &Path, slot: u32, volume: &Path) -> bool {
    let slot = slot.to_string();
    let args = ["open", "--test-passphrase", "--key-slot", &slot, "--key-file", text(secret), text(volume)];
    cryptsetup(&args).status.success()
}

#[test]
fn keyslot_made_by_us_opens_with_stock_cryptsetup_and_gives_the_key() {
    if !available("cryptsetup", "cryptsetup-bin") {
        return;
    }
    let folder = Scratch::new("keyslots-ours");
    let secret = folder.file("secret", dek(1).slot_secret());
    let wrong = folder.file("wrong", dek(2).slot_secret());
    for (name, geometry) in [("attached", Geometry::attached(512)), ("detached", Geometry::detached(4096))] {
        let detached = geometry.payload_offset == 0;
        let path = folder.join(name);
        let file = volume(&path, &geometry);
        for slot in 0..2 {
            assert_eq!(Header::add_keyslot(&file, detached, &dek(1)).unwrap(), slot);
            assert!(opens(&secret, slot, &path), "{name}: keyslot {slot}");
            assert!(!opens(&wrong, slot, &path), "{name}: keyslot {slot} opens with another secret");
        }
        let key = folder.join(&format!("{name}-key"));
        let first = ["luksDump", "--dump-volume-key", "--batch-mode", "--key-file", text(&secret)];
        cryptsetup_does(&[&first[..], &["--volume-key-file", text(&key), text(&path)]].concat());
        assert_eq!(std::fs::read(&key).unwrap(), dek(1).data_key());
        let header = Header::read(&file, detached).unwrap();
        let opened = header.open_keyslot(&file, 1, dek(1).slot_secret()).unwrap();
        assert_eq!(opened.expose(), dek(1).data_key());
        assert!(header.token().is_some(), "the token stays");
    }
}

#[test]
fn keyslot_for_another_key_is_not_made() {
    let folder = Scratch::new("keyslots-other");
    let file = volume(&folder.join("volume"), &Geometry::attached(512));
    let refused = Header::add_keyslot(&file, false, &dek(2));
    assert!(matches!(refused, Err(LuksError::WrongKey)), "{refused:?}");
    assert!(Header::read(&file, false).unwrap().describe().keyslots.is_empty());
}

#[test]
fn keyslots_area_holds_as_many_keyslots_as_the_format_and_no_more() {
    let folder = Scratch::new("keyslots-full");
    let file = volume(&folder.join("volume"), &Geometry::attached(512));
    for slot in 0..32 {
        assert_eq!(Header::add_keyslot(&file, false, &dek(1)).unwrap(), slot);
    }
    let full = Header::add_keyslot(&file, false, &dek(1));
    assert!(matches!(full, Err(LuksError::Keyslot { .. })), "{full:?}");
    let header = Header::read(&file, false).unwrap();
    assert!(header.open_keyslot(&file, 31, dek(1).slot_secret()).is_ok());
    // A number in the middle that became free is used again, with its area.
    Header::remove_keyslot(&file, false, 5).unwrap();
    assert_eq!(Header::add_keyslot(&file, false, &dek(1)).unwrap(), 5);
}

#[test]
fn removed_keyslot_opens_no_more_and_its_area_is_noise() {
    if !available("cryptsetup", "cryptsetup-bin") {
        return;
    }
    let folder = Scratch::new("keyslots-removed");
    let secret = folder.file("secret", dek(1).slot_secret());
    let path = folder.join("volume");
    let file = volume(&path, &Geometry::attached(512));
    Header::add_keyslot(&file, false, &dek(1)).unwrap();
    let mut before = vec![0; 256_000];
    file.read_exact_at(&mut before, 128 << 10).unwrap();
    Header::remove_keyslot(&file, false, 0).unwrap();
    let mut after = vec![0; 256_000];
    file.read_exact_at(&mut after, 128 << 10).unwrap();
    assert!(before.chunks(512).zip(after.chunks(512)).all(|(a, b)| a != b), "old material is left");
    assert!(!opens(&secret, 0, &path));
    let header = Header::read(&file, false).unwrap();
    assert!(header.digest_matches(&dek(1)), "the digest stays");
    assert!(matches!(Header::remove_keyslot(&file, false, 0), Err(LuksError::Keyslot { slot: 0, .. })));
}

#[test]
fn keyslot_made_by_cryptsetup_opens_with_our_code() {
    if !available("cryptsetup", "cryptsetup-bin") {
        return;
    }
    let folder = Scratch::new("keyslots-theirs");
    let secret = b"VMSEAL-TEST-SECRET-passphrase";
    let password = folder.file("password", secret);
    let key = folder.file("key", dek(1).data_key());
    for hash in ["sha256", "sha512"] {
        let path = folder.sparse(hash, 32 << 20);
        luks_format(&path, &password, &["--hash", hash, "--volume-key-file", text(&key)]);
        let file = File::open(&path).unwrap();
        let header = Header::read(&file, false).unwrap();
        assert!(header.digest_matches(&dek(1)), "{hash}");
        assert_eq!(header.open_keyslot(&file, 0, secret).unwrap().expose(), dek(1).data_key(), "{hash}");
        let wrong = header.open_keyslot(&file, 0, b"another");
        assert!(matches!(wrong, Err(LuksError::WrongSecret { slot: 0 })), "{hash}: {wrong:?}");
        let none = header.open_keyslot(&file, 3, secret);
        assert!(matches!(none, Err(LuksError::Keyslot { slot: 3, .. })), "{hash}: {none:?}");
    }
}

#[test]
fn argon2_keyslot_is_left_to_cryptsetup() {
    if !available("cryptsetup", "cryptsetup-bin") {
        return;
    }
    let folder = Scratch::new("keyslots-argon2");
    let password = folder.file("password", b"VMSEAL-TEST-SECRET-passphrase");
    let path = folder.sparse("volume", 32 << 20);
    let first =
        ["luksFormat", "--batch-mode", "--type", "luks2", "--pbkdf", "argon2id", "--pbkdf-memory", "32"];
    let second = ["--pbkdf-force-iterations", "4", "--pbkdf-parallel", "1", "--key-file", text(&password)];
    cryptsetup_does(
        &[&first[..], &second, &["--cipher", "aes-xts-plain64", "--key-size", "512", text(&path)]].concat(),
    );
    let file = File::open(&path).unwrap();
    let said = Header::read(&file, false).unwrap().open_keyslot(&file, 0, b"x").unwrap_err().to_string();
    assert_eq!(said, "keyslot 0: its key derivation is not PBKDF2; open it with cryptsetup");
}
