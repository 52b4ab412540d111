//! Tasks: asked for, sent, mirrored, sent again, cancelled.

use http_body_util::BodyExt as _;
use hyper::Method;
use serde_json::json;
use vmseal_api::{
    agent::v1::{Command, GroupCapabilities, HostCapabilities, KeyRequest, TaskEvent, command},
    audit::AuditEntry,
    host::{Capabilities, Host},
    key::Key,
    page::Page,
    paths,
    task::Task,
    vm::Vm,
};

use crate::{
    agent::{self, Agent, Guest, Joined},
    rig::Rig,
};

struct Scene {
    rig: Rig,
    joined: Joined,
    host: Agent,
    guest: Guest,
}

impl Scene {
    async fn set() -> Self {
        let rig = Rig::start().await;
        rig.provider("main").await;
        let joined = agent::join(&rig, "kvm1").await;
        let mut host = joined.connect(&rig).await;
        let guest = Guest::new("web01", 1);
        host.report(vec![guest.clear()]).await;
        Self { rig, joined, host, guest }
    }

    async fn encrypt(&mut self) -> (Task, Command) {
        let path = paths::fill(paths::VM_ENCRYPT, "web01");
        let asked = json!({"disks": ["vda"], "source": "wipe"});
        let task: Task = self.rig.root().post(&path, &asked).await.good();
        (task, self.host.command().await)
    }

    async fn task(&self, id: &str) -> Task {
        self.rig.root().get(&paths::fill(paths::TASK, id)).await.good()
    }
}

fn event(id: &str, state: &str, step: &str) -> TaskEvent {
    TaskEvent {
        task_id: id.into(),
        state: state.into(),
        step: step.into(),
        done_bytes: 5,
        total_bytes: 10,
        ..TaskEvent::default()
    }
}

#[tokio::test]
async fn task_is_sent_with_a_key_and_mirrors_what_the_host_says() {
    let mut scene = Scene::set().await;
    let (task, command) = scene.encrypt().await;
    assert_eq!(
        json!([task.state, task.kind, task.host, task.vm, task.by]),
        json!(["queued", "vm-encrypt", "kvm1", "web01", "local root"])
    );
    assert_eq!(command.id, task.id);
    assert_eq!(command.fencing_token, scene.rig.server().fencing_token);
    assert!(command.deadline_ms > task.created_ms);
    let Some(command::Body::EncryptVm(asked)) = command.body else { panic!() };
    assert_eq!((asked.domain_uuid, asked.targets), (scene.guest.domain.to_string(), vec!["vda".to_owned()]));
    assert_eq!((asked.provider.as_str(), asked.source.as_str(), asked.kek_id.len()), ("main", "wipe", 20));

    scene.host.task_is(event(&task.id, "running", "vda copied")).await;
    let seen = scene.task(&task.id).await;
    assert_eq!((seen.step.as_str(), seen.done_bytes, seen.total_bytes), ("vda copied", 5, 10));
    let vm: Vm = scene.rig.root().get(&paths::fill(paths::VM, "web01")).await.good();
    assert_eq!(vm.task, Some(task.id.clone()));
    // One task at a time.
    let path = paths::fill(paths::VM_DECRYPT, "web01");
    scene.rig.root().post(&path, &json!({"source": "keep"})).await.refused("task-running");

    scene.host.report(vec![scene.guest.encrypted("main", &asked.kek_id, 1)]).await;
    scene.host.task_is(event(&task.id, "succeeded", "vda source-gone")).await;
    // What comes after the end changes nothing.
    scene.host.task_is(event(&task.id, "running", "vda copied")).await;
    let ended = scene.task(&task.id).await;
    assert_eq!(json!(ended.state), json!("succeeded"));
    assert!(ended.finished_ms.is_some());
    let keys: Vec<Key> = scene.rig.root().get(paths::KEYS).await.good();
    assert_eq!((keys.len(), keys[0].vm.as_deref()), (1, Some("web01")));
    // A second disk of the VM comes under the VM's key.
    let disk = json!({"target": "vdb", "path": "/x/b.img", "format": "qcow2", "bytes": 1 << 20});
    let path = paths::fill(paths::VM_DISKS, "web01");
    let _: Task = scene.rig.root().post(&path, &disk).await.good();
    let Some(command::Body::CreateDisk(created)) = scene.host.command().await.body else { panic!() };
    assert_eq!(created.kek_id, asked.kek_id);
    assert_eq!((created.format.as_str(), created.bytes), ("qcow2", 1 << 20));
}

#[tokio::test]
async fn class_reaches_the_host_as_it_was_asked_for() {
    let mut scene = Scene::set().await;
    let (_, command) = scene.encrypt().await;
    let Some(command::Body::EncryptVm(encrypt)) = command.body else { panic!() };
    assert_eq!(encrypt.class, "auto");
    scene.host.report(vec![scene.guest.encrypted("main", &encrypt.kek_id, 1)]).await;
    scene.host.task_is(event(&command.id, "succeeded", "")).await;

    let path = paths::fill(paths::VM_DISK_SET, "web01");
    for wrong in
        [json!({"target": "", "class": "fast"}), json!({"target": "vda", "class": "warp"}), json!({})]
    {
        scene.rig.root().post(&path, &wrong).await.refused("bad-request");
    }
    let set = json!({"target": "vda", "class": "fast"});
    let task: Task = scene.rig.root().post(&path, &set).await.good();
    assert_eq!((json!(task.kind), task.vm.as_str()), (json!("disk-set"), "web01"));
    let Some(command::Body::SetDisk(asked)) = scene.host.command().await.body else { panic!() };
    let domain = scene.guest.domain.to_string();
    assert_eq!((asked.domain_uuid, asked.target.as_str(), asked.class.as_str()), (domain, "vda", "fast"));
    let page: Page<AuditEntry> = scene.rig.root().get("/v1/audit?limit=1000").await.good();
    let entry = page.items.iter().find(|entry| entry.verb == "disk.set" && entry.outcome == "done").unwrap();
    assert_eq!(entry.detail, format!("task {}: disk vda, class fast", task.id));
}

#[tokio::test]
async fn command_says_what_all_hosts_have_and_who_lacks_it() {
    let has = |ublk: bool| {
        let no_ublk = if ublk { String::new() } else { "no module".into() };
        HostCapabilities { ublk, no_ublk, vhost_user: true }
    };
    let mut scene = Scene::set().await;
    let asked = |command: &Command| match &command.body {
        Some(command::Body::EncryptVm(encrypt)) => encrypt.hosts.clone().unwrap(),
        other => panic!("{other:?}"),
    };
    let lacking = |names: &[&str]| GroupCapabilities {
        ublk: names.is_empty(),
        without_ublk: names.iter().map(|name| (*name).to_owned()).collect(),
    };
    // An agent that says nothing has nothing; so does a host that has not said anything yet.
    let (_, command) = scene.encrypt().await;
    assert_eq!(asked(&command), lacking(&["kvm1"]));
    scene.host.task_is(event(&command.id, "failed", "")).await;
    let other = agent::join(&scene.rig, "kvm2").await;
    scene.host.report_with(vec![scene.guest.clear()], has(true)).await;
    let (_, command) = scene.encrypt().await;
    assert_eq!(asked(&command), lacking(&["kvm2"]));
    scene.host.task_is(event(&command.id, "failed", "")).await;
    let mut second = other.connect(&scene.rig).await;
    second.report_with(Vec::new(), has(true)).await;
    // Also while it is not connected.
    drop(second);
    let (_, command) = scene.encrypt().await;
    assert_eq!(asked(&command), lacking(&[]));
    scene.host.task_is(event(&command.id, "failed", "")).await;

    scene.host.report_with(vec![scene.guest.clear()], has(false)).await;
    let set = json!({"target": "vda", "class": "auto"});
    scene.rig.root().post(&paths::fill(paths::VM_DISK_SET, "web01"), &set).await.good::<Task>();
    let Some(command::Body::SetDisk(asked)) = scene.host.command().await.body else { panic!() };
    assert_eq!(asked.hosts, Some(lacking(&["kvm1"])));
    let shown: Host = scene.rig.root().get(&paths::fill(paths::HOST, "kvm1")).await.good();
    let said = Capabilities { ublk: false, no_ublk: "no module".into(), vhost_user: true };
    assert_eq!(shown.capabilities, said);
}

#[tokio::test]
async fn host_that_is_not_connected_is_told_and_nothing_is_begun() {
    let scene = Scene::set().await;
    drop(scene.host);
    let path = paths::fill(paths::VM_ENCRYPT, "web01");
    // The end of the session is noticed a moment later; until then a task would only wait for the host.
    while scene.rig.server().sessions.count() > 0 {
        tokio::task::yield_now().await;
    }
    scene.rig.root().post(&path, &json!({"source": "wipe"})).await.refused("host-unreachable");
    let tasks: Page<Task> = scene.rig.root().get(paths::TASKS).await.good();
    assert!(tasks.items.is_empty());
    let vm: Vm = scene.rig.root().get(&paths::fill(paths::VM, "web01")).await.good();
    assert_eq!(json!(vm.state), json!("unknown"));
}

#[tokio::test]
async fn unfinished_command_is_sent_again_after_a_restart_under_a_higher_token() {
    let mut scene = Scene::set().await;
    let (task, first) = scene.encrypt().await;
    scene.rig.stop().await;
    scene.rig.start_again().await.unwrap();
    scene.joined.follow(&scene.rig);
    let mut host = scene.joined.connect(&scene.rig).await;
    let again = host.command().await;
    assert_eq!((&again.id, &again.body, again.deadline_ms), (&task.id, &first.body, first.deadline_ms));
    assert!(again.fencing_token > first.fencing_token);
    host.task_is(event(&task.id, "succeeded", "")).await;
    // Once ended it is not sent any more.
    let mut host = scene.joined.connect(&scene.rig).await;
    host.floors(&[]).await;
    let _: Task = scene.rig.root().post(&paths::fill(paths::VM_REPAIR, "web01"), &()).await.good();
    assert!(matches!(host.command().await.body, Some(command::Body::RepairVm(_))));
}

#[tokio::test]
async fn cancel_reaches_the_host_and_again_after_a_new_session() {
    let mut scene = Scene::set().await;
    let (task, _) = scene.encrypt().await;
    let path = paths::fill(paths::TASK_CANCEL, &task.id);
    let asked: Task = scene.rig.root().post(&path, &()).await.good();
    assert!(asked.cancel_requested);
    let cancel = scene.host.command().await;
    assert!(matches!(&cancel.body, Some(command::Body::CancelTask(c)) if c.task_id == task.id));
    let mut host = scene.joined.connect(&scene.rig).await;
    assert_eq!(host.command().await.id, task.id);
    assert_eq!(host.command().await.id, cancel.id);
    host.task_is(event(&task.id, "cancelled", "")).await;
    assert_eq!(json!(scene.task(&task.id).await.state), json!("cancelled"));
    scene.rig.root().post(&path, &()).await.refused("nothing-to-do");
    // Its key was never used and is forgotten.
    let keys: Vec<Key> = scene.rig.root().get(paths::KEYS).await.good();
    assert!(keys.is_empty());
}

#[tokio::test]
async fn repair_is_a_task_without_a_key_and_is_there_for_a_vm_with_foreign_ids_too() {
    let mut scene = Scene::set().await;
    let copy = Guest { name: "copy".into(), domain: Guest::new("", 9).domain, ..scene.guest.clone() };
    let vms = vec![scene.guest.encrypted("main", b"k", 1), copy.encrypted("main", b"k", 1)];
    scene.host.report(vms).await;
    let path = paths::fill(paths::VM_REPAIR, "copy");
    let task: Task = scene.rig.root().post(&path, &()).await.good();
    assert_eq!(json!([task.kind, task.state]), json!(["vm-repair", "queued"]));
    let repair = scene.host.command().await;
    assert_eq!(repair.id, task.id);
    assert!(
        matches!(&repair.body, Some(command::Body::RepairVm(c)) if c.domain_uuid == copy.domain.to_string())
    );
    scene.rig.root().post(&path, &()).await.refused("task-running");
    // Until the host says that it ended it is sent again, under its own id.
    let mut host = scene.joined.connect(&scene.rig).await;
    assert_eq!(host.command().await.id, task.id);
    let said = TaskEvent { message: "nothing was amiss".into(), ..event(&task.id, "succeeded", "") };
    host.task_is(said).await;
    let seen = scene.task(&task.id).await;
    assert_eq!(json!([seen.state, seen.message]), json!(["succeeded", "nothing was amiss"]));
}

#[tokio::test]
async fn failure_keeps_the_hosts_words_and_code() {
    let mut scene = Scene::set().await;
    let (task, _) = scene.encrypt().await;
    let failed = TaskEvent {
        code: "no-space".into(),
        message: "/x has 3 GiB free, 10 GiB are needed".into(),
        hint: "free some".into(),
        ..event(&task.id, "failed", "")
    };
    scene.host.task_is(failed).await;
    let seen = scene.task(&task.id).await;
    assert_eq!(seen.code.as_deref(), Some("no-space"));
    assert_eq!(
        (seen.message.as_str(), seen.hint.as_str()),
        ("/x has 3 GiB free, 10 GiB are needed", "free some")
    );
}

#[tokio::test]
async fn another_hosts_words_about_a_task_count_for_nothing() {
    let mut scene = Scene::set().await;
    let (task, _) = scene.encrypt().await;
    let mut other = agent::join(&scene.rig, "kvm2").await.connect(&scene.rig).await;
    other.task_is(event(&task.id, "succeeded", "")).await;
    other.task_is(event("no such task", "succeeded", "")).await;
    other.task_is(event(&task.id, "exploded", "")).await;
    assert_eq!(json!(scene.task(&task.id).await.state), json!("queued"));
}

#[tokio::test]
async fn vm_create_needs_a_host_where_there_are_several() {
    let mut scene = Scene::set().await;
    let mut new = json!({"xml": "<domain><name>new</name></domain>", "disk_bytes": {"vda": 1024}});
    let task: Task = scene.rig.root().post(paths::VMS, &new).await.good();
    assert_eq!(task.vm, "new");
    let Some(command::Body::CreateVm(asked)) = scene.host.command().await.body else { panic!() };
    assert_eq!((asked.disk_bytes["vda"], asked.provider.as_str()), (1024, "main"));
    agent::join(&scene.rig, "kvm2").await;
    scene.rig.root().post(paths::VMS, &new).await.refused("bad-request");
    new["host"] = json!("kvm1");
    let _: Task = scene.rig.root().post(paths::VMS, &new).await.good();
    new["host"] = json!("kvm3");
    scene.rig.root().post(paths::VMS, &new).await.refused("not-found");
    new["host"] = json!("kvm1");
    new["xml"] = json!("<domain/>");
    scene.rig.root().post(paths::VMS, &new).await.refused("bad-request");
}

#[tokio::test]
async fn watcher_sees_unfinished_tasks_and_every_change() {
    let mut scene = Scene::set().await;
    let (task, _) = scene.encrypt().await;
    let mut stream = scene.rig.root().open(Method::GET, paths::EVENTS, Vec::new()).await.into_body();
    let mut text = String::new();
    let mut read_until = async |wanted: &str| {
        while !text.contains(wanted) {
            let frame = stream.frame().await.expect("the stream goes on").unwrap();
            text.push_str(std::str::from_utf8(frame.data_ref().unwrap()).unwrap());
        }
    };
    read_until("\"state\":\"queued\"").await;
    scene.host.task_is(event(&task.id, "running", "vda copied")).await;
    read_until("\"step\":\"vda copied\"").await;
    assert!(text.contains(&format!("event: task\nid: {}", task.id)), "{text}");
}

#[tokio::test]
async fn tasks_of_a_removed_host_end() {
    let mut scene = Scene::set().await;
    let (task, _) = scene.encrypt().await;
    let _: serde_json::Value = scene.rig.root().delete(&paths::fill(paths::HOST, "kvm1")).await.good();
    let ended = scene.task(&task.id).await;
    assert_eq!((json!(ended.state), ended.code.as_deref()), (json!("failed"), Some("host-unreachable")));
}

/// The KEK of the command, had by its task.
async fn had_by_task(scene: &mut Scene, task: &Task, command: &Command) -> (Vec<u8>, [u8; 32]) {
    let Some(command::Body::EncryptVm(asked)) = &command.body else { panic!("{command:?}") };
    let request = KeyRequest { task_id: task.id.clone(), ..scene.guest.key_request("main", &asked.kek_id) };
    let grant = scene.host.ask(request).await.unwrap();
    (asked.kek_id.clone(), scene.host.open(&grant))
}

#[tokio::test]
async fn key_that_a_host_got_outlives_its_failed_task_and_one_it_did_not_get_goes() {
    let mut scene = Scene::set().await;
    let (task, command) = scene.encrypt().await;
    let (kek, key) = had_by_task(&mut scene, &task, &command).await;
    scene.host.task_is(event(&task.id, "failed", "")).await;
    let (second, _) = scene.encrypt().await;
    scene.host.task_is(event(&second.id, "failed", "")).await;
    let keys: Vec<Key> = scene.rig.root().get(paths::KEYS).await.good();
    assert_eq!(keys.len(), 1, "{keys:?}");
    // The volume was made after all.
    let encrypted = scene.guest.encrypted("main", &kek, 1);
    scene.host.report(vec![encrypted]).await;
    let grant = scene.host.ask(scene.guest.key_request("main", &kek)).await.unwrap();
    assert_eq!(scene.host.open(&grant), key);
}

#[tokio::test]
async fn host_that_was_removed_in_mid_task_comes_back_to_its_key() {
    let mut scene = Scene::set().await;
    let (task, command) = scene.encrypt().await;
    let (kek, key) = had_by_task(&mut scene, &task, &command).await;
    let _: serde_json::Value = scene.rig.root().delete(&paths::fill(paths::HOST, "kvm1")).await.good();
    let mut host = agent::join(&scene.rig, "kvm1").await.connect(&scene.rig).await;
    host.report(vec![scene.guest.encrypted("main", &kek, 1)]).await;
    let grant = host.ask(scene.guest.key_request("main", &kek)).await.unwrap();
    assert_eq!(host.open(&grant), key);
}

#[tokio::test]
async fn session_that_outlives_its_host_gets_no_key() {
    let mut scene = Scene::set().await;
    let (task, command) = scene.encrypt().await;
    let (kek, _) = had_by_task(&mut scene, &task, &command).await;
    scene.host.report(vec![scene.guest.encrypted("main", &kek, 1)]).await;
    scene.host.ask(scene.guest.key_request("main", &kek)).await.unwrap();
    // As if the host had been removed while its session began.
    let mut write = scene.rig.server().store.write().await.unwrap();
    sqlx::query("DELETE FROM hosts").execute(&mut *write).await.unwrap();
    write.commit().await.unwrap();
    let refused = scene.host.ask(scene.guest.key_request("main", &kek)).await.unwrap_err();
    assert_eq!(refused.code, "forbidden", "{}", refused.message);
    assert!(refused.message.contains("was removed"), "{}", refused.message);
}
