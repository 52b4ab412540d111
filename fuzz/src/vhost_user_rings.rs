//! A guest's queue in memory of this process: descriptors, available ring and requests, all of the input's making.

use std::sync::Arc;

use vmseal_disk::vhost_user::fuzzing::{
    inflight::{InflightArea, area_len},
    mapping::Mapping,
    memory::{GuestMemory, Piece, RegionSpec},
    request,
    ring::{Chain, Ring, RingAddresses, RingFeatures},
};

use crate::input::Input;

/// Bytes of each of two regions. Addresses within them are short, so that the input finds them.
const REGION: u64 = 8192;
/// Where the front end sees the first; the guest sees it at 0.
const USER: u64 = 0x10_0000;

/// Takes chains off the queue and reads them as requests, as a device does.
///
/// # Panics
///
/// If a piece lies outside the guest's memory, or a queue goes on for ever.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (choice, size) = (input.u8(), 1u32 << (input.u8() % 8));
    let accepted = input.u64();
    // The second region follows the first, or leaves a gap.
    let gap = if choice & 1 == 0 { 0 } else { 4096 };
    let (first, second) = (memory(), memory());
    let starts = [first.start() as usize, second.start() as usize];
    let bytes = input.all();
    fill(&first, bytes);
    fill(&second, bytes.get(REGION as usize..).unwrap_or_default());
    let spec = |guest, user| RegionSpec { guest, len: REGION, user, offset: 0 };
    let guest = GuestMemory::default()
        .with_mapping(spec(0, USER), first)
        .and_then(|memory| memory.with_mapping(spec(REGION + gap, USER + 2 * REGION), second))
        .expect("two regions");
    let features = RingFeatures { event_idx: choice & 2 != 0, indirect: choice & 4 != 0 };
    let at = RingAddresses { descriptors: USER, available: USER + 2048, used: USER + 2560 };
    let Ok(mut ring) = Ring::new(Arc::new(guest), at, size, features, 0) else { return };
    let area = Mapping::anonymous(area_len(1, ring.size()) as usize).expect("memory");
    let area = InflightArea::new(area, 1, ring.size()).expect("a new area");
    let mut inflight = area.queue(0, ring.size()).expect("its queue");
    let mut chain = Chain::default();
    for _ in 0..=2 * u32::from(ring.size()) {
        let head = match ring.next_head() {
            Ok(Some(head)) => head,
            Ok(None) | Err(_) => return,
        };
        if ring.walk(head, &mut chain).is_err() {
            return;
        }
        for piece in chain.readable.iter().chain(&chain.writable) {
            assert!(within(piece, &starts), "{piece:?} is not the guest's");
        }
        let Ok(parsed) = request::parse(&mut chain, accepted, choice & 8 != 0) else { return };
        assert!(
            starts.iter().any(|start| (*start..start + REGION as usize).contains(&(parsed.status as usize)))
        );
        for piece in chain.readable.iter().chain(&chain.writable) {
            assert!(within(piece, &starts), "{piece:?} is not the guest's");
        }
        inflight.begin(head);
        let _ = ring.push_used(head, parsed.writable as u32);
        inflight.settle(&[head], ring.published_used());
        ring.publish();
        let _ = (ring.must_tell(), ring.ask_to_be_told());
        ring.ask_for_silence();
    }
    // The ring lies in its own memory: a guest may make a queue of whatever we write, but not without end.
}

fn memory() -> Mapping {
    Mapping::anonymous(REGION as usize).expect("memory")
}

fn fill(mapping: &Mapping, bytes: &[u8]) {
    let len = bytes.len().min(mapping.len());
    // SAFETY: the mapping has that many bytes and nobody else uses it yet.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), mapping.start(), len) };
}

fn within(piece: &Piece, starts: &[usize; 2]) -> bool {
    let (begin, end) = (piece.base as usize, piece.base as usize + piece.len);
    let one = |start: usize| start <= begin && end <= start + REGION as usize;
    // Regions that neighbours in the guest happen to be neighbours here too.
    let both = starts[0].min(starts[1]);
    let neighbours = starts[0].abs_diff(starts[1]) == REGION as usize;
    starts.iter().any(|start| one(*start))
        || (neighbours && both <= begin && end <= both + 2 * REGION as usize)
}
