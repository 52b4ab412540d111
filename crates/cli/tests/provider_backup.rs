//! A backup that counts, and backups that do not; passwords on their way.

mod support;

use std::{fs, os::unix::fs::PermissionsExt};

use serde_json::json;
use support::{FakeServer, Reply, vmseal_with_fd3};

const PASSWORD: &str = "VMSEAL-TEST-PASSWORD";
/// `backup`.
const BACKUP: &str = "YmFja3Vw";

fn exporting(confirmed: bool) -> FakeServer {
    FakeServer::start(move |asked, _| match asked.what.as_str() {
        "POST /v1/providers/main/export" => Reply::Json(json!({ "file_name": "main.p12", "p12": BACKUP })),
        "POST /v1/providers/main/confirm-backup" if confirmed => Reply::Json(json!({
            "name": "main", "uuid": "1f", "kind": "native", "default": true, "usable": true, "generations": [],
            "keys": 0, "vms": [], "created_ms": 1
        })),
        _ => Reply::Problem(
            422,
            json!({ "status": 422, "title": "", "code": "integrity", "detail": "it does not open" }),
        ),
    })
}

#[test]
fn backup_is_private_and_confirmed_with_what_is_on_disk() {
    let server = exporting(true);
    let password = server.scratch.write("password", format!("{PASSWORD}\nsecond line\n"));
    let out = server.scratch.path("main.p12");
    let said = server.vmseal(&[
        "provider",
        "export",
        "main",
        "--out",
        out.to_str().unwrap(),
        "--password-file",
        password.to_str().unwrap(),
    ]);
    assert_eq!((said.exit, said.stdout.as_str()), (0, ""), "{said:?}");
    assert!(said.stderr.contains("read back and verified; provider main is usable"), "{said:?}");
    assert!(!said.stderr.contains("warning") && !said.stderr.contains(PASSWORD), "{said:?}");
    assert_eq!(fs::read(&out).unwrap(), b"backup");
    assert_eq!(fs::metadata(&out).unwrap().permissions().mode() & 0o777, 0o600);
    let asked = server.asked();
    assert_eq!(asked[0].json(), json!({ "password": PASSWORD }));
    assert_eq!(asked[1].json(), json!({ "p12": BACKUP, "password": PASSWORD }));
}

#[test]
fn backup_that_is_not_confirmed_stays_and_does_not_count() {
    let server = exporting(false);
    let password = server.scratch.write("password", PASSWORD);
    let out = server.scratch.path("main.p12");
    let (out_text, password) = (out.to_str().unwrap(), password.to_str().unwrap());
    let args = ["provider", "export", "main", "--out", out_text, "--password-file", password];
    let said = server.vmseal(&args);
    assert_eq!(said.exit, 3);
    assert!(said.stderr.contains("was written but not verified: this backup does not count"), "{said:?}");
    assert!(said.stderr.contains("it does not open [integrity]"), "{said:?}");
    assert_eq!(fs::read(&out).unwrap(), b"backup");

    // A second try over the same file asks nobody and changes nothing.
    let before = server.asked().len();
    let said = server.vmseal(&args);
    assert_eq!(said.exit, 1);
    assert!(said.stderr.contains("exists already; nothing was exported"), "{said:?}");
    assert_eq!(server.asked().len(), before);
}

#[test]
fn password_comes_from_a_descriptor_and_appears_nowhere_else() {
    let server =
        FakeServer::start(|_, _| Reply::Json(json!({ "name": "alice", "roles": ["Administrator"] })));
    let password = server.scratch.write("password", PASSWORD);
    let socket = server.scratch.path("api.sock");
    let said = vmseal_with_fd3(
        &server.scratch,
        &format!("3<{}", password.display()),
        &[
            "--socket",
            socket.to_str().unwrap(),
            "role",
            "add-user",
            "alice",
            "--role",
            "Administrator",
            "--password-file",
            "fd:3",
        ],
    );
    assert_eq!(said.exit, 0, "{said:?}");
    assert!(!format!("{said:?}").contains(PASSWORD));
    assert_eq!(
        server.asked()[0].json(),
        json!({ "name": "alice", "password": PASSWORD, "role": "Administrator" })
    );
}

#[test]
fn password_file_that_others_may_read_is_warned_of() {
    let server = exporting(true);
    let password = server.scratch.write("password", PASSWORD);
    fs::set_permissions(&password, fs::Permissions::from_mode(0o644)).unwrap();
    let file = server.scratch.write("main.p12", "x");
    let (file, password) = (file.to_str().unwrap(), password.to_str().unwrap());
    let said = server.vmseal(&["provider", "import", file, "--password-file", password]);
    assert!(said.stderr.contains("warning: others may read"), "{said:?}");
}

#[test]
fn without_a_terminal_the_way_to_give_a_password_is_named() {
    let server = exporting(true);
    let file = server.scratch.write("main.p12", "x");
    let mut command = std::process::Command::new("setsid");
    command
        .arg("--wait")
        .arg(env!("CARGO_BIN_EXE_vmseal"))
        .arg("--socket")
        .arg(server.scratch.path("api.sock"));
    command.args(["provider", "import"]).arg(file).stdin(std::process::Stdio::null());
    let said: support::Said = command.output().unwrap().into();
    assert_eq!(said.exit, 2, "{said:?}");
    assert!(said.stderr.contains("hint: give it with --password-file"), "{said:?}");
}
