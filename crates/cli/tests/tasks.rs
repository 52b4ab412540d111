//! Beginning a task and following it to its end.

mod support;

use serde_json::{Value, json};
use support::{FakeServer, Reply};

const ID: &str = "4d0c7d8e-1c1f-4c3e-9d52-6a3c7f5f0a11";

fn task(state: &str, step: &str, more: Value) -> Value {
    let mut task = json!({
        "id": ID, "kind": "vm-encrypt", "state": state, "host": "hv1", "vm": "web01", "step": step,
        "done_bytes": 512, "total_bytes": 1_073_741_824, "message": "", "by": "local root",
        "created_ms": 1, "updated_ms": 1
    });
    task.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    task
}

#[test]
fn task_that_is_not_waited_for_prints_its_id() {
    let server = FakeServer::start(|_, _| Reply::Json(task("queued", "", json!({}))));
    let said = server.vmseal(&["vm", "encrypt", "web01", "--disk", "vda", "--keep-source", "--no-wait"]);
    assert_eq!((said.exit, said.stdout, said.stderr), (0, format!("{ID}\n"), String::new()));
    let asked = server.asked();
    assert_eq!(asked[0].what, "POST /v1/vms/web01/encrypt");
    assert_eq!(asked[0].json(), json!({ "disks": ["vda"], "source": "keep" }));
}

#[test]
fn class_is_sent_where_one_is_named() {
    let server = FakeServer::start(|_, _| Reply::Json(task("queued", "", json!({}))));
    let said = |args: &[&str]| {
        let said = server.vmseal(&[args, &["--no-wait"]].concat());
        assert_eq!((said.exit, said.stderr.as_str()), (0, ""), "{args:?}");
        let asked = server.asked();
        let last = asked.last().expect("it asked");
        (last.what.clone(), last.json())
    };
    assert_eq!(
        said(&["vm", "encrypt", "web01", "--class", "fast"]),
        ("POST /v1/vms/web01/encrypt".to_owned(), json!({ "disks": [], "source": "wipe", "class": "fast" }))
    );
    let path = ["disk", "create", "web01", "--target", "vdb", "--path", "/x/b", "--size", "1M"];
    let disk = json!({ "target": "vdb", "path": "/x/b", "format": "raw", "bytes": 1 << 20 });
    let (what, auto) = said(&[&path[..], &["--class", "auto"]].concat());
    assert_eq!((what.as_str(), auto), ("POST /v1/vms/web01/disks", disk), "auto is what nobody says");
    let (_, compatible) = said(&[&path[..], &["--class", "compatible"]].concat());
    assert_eq!(compatible["class"], "compatible");
    assert_eq!(
        said(&["disk", "set", "--class", "compatible", "web01", "vda"]),
        ("POST /v1/vms/web01/disks/set".to_owned(), json!({ "target": "vda", "class": "compatible" }))
    );
    let wrong = server.vmseal(&["disk", "set", "--class", "warp", "web01", "vda"]);
    assert_eq!(wrong.exit, 2);
    assert!(wrong.stderr.contains("possible values: auto, compatible, fast"), "{}", wrong.stderr);
    let nothing = server.vmseal(&["disk", "set", "web01", "vda"]);
    assert_eq!(nothing.exit, 2, "{}", nothing.stderr);
}

#[test]
fn every_step_is_told_once_and_a_broken_connection_changes_nothing() {
    let server = FakeServer::start(|asked, n| match (asked.what.starts_with("POST"), n) {
        (true, _) => Reply::Json(task("queued", "", json!({}))),
        // The server is killed and restarted meanwhile: asked twice without an answer.
        (_, 3 | 4) => Reply::Raw(Vec::new()),
        (_, 2) => Reply::Json(task("running", "vda allocated", json!({}))),
        (_, 5 | 6) => Reply::Json(task("running", "vda copied", json!({}))),
        _ => Reply::Json(task("succeeded", "vda source-gone", json!({ "message": "vda encrypted" }))),
    });
    let said = server.vmseal(&["vm", "encrypt", "web01", "--provider", "main"]);
    assert_eq!((said.exit, said.stdout.as_str()), (0, ""));
    assert_eq!(
        said.stderr,
        "web01: vda allocated (1 GiB)\n\
         the server does not answer; the task goes on at its host, waiting\n\
         web01: vda copied (1 GiB)\n\
         web01: vda encrypted\n"
    );
    assert_eq!(server.asked()[0].json(), json!({ "disks": [], "provider": "main", "source": "wipe" }));
}

#[test]
fn task_that_failed_ends_with_its_own_code_and_hint() {
    for (more, exit, error) in [
        (
            json!({ "code": "no-space", "message": "/x has 1 GiB free", "hint": "make room" }),
            3,
            "error: /x has 1 GiB free [no-space]\nhint: make room\n",
        ),
        (
            json!({ "code": "key-missing", "message": "key k of main is missing" }),
            4,
            "error: key k of main is missing [key-missing]\n",
        ),
        (json!({ "code": "word-of-the-future", "message": "it broke" }), 1, "error: it broke\n"),
    ] {
        let server = FakeServer::start(move |_, _| Reply::Json(task("failed", "", more.clone())));
        let said = server.vmseal(&["task", "follow", ID]);
        assert_eq!((said.exit, said.stderr.as_str()), (exit, error));
    }
    let server = FakeServer::start(|_, _| Reply::Json(task("cancelled", "", json!({}))));
    assert_eq!(server.vmseal(&["task", "follow", ID]).exit, 1);
}

#[test]
fn json_of_a_followed_task_is_its_end() {
    let server = FakeServer::start(|_, n| match n {
        1..=2 => Reply::Json(task("running", "vda copied", json!({}))),
        _ => Reply::Json(task("succeeded", "", json!({ "finished_ms": 7 }))),
    });
    let said = server.vmseal(&["task", "follow", ID, "--output", "json"]);
    assert_eq!((said.exit, &said.json()["finished_ms"]), (0, &json!(7)));
}

#[test]
fn interrupted_command_leaves_the_task_and_says_how_to_go_on() {
    use std::{io::Read, process::Stdio};

    let server = FakeServer::start(|_, _| Reply::Json(task("running", "vda copied", json!({}))));
    let socket = server.scratch.path("api.sock");
    let mut child = support::command(&server.scratch)
        .args(["--socket", socket.to_str().unwrap(), "task", "follow", ID])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = child.stderr.take().unwrap();
    // Its first line is written after it began to listen for Ctrl-C.
    let mut said = vec![0; "web01: vda copied".len()];
    stderr.read_exact(&mut said).unwrap();
    let killed = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let status = child.wait().unwrap();
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).unwrap();
    assert_eq!(status.code(), Some(130));
    assert!(
        rest.contains(&format!("vmseal task follow {ID}"))
            && rest.contains(&format!("vmseal task cancel {ID}"))
    );
    assert!(server.asked().iter().all(|asked| asked.what.starts_with("GET")), "nothing was cancelled");
}

#[test]
fn size_of_a_new_disk_is_sent_in_bytes() {
    let server = FakeServer::start(|_, _| Reply::Json(task("succeeded", "", json!({}))));
    let said = server.vmseal(&[
        "disk", "create", "web01", "--target", "vdb", "--path", "/x/d.img", "--size", "10G", "--format",
        "qcow2",
    ]);
    assert_eq!(said.exit, 0, "{said:?}");
    let sent = json!({ "target": "vdb", "path": "/x/d.img", "format": "qcow2", "bytes": 10_737_418_240_u64 });
    assert_eq!(server.asked()[0].json(), sent);

    let xml = server.scratch.write("vm.xml", "<domain/>");
    let xml = xml.to_str().unwrap();
    let said = server.vmseal(&["vm", "create", "--xml", xml, "--disk-size", "vda=1G", "--host", "hv1"]);
    assert_eq!(said.exit, 0, "{said:?}");
    let sent = json!({ "host": "hv1", "xml": "<domain/>", "disk_bytes": { "vda": 1_073_741_824 } });
    assert_eq!(server.asked().iter().find(|a| a.what == "POST /v1/vms").unwrap().json(), sent);
}
