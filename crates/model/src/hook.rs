//! The frame between libvirt's qemu hook and the agent. Format: `docs/formats/hook.md`.
//!
//! A request is four texts (domain name, phase, sub-phase, extra) and the domain XML, each with a u32
//! little-endian length; a reply is a code byte, a message and an optional XML, likewise. Bounds come first.

/// Most bytes of a domain's XML.
pub const MAX_XML: usize = 8 << 20;
/// Most bytes of any other text.
pub const MAX_TEXT: usize = 4096;
/// Begins every request: name and version of this frame.
pub const MAGIC: [u8; 8] = *b"VMSHOOK1";

/// What libvirt called the hook for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Before resources are taken; may refuse.
    Prepare,
    /// Just before QEMU.
    Start,
    /// QEMU runs.
    Started,
    /// QEMU ended.
    Stopped,
    /// Resources are free.
    Release,
    /// On the target of a migration; may refuse and rewrite.
    Migrate,
    /// Before a saved image is used; may refuse and rewrite.
    Restore,
    /// libvirtd came back and found the VM running.
    Reconnect,
    /// A device was attached.
    Attach,
}

impl Phase {
    /// The phase of libvirt's second argument.
    pub fn from_arg(arg: &str) -> Option<Self> {
        Some(match arg {
            "prepare" => Self::Prepare,
            "start" => Self::Start,
            "started" => Self::Started,
            "stopped" => Self::Stopped,
            "release" => Self::Release,
            "migrate" => Self::Migrate,
            "restore" => Self::Restore,
            "reconnect" => Self::Reconnect,
            "attach" => Self::Attach,
            _ => return None,
        })
    }

    /// libvirt's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Start => "start",
            Self::Started => "started",
            Self::Stopped => "stopped",
            Self::Release => "release",
            Self::Migrate => "migrate",
            Self::Restore => "restore",
            Self::Reconnect => "reconnect",
            Self::Attach => "attach",
        }
    }

    /// Whether the hook may exit non-zero here. A refusal in `reconnect` kills the running QEMU, so everywhere else never.
    pub fn may_refuse(self) -> bool {
        matches!(self, Self::Prepare | Self::Migrate | Self::Restore)
    }

    /// How long the hook may wait in all, milliseconds.
    ///
    /// libvirt calls `stopped` and `release` one after the other with the domain locked, and `virsh list` waits for
    /// both: together they must be well below the two seconds it may take.
    pub fn deadline_ms(self) -> u64 {
        if self.may_refuse() { 10_000 } else { 800 }
    }
}

/// One call of the hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookRequest {
    /// libvirt's first argument: the domain's name.
    pub domain_name: String,
    /// Its second.
    pub phase: Phase,
    /// Its third: `begin` or `end`.
    pub sub_phase: String,
    /// Its fourth: `-`, or why.
    pub extra: String,
    /// The domain's XML from standard input.
    pub xml: String,
}

/// The agent's answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HookReply {
    /// 0: go on. Anything else refuses, where the phase allows that.
    pub code: u8,
    /// One line: what, why, what to do. Empty with code 0.
    pub message: String,
    /// XML to give to libvirt in place of what it has.
    pub xml: Option<String>,
}

/// Why bytes are no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// More is needed.
    #[error("frame ends early")]
    Truncated,
    /// Longer than allowed, or more than one frame.
    #[error("frame is longer than allowed")]
    TooLong,
    /// Not this protocol.
    #[error("not a hook frame of version 1")]
    Magic,
    /// Not UTF-8, or an unknown phase.
    #[error("frame holds a bad {0}")]
    Field(&'static str),
}

impl HookRequest {
    /// The bytes of the request.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        for text in [&self.domain_name, self.phase.as_str(), &self.sub_phase, &self.extra, &self.xml] {
            put(&mut out, text.as_bytes());
        }
        out
    }

    /// Reads a whole request.
    ///
    /// # Errors
    ///
    /// [`FrameError::Truncated`] means: read on. All others are final.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let (magic, mut rest) = bytes.split_at_checked(8).ok_or(FrameError::Truncated)?;
        if magic != MAGIC {
            return Err(FrameError::Magic);
        }
        let domain_name = take(&mut rest, MAX_TEXT)?;
        let phase = Phase::from_arg(&take(&mut rest, MAX_TEXT)?).ok_or(FrameError::Field("phase"))?;
        let sub_phase = take(&mut rest, MAX_TEXT)?;
        let extra = take(&mut rest, MAX_TEXT)?;
        let xml = take(&mut rest, MAX_XML)?;
        if !rest.is_empty() {
            return Err(FrameError::TooLong);
        }
        Ok(Self { domain_name, phase, sub_phase, extra, xml })
    }
}

impl HookReply {
    /// The bytes of the reply.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![self.code];
        put(&mut out, self.message.as_bytes());
        match &self.xml {
            None => out.push(0),
            Some(xml) => {
                out.push(1);
                put(&mut out, xml.as_bytes());
            }
        }
        out
    }

    /// Reads a whole reply.
    ///
    /// # Errors
    ///
    /// [`FrameError::Truncated`] means: read on. All others are final.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let (&code, mut rest) = bytes.split_first().ok_or(FrameError::Truncated)?;
        let message = take(&mut rest, MAX_TEXT)?;
        let (&has_xml, mut rest) = rest.split_first().ok_or(FrameError::Truncated)?;
        let xml = match has_xml {
            0 => None,
            1 => Some(take(&mut rest, MAX_XML)?),
            _ => return Err(FrameError::Field("XML mark")),
        };
        if rest.is_empty() { Ok(Self { code, message, xml }) } else { Err(FrameError::TooLong) }
    }
}

fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    let len = u32::try_from(bytes.len()).expect("texts of a frame are far below 4 GiB");
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(bytes);
}

fn take(rest: &mut &[u8], max: usize) -> Result<String, FrameError> {
    let (len, tail) = rest.split_first_chunk::<4>().ok_or(FrameError::Truncated)?;
    let len = u32::from_le_bytes(*len) as usize;
    if len > max {
        return Err(FrameError::TooLong);
    }
    let (bytes, tail) = tail.split_at_checked(len).ok_or(FrameError::Truncated)?;
    *rest = tail;
    String::from_utf8(bytes.to_vec()).map_err(|_| FrameError::Field("text (not UTF-8)"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_prepare_migrate_and_restore_may_refuse() {
        let all = [
            "prepare",
            "start",
            "started",
            "stopped",
            "release",
            "migrate",
            "restore",
            "reconnect",
            "attach",
        ];
        let may: Vec<_> = all.iter().filter(|a| Phase::from_arg(a).unwrap().may_refuse()).collect();
        assert_eq!(may, [&"prepare", &"migrate", &"restore"]);
    }

    proptest! {
        #[test]
        fn request_reads_back_and_every_prefix_asks_for_more(name in ".{0,40}", xml in ".{0,200}") {
            let request = HookRequest { domain_name: name, phase: Phase::Prepare, sub_phase: "begin".into(), extra: "-".into(), xml };
            let bytes = request.encode();
            for n in 0..bytes.len() {
                prop_assert_eq!(HookRequest::decode(&bytes[..n]), Err(FrameError::Truncated));
            }
            prop_assert_eq!(HookRequest::decode(&bytes), Ok(request));
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = HookRequest::decode(&bytes);
            let _ = HookReply::decode(&bytes);
        }

        #[test]
        fn reply_reads_back(code: u8, message in ".{0,40}", xml in proptest::option::of(".{0,80}")) {
            let reply = HookReply { code, message, xml };
            prop_assert_eq!(HookReply::decode(&reply.encode()), Ok(reply));
        }
    }
}
