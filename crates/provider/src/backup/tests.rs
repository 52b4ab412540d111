//! Round trips, what is refused, and stock openssl as the other reader and the other writer.

use super::*;
use crate::fixture::{NOW_MS, PASSWORD, Scratch, hex, kdk_bytes, provider, run};

/// What `openssl pkcs12 -nodes` prints of a file, or `None` if it refuses.
fn openssl_prints(file: &[u8], password: &str) -> Option<String> {
    let scratch = Scratch::new();
    let path = scratch.file("backup.p12", file);
    let path = path.to_str().unwrap();
    let out = run("openssl", &["pkcs12", "-in", path, "-nodes", "-passin", "stdin"], password.as_bytes());
    let text = String::from_utf8(out.stdout).unwrap() + &String::from_utf8_lossy(&out.stderr);
    out.status.success().then_some(text)
}

/// The secrets in openssl's print, as plain hex.
fn printed_secrets(text: &str) -> Vec<String> {
    let hex_line = |line: &&str| line.len() > 80 && line.chars().all(|c| c.is_ascii_hexdigit() || c == ' ');
    let lines = text.lines().map(|line| line.trim_start_matches("Bag Value: ").trim());
    lines.filter(hex_line).map(|line| line.replace(' ', "").to_lowercase()).collect()
}

#[test]
fn pkcs12_backup_gives_its_keys_to_stock_openssl_at_full_cost() {
    let provider = provider(2);
    let file = export(&provider, PASSWORD, NOW_MS).unwrap();
    let text = openssl_prints(&file, PASSWORD).expect("openssl opens the backup");
    assert_eq!(printed_secrets(&text), [hex(&kdk_bytes(1)), hex(&kdk_bytes(2))], "{text}");
    for generation in [1, 2] {
        let name = format!(
            "friendlyName: main generation {generation} provider 1b4e28ba-2fa1-41d2-883f-0016d3cca427 exported 2026-11-24T10:00:00Z"
        );
        assert!(text.contains(&name), "{text}");
        let id =
            format!("localKeyID: 1B 4E 28 BA 2F A1 41 D2 88 3F 00 16 D3 CC A4 27 0{generation} 00 00 00");
        assert!(text.contains(&id), "{text}");
    }
    let info = {
        let scratch = Scratch::new();
        let path = scratch.file("backup.p12", &file);
        run(
            "openssl",
            &["pkcs12", "-in", path.to_str().unwrap(), "-info", "-noout", "-passin", "stdin"],
            PASSWORD.as_bytes(),
        )
    };
    let info = String::from_utf8_lossy(&info.stderr).into_owned();
    assert!(info.contains("MAC: sha256, Iteration 1200000"), "{info}");
    assert!(info.contains("PBES2, PBKDF2, AES-256-CBC, Iteration 600000, PRF hmacWithSHA256"), "{info}");
    assert_eq!(import(&file, PASSWORD).unwrap().generations().len(), 2);
    assert!(matches!(import(&file, "VMSEAL-TEST-SECRET wrong"), Err(BackupError::WrongPassword)));
}
