//! Providers: unusable before a verified backup, removed, brought back.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::json;
use vmseal_api::{
    key::{Key, KeyState},
    paths,
    provider::{ImportedProvider, Provider, ProviderBackup, RemovedProvider},
    status::Status,
};
use vmseal_model::id::{KekId, KeyUuid};

use crate::{
    agent::{self, Guest},
    rig::{PASSWORD, Rig},
};

fn kek() -> Vec<u8> {
    KekId::native(1, KeyUuid::from_random([1; 16])).as_bytes().to_vec()
}

#[tokio::test]
async fn provider_is_unusable_before_its_backup_was_read_back() {
    let rig = Rig::start().await;
    let mut host = agent::join(&rig, "kvm1").await.connect(&rig).await;
    let guest = Guest::new("web01", 1);
    host.report(vec![guest.clear()]).await;
    let root = rig.root();
    let encrypt = paths::fill(paths::VM_ENCRYPT, "web01");
    let asked = json!({"source": "wipe"});
    root.post(&encrypt, &asked).await.refused("no-provider");
    let _: Provider = root.post(paths::PROVIDERS, &json!({"name": "main", "kind": "native"})).await.good();
    let refused = root.post(&encrypt, &asked).await.refused("provider-not-backed-up");
    assert!(refused.hint.unwrap().contains("vmseal provider export main"));

    let export = paths::fill(paths::PROVIDER_EXPORT, "main");
    root.post(&export, &json!({"password": "short"})).await.refused("bad-request");
    let backup: ProviderBackup = root.post(&export, &json!({"password": PASSWORD})).await.good();
    assert_eq!(backup.file_name, "vmseal-provider-main.p12");
    // An export alone changes nothing; neither does a file that does not open, or a damaged one.
    root.post(&encrypt, &asked).await.refused("provider-not-backed-up");
    let confirm = paths::fill(paths::PROVIDER_CONFIRM_BACKUP, "main");
    let with = |p12: &str, password: &str| json!({"p12": p12, "password": password});
    root.post(&confirm, &with(&backup.p12, "another password")).await.refused("integrity");
    let mut damaged = STANDARD.decode(&backup.p12).unwrap();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    root.post(&confirm, &with(&STANDARD.encode(&damaged), PASSWORD)).await.refused("integrity");
    root.post(&confirm, &with("not base64!", PASSWORD)).await.refused("bad-request");
    let _: Provider = root.post(paths::PROVIDERS, &json!({"name": "other", "kind": "native"})).await.good();
    let other = paths::fill(paths::PROVIDER_CONFIRM_BACKUP, "other");
    root.post(&other, &with(&backup.p12, PASSWORD)).await.refused("conflict");
    root.post(&encrypt, &asked).await.refused("provider-not-backed-up");

    let confirmed: Provider = root.post(&confirm, &with(&backup.p12, PASSWORD)).await.good();
    assert!(confirmed.usable && confirmed.generations[0].backed_up_ms.is_some());
    assert!(root.post(&encrypt, &asked).await.status.is_success());
}

#[tokio::test]
async fn first_provider_is_the_default_until_another_is_made_it() {
    let rig = Rig::start().await;
    let root = rig.root();
    for name in ["a", "b"] {
        let _: Provider = root.post(paths::PROVIDERS, &json!({"name": name, "kind": "native"})).await.good();
    }
    let default = async || root.get(paths::STATUS).await.good::<Status>().default_provider;
    assert_eq!(default().await.as_deref(), Some("a"));
    let _: Provider = root.post(&paths::fill(paths::PROVIDER_DEFAULT, "b"), &()).await.good();
    assert_eq!(default().await.as_deref(), Some("b"));
    let _: Provider =
        root.post(paths::PROVIDERS, &json!({"name": "c", "kind": "native", "default": true})).await.good();
    assert_eq!(default().await.as_deref(), Some("c"));
    root.post(paths::PROVIDERS, &json!({"name": "import", "kind": "native"})).await.refused("bad-request");
    root.post(paths::PROVIDERS, &json!({"name": "a/b", "kind": "native"})).await.refused("bad-request");
}

#[tokio::test]
async fn provider_in_use_is_removed_only_dangerously_and_an_import_brings_its_keys_back() {
    let mut rig = Rig::start().await;
    let backup = rig.provider("main").await;
    let guest = Guest::new("web01", 1);
    let mut joined = agent::join(&rig, "kvm1").await;
    let mut host = joined.connect(&rig).await;
    host.report(vec![guest.encrypted("main", &kek(), 1)]).await;
    let grant = host.ask(guest.key_request("main", &kek())).await.unwrap();
    let key = host.open(&grant);

    let path = paths::fill(paths::PROVIDER, "main");
    let refused = rig.root().delete(&path).await.refused("provider-in-use");
    assert_eq!(refused.details, ["web01"]);
    let danger = paths::with_query(&path, "danger_lose_keys", "true");
    let before = rig.clock.now_ms();
    let removed: RemovedProvider = rig.root().delete(&danger).await.good();
    assert_eq!((removed.keys_lost, removed.vms), (1, vec!["web01".to_owned()]));

    // Missing since the removal, not since somebody asked, and after a restart too.
    rig.clock.advance_ms(60_000);
    rig.stop().await;
    rig.start_again().await.unwrap();
    joined.follow(&rig);
    let mut host = joined.connect(&rig).await;
    let refused = host.ask(guest.key_request("main", &kek())).await.unwrap_err();
    assert_eq!(refused.code, "key-missing");
    assert!((before..before + 30_000).contains(&refused.since_ms), "{} {before}", refused.since_ms);
    let shown = KekId::from_bytes(kek()).unwrap().to_string();
    assert!(refused.message.contains("main") && refused.message.contains(&shown), "{}", refused.message);
    let keys: Vec<Key> = rig.root().get(paths::KEYS).await.good();
    assert_eq!((keys[0].state, keys[0].missing_since_ms), (KeyState::Missing, Some(refused.since_ms)));

    // Nobody takes the name meanwhile: records name it.
    let new = json!({"name": "main", "kind": "native"});
    let taken = rig.root().post(paths::PROVIDERS, &new).await.refused("exists");
    assert!(taken.hint.unwrap().contains("import"));

    let mut import = json!({"p12": backup.p12, "password": PASSWORD, "dry_run": true});
    let report: ImportedProvider = rig.root().post(paths::PROVIDER_IMPORT, &import).await.good();
    assert!(report.new && report.dry_run);
    assert_eq!((report.keys_back, &report.vms), (1, &vec!["web01".to_owned()]));
    assert_eq!(host.ask(guest.key_request("main", &kek())).await.unwrap_err().code, "key-missing");
    import["dry_run"] = json!(false);
    let report: ImportedProvider = rig.root().post(paths::PROVIDER_IMPORT, &import).await.good();
    assert_eq!((report.generations_added, report.keys_back), (vec![1], 1));
    assert_eq!(host.keys_available().await, "main");
    let grant = host.ask(guest.key_request("main", &kek())).await.unwrap();
    assert_eq!(host.open(&grant), key);
    let provider: Provider = rig.root().get(&path).await.good();
    assert!(provider.usable && provider.default);
}

#[tokio::test]
async fn key_that_never_was_there_is_missing_since_it_was_first_asked_for() {
    let rig = Rig::start().await;
    let guest = Guest::new("web01", 1);
    let mut host = agent::join(&rig, "kvm1").await.connect(&rig).await;
    host.report(vec![guest.encrypted("lost", &kek(), 1)]).await;
    let first = host.ask(guest.key_request("lost", &kek())).await.unwrap_err();
    rig.clock.advance_ms(5_000);
    let second = host.ask(guest.key_request("lost", &kek())).await.unwrap_err();
    assert_eq!((first.code.as_str(), first.since_ms), ("key-missing", second.since_ms));
    assert!(first.since_ms > 0);
}

#[tokio::test]
async fn provider_of_which_no_key_is_in_use_is_removed_without_danger() {
    let rig = Rig::start().await;
    rig.provider("main").await;
    let removed: RemovedProvider = rig.root().delete(&paths::fill(paths::PROVIDER, "main")).await.good();
    assert_eq!(removed.keys_lost, 0);
    let _: Provider =
        rig.root().post(paths::PROVIDERS, &json!({"name": "main", "kind": "native"})).await.good();
}

#[tokio::test]
async fn import_of_another_provider_of_the_same_name_is_refused() {
    let rig = Rig::start().await;
    let other = Rig::start().await;
    let backup = other.provider("main").await;
    rig.provider("main").await;
    let import = json!({"p12": backup.p12, "password": PASSWORD});
    rig.root().post(paths::PROVIDER_IMPORT, &import).await.refused("exists");
    // On a server that never had one it is simply there.
    let third = Rig::start().await;
    let report: ImportedProvider = third.root().post(paths::PROVIDER_IMPORT, &import).await.good();
    assert!(report.new);
    let again: ImportedProvider = third.root().post(paths::PROVIDER_IMPORT, &import).await.good();
    assert!(!again.new && again.generations_added.is_empty());
}

#[tokio::test]
async fn lost_database_loses_no_key() {
    let mut rig = Rig::start().await;
    let backup = rig.provider("main").await;
    let guest = Guest::new("web01", 1);
    let mut joined = agent::join(&rig, "kvm1").await;
    let mut host = joined.connect(&rig).await;
    host.report(vec![guest.encrypted("main", &kek(), 4)]).await;
    let grant = host.ask(guest.key_request("main", &kek())).await.unwrap();
    let key = host.open(&grant);
    rig.stop().await;
    std::fs::remove_dir_all(&rig.config.state_dir).unwrap();
    rig.start_again().await.unwrap();
    // The authority went too: the host joins again. Inventory, floors and bindings come with its first report.
    let import = json!({"p12": backup.p12, "password": PASSWORD});
    let _: ImportedProvider = rig.root().post(paths::PROVIDER_IMPORT, &import).await.good();
    joined = agent::join(&rig, "kvm1").await;
    let mut host = joined.connect(&rig).await;
    host.report(vec![guest.encrypted("main", &kek(), 4)]).await;
    let grant = host.ask(guest.key_request("main", &kek())).await.unwrap();
    assert_eq!(host.open(&grant), key);
    assert_eq!(host.floors(&[guest.disk]).await.floors[0].epoch, 4);
}

#[tokio::test]
async fn provider_whose_keys_are_known_here_is_not_made_anew_under_its_name() {
    let other = Rig::start().await;
    let backup = other.provider("main").await;
    let rig = Rig::start().await;
    let guest = Guest::new("web01", 1);
    let mut host = agent::join(&rig, "kvm1").await.connect(&rig).await;
    host.report(vec![guest.encrypted("main", &kek(), 1)]).await;
    let new = json!({"name": "main", "kind": "native"});
    rig.root().post(paths::PROVIDERS, &new).await.refused("exists");
    let import = json!({"p12": backup.p12, "password": PASSWORD});
    let report: ImportedProvider = rig.root().post(paths::PROVIDER_IMPORT, &import).await.good();
    assert!(report.new);
    host.ask(guest.key_request("main", &kek())).await.unwrap();
}
