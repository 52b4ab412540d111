//! What a task is asked to do: the server's command in our types, as it stands in the journal.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use vmseal_api::agent::v1;
use vmseal_model::{
    class::{ClassChoice, GroupCapabilities},
    id::{DomainUuid, KekId, ProviderId, TaskId},
    refusal::Code,
    state::InnerFormat,
    task::{SourceFate, TaskKind},
};

use crate::{domain_xml::DomainXml, tasks::refusal::Refusal};

/// A task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskCommand {
    /// Its id; the same command again is the same task.
    pub task: TaskId,
    /// What to do.
    pub work: Work,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Work {
    /// `vm encrypt`.
    EncryptVm {
        /// The domain.
        domain: DomainUuid,
        /// Its disks; none named: all that are clear.
        targets: Vec<String>,
        /// Under which key.
        key: KeyChoice,
        /// How they are presented.
        #[serde(default)]
        class: ClassChoice,
        /// What all hosts have.
        #[serde(default)]
        hosts: GroupCapabilities,
        /// What becomes of the clear images.
        source: SourceFate,
    },
    /// `vm decrypt`.
    DecryptVm {
        /// The domain.
        domain: DomainUuid,
        /// Its disks; none named: all that are encrypted.
        targets: Vec<String>,
        /// What becomes of the volumes.
        source: SourceFate,
    },
    /// `disk create`.
    CreateDisk {
        /// The domain.
        domain: DomainUuid,
        /// Name in the guest.
        target: String,
        /// Path of the new volume.
        path: String,
        /// What lies inside.
        format: InnerFormat,
        /// Bytes the guest sees.
        bytes: u64,
        /// Under which key.
        key: KeyChoice,
        /// How it is presented.
        #[serde(default)]
        class: ClassChoice,
        /// What all hosts have.
        #[serde(default)]
        hosts: GroupCapabilities,
    },
    /// `disk set`.
    SetDisk {
        /// The domain.
        domain: DomainUuid,
        /// Name in the guest.
        target: String,
        /// How it is to be presented.
        class: ClassChoice,
        /// What all hosts have.
        #[serde(default)]
        hosts: GroupCapabilities,
    },
    /// `vm create`.
    CreateVm {
        /// The definition, with its UUID.
        xml: String,
        /// Under which key.
        key: KeyChoice,
        /// How its disks are presented.
        #[serde(default)]
        class: ClassChoice,
        /// What all hosts have.
        #[serde(default)]
        hosts: GroupCapabilities,
        /// Bytes of disks whose image is not there yet, by target.
        sizes: BTreeMap<String, u64>,
    },
}

/// A key to wrap under.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyChoice {
    /// Whose.
    pub provider: ProviderId,
    /// Which.
    #[serde(serialize_with = "to_hex", deserialize_with = "from_hex")]
    pub kek: KekId,
}

impl TaskCommand {
    /// The server's command. `None` for one that is no task: cancel, adopt, repair.
    ///
    /// # Errors
    ///
    /// [`Code::BadRequest`] with the field that is wrong.
    pub fn from_protocol(command: &v1::Command) -> Option<Result<Self, Refusal>> {
        let work = match command.body.as_ref()? {
            v1::command::Body::EncryptVm(c) => encrypt(c),
            v1::command::Body::DecryptVm(c) => decrypt(c),
            v1::command::Body::CreateDisk(c) => create_disk(c),
            v1::command::Body::CreateVm(c) => create_vm(c),
            v1::command::Body::SetDisk(c) => set_disk(c),
            _ => return None,
        };
        let task = parse(&command.id, "id");
        Some(task.and_then(|task| Ok(Self { task, work: work? })))
    }

    /// What it is.
    pub fn kind(&self) -> TaskKind {
        match self.work {
            Work::EncryptVm { .. } => TaskKind::VmEncrypt,
            Work::DecryptVm { .. } => TaskKind::VmDecrypt,
            Work::CreateDisk { .. } => TaskKind::DiskCreate,
            Work::CreateVm { .. } => TaskKind::VmCreate,
            Work::SetDisk { .. } => TaskKind::DiskSet,
        }
    }

    /// The domain it is about; for a new one the UUID in its definition.
    pub fn domain(&self) -> Option<DomainUuid> {
        match &self.work {
            Work::EncryptVm { domain, .. }
            | Work::DecryptVm { domain, .. }
            | Work::CreateDisk { domain, .. }
            | Work::SetDisk { domain, .. } => Some(*domain),
            Work::CreateVm { xml, .. } => DomainXml::parse(xml).ok()?.uuid(),
        }
    }

    /// The word in failpoint names.
    pub(crate) fn word(&self) -> &'static str {
        match self.work {
            Work::EncryptVm { .. } => "encrypt",
            Work::DecryptVm { .. } => "decrypt",
            Work::CreateDisk { .. } => "create-disk",
            Work::CreateVm { .. } => "create-vm",
            Work::SetDisk { .. } => "set-disk",
        }
    }
}

fn encrypt(c: &v1::EncryptVm) -> Result<Work, Refusal> {
    Ok(Work::EncryptVm {
        domain: parse(&c.domain_uuid, "domain_uuid")?,
        targets: c.targets.clone(),
        key: key(&c.provider, &c.kek_id)?,
        class: class(&c.class)?,
        hosts: hosts(c.hosts.as_ref()),
        source: fate(&c.source)?,
    })
}

fn decrypt(c: &v1::DecryptVm) -> Result<Work, Refusal> {
    Ok(Work::DecryptVm {
        domain: parse(&c.domain_uuid, "domain_uuid")?,
        targets: c.targets.clone(),
        source: fate(&c.source)?,
    })
}

fn create_disk(c: &v1::CreateDisk) -> Result<Work, Refusal> {
    Ok(Work::CreateDisk {
        domain: parse(&c.domain_uuid, "domain_uuid")?,
        target: c.target.clone(),
        path: c.path.clone(),
        format: InnerFormat::from_libvirt(&c.format).ok_or_else(|| wrong("format", &c.format))?,
        bytes: c.bytes,
        key: key(&c.provider, &c.kek_id)?,
        class: class(&c.class)?,
        hosts: hosts(c.hosts.as_ref()),
    })
}

fn set_disk(c: &v1::SetDisk) -> Result<Work, Refusal> {
    Ok(Work::SetDisk {
        domain: parse(&c.domain_uuid, "domain_uuid")?,
        target: c.target.clone(),
        class: class(&c.class)?,
        hosts: hosts(c.hosts.as_ref()),
    })
}

fn create_vm(c: &v1::CreateVm) -> Result<Work, Refusal> {
    let sizes = c.disk_bytes.iter().map(|(target, bytes)| (target.clone(), *bytes)).collect();
    let (key, hosts) = (key(&c.provider, &c.kek_id)?, hosts(c.hosts.as_ref()));
    Ok(Work::CreateVm { xml: c.xml.clone(), key, class: class(&c.class)?, hosts, sizes })
}

fn key(provider: &str, kek: &[u8]) -> Result<KeyChoice, Refusal> {
    let kek = KekId::from_bytes(kek.to_vec()).ok_or_else(|| wrong("kek_id", ""))?;
    Ok(KeyChoice { provider: parse(provider, "provider")?, kek })
}

fn fate(word: &str) -> Result<SourceFate, Refusal> {
    match word {
        "wipe" => Ok(SourceFate::Wipe),
        "keep" => Ok(SourceFate::Keep),
        _ => Err(wrong("source", word)),
    }
}

/// A class this version does not know is refused, not replaced by one it knows.
fn class(word: &str) -> Result<ClassChoice, Refusal> {
    ClassChoice::from_word(word).ok_or_else(|| wrong("class", word))
}

/// A server that does not say what the others have leaves it at what every host has.
fn hosts(said: Option<&v1::GroupCapabilities>) -> GroupCapabilities {
    said.map_or_else(GroupCapabilities::default, |said| GroupCapabilities {
        ublk: said.ublk,
        without_ublk: said.without_ublk.clone(),
    })
}

fn parse<T: std::str::FromStr>(text: &str, field: &str) -> Result<T, Refusal> {
    text.parse().map_err(|_| wrong(field, text))
}

fn wrong(field: &str, text: &str) -> Refusal {
    let text: String = text.escape_debug().take(60).collect();
    Refusal::new(Code::BadRequest, format!("the command's {field} is not understood: '{text}'"))
}

fn to_hex<S: Serializer>(kek: &KekId, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(&crate::volume::hex(kek.as_bytes()))
}

fn from_hex<'de, D: Deserializer<'de>>(d: D) -> Result<KekId, D::Error> {
    let text = String::deserialize(d)?;
    crate::volume::unhex(&text)
        .and_then(KekId::from_bytes)
        .ok_or_else(|| serde::de::Error::custom("no KEK id"))
}

#[cfg(test)]
mod tests {
    use vmseal_model::id::KeyUuid;

    use super::*;

    fn command(body: v1::command::Body) -> v1::Command {
        v1::Command { id: TaskId::from_bytes([1; 16]).to_string(), body: Some(body), ..Default::default() }
    }

    fn encrypt_vm() -> v1::EncryptVm {
        v1::EncryptVm {
            domain_uuid: DomainUuid::from_bytes([2; 16]).to_string(),
            targets: vec!["vda".into()],
            provider: "main".into(),
            kek_id: KekId::native(3, KeyUuid::from_bytes([4; 16])).as_bytes().to_vec(),
            source: "wipe".into(),
            class: "fast".into(),
            hosts: Some(v1::GroupCapabilities { ublk: false, without_ublk: vec!["hv2".into()] }),
        }
    }

    #[test]
    fn command_reads_back_from_the_journal() {
        let command = TaskCommand::from_protocol(&command(v1::command::Body::EncryptVm(encrypt_vm())));
        let command = command.unwrap().unwrap();
        let json = serde_json::to_string(&command).unwrap();
        assert_eq!(serde_json::from_str::<TaskCommand>(&json).unwrap(), command);
        assert_eq!(
            (command.kind(), command.domain()),
            (TaskKind::VmEncrypt, Some(DomainUuid::from_bytes([2; 16])))
        );
    }

    #[test]
    fn command_of_a_version_without_classes_leaves_the_choice_to_the_host() {
        let body = v1::EncryptVm { class: String::new(), hosts: None, ..encrypt_vm() };
        let command = TaskCommand::from_protocol(&command(v1::command::Body::EncryptVm(body)));
        let command = command.unwrap().unwrap();
        let Work::EncryptVm { class, hosts, .. } = &command.work else { panic!("{command:?}") };
        assert_eq!((*class, hosts), (ClassChoice::Auto, &GroupCapabilities::default()));
        // The same in a journal.
        let mut json = serde_json::to_value(&command).unwrap();
        for field in ["class", "hosts"] {
            json["work"].as_object_mut().unwrap().remove(field).expect("it is written down");
        }
        assert_eq!(serde_json::from_value::<TaskCommand>(json).unwrap(), command);
    }

    #[test]
    fn wrong_field_is_named() {
        type Change = fn(&mut v1::EncryptVm);
        let changes: [(Change, &str); 5] = [
            (|c| c.domain_uuid = "x".into(), "domain_uuid"),
            (|c| c.provider = "a b".into(), "provider"),
            (|c| c.kek_id.clear(), "kek_id"),
            (|c| c.source = "burn".into(), "source"),
            (|c| c.class = "warp".into(), "class"),
        ];
        for (change, field) in changes {
            let mut body = encrypt_vm();
            change(&mut body);
            let refused = TaskCommand::from_protocol(&command(v1::command::Body::EncryptVm(body))).unwrap();
            let refused = refused.unwrap_err();
            assert!(refused.code == Code::BadRequest && refused.message.contains(field), "{refused:?}");
        }
    }

    #[test]
    fn what_is_no_task_is_none() {
        let cancel = v1::command::Body::CancelTask(v1::CancelTask { task_id: "x".into() });
        assert!(TaskCommand::from_protocol(&command(cancel)).is_none());
        assert!(TaskCommand::from_protocol(&v1::Command::default()).is_none());
    }
}
