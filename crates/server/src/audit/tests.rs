//! Mutations of a chain, each found at its exact place.

use std::path::PathBuf;

use sqlx::AssertSqlSafe;

use super::*;
use crate::{clock::Clock, store::Store};

struct Chain {
    dir: PathBuf,
    store: Store,
}

impl Chain {
    async fn of(entries: u32, name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("vmseal-audit-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let root = RootKey::load_or_create(&dir.join("root.key")).unwrap();
        let key = AuditKey::of(&root).unwrap();
        let store = Store::open(&dir.join("server.db"), key, Clock::default()).await.unwrap();
        for n in 0..entries {
            let mut write = store.write().await.unwrap();
            let detail = format!("number {n}");
            let entry =
                Entry { who: "local root", verb: "test", object: "/", outcome: DONE, detail: &detail };
            write.audit(&entry).await.unwrap();
            write.commit().await.unwrap();
        }
        Self { dir, store }
    }

    /// As somebody would who has the file: without the triggers.
    async fn tamper(&self, statements: &[&str]) {
        let mut db = self.store.read().await.unwrap();
        let triggers = ["DROP TRIGGER audit_is_not_changed", "DROP TRIGGER audit_is_not_deleted"];
        for sql in triggers.iter().chain(statements) {
            sqlx::query(AssertSqlSafe(*sql)).execute(&mut *db).await.unwrap();
        }
    }

    async fn verify(&self) -> AuditVerification {
        verify(&mut self.store.read().await.unwrap(), self.store.audit_key()).await.unwrap()
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

#[tokio::test]
async fn untouched_chain_is_intact_even_if_empty() {
    let empty = Chain::of(0, "empty").await;
    assert!(empty.verify().await.intact);
    let chain = Chain::of(7, "intact").await;
    let found = chain.verify().await;
    assert!(found.intact, "{found:?}");
    assert_eq!(found.entries, 7);
    assert_ne!(found.head, GENESIS);
}

#[tokio::test]
async fn mutation_is_found_at_its_exact_place() {
    // The statements, the place, a word of the answer.
    let cases: &[(&str, &[&str], u64, &str)] = &[
        ("removed", &["DELETE FROM audit WHERE seq = 4"], 4, "removed"),
        ("first_removed", &["DELETE FROM audit WHERE seq <= 2"], 1, "removed"),
        ("tail_cut", &["DELETE FROM audit WHERE seq >= 6"], 6, "cut off"),
        ("all_cut", &["DELETE FROM audit"], 1, "cut off"),
        ("text_changed", &["UPDATE audit SET detail = 'else' WHERE seq = 3"], 3, "changed"),
        ("who_changed", &["UPDATE audit SET who = 'nobody' WHERE seq = 1"], 1, "changed"),
        ("time_changed", &["UPDATE audit SET at_ms = at_ms + 1 WHERE seq = 5"], 5, "changed"),
        ("outcome_changed", &["UPDATE audit SET outcome = 'forbidden' WHERE seq = 2"], 2, "changed"),
        (
            "reordered",
            &[
                "UPDATE audit SET seq = -1 WHERE seq = 3",
                "UPDATE audit SET seq = 3 WHERE seq = 4",
                "UPDATE audit SET seq = 4 WHERE seq = -1",
            ],
            3,
            "changed",
        ),
        ("seal_changed", &["UPDATE audit SET seal = hash WHERE seq = 6"], 6, "not written"),
        ("head_gone", &["DELETE FROM meta WHERE name = 'audit_head'"], 7, "head"),
        ("head_edited", &["UPDATE meta SET value = '6:00:00' WHERE name = 'audit_head'"], 7, "head"),
    ];
    for (name, statements, seq, word) in cases {
        let chain = Chain::of(7, name).await;
        chain.tamper(statements).await;
        let found = chain.verify().await;
        assert!(!found.intact, "{name}");
        let broken = found.broken.unwrap();
        assert_eq!(broken.seq, *seq, "{name}: {}", broken.what);
        assert!(broken.what.contains(word), "{name}: {}", broken.what);
    }
}

#[tokio::test]
async fn chain_computed_anew_without_the_root_key_is_found_at_its_first_forged_entry() {
    let chain = Chain::of(5, "anew").await;
    let mut rows = batch(&mut chain.store.read().await.unwrap(), 0, 10).await.unwrap();
    let mut previous = rows[1].hash.clone();
    let mut statements = Vec::new();
    for row in &mut rows[2..] {
        row.detail = "forged".into();
        row.hash = row.hash_after(&previous);
        previous = row.hash.clone();
        statements.push(format!(
            "UPDATE audit SET detail = 'forged', hash = '{}' WHERE seq = {}",
            row.hash, row.seq
        ));
    }
    chain.tamper(&statements.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let broken = chain.verify().await.broken.unwrap();
    assert_eq!((broken.seq, broken.what.as_str()), (3, "the entry was not written by this server"));
}

#[tokio::test]
async fn database_refuses_to_change_or_delete_an_entry() {
    let chain = Chain::of(2, "append_only").await;
    let mut db = chain.store.read().await.unwrap();
    assert!(sqlx::query("UPDATE audit SET who = 'x'").execute(&mut *db).await.is_err());
    assert!(sqlx::query("DELETE FROM audit").execute(&mut *db).await.is_err());
}

#[tokio::test]
async fn nothing_is_written_if_the_entry_cannot_be_appended() {
    let chain = Chain::of(1, "refused").await;
    chain
        .tamper(&[
            "CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'the disk is full'); END",
        ])
        .await;
    let mut write = chain.store.write().await.unwrap();
    meta::set(&mut write, "probe", "1").await.unwrap();
    let entry = Entry { who: "server", verb: "test", object: "/", outcome: DONE, detail: "" };
    assert!(write.audit(&entry).await.is_err());
    drop(write);
    assert_eq!(meta::get(&mut chain.store.read().await.unwrap(), "probe").await.unwrap(), None);
}
