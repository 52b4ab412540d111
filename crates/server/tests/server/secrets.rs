//! No secret in a log or in a file, and what is lost is not made anew.

use std::{
    io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{Arc, Mutex},
};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use serde_json::json;
use tracing_subscriber::fmt::MakeWriter;
use vmseal_api::{login::User, paths, provider::ProviderBackup, task::Task};
use vmseal_model::id::{KekId, KeyUuid, ProviderUuid};
use vmseal_provider::{RootKey, StoredGeneration};
use vmseal_server::{
    audit::AuditKey,
    clock::Clock,
    store::{Store, provider},
};

use crate::{
    agent::{self, Guest},
    rig::{PASSWORD, Rig, USER_PASSWORD},
};

/// Everything that was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

fn contains(hay: &[u8], needle: &[u8]) -> bool {
    hay.windows(needle.len()).any(|window| window == needle)
}

/// Every file below `dir`, with its content.
fn files(dir: &Path, all: &mut Vec<(String, Vec<u8>)>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, all);
        } else if path.is_file() {
            all.push((path.display().to_string(), std::fs::read(&path).unwrap()));
        }
    }
}

/// The KDK in a row of the store: `VMSK`, version and zero (8 bytes), nonce (12), ciphertext (32), tag (16), under the
/// root key, with provider uuid and generation as associated data.
fn kdk_of(root_key: &[u8], row: &StoredGeneration, uuid: &str) -> Vec<u8> {
    let uuid: ProviderUuid = uuid.parse().unwrap();
    let aad = [uuid.to_bytes().as_slice(), &row.number.to_le_bytes()].concat();
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, root_key).unwrap());
    let nonce = Nonce::try_assume_unique_for_key(&row.sealed[8..20]).unwrap();
    let mut opened = row.sealed[20..].to_vec();
    key.open_in_place(nonce, Aad::from(aad), &mut opened).unwrap().to_vec()
}

#[tokio::test]
async fn passwords_tokens_and_keys_are_in_no_log_and_no_file() {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(log.clone())
        .finish();
    // Threads of other tests log elsewhere; this one's server runs on this thread.
    let _guard = tracing::subscriber::set_default(subscriber);

    let mut rig = Rig::start().await;
    let backup = rig.provider("main").await;
    let new = json!({"name": "ada", "password": USER_PASSWORD, "role": "Administrator"});
    let _: User = rig.root().header(paths::IDEMPOTENCY_KEY, "u").post(paths::USERS, &new).await.good();
    let ada = rig.login("ada", USER_PASSWORD).await;
    let wrong = "VMSEAL-TEST-SECRET-wrong";
    rig.remote()
        .post(paths::LOGIN, &json!({"name": "ada", "password": wrong}))
        .await
        .refused("unauthenticated");
    // A secret in the wrong place, which the refusal may quote to the one who sent it.
    let misplaced = json!({"name": 5, "password": wrong, "kind": "VMSEAL-TEST-SECRET-misplaced"});
    ada.post(paths::PROVIDERS, &misplaced).await.refused("bad-request");
    let export = paths::fill(paths::PROVIDER_EXPORT, "main");
    let kept = ada.header(paths::IDEMPOTENCY_KEY, "e").post(&export, &json!({"password": PASSWORD})).await;
    let _: ProviderBackup = kept.good();
    let claims = agent::claims(&rig).await;
    let joined = agent::join(&rig, "kvm1").await;
    let mut host = joined.connect(&rig).await;
    let guest = Guest::new("web01", 1);
    host.report(vec![guest.clear()]).await;
    let encrypt = paths::fill(paths::VM_ENCRYPT, "web01");
    let _: Task = ada.post(&encrypt, &json!({"source": "wipe"})).await.good();
    let kek = KekId::native(1, KeyUuid::from_random([1; 16])).as_bytes().to_vec();
    host.report(vec![guest.encrypted("main", &kek, 1)]).await;
    let grant = host.ask(guest.key_request("main", &kek)).await.unwrap();
    let key = host.open(&grant);
    let import = json!({"p12": backup.p12, "password": PASSWORD});
    let _: serde_json::Value = ada.post(paths::PROVIDER_IMPORT, &import).await.good();

    let token = ada.shown_token();
    let root_key = std::fs::read(rig.config.root_key_path()).unwrap();
    let mut db = rig.server().store.read().await.unwrap();
    let row = provider::get(&mut db, "main").await.unwrap().unwrap();
    let kdk = kdk_of(&root_key, &provider::generations(&mut db, "main").await.unwrap()[0], &row.uuid);
    drop(db);
    let mut found = Vec::new();
    files(&rig.dir, &mut found);
    rig.stop().await;
    files(&rig.dir, &mut found);
    let logged = log.0.lock().unwrap().clone();
    assert!(contains(&logged, b"a host joined"), "the log was caught");
    assert!(found.iter().any(|(name, _)| name.ends_with("server.db")), "the database was searched");
    found.push(("the log".into(), logged));
    let p12 = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, &backup.p12).unwrap();
    for (name, content) in &found {
        assert!(!contains(content, b"VMSEAL-TEST-SECRET"), "a password is in {name}");
        assert!(!contains(content, token.as_bytes()), "a session token is in {name}");
        assert!(!contains(content, claims.secret.expose().as_bytes()), "a join secret is in {name}");
        assert!(!contains(content, &key), "a KEK is in {name}");
        assert!(!contains(content, &kdk), "a KDK is in {name}");
        assert!(!contains(content, &p12[64..128]), "a backup is in {name}");
        assert!(!contains(content, &backup.p12.as_bytes()[64..128]), "a backup is in {name}");
        assert!(name.ends_with("root.key") || !contains(content, &root_key), "the root key is in {name}");
    }
}

#[tokio::test]
async fn sealed_kdk_is_gone_from_every_file_once_its_provider_is_removed() {
    let mut rig = Rig::start().await;
    rig.provider("main").await;
    let mut db = rig.server().store.read().await.unwrap();
    let sealed = provider::generations(&mut db, "main").await.unwrap();
    drop(db);
    let holds = |rig: &Rig| {
        let mut all = Vec::new();
        files(&rig.config.state_dir, &mut all);
        all.iter().any(|(_, content)| contains(content, &sealed[0].sealed[20..]))
    };
    assert!(holds(&rig));
    let _: serde_json::Value = rig.root().delete(&paths::fill(paths::PROVIDER, "main")).await.good();
    assert!(!holds(&rig));
    rig.stop().await;
    assert!(!holds(&rig));
}

#[tokio::test]
async fn server_does_not_start_without_its_root_key_or_half_of_its_authority() {
    let mut rig = Rig::start().await;
    agent::join(&rig, "hv1").await;
    rig.stop().await;
    for name in ["root.key", "ca.pem", "ca.key"] {
        let (path, aside) = (rig.config.state_dir.join(name), rig.dir.join(name));
        std::fs::rename(&path, &aside).unwrap();
        let error = rig.start_again().await.err().unwrap();
        let text = vmseal_server::refusal::causes(&error);
        assert!(text.contains(name), "{text}");
        assert!(!path.exists(), "{name} was made anew");
        std::fs::rename(&aside, &path).unwrap();
    }
    rig.start_again().await.unwrap();
}

#[tokio::test]
async fn first_start_that_was_cut_short_is_gone_on_with() {
    let mut rig = Rig::start().await;
    rig.stop().await;
    // Killed after the key was written, then after the database was.
    for names in [&["ca.pem"][..], &["ca.pem", "ca.key"]] {
        names.iter().for_each(|name| std::fs::remove_file(rig.config.state_dir.join(name)).unwrap());
        rig.start_again().await.unwrap();
        agent::claims(&rig).await;
        rig.stop().await;
    }
}

#[tokio::test]
async fn second_server_on_the_same_state_is_refused() {
    let rig = Rig::start().await;
    let error = vmseal_server::server::start(&rig.config, Clock::default()).await.err().unwrap();
    assert!(error.to_string().contains("another vmseal-server"), "{error}");
    // The first one's socket is still there.
    let _: serde_json::Value = rig.root().get(paths::STATUS).await.good();
}

#[tokio::test]
async fn provider_under_another_root_key_is_found_by_the_doctor_and_the_others_go_on() {
    let mut rig = Rig::start().await;
    rig.provider("main").await;
    rig.provider("spare").await;
    rig.stop().await;
    // As if the database had been put together from two backups.
    let root = RootKey::load(&rig.config.root_key_path()).unwrap();
    let key = AuditKey::of(&root).unwrap();
    let store = Store::open(&rig.config.state_dir.join("server.db"), key, Clock::default()).await.unwrap();
    sqlx::query("UPDATE generations SET sealed_kdk = zeroblob(68) WHERE provider = 'main'")
        .execute(&mut *store.read().await.unwrap())
        .await
        .unwrap();
    store.close().await;
    rig.start_again().await.unwrap();
    let doctor = rig.root().get(paths::DOCTOR).await.value();
    assert_eq!(doctor["findings"][0]["code"], json!("provider-unreadable"));
    let export = paths::fill(paths::PROVIDER_EXPORT, "main");
    rig.root().post(&export, &json!({"password": PASSWORD})).await.refused("integrity");
    rig.back_up("spare").await;
}

#[tokio::test]
async fn what_the_server_writes_is_its_users_alone() {
    let rig = Rig::start().await;
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&rig.config.state_dir), 0o700);
    assert_eq!(mode(&rig.config.state_dir.join("root.key")), 0o600);
    assert_eq!(mode(&rig.config.state_dir.join("ca.key")), 0o600);
    assert_eq!(mode(&rig.running().socket), 0o666);
}
