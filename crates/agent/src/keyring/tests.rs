use std::thread;

use tokio::sync::mpsc::{Receiver, channel};
use vmseal_api::agent::v1::FromAgent;
use vmseal_keys::seal_to;

use super::*;
use crate::uplink::QUEUE;

const HOST: HostId = HostId::from_bytes([7; 16]);
const LONG: Duration = Duration::from_secs(20);

fn provider() -> ProviderId {
    "main".parse().unwrap()
}

fn kek_id() -> KekId {
    KekId::from_bytes(b"17".to_vec()).unwrap()
}

fn purpose(domain: u8) -> KeyPurpose {
    KeyPurpose { domain: DomainUuid::from_bytes([domain; 16]), vm: None, task: None }
}

fn connected() -> (Arc<Keyring>, Arc<Uplink>, Receiver<FromAgent>) {
    let uplink = Arc::new(Uplink::new("not joined"));
    let (out, sent) = channel(QUEUE);
    uplink.opened(out);
    let keyring = Arc::new(Keyring::new(Arc::clone(&uplink)).unwrap());
    keyring.set_host(HOST);
    (keyring, uplink, sent)
}

fn next_request(sent: &mut Receiver<FromAgent>) -> KeyRequest {
    match sent.blocking_recv().unwrap().body {
        Some(Body::KeyRequest(request)) => request,
        other => panic!("a key request, not {other:?}"),
    }
}

fn grant(keyring: &Keyring, request: &KeyRequest, host: HostId) -> KeyGrant {
    let aad = grant_aad(host, &provider(), &kek_id());
    let (enc, sealed_kek) = seal_to(&keyring.session_public_key(), KEY_GRANT_INFO, &aad, &[5; 32]).unwrap();
    KeyGrant {
        request_id: request.request_id.clone(),
        provider: request.provider.clone(),
        kek_id: request.kek_id.clone(),
        enc,
        sealed_kek,
    }
}

#[test]
fn granted_key_is_asked_for_once_and_kept_for_the_next() {
    let (keyring, uplink, mut sent) = connected();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| keyring.kek(&provider(), &kek_id(), &purpose(1), LONG));
        let request = next_request(&mut sent);
        assert_eq!(request.domain_uuid, purpose(1).domain.to_string());
        keyring.granted(&grant(&keyring, &request, HOST));
        assert_eq!(waiting.join().unwrap().unwrap().expose(), &[5; 32]);
    });
    uplink.closed("gone");
    assert!(keyring.kek(&provider(), &kek_id(), &purpose(2), Duration::ZERO).is_ok());
    assert!(sent.try_recv().is_err());
}

#[test]
fn two_who_want_one_key_make_one_ask() {
    let (keyring, _uplink, mut sent) = connected();
    thread::scope(|scope| {
        let first = scope.spawn(|| keyring.kek(&provider(), &kek_id(), &purpose(1), LONG));
        let request = next_request(&mut sent);
        let second = scope.spawn(|| keyring.kek(&provider(), &kek_id(), &purpose(2), LONG));
        // The map's handle, and one of each that waits.
        while keyring.lock().asked.values().map(Arc::strong_count).sum::<usize>() < 3 {
            thread::yield_now();
        }
        keyring.granted(&grant(&keyring, &request, HOST));
        assert!(first.join().unwrap().is_ok() && second.join().unwrap().is_ok());
    });
    assert!(sent.try_recv().is_err());
    assert!(keyring.lock().asked.is_empty());
}

#[test]
fn refusal_carries_code_reason_and_since() {
    let (keyring, _uplink, mut sent) = connected();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| keyring.kek(&provider(), &kek_id(), &purpose(1), LONG));
        let request = next_request(&mut sent);
        keyring.refused(&KeyRefused {
            request_id: request.request_id,
            provider: request.provider,
            kek_id: request.kek_id,
            code: "forbidden".into(),
            message: "not placed here".into(),
            since_ms: 5,
        });
        let why = waiting.join().unwrap().unwrap_err();
        assert_eq!((why.code, why.reason.as_str(), why.since_ms), (Code::Forbidden, "not placed here", 5));
    });
    assert!(keyring.is_empty());
}

#[test]
fn without_a_session_the_answer_is_at_once() {
    let keyring = Keyring::new(Arc::new(Uplink::new("connection refused"))).unwrap();
    let why = keyring.kek(&provider(), &kek_id(), &purpose(1), LONG).unwrap_err();
    assert_eq!(why.code, Code::ServerUnreachable);
    assert!(why.reason.contains("connection refused"), "{why}");
}

#[test]
fn slow_server_costs_no_more_than_the_deadline_and_its_late_key_is_kept_and_told() {
    let (keyring, _uplink, mut sent) = connected();
    let (tell, told) = std::sync::mpsc::channel();
    keyring.on_late(move || tell.send(()).unwrap());
    let why = keyring.kek(&provider(), &kek_id(), &purpose(1), Duration::from_millis(1)).unwrap_err();
    assert_eq!(why.code, Code::ServerUnreachable);
    let request = next_request(&mut sent);
    let _ = keyring.kek(&provider(), &kek_id(), &purpose(1), Duration::ZERO);
    assert!(sent.try_recv().is_err(), "the ask is on its way already");
    keyring.granted(&grant(&keyring, &request, HOST));
    told.try_recv().unwrap();
    assert!(keyring.kek(&provider(), &kek_id(), &purpose(1), Duration::ZERO).is_ok());
    keyring.granted(&grant(&keyring, &request, HOST));
    assert!(told.try_recv().is_err(), "an answer nobody asked for is dropped");
}

#[test]
fn lost_session_wakes_those_who_wait() {
    let (keyring, _uplink, mut sent) = connected();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| keyring.kek(&provider(), &kek_id(), &purpose(1), LONG));
        next_request(&mut sent);
        keyring.session_lost("the server went away");
        assert_eq!(waiting.join().unwrap().unwrap_err().reason, "the server went away");
    });
}

#[test]
fn grant_for_another_host_or_altered_is_refused() {
    for spoil in [0, 1] {
        let (keyring, _uplink, mut sent) = connected();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| keyring.kek(&provider(), &kek_id(), &purpose(1), LONG));
            let request = next_request(&mut sent);
            let host = if spoil == 0 { HostId::from_bytes([8; 16]) } else { HOST };
            let mut grant = grant(&keyring, &request, host);
            grant.sealed_kek[3] ^= spoil;
            keyring.granted(&grant);
            assert_eq!(waiting.join().unwrap().unwrap_err().code, Code::Integrity);
        });
        assert!(keyring.is_empty());
    }
}

#[test]
fn key_goes_with_the_last_vm_that_uses_it() {
    let (keyring, _uplink, mut sent) = connected();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| keyring.kek(&provider(), &kek_id(), &purpose(1), LONG));
        let request = next_request(&mut sent);
        keyring.granted(&grant(&keyring, &request, HOST));
        waiting.join().unwrap().unwrap();
    });
    keyring.kek(&provider(), &kek_id(), &purpose(2), LONG).unwrap();
    keyring.keep_only(&HashSet::from([purpose(2).domain]));
    assert_eq!(keyring.len(), 1);
    keyring.keep_only(&HashSet::new());
    assert!(keyring.is_empty());
}
