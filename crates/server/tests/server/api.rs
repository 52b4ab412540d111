//! The API as such: its document, who may do what, limits, sending a request again.

use std::collections::BTreeMap;

use hyper::{Method, StatusCode, header};
use serde_json::{Value, json};
use vmseal_api::{login::User, page::Page, paths, provider::Provider, status::Status};
use vmseal_model::operation::{OPERATIONS, ObjectKind};
use vmseal_server::http;

use crate::rig::{Rig, USER_PASSWORD};

/// Endpoints that act on the caller alone and have no row in the operation table.
const OWN: [&str; 2] = ["login", "logout"];

/// Every endpoint: operation, method, path.
fn endpoints() -> Vec<(String, Method, String)> {
    let document: Value = serde_json::from_str(&http::document()).unwrap();
    let mut all = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, endpoint) in methods.as_object().unwrap() {
            let operation = endpoint["operationId"].as_str().unwrap().to_owned();
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            all.push((operation, method, path.clone()));
        }
    }
    all
}

#[test]
fn document_is_the_one_in_the_tree() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../openapi/v1.json");
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        kept == http::document(),
        "openapi/v1.json is not what the server serves; if the change is meant: \
         cargo run -p vmseal-server -- openapi > openapi/v1.json"
    );
}

#[test]
fn every_operation_has_exactly_one_endpoint_and_every_endpoint_an_operation() {
    let mut counted: BTreeMap<String, u32> = BTreeMap::new();
    for (operation, ..) in endpoints() {
        *counted.entry(operation).or_default() += 1;
    }
    for operation in OPERATIONS {
        assert_eq!(counted.remove(operation.name), Some(1), "endpoints of {}", operation.name);
    }
    assert_eq!(counted.into_keys().collect::<Vec<_>>(), OWN);
}

#[test]
fn path_names_an_object_exactly_if_the_operation_acts_on_one() {
    for (operation, _, path) in endpoints() {
        let Some(row) = OPERATIONS.iter().find(|row| row.name == operation) else { continue };
        assert_eq!(path.contains('{'), row.object != ObjectKind::Root, "{operation} {path}");
    }
}

#[tokio::test]
async fn every_endpoint_refuses_nobody_and_a_user_without_a_role() {
    let rig = Rig::start().await;
    let new = json!({"name": "stranger", "password": USER_PASSWORD});
    let _: User = rig.root().post(paths::USERS, &new).await.good();
    let nobody = rig.remote();
    let stranger = rig.login("stranger", USER_PASSWORD).await;
    for (operation, method, path) in endpoints() {
        if operation == "login" {
            continue;
        }
        let path = paths::fill(&path, "x");
        let refused = nobody.send(method.clone(), &path, Vec::new()).await;
        assert_eq!(refused.status, StatusCode::UNAUTHORIZED, "{operation}");
        refused.refused("unauthenticated");
        let false_token = nobody.token("vms_guessed").send(method.clone(), &path, Vec::new()).await;
        assert_eq!(false_token.status, StatusCode::UNAUTHORIZED, "{operation}");
        if operation == "logout" {
            continue;
        }
        let refused = stranger.send(method, &path, Vec::new()).await;
        assert_eq!(refused.status, StatusCode::FORBIDDEN, "{operation}");
        refused.refused("forbidden");
    }
    // Each of the second kind is in the audit, by name.
    let page: Page<vmseal_api::audit::AuditEntry> =
        rig.root().get(&paths::with_query(paths::AUDIT, "limit", "1000")).await.good();
    let forbidden =
        page.items.iter().filter(|e| e.who == "user:stranger" && e.outcome == "forbidden").count();
    assert_eq!(forbidden, OPERATIONS.len());
}

#[tokio::test]
async fn administrator_logs_in_works_and_logs_out() {
    let rig = Rig::start().await;
    let new = json!({"name": "ada", "password": USER_PASSWORD, "role": "Administrator"});
    let _: User = rig.root().post(paths::USERS, &new).await.good();
    rig.root().post(paths::USERS, &new).await.refused("exists");
    let ada = rig.login("ada", USER_PASSWORD).await;
    let status: Status = ada.get(paths::STATUS).await.good();
    assert_eq!(status.you, "user:ada");
    ada.delete(paths::LOGIN).await.value();
    ada.get(paths::STATUS).await.refused("unauthenticated");

    let ada = rig.login("ada", USER_PASSWORD).await;
    rig.clock.advance_ms(vmseal_server::login::SESSION_MS);
    ada.get(paths::STATUS).await.refused("unauthenticated");
}

#[tokio::test]
async fn wrong_password_wrong_name_and_waiting_name_are_told_alike() {
    let rig = Rig::start().await;
    let new = json!({"name": "ada", "password": USER_PASSWORD});
    let _: User = rig.root().post(paths::USERS, &new).await.good();
    let remote = rig.remote();
    let wrong_name = json!({"name": "eve", "password": USER_PASSWORD});
    let wrong_password = json!({"name": "ada", "password": "something else"});
    let first = remote.post(paths::LOGIN, &wrong_name).await.refused("unauthenticated");
    for _ in 0..5 {
        assert_eq!(remote.post(paths::LOGIN, &wrong_password).await.refused("unauthenticated"), first);
    }
    let right = json!({"name": "ada", "password": USER_PASSWORD});
    let waits = remote.post(paths::LOGIN, &right).await.refused("unauthenticated");
    assert_eq!(waits.detail, first.detail);
    assert!(waits.hint.unwrap().contains("wait"));
    rig.clock.advance_ms(60_000);
    assert!(remote.post(paths::LOGIN, &right).await.status.is_success());
}

#[tokio::test]
async fn bad_user_names_passwords_and_roles_are_refused() {
    let rig = Rig::start().await;
    for (name, password, role) in [
        ("", USER_PASSWORD, None),
        ("a b", USER_PASSWORD, None),
        ("-a", USER_PASSWORD, None),
        ("ada", "short", None),
        ("ada", USER_PASSWORD, Some("King")),
    ] {
        let new = json!({"name": name, "password": password, "role": role});
        rig.root().post(paths::USERS, &new).await.refused("bad-request");
    }
}

#[tokio::test]
async fn malformed_requests_get_a_problem_and_the_server_goes_on() {
    let rig = Rig::start().await;
    let root = rig.root();
    let post = async |path: &str, body: Vec<u8>| root.send(Method::POST, path, body).await;
    post(paths::PROVIDERS, b"not json".to_vec()).await.refused("bad-request");
    post(paths::PROVIDERS, br#"{"name":"a","kind":"native","surprise":1}"#.to_vec())
        .await
        .refused("bad-request");
    post(paths::PROVIDERS, "[".repeat(100_000).into_bytes()).await.refused("bad-request");
    let huge = post(paths::PROVIDERS, vec![b' '; (1 << 20) + 1]).await;
    assert_eq!(huge.status, StatusCode::PAYLOAD_TOO_LARGE);
    huge.refused("bad-request");
    root.get("/v1/nothing").await.refused("not-found");
    let wrong = root.send(Method::PUT, paths::STATUS, Vec::new()).await;
    assert_eq!(wrong.status, StatusCode::METHOD_NOT_ALLOWED);
    wrong.refused("bad-request");
    root.get("/v1/vms/%ff").await.refused("bad-request");
    root.get("/v1/vms?limit=many").await.refused("bad-request");
    root.get("/v1/vms?cursor=AAAA").await.refused("bad-request");
    root.header(paths::IDEMPOTENCY_KEY, "with space")
        .post(paths::PROVIDERS, &json!({"name": "a", "kind": "native"}))
        .await
        .refused("bad-request");
    let _: Status = root.get(paths::STATUS).await.good();
}

#[tokio::test]
async fn request_sent_again_under_its_key_gives_the_same_answer_and_is_done_once() {
    let mut rig = Rig::start().await;
    let new = json!({"name": "main", "kind": "native"});
    let first = rig.root().header(paths::IDEMPOTENCY_KEY, "k1").post(paths::PROVIDERS, &new).await;
    let made: Provider = first.good();
    rig.stop().await;
    rig.start_again().await.unwrap();
    let keyed = rig.root().header(paths::IDEMPOTENCY_KEY, "k1");
    let again = keyed.post(paths::PROVIDERS, &new).await;
    assert_eq!((again.status, &again.body), (first.status, &first.body));
    // Another request under the same key is a fault; without one it is done, and refused.
    keyed.post(paths::PROVIDERS, &json!({"name": "other", "kind": "native"})).await.refused("conflict");
    rig.root().post(paths::PROVIDERS, &new).await.refused("exists");
    // Two at once: one is done, both get its answer.
    let keyed = rig.root().header(paths::IDEMPOTENCY_KEY, "k2");
    let (a, b) = tokio::join!(keyed.post(paths::JOIN_TOKENS, &()), keyed.post(paths::JOIN_TOKENS, &()));
    assert!(a.status.is_success() && a.body == b.body, "{a:?} {b:?}");
    // After a day the key is forgotten.
    rig.clock.advance_ms(24 * 3_600_000);
    let keyed = rig.root().header(paths::IDEMPOTENCY_KEY, "k1");
    keyed.post(paths::PROVIDERS, &new).await.refused("exists");
    let all: Vec<Provider> = rig.root().get(paths::PROVIDERS).await.good();
    assert_eq!(all.iter().map(|p| &p.uuid).collect::<Vec<_>>(), [&made.uuid]);
}

#[tokio::test]
async fn change_of_an_object_that_changed_meanwhile_is_refused() {
    let rig = Rig::start().await;
    let _: Provider = rig.root().post(paths::PROVIDERS, &json!({"name": "a", "kind": "native"})).await.good();
    let _: Provider = rig.root().post(paths::PROVIDERS, &json!({"name": "b", "kind": "native"})).await.good();
    let path = paths::fill(paths::PROVIDER, "b");
    let seen = rig.root().get(&path).await;
    let tag = seen.headers[header::ETAG].to_str().unwrap().to_owned();
    let guarded = rig.root().header("if-match", &tag);
    let set_default = paths::fill(paths::PROVIDER_DEFAULT, "b");
    assert!(guarded.post(&set_default, &()).await.status.is_success());
    let late = guarded.delete(&path).await;
    assert_eq!(late.status, StatusCode::PRECONDITION_FAILED);
    late.refused("conflict");
    assert!(rig.root().header("if-match", "*").delete(&path).await.status.is_success());
}

#[tokio::test]
async fn audit_tells_who_did_what_and_verifies() {
    let rig = Rig::start().await;
    rig.provider("main").await;
    let root = rig.root();
    root.delete(&paths::fill(paths::PROVIDER, "nothing")).await.refused("not-found");
    let page: Page<vmseal_api::audit::AuditEntry> = root.get(paths::AUDIT).await.good();
    let told: Vec<_> =
        page.items.iter().map(|e| (e.verb.as_str(), e.object.as_str(), e.outcome.as_str())).collect();
    assert_eq!(
        told,
        [
            ("provider.create", "/providers/main", "done"),
            ("provider.export", "/providers/main", "done"),
            ("provider.backed-up", "/providers/main", "done"),
            ("provider.remove", "/providers/nothing", "not-found"),
        ]
    );
    assert!(page.items.iter().all(|e| e.who == "local root"));
    let verified = root.get(paths::AUDIT_VERIFY).await.value();
    assert_eq!((&verified["intact"], &verified["entries"]), (&json!(true), &json!(4)));
    // In two pages.
    let first: Page<vmseal_api::audit::AuditEntry> = root.get("/v1/audit?limit=3").await.good();
    assert_eq!(first.next.as_deref(), Some("3"));
    let second: Page<vmseal_api::audit::AuditEntry> = root.get("/v1/audit?limit=3&after=3").await.good();
    assert_eq!((second.items.len(), second.next), (1, None));
}
