//! libvirt behind the agent's [`Hypervisor`] port: one connection that comes back by itself, and events on a channel.
//!
//! Two threads of its own: one runs libvirt's event loop, one connects and connects again. A call while there is no
//! connection fails at once, so nobody waits for libvirtd. Must not be called during a hook: libvirtd waits for the
//! hook, and a caller of libvirtd would wait for libvirtd.

mod connection;
mod events;
mod library;

use std::{
    sync::{
        Arc, RwLock,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::Duration,
};

use vmseal_model::{id::DomainUuid, state::VmState};

use self::{
    connection::{Connection, Domain},
    events::{Sink, subscribe},
    library::Library,
};
pub use self::{events::HypervisorEvent, library::LoadError};
use crate::ports::{Definition, DomainInfo, Hypervisor, HypervisorError};

/// First and longest pause between two tries to connect.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(3));
/// How often a silent connection is looked at.
const LOOK: Duration = Duration::from_secs(5);

/// The host's libvirtd.
pub struct Libvirt {
    uri: String,
    link: Arc<RwLock<Link>>,
}

enum Link {
    Up(Arc<Connection>),
    Down { reason: String },
}

impl Libvirt {
    /// Loads libvirt's library and begins to connect; `events` gets a [`HypervisorEvent::Connected`] first.
    ///
    /// # Errors
    ///
    /// [`LoadError`] if the library is not there. That libvirtd does not answer is none.
    pub fn start(uri: &str, events: Sender<HypervisorEvent>) -> Result<Self, LoadError> {
        let library = Library::get()?;
        run_event_loop(library);
        let link = Arc::new(RwLock::new(Link::Down { reason: "not connected yet".to_owned() }));
        let (closed, on_closed) = mpsc::channel();
        // Leaked: libvirt keeps pointers to it for as long as the process lives. One per agent.
        let sink: &'static Sink = Box::leak(Box::new(Sink { library, events, closed }));
        let connector = Connector { library, uri: uri.to_owned(), link: Arc::clone(&link), sink, on_closed };
        thread::Builder::new()
            .name("libvirt-connect".to_owned())
            .spawn(move || connector.run())
            .map_err(|e| LoadError::Initialise { reason: e.to_string() })?;
        Ok(Self { uri: uri.to_owned(), link })
    }

    /// Whether there is a connection now.
    pub fn is_connected(&self) -> bool {
        self.connection().is_ok()
    }

    /// Versions of libvirtd and QEMU, as major × 1,000,000 + minor × 1,000 + release.
    ///
    /// # Errors
    ///
    /// [`HypervisorError::Unreachable`] mostly.
    pub fn versions(&self) -> Result<(u64, u64), HypervisorError> {
        self.connection()?.versions()
    }

    fn connection(&self) -> Result<Arc<Connection>, HypervisorError> {
        match &*self.link.read().unwrap_or_else(|e| e.into_inner()) {
            Link::Up(connection) => Ok(Arc::clone(connection)),
            Link::Down { reason } => {
                Err(HypervisorError::Unreachable { uri: self.uri.clone(), reason: reason.clone() })
            }
        }
    }
}

impl Hypervisor for Libvirt {
    fn domains(&self) -> Result<Vec<DomainInfo>, HypervisorError> {
        let connection = self.connection()?;
        let domains = connection.domains()?;
        let described = domains.iter().filter_map(|domain| match info(domain) {
            Err(HypervisorError::NoDomain { .. }) => None,
            // One that goes away while we look is not in the list. Any other is, or nobody can tell what there is.
            Err(error) => match domain.uuid().and_then(|uuid| connection.domain(uuid)) {
                Err(HypervisorError::NoDomain { .. }) => None,
                _ => Some(Err(error)),
            },
            done => Some(done),
        });
        described.collect()
    }

    fn domain(&self, uuid: DomainUuid) -> Result<DomainInfo, HypervisorError> {
        info(&self.connection()?.domain(uuid)?)
    }

    fn xml(&self, uuid: DomainUuid, which: Definition) -> Result<String, HypervisorError> {
        // VIR_DOMAIN_XML_SECURE, VIR_DOMAIN_XML_INACTIVE
        let flags = match which {
            Definition::Live => 1,
            Definition::Persistent => 1 | 2,
        };
        self.connection()?.domain(uuid)?.xml(flags)
    }

    fn define(&self, xml: &str) -> Result<DomainUuid, HypervisorError> {
        self.connection()?.define(xml)?.uuid()
    }

    fn snapshots(&self, uuid: DomainUuid) -> Result<u32, HypervisorError> {
        let connection = self.connection()?;
        let domain = connection.domain(uuid)?;
        Ok(domain.snapshots()?.saturating_add(domain.checkpoints()?))
    }

    fn has_managed_save(&self, uuid: DomainUuid) -> Result<bool, HypervisorError> {
        self.connection()?.domain(uuid)?.has_managed_save()
    }

    fn start(&self, uuid: DomainUuid) -> Result<(), HypervisorError> {
        self.connection()?.domain(uuid)?.start()
    }

    fn set_metadata(&self, uuid: DomainUuid, element: Option<&str>) -> Result<(), HypervisorError> {
        let connection = self.connection()?;
        let domain = connection.domain(uuid)?;
        domain.set_metadata(element, domain.is_active()?, domain.is_persistent()?)
    }

    fn resume_after_io_error(&self, uuid: DomainUuid) -> Result<bool, HypervisorError> {
        // VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_IOERROR
        const PAUSED_IO_ERROR: (i32, i32) = (3, 5);
        let connection = self.connection()?;
        let domain = connection.domain(uuid)?;
        if domain.state()? != PAUSED_IO_ERROR {
            return Ok(false);
        }
        domain.resume().map(|()| true)
    }
}

fn info(domain: &Domain<'_>) -> Result<DomainInfo, HypervisorError> {
    let (state, _) = domain.state()?;
    let persistent = domain.is_persistent()?;
    let state = match state {
        // VIR_DOMAIN_RUNNING, BLOCKED, SHUTDOWN: QEMU is there.
        1 | 2 | 4 => VmState::Running,
        // PAUSED, CRASHED (kept for a look), PMSUSPENDED: so it is, but does not compute.
        3 | 7 => VmState::Paused,
        6 if domain.is_active()? => VmState::Paused,
        // Just being started: libvirt calls it shut off until QEMU has answered.
        5 if domain.is_active()? => VmState::Unknown,
        5 | 6 if persistent && domain.has_managed_save()? => VmState::Saved,
        5 | 6 => VmState::Off,
        _ => VmState::Unknown,
    };
    Ok(DomainInfo {
        uuid: domain.uuid()?,
        name: domain.name()?,
        state,
        persistent,
        autostart: persistent && domain.autostart()?,
    })
}

/// Runs libvirt's default event loop, once in this process.
fn run_event_loop(library: &'static Library) {
    static RUNNING: std::sync::Once = std::sync::Once::new();
    RUNNING.call_once(|| {
        let run = move || {
            loop {
                // SAFETY: the default implementation was registered when the library was loaded; this is the only
                // thread that runs it.
                if unsafe { (library.event_run_default)() } < 0 {
                    tracing::error!("libvirt's event loop: {}", library.error_text());
                    thread::sleep(PAUSE.0);
                }
            }
        };
        if let Err(e) = thread::Builder::new().name("libvirt-events".to_owned()).spawn(run) {
            tracing::error!("libvirt's event loop does not start: {e}");
        }
    });
}

/// Connects, waits for the end of the connection, connects again.
struct Connector {
    library: &'static Library,
    uri: String,
    link: Arc<RwLock<Link>>,
    sink: &'static Sink,
    on_closed: Receiver<()>,
}

impl Connector {
    fn run(self) {
        let mut pause = PAUSE.0;
        loop {
            // A close notice of the last connection says nothing about the next one.
            while self.on_closed.try_recv().is_ok() {}
            let opened = Connection::open(self.library, &self.uri)
                .and_then(|mut connection| subscribe(&mut connection, self.sink).map(|()| connection));
            match opened {
                Err(e) => {
                    if pause == PAUSE.0 {
                        tracing::warn!("{e}; trying again");
                    }
                    self.set(Link::Down { reason: reason_of(e) });
                    thread::sleep(pause);
                    pause = (pause * 2).min(PAUSE.1);
                }
                Ok(connection) => {
                    pause = PAUSE.0;
                    let connection = Arc::new(connection);
                    self.set(Link::Up(Arc::clone(&connection)));
                    tracing::info!("connected to libvirt at {}", self.uri);
                    let _ = self.sink.events.send(HypervisorEvent::Connected);
                    self.wait_for_end(&connection);
                    tracing::warn!("the connection to libvirt at {} is lost; trying again", self.uri);
                    self.set(Link::Down { reason: "the connection was lost".to_owned() });
                    let _ = self.sink.events.send(HypervisorEvent::Lost);
                }
            }
        }
    }

    fn wait_for_end(&self, connection: &Connection) {
        while let Err(RecvTimeoutError::Timeout) = self.on_closed.recv_timeout(LOOK) {
            if !connection.is_alive() {
                return;
            }
        }
    }

    fn set(&self, link: Link) {
        *self.link.write().unwrap_or_else(|e| e.into_inner()) = link;
    }
}

fn reason_of(error: HypervisorError) -> String {
    match error {
        HypervisorError::Unreachable { reason, .. } | HypervisorError::Refused { reason, .. } => reason,
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    //! Against libvirt's own `test:///default` driver: it lives in this process, with one running domain, `test`.

    use super::*;

    fn connected() -> (Libvirt, Receiver<HypervisorEvent>, DomainInfo) {
        let (events, received) = mpsc::channel();
        let libvirt = Libvirt::start("test:///default", events).unwrap();
        assert_eq!(received.recv_timeout(Duration::from_secs(20)), Ok(HypervisorEvent::Connected));
        let domain = libvirt.domains().unwrap().into_iter().find(|d| d.name == "test").unwrap();
        (libvirt, received, domain)
    }

    /// Waits for an event; those of other tests, which share the driver's one host, pass by.
    fn expect(events: &Receiver<HypervisorEvent>, wanted: &HypervisorEvent) {
        while events.recv_timeout(Duration::from_secs(20)).expect("the event comes") != *wanted {}
    }

    #[test]
    fn running_domain_is_listed_and_described() {
        let (libvirt, _events, domain) = connected();
        assert_eq!((domain.state, domain.persistent), (VmState::Running, true));
        assert_eq!(libvirt.domain(domain.uuid).unwrap(), domain);
        assert!(libvirt.versions().unwrap().0 >= 6_000_000);
        let xml = libvirt.xml(domain.uuid, Definition::Persistent).unwrap();
        assert!(xml.contains(&domain.uuid.to_string()), "{xml}");
        assert_eq!(libvirt.snapshots(domain.uuid).unwrap(), 0);
        assert!(!libvirt.has_managed_save(domain.uuid).unwrap());
        assert!(!libvirt.resume_after_io_error(domain.uuid).unwrap());
    }

    #[test]
    fn unknown_domain_is_named() {
        let (libvirt, _events, _) = connected();
        let uuid = DomainUuid::from_bytes([9; 16]);
        let error = libvirt.domain(uuid).unwrap_err();
        assert_eq!(error, HypervisorError::NoDomain { domain: uuid.to_string() });
    }

    #[test]
    fn metadata_is_written_announced_and_removed() {
        let (libvirt, events, domain) = connected();
        libvirt.set_metadata(domain.uuid, Some("<vm id='1'><disk target='vda'/></vm>")).unwrap();
        let xml = libvirt.xml(domain.uuid, Definition::Live).unwrap();
        assert!(xml.contains("<vmseal:vm xmlns:vmseal=\"urn:vmseal:domain:1\" id=\"1\">"), "{xml}");
        assert!(xml.contains("<vmseal:disk target=\"vda\"/>"), "{xml}");
        expect(&events, &HypervisorEvent::Metadata(domain.uuid));
        libvirt.set_metadata(domain.uuid, None).unwrap();
        assert!(!libvirt.xml(domain.uuid, Definition::Live).unwrap().contains("vmseal"));
    }

    #[test]
    fn definition_is_taken_started_and_announced() {
        let (libvirt, events, _) = connected();
        let xml = "<domain type='test'><name>web01</name><memory>4096</memory><vcpu>1</vcpu><os><type>hvm</type></os></domain>";
        let uuid = libvirt.define(xml).unwrap();
        assert_eq!(libvirt.domain(uuid).unwrap().state, VmState::Off);
        libvirt.start(uuid).unwrap();
        assert_eq!(libvirt.domain(uuid).unwrap().state, VmState::Running);
        expect(&events, &HypervisorEvent::Defined(uuid));
        expect(&events, &HypervisorEvent::Started(uuid));
        assert!(matches!(libvirt.start(uuid), Err(HypervisorError::Refused { .. })));
    }

    #[test]
    fn what_is_no_definition_is_refused_in_libvirts_words() {
        let (libvirt, _events, _) = connected();
        let error = libvirt.define("<domain/>").unwrap_err();
        assert!(matches!(&error, HypervisorError::Refused { reason, .. } if !reason.is_empty()), "{error}");
    }

    #[test]
    fn without_libvirtd_calls_fail_at_once() {
        let (events, _received) = mpsc::channel();
        let libvirt = Libvirt::start("qemu+unix:///system?socket=/nonexistent/libvirt-sock", events).unwrap();
        assert!(!libvirt.is_connected());
        assert!(matches!(libvirt.domains(), Err(HypervisorError::Unreachable { .. })));
    }
}
