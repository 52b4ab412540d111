//! A process that dies at every step of its work, and the next one.

use proptest::prelude::*;

use super::*;

const SIZE: u16 = 8;

fn area() -> InflightArea {
    InflightArea::new(Mapping::anonymous(area_len(2, SIZE) as usize).unwrap(), 2, SIZE).unwrap()
}

#[test]
fn layout_is_the_specifications() {
    let area = area();
    let mut queue = area.queue(1, SIZE).unwrap();
    queue.begin(5);
    queue.begin(2);
    queue.link(5);
    queue.settle(&[5], 1);
    let at = |offset: usize| {
        // SAFETY: within the mapping: the second queue's part begins after 192 bytes.
        unsafe { area.mapping.start().add(192 + offset).read_volatile() }
    };
    let half = |offset| u16::from_le_bytes([at(offset), at(offset + 1)]);
    assert_eq!((half(8), half(10), half(12), half(14)), (1, SIZE, 5, 1));
    assert_eq!((at(16 + 2 * 16), at(16 + 5 * 16)), (1, 0));
    assert_eq!((half(16 + 2 * 16 + 8), half(16 + 5 * 16 + 8)), (1, 0), "counters");
}

#[test]
fn areas_that_are_not_ours_are_refused() {
    let make =
        |len: u64, queues, size| InflightArea::new(Mapping::anonymous(len as usize).unwrap(), queues, size);
    assert_eq!(make(4096, 0, 8).unwrap_err(), InflightError::Shape { queues: 0, size: 8 });
    assert_eq!(make(4096, 1, 7).unwrap_err(), InflightError::Shape { queues: 1, size: 7 });
    assert_eq!(make(100, 1, 8).unwrap_err(), InflightError::TooShort);
    let foreign = Mapping::anonymous(4096).unwrap();
    // SAFETY: within the mapping.
    unsafe { foreign.start().add(COUNT).cast::<u16>().write(64) };
    assert_eq!(InflightArea::new(foreign, 1, 8).unwrap_err(), InflightError::Foreign(0));
    let area = area();
    assert!(area.queue(2, SIZE).is_none());
    assert!(area.queue(0, 16).is_none());
    assert!(area.queue(0, 4).is_some());
}

#[test]
fn write_cache_is_remembered_where_there_is_room() {
    let area = area();
    assert_eq!(area.write_through(), None);
    area.remember_write_through(true);
    assert_eq!(area.write_through(), Some(true));
    area.remember_write_through(false);
    assert_eq!(area.write_through(), Some(false));
    // Made by another back end, without our bytes.
    let mapping = Mapping::anonymous(part_len(SIZE) as usize).unwrap();
    let other = InflightArea::new(mapping, 1, SIZE).unwrap();
    other.remember_write_through(true);
    assert_eq!(other.write_through(), None);
}

#[test]
fn marks_of_nonsense_are_bounded() {
    let area = area();
    let mut queue = area.queue(0, SIZE).unwrap();
    queue.half(BATCH).store(60_000, Ordering::Relaxed);
    queue.half(USED).store(17, Ordering::Relaxed);
    for head in 0..SIZE {
        queue.next(head).store(head.wrapping_mul(7919), Ordering::Relaxed);
        queue.count(head).store(u64::MAX - u64::from(head), Ordering::Relaxed);
        queue.mark(head).store(0xff, Ordering::Relaxed);
    }
    let left = queue.recover(60_000);
    assert_eq!(left, [7, 6, 5, 4, 3, 2, 1, 0]);
    queue.begin(3);
}

/// What a queue does, in order; the process may die before each step.
#[derive(Debug, Clone, Copy)]
enum Step {
    Begin(u16),
    Link(u16),
    /// The used index the driver sees.
    Show(u16),
    /// Takes one mark away.
    Unmark(u16),
    Settle(u16),
}

/// The steps of a queue that takes and gives back as told: `true` takes, `false` gives back a batch.
fn steps(plan: &[(bool, usize)]) -> Vec<Step> {
    let (mut steps, mut taken, mut free, mut used) =
        (Vec::new(), Vec::new(), (0..SIZE).collect::<Vec<_>>(), 0u16);
    for &(take, choice) in plan {
        if take && !free.is_empty() {
            let head = free.remove(choice % free.len());
            taken.push(head);
            steps.push(Step::Begin(head));
        } else if !taken.is_empty() {
            let batch: Vec<u16> =
                (0..=choice % taken.len()).map(|_| taken.remove(choice % taken.len())).collect();
            steps.extend(batch.iter().map(|head| Step::Link(*head)));
            used += batch.len() as u16;
            steps.push(Step::Show(used));
            steps.extend(batch.iter().map(|head| Step::Unmark(*head)));
            steps.push(Step::Settle(used));
            free.extend(batch);
        }
    }
    steps
}

proptest! {
    /// Wherever it dies: what the driver does not see as used is resubmitted, in the order it was taken, and nothing
    /// else is.
    #[test]
    fn death_at_any_step_loses_nothing_and_repeats_nothing(
        plan in proptest::collection::vec((any::<bool>(), 0usize..8), 1..60),
        death in 0usize..200,
    ) {
        let area = area();
        let mut queue = area.queue(0, SIZE).unwrap();
        prop_assert_eq!(queue.recover(0), Vec::<u16>::new());
        let (mut taken, mut linked, mut seen) = (Vec::new(), Vec::new(), 0);
        for step in steps(&plan).into_iter().take(death) {
            match step {
                Step::Begin(head) => {
                    queue.begin(head);
                    taken.push(head);
                }
                Step::Link(head) => {
                    queue.link(head);
                    linked.push(head);
                }
                Step::Show(used) => {
                    seen = used;
                    taken.retain(|head| !linked.contains(head));
                    linked.clear();
                }
                Step::Unmark(head) => queue.mark(head).store(0, Ordering::Relaxed),
                Step::Settle(used) => queue.settle(&[], used),
            }
        }
        drop(queue);
        let mut next = area.queue(0, SIZE).unwrap();
        prop_assert_eq!(&next.recover(seen), &taken);
        // And if that one dies before it does anything, the third finds the same.
        let mut third = area.queue(0, SIZE).unwrap();
        prop_assert_eq!(&third.recover(seen), &taken);
        // New requests come after the old ones.
        if let Some(free) = (0..SIZE).find(|head| !taken.contains(head)) {
            third.begin(free);
            let after = area.queue(0, SIZE).unwrap().recover(seen);
            prop_assert_eq!(after.last(), Some(&free));
        }
    }
}
