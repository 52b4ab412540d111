//! Users: passwords (argon2id) and sessions (opaque tokens, kept as their digests).
//!
//! A wrong name takes as long as a wrong password, and both are counted: after five in a row a name waits. Few
//! passwords are computed at a time, since each takes 19 MiB.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use argon2::{
    Argon2,
    password_hash::{PasswordHasher as _, PasswordVerifier as _, phc::PasswordHash},
};
use axum::http::StatusCode;
use tokio::sync::Semaphore;
use vmseal_api::{
    login::{CreateUser, Login, Session, User},
    secret_text::SecretText,
};
use vmseal_model::{operation::ROLES, refusal::Code};

use crate::{
    audit::{DONE, Entry},
    authz::Permit,
    digest::{random_token, sha256_hex},
    http::answer::Answer,
    refusal::{Refusal, shown},
    server::Server,
    store::{user, user::Grant},
};

/// How long a session lasts.
pub const SESSION_MS: i64 = 12 * 3_600_000;
/// Wrong passwords in a row before a name has to wait, and how long.
const TRIES: u32 = 5;
const WAIT_MS: i64 = 60_000;
/// Names counted at most; an attacker who uses more gets the count of all reset, and has waited for none.
const NAMES: usize = 10_000;
/// Shortest password.
pub const MIN_PASSWORD: usize = 12;
/// Longest password, in bytes.
const MAX_PASSWORD: usize = 1024;
/// What a wrong name is compared with.
const NOBODY: &str = "$argon2id$v=19$m=19456,t=2,p=1$dm1zZWFsIG5vYm9keSE$\
    /////////////////////////////////////////w8";

/// Counts wrong passwords and limits how many are computed.
pub struct LoginGuard {
    wrong: Mutex<HashMap<String, (u32, i64)>>,
    at_once: Semaphore,
}

impl Default for LoginGuard {
    fn default() -> Self {
        Self { wrong: Mutex::default(), at_once: Semaphore::new(2) }
    }
}

impl LoginGuard {
    fn must_wait(&self, name: &str, now_ms: i64) -> bool {
        let wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        wrong.get(name).is_some_and(|(tries, last)| *tries >= TRIES && now_ms < last + WAIT_MS)
    }

    fn note(&self, name: &str, right: bool, now_ms: i64) {
        let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        if right {
            wrong.remove(name);
            return;
        }
        if wrong.len() >= NAMES {
            wrong.clear();
        }
        let (tries, last) = wrong.entry(name.to_owned()).or_insert((0, now_ms));
        if *tries >= TRIES && now_ms >= *last + WAIT_MS {
            *tries = 0;
        }
        (*tries, *last) = (*tries + 1, now_ms);
    }
}

/// Longest name that is looked for; what strangers send is kept a while.
const MAX_NAME: usize = 256;

/// Begins a session.
pub(crate) async fn begin(server: &Server, asked: Login) -> Result<Answer, Refusal> {
    let Login { name, password } = asked;
    let now_ms = server.clock.now_ms();
    if name.len() > MAX_NAME {
        return Err(wrong());
    }
    let who = format!("user:{}", shown(&name));
    if server.logins.must_wait(&name, now_ms) {
        return Err(wrong().hint("too many wrong passwords for this name: wait a minute"));
    }
    let stored = user::password_hash(&mut *server.store.read().await?, &name).await?;
    let right = verify(server, stored, password).await?;
    server.logins.note(&name, right, now_ms);
    let mut write = server.store.write().await?;
    if !right {
        let entry = Entry {
            who: "nobody",
            verb: "session.begin",
            object: "/",
            outcome: Code::Unauthenticated.as_str(),
            detail: &who,
        };
        write.audit(&entry).await?;
        write.commit().await?;
        return Err(wrong());
    }
    let token = random_token("vms_")?;
    let expires_ms = now_ms.saturating_add(SESSION_MS);
    user::begin_session(&mut write, &sha256_hex(token.expose().as_bytes()), &name, now_ms, expires_ms)
        .await?;
    let roles = user::grants(&mut write, &name).await?.into_iter().map(|g| g.role).collect();
    write.audit(&Entry { who: &who, verb: "session.begin", object: "/", outcome: DONE, detail: "" }).await?;
    write.commit().await?;
    Answer::ok(&Session { token, expires_ms, name, roles })
}

/// Ends a session.
pub(crate) async fn end(server: &Server, name: &str, token_sha256: &str) -> Result<Answer, Refusal> {
    let who = format!("user:{name}");
    let mut write = server.store.write().await?;
    user::end_session(&mut write, token_sha256).await?;
    write.audit(&Entry { who: &who, verb: "session.end", object: "/", outcome: DONE, detail: "" }).await?;
    write.commit().await?;
    Ok(Answer::of(StatusCode::OK, b"{}".to_vec()))
}

/// Makes a user.
pub(crate) async fn create(server: &Server, permit: &Permit, new: CreateUser) -> Result<Answer, Refusal> {
    let CreateUser { name, password, role } = new;
    check_name(&name)?;
    if password.expose().chars().count() < MIN_PASSWORD || password.expose().len() > MAX_PASSWORD {
        return Err(Refusal::bad_request(format!(
            "a password has at least {MIN_PASSWORD} characters and at most {MAX_PASSWORD} bytes"
        )));
    }
    if let Some(role) = &role
        && !ROLES.iter().any(|r| r.name == role)
    {
        let known: Vec<String> = ROLES.iter().map(|r| r.name.to_owned()).collect();
        return Err(Refusal::bad_request(format!("there is no role '{}'", shown(role))).details(known));
    }
    let hash = hash(server, password).await?;
    let mut change = permit.begin().await?;
    let now_ms = change.now_ms();
    user::insert(&mut change, &name, &hash, now_ms).await.map_err(|error| {
        if error.is_duplicate() {
            Refusal::new(Code::Exists, format!("there already is a user {name}"))
        } else {
            error.into()
        }
    })?;
    if let Some(role) = &role {
        user::grant(&mut change, &name, &Grant { role: role.clone(), path: "/".into() }).await?;
    }
    change.on(format!("/users/{name}"));
    let user = User { name, roles: role.into_iter().collect() };
    let detail = format!("roles {:?}", user.roles);
    change.commit(StatusCode::CREATED, &user, &detail).await
}

fn check_name(name: &str) -> Result<(), Refusal> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '@');
    let good = (1..=64).contains(&name.len())
        && name.chars().all(plain)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if good {
        return Ok(());
    }
    Err(Refusal::bad_request(
        "a user's name is 1 to 64 letters, digits, '.', '_', '-' or '@', starting with a letter or digit",
    ))
}

fn wrong() -> Refusal {
    Refusal::new(Code::Unauthenticated, "name or password is wrong")
}

async fn hash(server: &Server, password: SecretText) -> Result<String, Refusal> {
    slowly(server, move || {
        Argon2::default().hash_password(password.expose().as_bytes()).map(|hash| hash.to_string())
    })
    .await?
    .map_err(|_| Refusal::new(Code::Failed, "the password could not be hashed"))
}

async fn verify(server: &Server, stored: Option<String>, password: SecretText) -> Result<bool, Refusal> {
    if password.expose().len() > MAX_PASSWORD {
        return Ok(false);
    }
    slowly(server, move || {
        let known = stored.is_some();
        let right = PasswordHash::new(stored.as_deref().unwrap_or(NOBODY))
            .is_ok_and(|hash| Argon2::default().verify_password(password.expose().as_bytes(), &hash).is_ok());
        known && right
    })
    .await
}

/// Does on a thread of its own what takes memory and time, few at once.
async fn slowly<T: Send + 'static>(
    server: &Server,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Refusal> {
    let failed = || Refusal::new(Code::Failed, "the password could not be processed");
    let _turn = server.logins.at_once.acquire().await.map_err(|_| failed())?;
    tokio::task::spawn_blocking(work).await.map_err(|_| failed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fifth_wrong_password_in_a_row_makes_the_name_wait_and_a_right_one_resets() {
        let guard = LoginGuard::default();
        for _ in 0..TRIES {
            assert!(!guard.must_wait("ada", 0));
            guard.note("ada", false, 0);
        }
        assert!(guard.must_wait("ada", WAIT_MS - 1));
        assert!(!guard.must_wait("bob", 0));
        assert!(!guard.must_wait("ada", WAIT_MS));
        guard.note("ada", false, WAIT_MS);
        assert!(!guard.must_wait("ada", WAIT_MS), "a new count begins after the wait");
        guard.note("ada", true, WAIT_MS);
        assert!(guard.wrong.lock().unwrap().is_empty());
    }

    #[test]
    fn hash_for_wrong_names_costs_as_much_as_a_real_one() {
        let real = Argon2::default().hash_password(b"a password, a test").unwrap().to_string();
        let cost = |hash: &str| PasswordHash::new(hash).unwrap().params.to_string();
        assert_eq!(cost(NOBODY), cost(&real));
        let nobody = PasswordHash::new(NOBODY).unwrap();
        assert!(nobody.hash.is_some() && nobody.salt.is_some());
    }
}
