//! Who gets which key.

use vmseal_api::{
    agent::v1::KeyRequest,
    audit::AuditEntry,
    key::{Key, KeyState},
    page::Page,
    paths,
    task::Task,
};
use vmseal_model::id::{KekId, KeyUuid};

use crate::{
    agent::{self, Agent, Guest},
    rig::Rig,
};

fn kek(seed: u8) -> Vec<u8> {
    KekId::native(1, KeyUuid::from_random([seed; 16])).as_bytes().to_vec()
}

async fn host(rig: &Rig, name: &str) -> Agent {
    agent::join(rig, name).await.connect(rig).await
}

async fn audit(rig: &Rig) -> Vec<AuditEntry> {
    let page: Page<AuditEntry> = rig.root().get("/v1/audit?limit=1000").await.good();
    page.items
}

#[tokio::test]
async fn host_gets_the_key_of_its_vm_and_the_same_each_time() {
    let mut rig = Rig::start().await;
    rig.provider("main").await;
    let guest = Guest::new("web01", 1);
    let mut joined = agent::join(&rig, "kvm1").await;
    let mut host = joined.connect(&rig).await;
    host.report(vec![guest.encrypted("main", &kek(1), 1)]).await;
    let grant = host.ask(guest.key_request("main", &kek(1))).await.unwrap();
    assert_eq!(grant.kek_id, kek(1));
    let first = host.open(&grant);
    rig.stop().await;
    rig.start_again().await.unwrap();
    joined.follow(&rig);
    let mut host = joined.connect(&rig).await;
    let grant = host.ask(guest.key_request("main", &kek(1))).await.unwrap();
    assert_eq!(host.open(&grant), first);

    let keys: Vec<Key> = rig.root().get(paths::KEYS).await.good();
    assert_eq!(
        (keys[0].state, keys[0].vm.as_deref(), keys[0].host.as_deref()),
        (KeyState::Active, Some("web01"), Some("kvm1"))
    );
    let grants = audit(&rig).await.into_iter().filter(|e| e.verb == "key.grant").count();
    assert_eq!(grants, 2);
}

#[tokio::test]
async fn rogue_host_gets_no_key_of_another_hosts_vm_and_raises_an_alarm() {
    let rig = Rig::start().await;
    rig.provider("main").await;
    let guest = Guest::new("web01", 1);
    let mut owner = host(&rig, "kvm1").await;
    owner.report(vec![guest.encrypted("main", &kek(1), 1)]).await;
    owner.ask(guest.key_request("main", &kek(1))).await.unwrap();

    let mut rogue = host(&rig, "kvm2").await;
    let own = Guest::new("bait", 2);
    // It reports the VM as its own, asks for it, asks for it under its own VM, under none, under a task it made up.
    rogue.report(vec![guest.encrypted("main", &kek(1), 2), own.encrypted("main", &kek(1), 1)]).await;
    let by_task = KeyRequest {
        task_id: "8c8d1d5e-1111-4111-8111-111111111111".into(),
        ..guest.key_request("main", &kek(1))
    };
    let without_vm = KeyRequest { vm_id: String::new(), ..guest.key_request("main", &kek(1)) };
    for request in [guest.key_request("main", &kek(1)), own.key_request("main", &kek(1)), by_task, without_vm]
    {
        let refused = rogue.ask(request.clone()).await.unwrap_err();
        assert_eq!(refused.code, "forbidden", "{request:?}: {}", refused.message);
    }
    // Mixing the ids of two VMs.
    let mixed = KeyRequest { domain_uuid: own.domain.to_string(), ..guest.key_request("main", &kek(1)) };
    assert_eq!(rogue.ask(mixed).await.unwrap_err().code, "unknown-vm");
    let alarms = audit(&rig).await.into_iter().filter(|e| e.verb == "alarm.key-request").count();
    assert_eq!(alarms, 4);
    owner.ask(guest.key_request("main", &kek(1))).await.unwrap();
}

#[tokio::test]
async fn vm_that_moved_gets_its_key_on_the_new_host_and_no_longer_on_the_old() {
    let rig = Rig::start().await;
    rig.provider("main").await;
    let guest = Guest::new("web01", 1);
    let (mut old, mut new) = (host(&rig, "kvm1").await, host(&rig, "kvm2").await);
    old.report(vec![guest.encrypted("main", &kek(1), 1)]).await;
    let grant = old.ask(guest.key_request("main", &kek(1))).await.unwrap();
    let key = old.open(&grant);
    old.report(vec![]).await;
    new.report(vec![guest.encrypted("main", &kek(1), 1)]).await;
    let grant = new.ask(guest.key_request("main", &kek(1))).await.unwrap();
    assert_eq!(new.open(&grant), key);
    assert_eq!(old.ask(guest.key_request("main", &kek(1))).await.unwrap_err().code, "forbidden");
}

#[tokio::test]
async fn domain_that_the_host_did_not_report_gets_no_key() {
    let rig = Rig::start().await;
    rig.provider("main").await;
    let mut host = host(&rig, "kvm1").await;
    let refused = host.ask(Guest::new("web01", 1).key_request("main", &kek(1))).await.unwrap_err();
    assert_eq!(refused.code, "unknown-vm");
}

#[tokio::test]
async fn key_of_a_task_goes_to_the_host_that_runs_it_while_it_runs() {
    let rig = Rig::start().await;
    rig.provider("main").await;
    let guest = Guest::new("web01", 1);
    let (mut worker, mut other) = (host(&rig, "kvm1").await, host(&rig, "kvm2").await);
    worker.report(vec![guest.clear()]).await;
    let encrypt = paths::fill(paths::VM_ENCRYPT, "web01");
    let task: Task = rig.root().post(&encrypt, &serde_json::json!({"source": "wipe"})).await.good();
    let command = worker.command().await;
    let Some(vmseal_api::agent::v1::command::Body::EncryptVm(asked)) = command.body else { panic!() };
    let request = KeyRequest {
        task_id: task.id.clone(),
        vm_id: String::new(),
        ..guest.key_request("main", &asked.kek_id)
    };
    assert_eq!(other.ask(request.clone()).await.unwrap_err().code, "forbidden");
    let grant = worker.ask(request.clone()).await.unwrap();
    worker.open(&grant);
    worker
        .task_is(vmseal_api::agent::v1::TaskEvent {
            task_id: task.id,
            state: "failed".into(),
            ..Default::default()
        })
        .await;
    assert_eq!(worker.ask(request).await.unwrap_err().code, "forbidden");
}

#[tokio::test]
async fn task_on_an_encrypted_vm_gets_that_vms_key_and_no_other() {
    let rig = Rig::start().await;
    rig.provider("main").await;
    let (guest, neighbour) = (Guest::new("web01", 1), Guest::new("web02", 2));
    let mut worker = host(&rig, "kvm1").await;
    worker.report(vec![guest.encrypted("main", &kek(1), 1), neighbour.encrypted("main", &kek(2), 1)]).await;
    let decrypt = paths::fill(paths::VM_DECRYPT, "web01");
    let task: Task = rig.root().post(&decrypt, &serde_json::json!({"source": "keep"})).await.good();
    let asked = KeyRequest { task_id: task.id, vm_id: String::new(), ..guest.key_request("main", &kek(1)) };
    let grant = worker.ask(asked.clone()).await.unwrap();
    worker.open(&grant);
    let other = KeyRequest { kek_id: kek(2), ..asked };
    assert_eq!(worker.ask(other).await.unwrap_err().code, "unknown-vm");
}

#[tokio::test]
async fn malformed_key_request_is_refused_and_the_session_goes_on() {
    let rig = Rig::start().await;
    let mut host = host(&rig, "kvm1").await;
    let good = Guest::new("web01", 1).key_request("main", &kek(1));
    for bad in [
        KeyRequest { provider: "../x".into(), ..good.clone() },
        KeyRequest { kek_id: Vec::new(), ..good.clone() },
        KeyRequest { kek_id: vec![0; 2000], ..good.clone() },
        KeyRequest { domain_uuid: "web01".into(), ..good.clone() },
        KeyRequest { vm_id: "web01".into(), ..good.clone() },
        KeyRequest { task_id: "'; DROP TABLE keys".into(), ..good.clone() },
    ] {
        assert_eq!(host.ask(bad).await.unwrap_err().code, "bad-request");
    }
    host.floors(&[]).await;
}
