//! Reencryptions that cryptsetup began: from key to key they are accepted as what they are, all others refused.

mod tool;

use std::{
    fs::File,
    io::Read,
    path::Path,
    process::{Child, Stdio},
};

use tool::{CHEAP, Scratch, available, command, cryptsetup_does, luks_format, text};
use vmseal_luks::{Header, LuksError, inspect};

const UNFINISHED: &str = "accept (reencryption unfinished, needs the key)";

fn verdict(path: &Path, detached: bool) -> String {
    inspect(&mut File::open(path).unwrap(), Some(detached)).unwrap().to_string()
}

fn reencrypt(password: &Path, args: &[&str]) {
    let first = ["reencrypt", "--batch-mode", "--force-offline-reencrypt", "--key-file", text(password)];
    cryptsetup_does(&[&first[..], args].concat());
}

/// Ends a process as a crash would.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn reencryption_that_was_only_begun_is_accepted_as_such_and_not_served() {
    if !available("cryptsetup", "cryptsetup-bin") {
        return;
    }
    let folder = Scratch::new("reencrypt-begun");
    let password = folder.file("password", b"VMSEAL-TEST-SECRET-passphrase");
    for resilience in ["checksum", "journal", "none"] {
        let path = folder.sparse(resilience, 48 << 20);
        luks_format(&path, &password, &["--sector-size", "512"]);
        let more = ["--init-only", "--resilience", resilience, text(&path)];
        reencrypt(&password, &[&CHEAP[..], &more].concat());
        assert_eq!(verdict(&path, false), UNFINISHED, "{resilience}");
        let served = Header::read(&File::open(&path).unwrap(), false);
        assert!(matches!(served, Err(LuksError::Reencrypting)), "{served:?}");
    }
}

#[test]
fn reencryption_killed_half_way_is_accepted_as_such_until_it_is_finished() {
    if !available("cryptsetup", "cryptsetup-bin") {
        return;
    }
    let folder = Scratch::new("reencrypt-killed");
    let password = folder.file("password", b"VMSEAL-TEST-SECRET-passphrase");
    let path = folder.sparse("volume", 272 << 20);
    luks_format(&path, &password, &[]);
    let args = ["reencrypt", "--batch-mode", "--force-offline-reencrypt", "--key-file", text(&password)];
    let slow = ["--resilience", "journal", "--hotzone-size", "1M", text(&path)];
    let child =
        command("cryptsetup").args(args).args(CHEAP).args(slow).stdout(Stdio::null()).spawn().unwrap();
    let mut running = Killed(child);
    // Killed as soon as the header on disk shows that a part is done.
    while !is_half_way(&path) {
        assert_eq!(running.0.try_wait().unwrap(), None, "it ended before it was seen half-way");
    }
    drop(running);
    assert!(is_half_way(&path), "it was killed half-way");
    assert_eq!(verdict(&path, false), UNFINISHED);
    // Killed inside a hot zone, cryptsetup wants that zone recovered first; the volume is then still unfinished.
    cryptsetup_does(&["repair", "--batch-mode", "--key-file", text(&password), text(&path)]);
    assert_eq!(verdict(&path, false), UNFINISHED);
    reencrypt(&password, &["--resume-only", text(&path)]);
    assert_eq!(verdict(&path, false), "accept");
}

/// Whether the primary copy has a first segment of fixed size, as it has while a part is done and a part is not.
fn is_half_way(path: &Path) -> bool {
    let mut head = [0; 16 << 10];
    File::open(path).and_then(|mut file| file.read_exact(&mut head)).unwrap();
    let text = head[4096..].split(|&b| b == 0).next().unwrap_or(&[]);
    // It may be read in the middle of being written.
    let Ok(json) = serde_json::from_slice::<serde_json::Value>(text) else { return false };
    json["segments"]["0"]["size"].as_str().is_some_and(|size| size != "dynamic")
}

#[test]
fn decryption_and_encryption_in_place_are_refused() {
    if !available("cryptsetup", "cryptsetup-bin") {
        return;
    }
    let folder = Scratch::new("reencrypt-clear");
    let password = folder.file("password", b"VMSEAL-TEST-SECRET-passphrase");

    let data = folder.sparse("to-decrypt", 48 << 20);
    let header = folder.join("to-decrypt.luks");
    luks_format(&data, &password, &["--header", text(&header)]);
    assert_eq!(verdict(&header, true), "accept");
    reencrypt(&password, &["--decrypt", "--init-only", "--header", text(&header), text(&data)]);
    let said = verdict(&header, true);
    assert_eq!(said, "reject: keyslots.1.mode is 'decrypt': the volume would be partly in clear text");

    let clear = folder.sparse("to-encrypt", 64 << 20);
    let more = ["--encrypt", "--init-only", "--type", "luks2", "--reduce-device-size", "32M", text(&clear)];
    reencrypt(&password, &[&CHEAP[..], &more].concat());
    let said = verdict(&clear, false);
    assert!(said.starts_with("reject: "), "{said}");
}
