//! VMs that should run and cannot yet: refused for want of a key, or running without the process that served their
//! disks.
//!
//! Refused starts and lost processes in, starts and new processes out, on two threads, whenever somebody rings because
//! keys may be there. A refused start is tried once a ring, and now and then where only the server did not answer; a
//! lost process every few seconds, for a guest waits for it. Refused starts outlive the agent in
//! `<state dir>/wanted.json` and are forgotten at a reboot, where autostart says anew what is wanted.

use std::{
    collections::BTreeMap,
    fs, io,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use vmseal_model::{
    id::{DomainUuid, KekId, ProviderId},
    refusal::Code,
};

use crate::{
    ports::{Hypervisor, HypervisorError, KeyMissing},
    start::{NoStart, Starter, plan::Plan},
    uplink::Uplink,
    volume::{hex, unhex},
};

/// Between two tries to serve a guest that waits.
const PAUSE: Duration = Duration::from_secs(2);
/// Between two tries to start a VM whose key the server did not give in time.
const AGAIN: Duration = Duration::from_secs(20);
/// How long keys may take for such a guest.
const PATIENCE: Duration = Duration::from_secs(8);
/// Version of the file.
const VERSION: u32 = 1;
/// Most bytes read of it.
const MAX_FILE: u64 = 16 << 20;

/// The VMs.
pub struct Wanted {
    state: Mutex<State>,
    bell: Condvar,
    file: PathBuf,
}

#[derive(Default)]
struct State {
    /// Starts that were refused for want of a key.
    refused: BTreeMap<DomainUuid, Wish>,
    /// Guests without their process.
    lost: BTreeMap<DomainUuid, Lost>,
    rung_for_lost: bool,
    rung_for_refused: bool,
    notes: u64,
}

#[derive(Clone)]
struct Wish {
    name: String,
    missing: KeyMissing,
    /// Which note this is: one that is older than a try was answered by that try.
    note: u64,
}

#[derive(Clone)]
struct Lost {
    plan: Arc<Plan>,
    missing: Option<KeyMissing>,
    /// What was said last, so that it is not said every few seconds.
    said: String,
}

impl Wanted {
    /// Those that an earlier run of the agent left; see [`Wanted::work`].
    pub fn open(state_dir: &std::path::Path) -> Self {
        let file = state_dir.join("wanted.json");
        let refused = read(&file).unwrap_or_else(|error| {
            tracing::warn!("which VMs were wanted is not known: {}: {error}", file.display());
            BTreeMap::new()
        });
        Self { state: Mutex::new(State { refused, ..State::default() }), bell: Condvar::new(), file }
    }

    /// A start was refused since this key is missing.
    pub fn refused(&self, domain: DomainUuid, name: &str, missing: &KeyMissing) {
        let mut state = self.lock();
        state.notes += 1;
        let mut wish = Wish { name: name.to_owned(), missing: missing.clone(), note: state.notes };
        // The first date is when it began.
        if let Some(before) = state.refused.get(&domain).filter(|w| w.missing.kek == missing.kek) {
            wish.missing.since_ms = earlier(before.missing.since_ms, missing.since_ms);
        }
        state.refused.insert(domain, wish);
        self.keep(&state);
    }

    /// It started, or nobody wants it any longer.
    pub fn settled(&self, domain: DomainUuid) {
        let mut state = self.lock();
        if state.refused.remove(&domain).is_some() {
            self.keep(&state);
        }
    }

    /// A running guest has lost the process that served its disks.
    pub fn lost(&self, plan: Arc<Plan>) {
        let mut state = self.lock();
        state.lost.insert(plan.domain, Lost { plan, missing: None, said: String::new() });
        state.rung_for_lost = true;
        drop(state);
        self.bell.notify_all();
    }

    /// The guest without its process has ended.
    pub fn ended(&self, domain: DomainUuid) {
        self.lock().lost.remove(&domain);
    }

    /// Whether a guest runs without its process.
    pub fn is_lost(&self, domain: DomainUuid) -> bool {
        self.lock().lost.contains_key(&domain)
    }

    /// The key that a VM lacks, and whether it is to start by itself.
    pub fn locked(&self, domain: DomainUuid) -> Option<(KeyMissing, bool)> {
        let state = self.lock();
        let refused = state.refused.get(&domain).map(|wish| (wish.missing.clone(), true));
        refused.or_else(|| Some((state.lost.get(&domain)?.missing.clone()?, false)))
    }

    /// Keys may be there: try.
    pub fn ring(&self) {
        {
            let mut state = self.lock();
            (state.rung_for_lost, state.rung_for_refused) = (true, true);
        }
        self.bell.notify_all();
    }

    /// Tries for ever, on threads of its own; `changed` is called with every domain whose state changed.
    ///
    /// # Errors
    ///
    /// If there can be no thread.
    pub fn work(
        self: &Arc<Self>,
        starter: Arc<Starter>,
        hypervisor: Arc<dyn Hypervisor>,
        uplink: Arc<Uplink>,
        changed: impl Fn(DomainUuid) + Send + Sync + 'static,
    ) -> io::Result<()> {
        let worker =
            Worker { wanted: Arc::clone(self), starter, hypervisor, uplink, changed: Box::new(changed) };
        let (worker, starts) = (Arc::new(worker), thread::Builder::new().name("wanted-starts".to_owned()));
        // Apart: a start that libvirt does not finish must not keep running guests from their disks.
        let of_refused = Arc::clone(&worker);
        starts.spawn(move || of_refused.start_refused())?;
        thread::Builder::new().name("wanted-disks".to_owned()).spawn(move || worker.serve_lost())?;
        Ok(())
    }

    /// Waits for a ring, or as long as `at_most` says; true after a ring.
    fn wait(
        &self,
        rung: impl Fn(&mut State) -> &mut bool,
        at_most: impl Fn(&State) -> Option<Duration>,
    ) -> bool {
        let mut state = self.lock();
        loop {
            if std::mem::take(rung(&mut state)) {
                return true;
            }
            let Some(at_most) = at_most(&state) else {
                state = self.bell.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let (again, late) =
                self.bell.wait_timeout(state, at_most).unwrap_or_else(PoisonError::into_inner);
            state = again;
            if late.timed_out() {
                return std::mem::take(rung(&mut state));
            }
        }
    }

    fn keep(&self, state: &State) {
        if let Err(error) = write(&self.file, &state.refused) {
            tracing::warn!("{} is not written: {error}", self.file.display());
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Worker {
    wanted: Arc<Wanted>,
    starter: Arc<Starter>,
    hypervisor: Arc<dyn Hypervisor>,
    uplink: Arc<Uplink>,
    changed: Box<dyn Fn(DomainUuid) + Send + Sync>,
}

impl Worker {
    fn serve_lost(&self) {
        loop {
            self.wanted.wait(|state| &mut state.rung_for_lost, |s| (!s.lost.is_empty()).then_some(PAUSE));
            let lost: Vec<Lost> = self.wanted.lock().lost.values().cloned().collect();
            lost.into_iter().for_each(|lost| self.serve(lost));
        }
    }

    fn start_refused(&self) {
        let unanswered = |wish: &Wish| wish.missing.code == Code::ServerUnreachable;
        loop {
            let rung = self.wanted.wait(
                |state| &mut state.rung_for_refused,
                |state| state.refused.values().any(unanswered).then_some(AGAIN),
            );
            let mut refused = self.wanted.lock().refused.clone();
            // A key that a server said is missing is not asked for before something changed.
            refused.retain(|_, wish| rung || (unanswered(wish) && self.uplink.is_up()));
            refused.into_iter().for_each(|(domain, wish)| self.start(domain, &wish));
        }
    }

    /// Serves the disks of a guest again.
    fn serve(&self, lost: Lost) {
        let domain = lost.plan.domain;
        match self.hypervisor.domain(domain) {
            Err(HypervisorError::NoDomain { .. }) => return self.wanted.ended(domain),
            Ok(info) if !info.state.has_qemu() => {
                return self.wanted.ended(domain);
            }
            // Where libvirtd cannot say, the guest may well run.
            _ => {}
        }
        let (missing, said) = match self.starter.serve_running((*lost.plan).clone(), PATIENCE) {
            Ok(()) => {
                self.wanted.ended(domain);
                let now = Instant::now();
                if self.hypervisor.domain(domain).is_ok_and(|info| !info.state.has_qemu()) {
                    // The guest ended meanwhile, so nobody else will end this process.
                    return self.starter.backends.clear_out(domain, now);
                }
                let name = &lost.plan.name;
                tracing::info!(%domain, "the disks of VM '{name}' are served again");
                self.resume(domain, name);
                return (self.changed)(domain);
            }
            Err(NoStart::Locked(missing)) => {
                let said = missing.to_string();
                (Some(missing), said)
            }
            Err(NoStart::Refused(refusal)) => (None, refusal.message),
        };
        let news = {
            let mut state = self.wanted.lock();
            let entry = state.lost.get_mut(&domain).filter(|entry| entry.said != said);
            entry.map(|entry| (entry.missing, entry.said) = (missing, said.clone())).is_some()
        };
        if news {
            let text = format!("VM '{}' waits for its disks, which cannot be served: {said}", lost.plan.name);
            self.uplink.notice("disk-process-lost", Some(domain), text);
            (self.changed)(domain);
        }
    }

    /// QEMU pauses a guest whose disk was away for too long.
    fn resume(&self, domain: DomainUuid, name: &str) {
        match self.hypervisor.resume_after_io_error(domain) {
            Ok(true) => tracing::info!(%domain, "VM '{name}' goes on"),
            Ok(false) => {}
            Err(error) => tracing::warn!(%domain, "VM '{name}' may be paused still: {error}"),
        }
    }

    /// Starts a VM that was refused; the hook of this very start says whether the key is there now.
    fn start(&self, domain: DomainUuid, wish: &Wish) {
        let outcome = self.hypervisor.start(domain);
        if let Err(HypervisorError::Unreachable { .. }) = outcome {
            return;
        }
        {
            let mut state = self.wanted.lock();
            if state.refused.get(&domain).is_some_and(|now| now.note > wish.note) {
                return;
            }
            state.refused.remove(&domain);
            self.wanted.keep(&state);
        }
        match outcome {
            Ok(()) => {
                tracing::info!(%domain, "VM '{}', which had waited for its key, was started", wish.name);
            }
            Err(error) => {
                let text = format!("VM '{}' had waited for its key and does not start: {error}", wish.name);
                self.uplink.notice("wanted-not-started", Some(domain), text);
            }
        }
        (self.changed)(domain);
    }
}

/// The earlier of two dates, of which 0 stands for none.
fn earlier(a: i64, b: i64) -> i64 {
    if a > 0 && (b <= 0 || a < b) { a } else { b }
}

#[derive(Serialize, Deserialize)]
struct WantedFile {
    version: u32,
    boot: String,
    vms: Vec<WantedVm>,
}

#[derive(Serialize, Deserialize)]
struct WantedVm {
    domain: DomainUuid,
    name: String,
    provider: ProviderId,
    kek: String,
    reason: String,
    code: String,
    since_ms: i64,
}

fn read(file: &std::path::Path) -> io::Result<BTreeMap<DomainUuid, Wish>> {
    use io::Read;
    let mut text = String::new();
    match fs::File::open(file) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        other => other?.take(MAX_FILE).read_to_string(&mut text)?,
    };
    let found: WantedFile = serde_json::from_str(&text)?;
    if found.version != VERSION {
        return Err(io::Error::other(format!("its version is {}", found.version)));
    }
    if found.boot != boot_id() {
        return Ok(BTreeMap::new());
    }
    let wish = |vm: WantedVm| {
        let kek = unhex(&vm.kek).and_then(KekId::from_bytes)?;
        let code = Code::from_word(&vm.code).unwrap_or(Code::KeyMissing);
        let missing =
            KeyMissing { provider: vm.provider, kek, reason: vm.reason, code, since_ms: vm.since_ms };
        Some((vm.domain, Wish { name: vm.name, missing, note: 0 }))
    };
    Ok(found.vms.into_iter().filter_map(wish).collect())
}

fn write(file: &std::path::Path, refused: &BTreeMap<DomainUuid, Wish>) -> io::Result<()> {
    let vm = |(domain, wish): (&DomainUuid, &Wish)| WantedVm {
        domain: *domain,
        name: wish.name.clone(),
        provider: wish.missing.provider.clone(),
        kek: hex(wish.missing.kek.as_bytes()),
        reason: wish.missing.reason.clone(),
        code: wish.missing.code.as_str().to_owned(),
        since_ms: wish.missing.since_ms,
    };
    let content = WantedFile { version: VERSION, boot: boot_id(), vms: refused.iter().map(vm).collect() };
    let tmp = file.with_extension("tmp");
    // Nothing of it counts after a crash of the machine, so nothing is flushed.
    fs::write(&tmp, serde_json::to_vec_pretty(&content)?)?;
    fs::rename(&tmp, file)
}

/// Another one after every boot.
fn boot_id() -> String {
    let read = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    read.map(|text| text.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    const DOMAIN: DomainUuid = DomainUuid::from_bytes([1; 16]);

    fn missing(since_ms: i64) -> KeyMissing {
        KeyMissing {
            provider: "main".parse().unwrap(),
            kek: KekId::from_bytes(vec![0xab, 1]).unwrap(),
            reason: "gone".into(),
            code: Code::KeyMissing,
            since_ms,
        }
    }

    #[test]
    fn refused_start_outlives_the_agent_and_keeps_its_first_date() {
        let scratch = Scratch::new();
        let wanted = Wanted::open(scratch.path());
        assert_eq!(wanted.locked(DOMAIN), None);
        wanted.refused(DOMAIN, "web01", &missing(5));
        wanted.refused(DOMAIN, "web01", &missing(9));
        let again = Wanted::open(scratch.path());
        assert_eq!(again.locked(DOMAIN), Some((missing(5), true)));
        again.settled(DOMAIN);
        assert_eq!(Wanted::open(scratch.path()).locked(DOMAIN), None);

        wanted.refused(DOMAIN, "web01", &missing(5));
        let file = scratch.path().join("wanted.json");
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, text.replace(&boot_id(), "of an earlier boot")).unwrap();
        assert_eq!(Wanted::open(scratch.path()).locked(DOMAIN), None, "a reboot forgets it");
    }

    #[test]
    fn damaged_file_is_no_file() {
        let scratch = Scratch::new();
        for text in ["", "{", "{\"version\":2,\"boot\":\"\",\"vms\":[]}"] {
            fs::write(scratch.path().join("wanted.json"), text).unwrap();
            assert_eq!(Wanted::open(scratch.path()).locked(DOMAIN), None);
        }
    }

    #[test]
    fn first_date_is_the_earlier_one_that_is_known() {
        assert_eq!((earlier(0, 7), earlier(7, 0), earlier(7, 3), earlier(3, 7)), (7, 7, 3, 3));
    }
}
