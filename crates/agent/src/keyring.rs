//! KEKs on this host: asked of the server once, kept in secret memory while a VM that needs them is here.
//!
//! A grant arrives sealed to a key that this agent made and never wrote down, and is opened into secret memory. Asks
//! of several VMs for one key are one ask. Nothing of a key is written to disk.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock},
    time::{Duration, Instant},
};

use vmseal_api::agent::{
    KEY_GRANT_INFO,
    v1::{KeyGrant, KeyRefused, KeyRequest, from_agent::Body},
};
use vmseal_keys::{GrantError, Kek, SecretError, SessionKey, random_bytes};
use vmseal_model::{
    id::{DomainUuid, HostId, KekId, ProviderId, TaskId},
    refusal::Code,
};

use crate::{
    clock::now_ms,
    ports::{KeyMissing, KeyPurpose, KeySource},
    uplink::Uplink,
};

type KeyName = (ProviderId, KekId);

/// The keys.
pub struct Keyring {
    uplink: Arc<Uplink>,
    session: SessionKey,
    host: RwLock<Option<HostId>>,
    inner: Mutex<Inner>,
    answered: Condvar,
    late: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

#[derive(Default)]
struct Inner {
    keys: HashMap<KeyName, Kept>,
    asked: HashMap<KeyName, Arc<Ask>>,
}

struct Kept {
    kek: Arc<Kek>,
    users: BTreeSet<DomainUuid>,
}

/// One ask on its way, held by everybody who waits for it.
struct Ask {
    request: String,
    sent: Instant,
    answer: OnceLock<Result<Arc<Kek>, KeyMissing>>,
    /// Who gave up waiting; the key is theirs all the same when it comes.
    given_up: Mutex<BTreeSet<DomainUuid>>,
}

/// After so long an ask is taken for lost and sent anew.
const LOST: Duration = Duration::from_secs(10);

impl Keyring {
    /// An empty keyring with a session key of its own.
    ///
    /// # Errors
    ///
    /// [`GrantError`] if there is no secret memory.
    pub fn new(uplink: Arc<Uplink>) -> Result<Self, GrantError> {
        Ok(Self {
            uplink,
            session: SessionKey::generate()?,
            host: RwLock::default(),
            inner: Mutex::default(),
            answered: Condvar::new(),
            late: OnceLock::new(),
        })
    }

    /// What the server seals grants to; goes into the hello.
    pub fn session_public_key(&self) -> [u8; 32] {
        self.session.public()
    }

    /// The id grants are bound to, once this host has one.
    pub fn set_host(&self, host: HostId) {
        *self.host.write().unwrap_or_else(PoisonError::into_inner) = Some(host);
    }

    /// Has `call` called when a key comes for somebody who gave up waiting for it.
    pub fn on_late(&self, call: impl Fn() + Send + Sync + 'static) {
        let _ = self.late.set(Box::new(call));
    }

    /// Takes a grant. One that nobody asked for, or that does not open, is dropped.
    pub fn granted(&self, grant: &KeyGrant) {
        let Some(name) = name(&grant.provider, &grant.kek_id) else { return };
        if !self.is_asked(&name, &grant.request_id) {
            tracing::warn!(kek = %name.1, "dropped a key that nobody waits for");
            return;
        }
        let answer = self.open(&name, grant).map(Arc::new).map_err(|e| {
            let missing =
                missing(&name, Code::Integrity, format!("the key that the server sent does not open: {e}"));
            tracing::error!("{missing}");
            missing
        });
        self.answer(&name, &grant.request_id, answer);
    }

    /// Takes a refusal.
    pub fn refused(&self, refusal: &KeyRefused) {
        let Some(name) = name(&refusal.provider, &refusal.kek_id) else { return };
        let code = Code::from_word(&refusal.code).unwrap_or(Code::KeyMissing);
        // Whoever shows it says of which key and provider himself.
        let reason = refusal.message.split_once(" is missing: ").map_or(&*refusal.message, |(_, why)| why);
        let mut why = missing(&name, code, reason.to_owned());
        why.since_ms = refusal.since_ms;
        self.answer(&name, &refusal.request_id, Err(why));
    }

    /// The session broke: nobody waits for its answers any longer.
    pub fn session_lost(&self, reason: &str) {
        for (name, ask) in self.lock().asked.drain() {
            let _ = ask.answer.set(Err(missing(&name, Code::ServerUnreachable, reason.to_owned())));
        }
        self.answered.notify_all();
    }

    /// Forgets the keys that none of these domains uses.
    pub fn keep_only(&self, domains: &HashSet<DomainUuid>) {
        let mut inner = self.lock();
        for kept in inner.keys.values_mut() {
            kept.users.retain(|user| domains.contains(user));
        }
        inner.keys.retain(|_, kept| !kept.users.is_empty());
    }

    /// How many keys are held.
    pub fn len(&self) -> usize {
        self.lock().keys.len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn open(&self, name: &KeyName, grant: &KeyGrant) -> Result<Kek, GrantError> {
        let host = self.host.read().unwrap_or_else(PoisonError::into_inner).ok_or(GrantError::Open)?;
        let aad = grant_aad(host, &name.0, &name.1);
        let secret = self.session.open(KEY_GRANT_INFO, &aad, &grant.enc, &grant.sealed_kek)?;
        Ok(Kek::new(name.1.clone(), secret))
    }

    fn is_asked(&self, name: &KeyName, request: &str) -> bool {
        self.lock().asked.get(name).is_some_and(|ask| ask.request == request)
    }

    fn answer(&self, name: &KeyName, request: &str, answer: Result<Arc<Kek>, KeyMissing>) {
        let mut inner = self.lock();
        if inner.asked.get(name).is_none_or(|ask| ask.request != request) {
            return;
        }
        let Some(ask) = inner.asked.remove(name) else { return };
        let late = std::mem::take(&mut *ask.given_up.lock().unwrap_or_else(PoisonError::into_inner));
        let wanted_late = answer.is_ok() && !late.is_empty();
        if let Ok(kek) = &answer
            && wanted_late
        {
            let kept = Kept { kek: Arc::clone(kek), users: BTreeSet::new() };
            inner.keys.entry(name.clone()).or_insert(kept).users.extend(late);
        }
        let _ = ask.answer.set(answer);
        self.answered.notify_all();
        drop(inner);
        if let Some(call) = self.late.get().filter(|_| wanted_late) {
            call();
        }
    }

    /// Joins the ask for `name`, or begins it.
    fn ask(&self, inner: &mut Inner, name: &KeyName, purpose: &KeyPurpose) -> Result<Arc<Ask>, KeyMissing> {
        let before = inner.asked.get(name).map(Arc::clone);
        if let Some(ask) = before.as_ref().filter(|ask| ask.sent.elapsed() < LOST) {
            return Ok(Arc::clone(ask));
        }
        let no_request = |e: SecretError| missing(name, Code::Failed, e.to_string());
        let request = TaskId::from_random(random_bytes().map_err(no_request)?).to_string();
        let body = Body::KeyRequest(KeyRequest {
            request_id: request.clone(),
            provider: name.0.to_string(),
            kek_id: name.1.as_bytes().to_vec(),
            domain_uuid: purpose.domain.to_string(),
            vm_id: purpose.vm.map_or(String::new(), |id| id.to_string()),
            task_id: purpose.task.map_or(String::new(), |id| id.to_string()),
        });
        self.uplink.send(body).map_err(|down| {
            let mut why =
                missing(name, Code::ServerUnreachable, format!("no session to the server: {}", down.reason));
            why.since_ms = down.since_ms;
            why
        })?;
        let given_up = Mutex::new(before.map_or(BTreeSet::new(), |ask| {
            std::mem::take(&mut *ask.given_up.lock().unwrap_or_else(PoisonError::into_inner))
        }));
        let ask = Arc::new(Ask { request, sent: Instant::now(), answer: OnceLock::new(), given_up });
        inner.asked.insert(name.clone(), Arc::clone(&ask));
        Ok(ask)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KeySource for Keyring {
    fn kek(
        &self,
        provider: &ProviderId,
        kek: &KekId,
        purpose: &KeyPurpose,
        deadline: Duration,
    ) -> Result<Arc<Kek>, KeyMissing> {
        let until = Instant::now() + deadline;
        let name = (provider.clone(), kek.clone());
        let mut inner = self.lock();
        if let Some(kept) = inner.keys.get_mut(&name) {
            kept.users.insert(purpose.domain);
            return Ok(Arc::clone(&kept.kek));
        }
        let ask = self.ask(&mut inner, &name, purpose)?;
        let answer = loop {
            if let Some(answer) = ask.answer.get() {
                break answer.clone();
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // The ask stays: its answer may come in a moment, and then the VM starts by itself.
                ask.given_up.lock().unwrap_or_else(PoisonError::into_inner).insert(purpose.domain);
                let reason = format!("the server did not answer within {} ms", deadline.as_millis());
                break Err(missing(&name, Code::ServerUnreachable, reason));
            }
            inner = self.answered.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        let kek = answer?;
        let kept = inner.keys.entry(name).or_insert_with(|| Kept { kek, users: BTreeSet::new() });
        kept.users.insert(purpose.domain);
        Ok(Arc::clone(&kept.kek))
    }
}

/// Associated data of a grant: host id ‖ length of the provider's name ‖ name ‖ KEK id.
fn grant_aad(host: HostId, provider: &ProviderId, kek: &KekId) -> Vec<u8> {
    let mut aad = host.to_bytes().to_vec();
    aad.push(provider.as_str().len() as u8);
    aad.extend_from_slice(provider.as_str().as_bytes());
    aad.extend_from_slice(kek.as_bytes());
    aad
}

fn name(provider: &str, kek: &[u8]) -> Option<KeyName> {
    Some((provider.parse().ok()?, KekId::from_bytes(kek.to_vec())?))
}

fn missing(name: &KeyName, code: Code, reason: String) -> KeyMissing {
    KeyMissing { provider: name.0.clone(), kek: name.1.clone(), reason, code, since_ms: now_ms() }
}

#[cfg(test)]
mod tests;
