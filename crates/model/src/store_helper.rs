//! Messages between a VM's disk process and the helper that keeps its ciphertext on a network store.
//!
//! Every message is [`MESSAGE_BYTES`] long and goes through a unix seqpacket socket, up to [`MAX_BATCH`] of them in one
//! packet. Data lies in memory that both processes have mapped, and is ciphertext always. Format and order of events:
//! `docs/formats/store-helper.md`.

/// Version of these messages.
pub const STORE_HELPER_VERSION: u16 = 1;
/// What the token of a [`StoreOp::Hello`] is: `VMSLSTOR`.
pub const STORE_HELPER_MAGIC: u64 = u64::from_be_bytes(*b"VMSLSTOR");
/// Bytes of a message.
pub const MESSAGE_BYTES: usize = 32;
/// Most messages in a packet.
pub const MAX_BATCH: usize = 64;
/// Bytes of memory that belong to a channel.
pub const CHANNEL_BYTES: usize = 8 << 20;
/// Most requests a channel may have under way.
pub const MAX_UNDER_WAY: usize = 128;
/// Most bytes of one [`StoreOp::Discard`].
pub const MAX_DISCARD: u64 = 1 << 30;
/// Most channels beside the first one.
pub const MAX_CHANNELS: usize = 64;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum StoreOp {
    /// First message of each side on the first channel: token is [`STORE_HELPER_MAGIC`], flags the version. The helper's
    /// comes with the channel's memory; offset is the bytes of the store, length those of the memory.
    Hello = 1,
    /// Another channel, on the first one only: the reply comes with its socket and its memory.
    Open = 2,
    /// Store to memory.
    Read = 3,
    /// Memory to store. Durable when answered.
    Write = 4,
    /// Gives space back; zeros or old bytes are read there afterwards.
    Discard = 5,
    /// Everything answered before is durable.
    Flush = 6,
}

impl StoreOp {
    fn from_number(number: u16) -> Option<Self> {
        [Self::Hello, Self::Open, Self::Read, Self::Write, Self::Discard, Self::Flush]
            .into_iter()
            .find(|op| *op as u16 == number)
    }
}

/// A request, or the reply to one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreMessage {
    /// The asker's own number; a reply repeats it.
    pub token: u64,
    /// What is asked; a reply repeats it.
    pub op: StoreOp,
    /// The version in a [`StoreOp::Hello`], else 0.
    pub flags: u16,
    /// 0 in a request; in a reply why it failed, or 0.
    pub errno: u32,
    /// Where in the store, in bytes.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
    /// Where in the channel's memory, in bytes.
    pub buffer: u32,
}

impl StoreMessage {
    /// As it is sent: integers little-endian, in the order of the fields.
    pub fn encode(&self) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[..8].copy_from_slice(&self.token.to_le_bytes());
        bytes[8..10].copy_from_slice(&(self.op as u16).to_le_bytes());
        bytes[10..12].copy_from_slice(&self.flags.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.errno.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..].copy_from_slice(&self.buffer.to_le_bytes());
        bytes
    }

    /// From the bytes of one message; `None` if it is not one.
    pub fn decode(bytes: &[u8; MESSAGE_BYTES]) -> Option<Self> {
        let [a @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] = *bytes;
        let [.., b0, b1, b2, b3, b4, b5, b6, b7, l0, l1, l2, l3, m0, m1, m2, m3] = *bytes;
        let [t0, t1, t2, t3, t4, t5, t6, t7, o0, o1, f0, f1, e0, e1, e2, e3] = a;
        Some(Self {
            token: u64::from_le_bytes([t0, t1, t2, t3, t4, t5, t6, t7]),
            op: StoreOp::from_number(u16::from_le_bytes([o0, o1]))?,
            flags: u16::from_le_bytes([f0, f1]),
            errno: u32::from_le_bytes([e0, e1, e2, e3]),
            offset: u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            buffer: u32::from_le_bytes([m0, m1, m2, m3]),
        })
    }

    /// From a whole packet; `None` if any part of it is no message.
    pub fn decode_packet(packet: &[u8]) -> Option<Vec<Self>> {
        let (messages, rest) = packet.as_chunks::<MESSAGE_BYTES>();
        if messages.is_empty() || messages.len() > MAX_BATCH || !rest.is_empty() {
            return None;
        }
        messages.iter().map(Self::decode).collect()
    }

    /// The helper's or the worker's first word; the worker's repeats what it heard.
    pub fn hello(store_bytes: u64) -> Self {
        Self {
            token: STORE_HELPER_MAGIC,
            op: StoreOp::Hello,
            flags: STORE_HELPER_VERSION,
            errno: 0,
            offset: store_bytes,
            length: CHANNEL_BYTES as u32,
            buffer: 0,
        }
    }

    /// Whether a helper may carry this request out: known place, within memory and store. Nobody but the worker sends
    /// any, and a worker that was taken over must not reach the helper's own memory.
    pub fn is_within(&self, store_bytes: u64) -> bool {
        let place = self.offset.checked_add(u64::from(self.length)).is_some_and(|end| end <= store_bytes);
        match self.op {
            StoreOp::Read | StoreOp::Write => {
                let end = u64::from(self.buffer) + u64::from(self.length);
                place && self.length > 0 && end <= CHANNEL_BYTES as u64
            }
            StoreOp::Discard => place && u64::from(self.length) <= MAX_DISCARD,
            StoreOp::Flush | StoreOp::Open | StoreOp::Hello => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write() -> StoreMessage {
        StoreMessage {
            token: 0x0102_0304_0506_0708,
            op: StoreOp::Write,
            flags: 0,
            errno: 0,
            offset: 16 << 20,
            length: 4096,
            buffer: 131_072,
        }
    }

    #[test]
    fn message_is_laid_out_as_written_down() {
        let bytes = write().encode();
        let expected = "0807060504030201\
                        0400\
                        0000\
                        00000000\
                        0000000100000000\
                        00100000\
                        00000200";
        assert_eq!(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), expected);
        assert_eq!(StoreMessage::decode(&bytes), Some(write()));
        let hello = StoreMessage::hello(1 << 40);
        assert_eq!(StoreMessage::decode(&hello.encode()), Some(hello));
    }

    #[test]
    fn packet_of_anything_else_is_none() {
        let mut packet = write().encode().to_vec();
        packet.extend(StoreMessage { op: StoreOp::Flush, ..write() }.encode());
        assert_eq!(StoreMessage::decode_packet(&packet).unwrap().len(), 2);
        for cut in [0, 1, 31, 33, 63] {
            assert_eq!(StoreMessage::decode_packet(&packet[..cut]), None, "{cut}");
        }
        let many = write().encode().repeat(MAX_BATCH + 1);
        assert_eq!(StoreMessage::decode_packet(&many), None);
        for op in [0u16, 7, 0x0104, u16::MAX] {
            packet[8..10].copy_from_slice(&op.to_le_bytes());
            assert_eq!(StoreMessage::decode_packet(&packet), None, "{op}");
        }
    }

    #[test]
    fn request_outside_memory_or_store_is_seen() {
        let store = (16 << 20) + 4096;
        assert!(write().is_within(store));
        assert!(!write().is_within(store - 1));
        let outside = [
            StoreMessage { offset: u64::MAX, ..write() },
            StoreMessage { buffer: CHANNEL_BYTES as u32 - 4095, ..write() },
            StoreMessage { buffer: u32::MAX, ..write() },
            StoreMessage { length: 0, ..write() },
            StoreMessage { op: StoreOp::Discard, offset: store, ..write() },
            StoreMessage { op: StoreOp::Read, length: u32::MAX, offset: 0, ..write() },
        ];
        for message in outside {
            assert!(!message.is_within(store), "{message:?}");
        }
        assert!(StoreMessage { op: StoreOp::Flush, offset: u64::MAX, ..write() }.is_within(store));
    }
}
