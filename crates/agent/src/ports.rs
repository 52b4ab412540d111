//! What the agent's tasks need of the world: a hypervisor, keys, somebody to tell. Traits, so that every crash
//! between two steps can be tested without a guest.

use std::{sync::Arc, time::Duration};

use vmseal_keys::Kek;
use vmseal_model::{
    id::{DomainUuid, KekId, ProviderId, TaskId, VmId},
    refusal::Code,
    state::VmState,
    task::TaskState,
};

/// A domain as libvirt knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainInfo {
    /// libvirt's UUID.
    pub uuid: DomainUuid,
    /// Its name.
    pub name: String,
    /// What it does; [`VmState::Locked`] is never libvirt's word.
    pub state: VmState,
    /// Whether it has a persistent definition.
    pub persistent: bool,
    /// Whether libvirtd starts it.
    pub autostart: bool,
}

/// Which of a domain's two definitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Definition {
    /// As it runs now.
    Live,
    /// As it will start next.
    Persistent,
}

/// Why libvirt did not do something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HypervisorError {
    /// No such domain.
    #[error("libvirt has no domain {domain}")]
    NoDomain {
        /// Its name or UUID.
        domain: String,
    },
    /// No connection.
    #[error("libvirt at {uri} does not answer: {reason}")]
    Unreachable {
        /// Where.
        uri: String,
        /// libvirt's words.
        reason: String,
    },
    /// It refused.
    #[error("libvirt refused to {action}: {reason}")]
    Refused {
        /// What was asked.
        action: &'static str,
        /// libvirt's words.
        reason: String,
    },
}

/// libvirt, as far as the agent needs it. Never called during a hook.
pub trait Hypervisor: Send + Sync {
    /// All domains, running or not.
    fn domains(&self) -> Result<Vec<DomainInfo>, HypervisorError>;
    /// One domain.
    fn domain(&self, uuid: DomainUuid) -> Result<DomainInfo, HypervisorError>;
    /// Its XML, with security information.
    fn xml(&self, uuid: DomainUuid, which: Definition) -> Result<String, HypervisorError>;
    /// Defines it, validated; gives its UUID.
    fn define(&self, xml: &str) -> Result<DomainUuid, HypervisorError>;
    /// Snapshots and checkpoints it has.
    fn snapshots(&self, uuid: DomainUuid) -> Result<u32, HypervisorError>;
    /// Whether a managed-save image waits.
    fn has_managed_save(&self, uuid: DomainUuid) -> Result<bool, HypervisorError>;
    /// Starts it.
    fn start(&self, uuid: DomainUuid) -> Result<(), HypervisorError>;
    /// Writes our metadata element, live and persistent as it applies; `None` removes it.
    fn set_metadata(&self, uuid: DomainUuid, element: Option<&str>) -> Result<(), HypervisorError>;
    /// Lets a guest go on that QEMU paused because its disk failed, and does nothing to any other; whether it was one.
    fn resume_after_io_error(&self, uuid: DomainUuid) -> Result<bool, HypervisorError>;
}

/// Why a key cannot be had now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("key {kek} of provider {provider} cannot be had: {reason}")]
pub struct KeyMissing {
    /// The provider's name.
    pub provider: ProviderId,
    /// The key.
    pub kek: KekId,
    /// Why, for the administrator.
    pub reason: String,
    /// [`Code::KeyMissing`], [`Code::ServerUnreachable`], [`Code::Forbidden`].
    pub code: Code,
    /// Since when, milliseconds since 1970; 0 if unknown.
    pub since_ms: i64,
}

/// For whom a key is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyPurpose {
    /// The domain.
    pub domain: DomainUuid,
    /// Its VM id, once it has one.
    pub vm: Option<VmId>,
    /// The task, if one asks.
    pub task: Option<TaskId>,
}

/// Where KEKs come from: memory of this agent, else the server.
pub trait KeySource: Send + Sync {
    /// The KEK, within the deadline.
    fn kek(
        &self,
        provider: &ProviderId,
        kek: &KekId,
        purpose: &KeyPurpose,
        deadline: Duration,
    ) -> Result<Arc<Kek>, KeyMissing>;
}

/// What a task says while it works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskReport {
    /// Which.
    pub task: TaskId,
    /// Where it stands.
    pub state: TaskState,
    /// The step reached, with the disk's target: `vda copied`.
    pub step: String,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// For people; on failure what failed, on which object, why.
    pub message: String,
    /// On failure.
    pub code: Option<Code>,
    /// What to do next.
    pub hint: String,
}

/// Who hears of tasks: the server's stream. Never blocks; a report may be lost, the journal is the truth.
pub trait TaskSink: Send + Sync {
    /// Tells.
    fn report(&self, report: TaskReport);
}
