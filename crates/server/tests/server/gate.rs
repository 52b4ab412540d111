//! Joining, sessions, inventory.

use serde_json::json;
use tonic::Code;
use vmseal_api::{
    agent::v1::{Notice, agent_gate_client::AgentGateClient, from_agent},
    host::{Host, HostState},
    page::Page,
    paths,
    status::{Doctor, Status},
    vm::Vm,
};

use crate::{
    agent::{self, Guest},
    rig::Rig,
};

#[tokio::test]
async fn token_joins_one_host_within_its_hour() {
    let rig = Rig::start().await;
    let claims = agent::claims(&rig).await;
    assert_eq!(claims.ca_sha256, rig.server().ca.fingerprint());
    assert_eq!(claims.address, rig.running().gate.to_string());
    let (mut request, _) = agent::request(claims.secret.expose(), "kvm1");
    request.secret.push('x');
    let wrong = agent::ask_to_join(&rig, request).await.unwrap_err();
    assert_eq!(wrong.code(), Code::PermissionDenied);

    // A request that is refused for its certificate request does not use the token up.
    let (mut request, _) = agent::request(claims.secret.expose(), "kvm1");
    request.csr_pem = "nonsense".into();
    assert_eq!(agent::ask_to_join(&rig, request).await.unwrap_err().code(), Code::InvalidArgument);

    let (request, _) = agent::request(claims.secret.expose(), "kvm1");
    assert!(agent::ask_to_join(&rig, request.clone()).await.is_ok());
    assert_eq!(agent::ask_to_join(&rig, request).await.unwrap_err().code(), Code::PermissionDenied);

    let late = agent::claims(&rig).await;
    rig.clock.advance_ms(3_600_000);
    let (request, _) = agent::request(late.secret.expose(), "kvm2");
    assert_eq!(agent::ask_to_join(&rig, request).await.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn certificate_request_for_another_kind_of_key_is_refused() {
    let rig = Rig::start().await;
    let claims = agent::claims(&rig).await;
    let (mut request, _) = agent::request(claims.secret.expose(), "kvm1");
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    request.csr_pem = rcgen::CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
    assert_eq!(agent::ask_to_join(&rig, request).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn two_hosts_of_one_name_and_one_named_like_an_endpoint_get_names_of_their_own() {
    let rig = Rig::start().await;
    for name in ["kvm1", "kvm1", "join-tokens", "../\n"] {
        agent::join(&rig, name).await;
    }
    let hosts: Vec<Host> = rig.root().get(paths::HOSTS).await.good();
    let names: Vec<_> = hosts.iter().map(|h| h.name.as_str()).collect();
    assert!(
        names.contains(&"kvm1") && names.contains(&"kvm1-2") && names.contains(&"join-tokens-2"),
        "{names:?}"
    );
    assert!(names.iter().all(|n| n.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))));
}

#[tokio::test]
async fn session_without_a_certificate_or_after_removal_is_refused() {
    let rig = Rig::start().await;
    let joined = agent::join(&rig, "kvm1").await;
    let tls = tonic::transport::ClientTlsConfig::new()
        .ca_certificate(tonic::transport::Certificate::from_pem(rig.server().ca.pem()))
        .domain_name(vmseal_api::join::SERVER_NAME);
    let bare = agent::channel(&rig.running().gate.to_string(), tls).await;
    let refused = AgentGateClient::new(bare).session(tokio_stream::empty()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);

    let mut session = joined.connect(&rig).await;
    let _: Host = rig.root().delete(&paths::fill(paths::HOST, "kvm1")).await.good();
    assert!(matches!(session.next().await, Ok(None)), "the session ends with the removal");
    assert_eq!(joined.try_connect(&rig).await.err().unwrap().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn certificate_of_another_authority_gets_no_connection() {
    let rig = Rig::start().await;
    let other = Rig::start().await;
    let mut stranger = agent::join(&other, "kvm1").await;
    stranger.follow(&rig);
    assert!(stranger.try_connect(&rig).await.is_err());
}

#[tokio::test]
async fn newer_session_takes_the_place_of_the_older() {
    let rig = Rig::start().await;
    let joined = agent::join(&rig, "kvm1").await;
    let mut older = joined.connect(&rig).await;
    older.report(vec![]).await;
    let mut newer = joined.connect(&rig).await;
    newer.report(vec![Guest::new("web01", 1).clear()]).await;
    assert!(matches!(older.next().await, Ok(None)));
    let host: Host = rig.root().get(&paths::fill(paths::HOST, "kvm1")).await.good();
    assert_eq!((host.state, host.vms), (HostState::Connected, 1));
    assert_eq!((host.version.as_str(), host.secret_memory.as_str()), ("0.0.test", "memfd_secret"));
}

#[tokio::test]
async fn inventory_is_what_the_api_shows() {
    let rig = Rig::start().await;
    let mut host = agent::join(&rig, "kvm1").await.connect(&rig).await;
    let (clear, sealed) = (Guest::new("clear", 1), Guest::new("web01", 2));
    let mut partly = sealed.encrypted("main", b"key-1", 3);
    partly.disks.push(vmseal_api::agent::v1::Disk { target: "vdb".into(), ..partly.disks[0].clone() });
    partly.disks[1].encrypted = false;
    partly.state = "locked".into();
    partly.locked = Some(vmseal_api::agent::v1::Locked {
        provider: "main".into(),
        kek: "key-1".into(),
        since_ms: 77,
        reason: "gone".into(),
        wanted: true,
    });
    host.report(vec![clear.clear(), partly]).await;
    for name in ["web01".to_owned(), sealed.vm.to_string(), sealed.domain.to_string()] {
        let vm: Vm = rig.root().get(&paths::fill(paths::VM, &name)).await.good();
        assert_eq!((vm.name.as_str(), vm.host.as_str()), ("web01", "kvm1"));
        assert_eq!(json!([vm.state, vm.coverage]), json!(["locked", "partly-encrypted"]));
        let locked = vm.locked.unwrap();
        assert_eq!((locked.key.as_str(), locked.since_ms, locked.wanted), ("key-1", Some(77), true));
        assert_eq!((vm.disks[0].epoch, vm.disks[0].keys[0].key.as_str()), (Some(3), "key-1"));
        assert_eq!(vm.unprotected.len(), 1);
    }
    let status: Status = rig.root().get(paths::STATUS).await.good();
    assert_eq!((status.vms, status.vms_clear, status.vms_partly_encrypted, status.vms_locked), (2, 1, 1, 1));
    // What is no longer reported is gone.
    host.report(vec![clear.clear()]).await;
    rig.root().get(&paths::fill(paths::VM, "web01")).await.refused("not-found");
}

#[tokio::test]
async fn vm_name_on_two_hosts_is_a_conflict_that_lists_both() {
    let rig = Rig::start().await;
    let mut one = agent::join(&rig, "kvm1").await.connect(&rig).await;
    let mut two = agent::join(&rig, "kvm2").await.connect(&rig).await;
    one.report(vec![Guest::new("web01", 1).clear()]).await;
    two.report(vec![Guest::new("web01", 2).clear()]).await;
    let problem = rig.root().get(&paths::fill(paths::VM, "web01")).await.refused("conflict");
    assert_eq!(problem.details.len(), 2);
    assert!(problem.details[1].contains("kvm2"));
    let vm: Vm = rig.root().get(&paths::fill(paths::VM, &Guest::new("", 2).domain.to_string())).await.good();
    assert_eq!(vm.host, "kvm2");
}

#[tokio::test]
async fn list_of_vms_comes_in_pages_without_loss_or_repetition() {
    let rig = Rig::start().await;
    let mut host = agent::join(&rig, "kvm1").await.connect(&rig).await;
    let guests: Vec<_> = (1..=7).map(|n| Guest::new(&format!("vm{}", n % 3), n).clear()).collect();
    host.report(guests).await;
    let mut seen = Vec::new();
    let mut path = paths::with_query(paths::VMS, "limit", "3");
    loop {
        let page: Page<Vm> = rig.root().get(&path).await.good();
        seen.extend(page.items.into_iter().map(|vm| vm.domain_uuid));
        let Some(next) = page.next else { break };
        path = paths::with_query(&paths::with_query(paths::VMS, "limit", "3"), "cursor", &next);
    }
    assert_eq!(seen.len(), 7);
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 7);
}

#[tokio::test]
async fn doctor_tells_what_hosts_found_and_who_is_missing() {
    let rig = Rig::start().await;
    let joined = agent::join(&rig, "kvm1").await;
    let codes = async |rig: &Rig| {
        let doctor: Doctor = rig.root().get(paths::DOCTOR).await.good();
        doctor.findings.into_iter().map(|f| f.code).collect::<Vec<_>>()
    };
    assert_eq!(codes(&rig).await, ["host-unreachable"]);
    let mut host = joined.connect(&rig).await;
    host.floors(&[]).await;
    assert_eq!(codes(&rig).await, ["clear-swap"]);
    let notice = Notice {
        code: "unknown-client".into(),
        message: "process 7 at vda.sock".into(),
        domain_uuid: Guest::new("", 1).domain.to_string(),
    };
    host.say(from_agent::Body::Notice(notice)).await;
    let _: serde_json::Value =
        rig.root().post(paths::PROVIDERS, &json!({"name": "main", "kind": "native"})).await.good();
    host.report(vec![]).await;
    assert_eq!(codes(&rig).await, ["provider-not-backed-up", "alarm-unknown-client"]);
}

#[tokio::test]
async fn floor_rises_with_the_epoch_seen_and_never_falls() {
    let rig = Rig::start().await;
    let guest = Guest::new("web01", 1);
    let mut host = agent::join(&rig, "kvm1").await.connect(&rig).await;
    host.report(vec![guest.encrypted("main", b"k", 5)]).await;
    host.report(vec![guest.encrypted("main", b"k", 3)]).await;
    let floor = host.floors(&[guest.disk]).await.floors.remove(0);
    assert_eq!((floor.epoch, floor.record), (5, guest.record("main", b"k", 5)));
    // Another host learns nothing of it, nor raises it.
    let mut other = agent::join(&rig, "kvm2").await.connect(&rig).await;
    other.report(vec![guest.encrypted("main", b"k", 99)]).await;
    assert!(other.floors(&[guest.disk]).await.floors.is_empty());
    assert_eq!(host.floors(&[guest.disk]).await.floors[0].epoch, 5);
}

#[tokio::test]
async fn vm_with_foreign_ids_is_flagged_until_it_is_adopted() {
    let rig = Rig::start().await;
    let guest = Guest::new("web01", 1);
    let mut host = agent::join(&rig, "kvm1").await.connect(&rig).await;
    host.report(vec![guest.encrypted("main", b"k", 1)]).await;
    let copy = Guest { name: "copy".into(), domain: Guest::new("", 9).domain, ..guest.clone() };
    host.report(vec![guest.encrypted("main", b"k", 1), copy.encrypted("main", b"k", 1)]).await;
    let path = paths::fill(paths::VM, "copy");
    let vm: Vm = rig.root().get(&path).await.good();
    assert!(vm.unknown_ids);
    let encrypt = paths::fill(paths::VM_ENCRYPT, "copy");
    let refused = rig.root().post(&encrypt, &json!({"source": "wipe"})).await.refused("unknown-vm");
    assert!(refused.hint.unwrap().contains("vm adopt"));
    let doctor: Doctor = rig.root().get(paths::DOCTOR).await.good();
    assert!(doctor.findings.iter().any(|f| f.code == "unknown-vm"), "{doctor:?}");

    let adopted: Vm = rig.root().post(&paths::fill(paths::VM_ADOPT, "copy"), &()).await.good();
    assert!(!adopted.unknown_ids);
    let command = host.command().await;
    assert!(matches!(
        command.body,
        Some(vmseal_api::agent::v1::command::Body::AdoptVm(adopt)) if adopt.domain_uuid == copy.domain.to_string()
    ));
    // The copy is the VM now.
    host.report(vec![guest.encrypted("main", b"k", 1), copy.encrypted("main", b"k", 1)]).await;
    let vm: Vm = rig.root().get(&path).await.good();
    assert!(!vm.unknown_ids);
    let vm: Vm = rig.root().get(&paths::fill(paths::VM, "web01")).await.good();
    assert!(vm.unknown_ids);
}
