//! Checks that belong to the tree. `cargo xtask check-doors` reads the manifests against the drawing in
//! `docs/design/house.md`; `cargo xtask prepush` runs what CI runs before the tests.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

/// Doors open downwards, and only these.
const DOORS: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("xts", &[]),
    ("rbd", &["model"]),
    // It faces the network: no door leads to a key.
    ("nbd-tls", &[]),
    ("ublk", &["model"]),
    ("keys", &["model"]),
    ("luks", &["keys", "xts", "model"]),
    ("disk", &["luks", "xts", "keys", "model"]),
    ("provider", &["keys", "model"]),
    ("api", &["model"]),
    ("agent", &["api", "keys", "luks", "model"]),
    ("server", &["api", "provider", "keys", "model"]),
    ("cli", &["api", "provider", "luks", "keys", "model"]),
];

/// What the small binary that holds keys must not link.
const NOT_IN_DISK: &[&str] = &["tokio", "sqlx", "axum", "tonic", "hyper", "rustls"];

/// Rooms that may say `unsafe`: they call the kernel, SIMD or C.
const UNSAFE_ROOMS: &[&str] = &["keys", "xts", "disk", "agent", "rbd", "nbd-tls", "ublk"];

fn main() -> ExitCode {
    let found = match std::env::args().nth(1).as_deref() {
        Some("check-doors") => check_doors(),
        Some("prepush") => prepush(),
        _ => vec!["usage: cargo xtask check-doors | prepush".to_owned()],
    };
    for line in &found {
        eprintln!("xtask: {line}");
    }
    if found.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn tree() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn check_doors() -> Vec<String> {
    let mut found = Vec::new();
    let doors: BTreeMap<_, _> = DOORS.iter().copied().collect();
    for entry in fs::read_dir(tree().join("crates")).into_iter().flatten().flatten() {
        let room = entry.file_name().to_string_lossy().into_owned();
        let Some(allowed) = doors.get(room.as_str()) else {
            found.push(format!(
                "crates/{room} is not in the drawing: add its doors to xtask and docs/design/house.md"
            ));
            continue;
        };
        let manifest = read(&entry.path().join("Cargo.toml"));
        let manifest: toml::Table = match manifest.parse() {
            Ok(table) => table,
            Err(e) => {
                found.push(format!("crates/{room}/Cargo.toml does not parse: {e}"));
                continue;
            }
        };
        for table in ["dependencies", "build-dependencies"] {
            for name in manifest.get(table).and_then(|t| t.as_table()).into_iter().flat_map(|t| t.keys()) {
                if let Some(other) = name.strip_prefix("vmseal-")
                    && !allowed.contains(&other)
                {
                    found.push(format!(
                        "crates/{room} opens a door to {other}, which the drawing does not have"
                    ));
                }
                if room == "disk" && NOT_IN_DISK.contains(&name.as_str()) {
                    found.push(format!(
                        "crates/disk links {name}: keep it out of the process that holds keys"
                    ));
                }
            }
        }
        for file in rust_files(&entry.path().join("src")) {
            look_inside(&room, &file, &mut found);
        }
    }
    found
}

fn look_inside(room: &str, file: &Path, found: &mut Vec<String>) {
    let text = read(file);
    let shown = file.strip_prefix(tree()).unwrap_or(file).display().to_string();
    let name = file.file_name().unwrap_or_default();
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        let at = format!("{shown}:{}", number + 1);
        if room == "server" && has_word(code, "Dek") {
            found.push(format!("{at}: the server names Dek; no data key may come near it"));
        }
        if room == "server" && has_word(code, "Kek") && name != "broker.rs" {
            found.push(format!("{at}: Kek outside broker.rs"));
        }
        if !UNSAFE_ROOMS.contains(&room) && has_word(code, "unsafe") {
            found.push(format!("{at}: unsafe in a room that calls neither kernel, SIMD nor C"));
        }
    }
}

/// Whether a word stands alone in a line: `Dek`, not `DekId`.
fn has_word(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(part) && !line[at + word.len()..].starts_with(part))
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{} cannot be read: {e}", path.display()))
}

fn prepush() -> Vec<String> {
    let steps: &[&[&str]] = &[
        &["fmt", "--all", "--check"],
        &["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"],
        &["xtask", "check-doors"],
    ];
    steps
        .iter()
        .filter(|step| {
            !Command::new("cargo").args(**step).current_dir(tree()).status().is_ok_and(|s| s.success())
        })
        .map(|step| format!("`cargo {}` failed", step.join(" ")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_found_only_when_it_stands_alone() {
        assert!(has_word("let k: Dek = x;", "Dek"));
        assert!(has_word("Dek::generate()", "Dek"));
        assert!(!has_word("let k: DekId = x;", "Dek"));
        assert!(!has_word("SideDek", "Dek"));
    }

    #[test]
    fn doors_lead_down_only() {
        for (i, (room, doors)) in DOORS.iter().enumerate() {
            for door in *doors {
                assert!(DOORS[..i].iter().any(|(r, _)| r == door), "{room} → {door}");
            }
        }
    }
}
