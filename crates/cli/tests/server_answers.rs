//! What the command makes of the server's answers: exit codes, hints, JSON, lists, and servers that misbehave.

mod support;

use serde_json::json;
use support::{FakeServer, Reply, Scratch, vmseal};

fn problem(code: &str, detail: &str, hint: Option<&str>, details: &[&str]) -> serde_json::Value {
    let mut problem =
        json!({ "status": 409, "title": "Conflict", "code": code, "detail": detail, "details": details });
    if let Some(hint) = hint {
        problem["hint"] = hint.into();
    }
    problem
}

#[test]
fn problem_becomes_error_hint_and_the_exit_code_of_its_code() {
    for (status, code, exit) in [
        (404, "not-found", 3),
        (409, "vm-running", 3),
        (422, "integrity", 3),
        (500, "failed", 1),
        (400, "bad-request", 2),
        (423, "key-missing", 4),
        (503, "host-unreachable", 5),
        (409, "a-code-of-the-future", 3),
        (500, "a-code-of-the-future", 1),
    ] {
        let answer = problem(code, "VM web01 does not do that", Some("try this"), &[]);
        let server = FakeServer::start(move |_, _| Reply::Problem(status, answer.clone()));
        let said = server.vmseal(&["vm", "show", "web01"]);
        assert_eq!(said.exit, exit, "{code}: {said:?}");
        assert_eq!(said.stdout, "");
        assert!(said.stderr.starts_with("error: VM web01 does not do that"), "{said:?}");
        assert!(said.stderr.ends_with("hint: try this\n"), "{said:?}");
        assert_eq!(said.stderr.contains("[vm-running]"), code == "vm-running");
    }
}

#[test]
fn vms_that_would_break_are_listed_under_the_error() {
    let server = FakeServer::start(|_, _| {
        Reply::Problem(
            409,
            problem("provider-in-use", "2 VMs need keys of main", None, &["web01", "a\u{1b}[2J"]),
        )
    });
    let said = server.vmseal(&["provider", "remove", "main"]);
    assert_eq!(
        (said.exit, said.stderr.as_str()),
        (3, "error: 2 VMs need keys of main [provider-in-use]\n  web01\n  a\\u{1b}[2J\n")
    );
    assert_eq!(server.asked()[0].what, "DELETE /v1/providers/main");
}

#[test]
fn no_server_is_unreachable_and_the_hint_starts_it() {
    let scratch = Scratch::new();
    let socket = scratch.path("none.sock");
    let said = vmseal(&scratch, &["status", "--socket", socket.to_str().unwrap()]);
    assert_eq!(said.exit, 5);
    assert!(
        said.stderr
            .contains("none.sock [server-unreachable]\nhint: start it with: systemctl start vmseal-server")
    );

    // A socket that a dead server left behind.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert_eq!(vmseal(&scratch, &["status", "--socket", socket.to_str().unwrap()]).exit, 5);
}

#[test]
fn something_that_is_no_server_is_told_from_one() {
    for (raw, exit) in [
        (&b"SSH-2.0-OpenSSH_9.2\r\n"[..], 5),
        (b"", 5),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{", 5),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", 1),
        (b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 5\r\n\r\n<html", 5),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\n<html", 1),
    ] {
        let server = FakeServer::start(move |_, _| Reply::Raw(raw.to_vec()));
        let said = server.vmseal(&["status"]);
        assert_eq!(said.exit, exit, "{raw:?}: {said:?}");
        assert!(said.stderr.starts_with("error: ") && said.stdout.is_empty(), "{said:?}");
    }
}

#[test]
fn answer_without_end_is_given_up() {
    let server = FakeServer::start(|_, _| Reply::Endless);
    let said = server.vmseal(&["status"]);
    assert_eq!(said.exit, 1);
    assert!(said.stderr.contains("more than 67108864 bytes"), "{said:?}");
}

#[test]
fn post_is_sent_again_with_the_same_key_when_the_connection_breaks() {
    let server = FakeServer::start(|_, n| match n {
        1 => Reply::Raw(Vec::new()),
        _ => Reply::Json(json!({ "token": "vmseal1.SECRET", "expires_ms": 1_795_510_212_000_i64 })),
    });
    let said = server.vmseal(&["host", "add"]);
    assert_eq!((said.exit, said.stdout.as_str()), (0, "vmseal1.SECRET\n"), "{said:?}");
    assert!(said.stderr.contains("vmseal-agent join -") && !said.stderr.contains("SECRET"), "{said:?}");
    let asked = server.asked();
    assert_eq!(asked.len(), 2);
    assert!(asked[0].header("idempotency-key").is_some_and(|key| key.len() == 36));
    assert_eq!(asked[0].header("idempotency-key"), asked[1].header("idempotency-key"));
}

#[test]
fn json_is_the_object_as_the_server_sent_it() {
    let vm = json!({
        "domain_uuid": "bb", "name": "web01", "host": "hv1", "state": "off", "coverage": "clear", "disks": [],
        "unprotected": [], "transient": false, "seen_ms": 5, "field_of_the_future": [1, 2]
    });
    let sent = vm.clone();
    let server = FakeServer::start(move |_, _| Reply::Json(sent.clone()));
    let said = server.vmseal(&["vm", "show", "a b/c", "--output", "json"]);
    assert_eq!((said.exit, said.json()), (0, vm));
    assert_eq!(server.asked()[0].what, "GET /v1/vms/a%20b%2Fc");
}

#[test]
fn list_is_read_to_its_last_page() {
    let vm = |name: &str| {
        json!({ "domain_uuid": "bb", "name": name, "host": "hv1", "state": "off", "coverage": "clear", "disks": [],
                "unprotected": [], "transient": false, "seen_ms": 5 })
    };
    let server = FakeServer::start(move |asked, _| match asked.what.as_str() {
        "GET /v1/vms?limit=200" => Reply::Json(json!({ "items": [vm("a")], "next": "x&y" })),
        "GET /v1/vms?limit=200&cursor=x%26y" => Reply::Json(json!({ "items": [vm("b")] })),
        other => Reply::Problem(404, problem("not-found", other, None, &[])),
    });
    let said = server.vmseal(&["vm", "list"]);
    assert_eq!(said.exit, 0, "{said:?}");
    let names: Vec<&str> = said.stdout.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(names, ["NAME", "a", "b"]);
    assert_eq!(server.vmseal(&["vm", "list", "--output", "json"]).json()[1]["name"], "b");
}

#[test]
fn doctor_ends_with_1_if_there_is_anything_to_do() {
    let finding =
        json!({ "code": "clear-swap", "message": "swap is clear", "hint": "encrypt it", "host": "hv1" });
    let server = FakeServer::start(move |_, _| Reply::Json(json!({ "findings": [finding] })));
    let said = server.vmseal(&["doctor"]);
    assert_eq!(
        (said.exit, said.stdout.as_str()),
        (1, "hv1: swap is clear [clear-swap]\n  hint: encrypt it\n")
    );
    let well = FakeServer::start(|_, _| Reply::Json(json!({ "findings": [] })));
    assert_eq!(well.vmseal(&["doctor"]).exit, 0);
}

#[test]
fn wrong_use_is_2_and_touches_nobody() {
    let server = FakeServer::start(|_, _| Reply::Json(json!({})));
    for args in [
        &["vm", "encrypt"][..],
        &["vm", "encrypt", "a", "--keep-source", "--wipe-source"],
        &["disk", "create", "a", "--target", "vdb", "--path", "/x", "--size", "10GB"],
        &["vm", "create", "--xml", "/nonexistent", "--disk-size", "vda"],
        &["nonsense"],
        &["completions", "powershell"],
    ] {
        assert_eq!(server.vmseal(args).exit, 2, "{args:?}");
    }
    assert!(server.asked().is_empty());
}

#[test]
fn reader_that_stops_early_is_no_error() {
    let scratch = Scratch::new();
    let said = support::vmseal_with_fd3(&scratch, "| head -n 1 >/dev/null; true", &["completions", "bash"]);
    assert_eq!((said.exit, said.stderr.as_str()), (0, ""));
    let script = vmseal(&scratch, &["completions", "fish"]).stdout;
    assert!(script.contains("encrypt"));
}
