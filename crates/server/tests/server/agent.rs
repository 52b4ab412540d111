//! A host that speaks the real protocol and does what the test says.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status, Streaming,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use vmseal_api::{
    agent::{
        KEY_GRANT_INFO, PROTOCOL,
        v1::{
            Command, Disk, FloorReply, FloorRequest, FromAgent, Hello, HostCapabilities, Inventory,
            JoinReply, JoinRequest, KeyGrant, KeyRefused, KeyRequest, TaskEvent, ToAgent, Vm, Warning,
            agent_gate_client::AgentGateClient, from_agent, to_agent,
        },
    },
    host::JoinToken,
    join::{JOIN_TOKEN_PREFIX, JoinClaims, SERVER_NAME},
    paths,
};
use vmseal_keys::SessionKey;
use vmseal_model::{
    id::{DiskId, DomainUuid, HostId, KekId, ProviderId, RecordId, VmId},
    record::{
        DISK_PAYLOAD_LEN, HeaderKind, KeyRecord, MAC_LEN, Recipient, RecipientId, RecipientKind,
        RecipientSeal, RecordHead, RecordState, Subject, TAG_LEN, UnitBytes,
    },
};

use crate::rig::Rig;

/// A host that joined.
pub(crate) struct Joined {
    pub(crate) id: HostId,
    reply: JoinReply,
    key_pem: String,
    address: String,
}

/// The inside of a new join token.
pub(crate) async fn claims(rig: &Rig) -> JoinClaims {
    let token: JoinToken = rig.root().post(paths::JOIN_TOKENS, &()).await.good();
    let inside = token.token.expose().strip_prefix(JOIN_TOKEN_PREFIX).unwrap().to_owned();
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(inside).unwrap()).unwrap()
}

fn tls(rig: &Rig) -> ClientTlsConfig {
    let ca = Certificate::from_pem(rig.server().ca.pem());
    ClientTlsConfig::new().ca_certificate(ca).domain_name(SERVER_NAME)
}

pub(crate) async fn channel(address: &str, tls: ClientTlsConfig) -> Channel {
    Endpoint::from_shared(format!("https://{address}"))
        .unwrap()
        .tls_config(tls)
        .unwrap()
        .connect()
        .await
        .unwrap()
}

/// A certificate request and its key.
pub(crate) fn request(secret: &str, hostname: &str) -> (JoinRequest, String) {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap();
    let request = JoinRequest {
        secret: secret.to_owned(),
        csr_pem: csr.pem().unwrap(),
        hostname: hostname.to_owned(),
        machine_id: "0123456789abcdef0123456789abcdef".into(),
    };
    (request, key.serialize_pem())
}

/// Asks to join.
pub(crate) async fn ask_to_join(rig: &Rig, request: JoinRequest) -> Result<JoinReply, Status> {
    let address = rig.running().gate.to_string();
    let reply = AgentGateClient::new(channel(&address, tls(rig)).await).join(request).await?;
    Ok(reply.into_inner())
}

/// Joins under this name.
pub(crate) async fn join(rig: &Rig, hostname: &str) -> Joined {
    let claims = claims(rig).await;
    let (request, key_pem) = request(claims.secret.expose(), hostname);
    let reply = ask_to_join(rig, request).await.unwrap();
    Joined { id: reply.host_id.parse().unwrap(), reply, key_pem, address: rig.running().gate.to_string() }
}

impl Joined {
    /// The same host, after the server got another port.
    pub(crate) fn follow(&mut self, rig: &Rig) {
        self.address = rig.running().gate.to_string();
    }

    /// Opens a stream and greets.
    pub(crate) async fn connect(&self, rig: &Rig) -> Agent {
        self.try_connect(rig).await.unwrap()
    }

    pub(crate) async fn try_connect(&self, rig: &Rig) -> Result<Agent, Status> {
        let identity = Identity::from_pem(&self.reply.certificate_pem, &self.key_pem);
        let channel = channel(&self.address, tls(rig).identity(identity)).await;
        let (up, stream) = mpsc::channel(64);
        let session_key = SessionKey::generate().unwrap();
        let hello = Hello {
            protocol: PROTOCOL,
            version: "0.0.test".into(),
            hostname: "whatever it says".into(),
            session_public_key: session_key.public().to_vec(),
            secret_memory: "memfd_secret".into(),
            libvirt_uri: "qemu:///system".into(),
            warnings: vec![Warning {
                code: "clear-swap".into(),
                message: "swap is not encrypted".into(),
                hint: "swapoff -a".into(),
            }],
        };
        up.send(FromAgent { body: Some(from_agent::Body::Hello(hello)) }).await.unwrap();
        let down = AgentGateClient::new(channel).session(ReceiverStream::new(stream)).await?.into_inner();
        let mut agent = Agent { id: self.id, session_key, up, down, set_aside: Vec::new() };
        match agent.next().await? {
            Some(to_agent::Body::Welcome(_)) => Ok(agent),
            other => panic!("the first message was {other:?}"),
        }
    }
}

/// A host's session.
pub(crate) struct Agent {
    pub(crate) id: HostId,
    session_key: SessionKey,
    up: mpsc::Sender<FromAgent>,
    down: Streaming<ToAgent>,
    set_aside: Vec<to_agent::Body>,
}

impl Agent {
    /// What comes next; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<to_agent::Body>, Status> {
        Ok(self.down.message().await?.and_then(|message| message.body))
    }

    /// The next message that `wanted` takes; others are kept for later.
    async fn wait<T>(&mut self, wanted: impl Fn(&to_agent::Body) -> Option<T>) -> T {
        if let Some(at) = self.set_aside.iter().position(|body| wanted(body).is_some()) {
            return wanted(&self.set_aside.remove(at)).unwrap();
        }
        loop {
            let body = self.next().await.unwrap().expect("the session goes on");
            match wanted(&body) {
                Some(found) => return found,
                None => self.set_aside.push(body),
            }
        }
    }

    pub(crate) async fn say(&self, body: from_agent::Body) {
        self.up.send(FromAgent { body: Some(body) }).await.unwrap();
    }

    /// Reports these VMs, and waits until the server has taken it in.
    pub(crate) async fn report(&mut self, vms: Vec<Vm>) {
        self.say(from_agent::Body::Inventory(Inventory { vms, ..Inventory::default() })).await;
        // Messages are handled in order, so an answer to a later one says that this one is done.
        self.floors(&[]).await;
    }

    /// The same of an agent that says what its host can present disks by.
    pub(crate) async fn report_with(&mut self, vms: Vec<Vm>, capabilities: HostCapabilities) {
        let all = Inventory { vms, capabilities: Some(capabilities), ..Inventory::default() };
        self.say(from_agent::Body::Inventory(all)).await;
        self.floors(&[]).await;
    }

    pub(crate) async fn floors(&mut self, disks: &[DiskId]) -> FloorReply {
        let disk_ids = disks.iter().map(DiskId::to_string).collect();
        self.say(from_agent::Body::FloorRequest(FloorRequest { request_id: "f".into(), disk_ids })).await;
        self.wait(|body| match body {
            to_agent::Body::FloorReply(reply) => Some(reply.clone()),
            _ => None,
        })
        .await
    }

    pub(crate) async fn command(&mut self) -> Command {
        self.wait(|body| match body {
            to_agent::Body::Command(command) => Some(command.clone()),
            _ => None,
        })
        .await
    }

    pub(crate) async fn keys_available(&mut self) -> String {
        self.wait(|body| match body {
            to_agent::Body::KeysAvailable(keys) => Some(keys.provider.clone()),
            _ => None,
        })
        .await
    }

    /// Says how a task is, and waits until the server has taken it in.
    pub(crate) async fn task_is(&mut self, event: TaskEvent) {
        self.say(from_agent::Body::TaskEvent(event)).await;
        self.floors(&[]).await;
    }

    /// Asks for a key.
    pub(crate) async fn ask(&mut self, request: KeyRequest) -> Result<KeyGrant, KeyRefused> {
        self.say(from_agent::Body::KeyRequest(request)).await;
        self.wait(|body| match body {
            to_agent::Body::KeyGrant(grant) => Some(Ok(grant.clone())),
            to_agent::Body::KeyRefused(refused) => Some(Err(refused.clone())),
            _ => None,
        })
        .await
    }

    /// Opens a grant as the protocol says.
    pub(crate) fn open(&self, grant: &KeyGrant) -> [u8; 32] {
        let mut aad = self.id.to_bytes().to_vec();
        aad.push(grant.provider.len() as u8);
        aad.extend_from_slice(grant.provider.as_bytes());
        aad.extend_from_slice(&grant.kek_id);
        *self.session_key.open(KEY_GRANT_INFO, &aad, &grant.enc, &grant.sealed_kek).unwrap().expose()
    }
}

/// A VM with one disk, as a host would report it.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) name: String,
    pub(crate) domain: DomainUuid,
    pub(crate) vm: VmId,
    pub(crate) disk: DiskId,
}

impl Guest {
    /// Ids made of one byte each.
    pub(crate) fn new(name: &str, seed: u8) -> Self {
        Self {
            name: name.into(),
            domain: DomainUuid::from_random([seed; 16]),
            vm: VmId::from_random([seed.wrapping_add(100); 16]),
            disk: DiskId::from_random([seed.wrapping_add(200); 16]),
        }
    }

    pub(crate) fn clear(&self) -> Vm {
        Vm {
            domain_uuid: self.domain.to_string(),
            name: self.name.clone(),
            state: "off".into(),
            vm_id: String::new(),
            disks: vec![Disk {
                target: "vda".into(),
                source: format!("/x/{}.img", self.name),
                format: "raw".into(),
                stored_bytes: 1 << 30,
                presented_bytes: 1 << 30,
                ..Disk::default()
            }],
            locked: None,
            unprotected: vec!["managed save writes memory in clear".into()],
            transient: false,
        }
    }

    pub(crate) fn encrypted(&self, provider: &str, kek: &[u8], epoch: u64) -> Vm {
        let mut vm = self.clear();
        vm.vm_id = self.vm.to_string();
        let disk = &mut vm.disks[0];
        disk.encrypted = true;
        disk.disk_id = self.disk.to_string();
        disk.epoch = epoch;
        disk.class = "compatible".into();
        disk.record = self.record(provider, kek, epoch);
        vm
    }

    /// A record of the right shape; the server cannot and does not verify its MAC.
    pub(crate) fn record(&self, provider: &str, kek: &[u8], epoch: u64) -> Vec<u8> {
        let record = KeyRecord {
            head: RecordHead {
                record: RecordId::from_bytes([9; 16]),
                vm: self.vm,
                subject: Subject::Disk {
                    disk: self.disk,
                    header: HeaderKind::Attached,
                    unit: UnitBytes::B512,
                    payload_offset: 16 << 20,
                },
                created_ms: 1,
                key_check: [8; 32],
            },
            state: RecordState { epoch, stored_bytes: 1 << 30, presented_bytes: 1 << 30 },
            recipients: vec![Recipient {
                id: RecipientId {
                    kind: RecipientKind::Native,
                    provider: provider.parse::<ProviderId>().unwrap(),
                    kek: KekId::from_bytes(kek.to_vec()).unwrap(),
                },
                seal: RecipientSeal::Gcm { salt: [1; 32], nonce: [2; 12], wrapped_kek: None },
                wrapped_payload: vec![3; DISK_PAYLOAD_LEN + TAG_LEN],
            }],
            mac: [4; MAC_LEN],
        };
        record.encode()
    }

    /// Asks for a key to start with.
    pub(crate) fn key_request(&self, provider: &str, kek: &[u8]) -> KeyRequest {
        KeyRequest {
            request_id: "r".into(),
            provider: provider.into(),
            kek_id: kek.to_vec(),
            domain_uuid: self.domain.to_string(),
            vm_id: self.vm.to_string(),
            task_id: String::new(),
        }
    }
}
