//! Crashes are all there, and none that could not be.

use std::{collections::BTreeSet, io::Read};

use vmseal_test_store::{
    crash_states::{CrashKind, CrashState, CrashStates},
    entry::Entry,
    seed::Random,
};

fn write(sector: u64, bytes: &[u8]) -> Entry {
    Entry::Write {
        offset: sector * 512,
        data: bytes.iter().flat_map(|byte| [*byte; 512]).collect(),
        thread: 0,
    }
}

/// One letter a sector.
fn letters(state: &CrashState) -> String {
    state.image.range(0, u64::MAX).chunks(512).map(|sector| char::from(sector[0].max(b'.'))).collect()
}

fn crashes(base: usize, log: &[Entry]) -> Vec<CrashState> {
    CrashStates::new(vec![0; base * 512], log, Random::new(1)).collect()
}

fn set(of: &[&str]) -> BTreeSet<String> {
    of.iter().map(|text| (*text).to_owned()).collect()
}

#[test]
fn what_was_flushed_is_there_and_of_the_rest_any_part() {
    let log = [write(0, b"a"), Entry::Flush, write(1, b"bc"), write(0, b"d")];
    let all = crashes(3, &log);
    let images: BTreeSet<_> = all.iter().map(letters).collect();
    assert_eq!(images, set(&["...", "a..", "ab.", "a.c", "abc", "dbc", "d.."]));
    assert!(
        all.iter().all(|state| state.position < 2 || letters(state) != "..."),
        "nothing older than the flush"
    );
    let torn = all.iter().filter(|state| matches!(state.kind, CrashKind::Torn { .. })).count();
    assert_eq!((all.len(), torn), (10, 2));
}

#[test]
fn sector_that_is_written_in_part_is_old_or_new() {
    let mut before = vec![b'a'; 1024];
    let log = [Entry::Write { offset: 300, data: vec![b'b'; 512], thread: 0 }];
    let all: Vec<_> = CrashStates::new(before.clone(), &log, Random::new(1)).collect();
    let mut images: Vec<_> = all.iter().map(|state| state.image.range(0, 1024)).collect();
    assert_eq!(images.len(), 5);
    assert_eq!(images.pop().as_ref(), Some(&before), "and nothing of it");
    assert_eq!(images[0], before);
    before[300..812].fill(b'b');
    assert_eq!(images[3], before);
    let lower = images[1].clone();
    assert_eq!(lower, [&[b'a'; 300][..], &[b'b'; 212], &[b'a'; 512]].concat());
    let mut read = Vec::new();
    let mut last = all.into_iter().nth(3).unwrap().image;
    last.read_to_end(&mut read).unwrap();
    assert_eq!(Some(read), images.pop());
}

#[test]
fn file_that_grew_may_be_long_and_empty_or_short() {
    let log = [write(1, b"b"), write(2, b"c")];
    let images: BTreeSet<_> = crashes(1, &log).iter().map(letters).collect();
    assert_eq!(images, set(&[".", "..", ".b", ".b.", ".bc", "..c"]));
    let cut = [write(0, b"abc"), Entry::Flush, Entry::SetLen { len: 512 }, Entry::SetLen { len: 1024 }];
    let images: BTreeSet<_> = crashes(0, &cut).iter().filter(|s| s.position >= 2).map(letters).collect();
    assert_eq!(images, set(&["abc", "a", "a.", "ab"]));
}

#[test]
fn failed_flush_makes_nothing_durable_and_neither_does_a_later_one() {
    let log = [write(0, b"a"), Entry::FlushFailed, write(1, b"b"), Entry::Flush];
    let after: BTreeSet<_> = crashes(2, &log).iter().filter(|s| s.position == 4).map(letters).collect();
    assert_eq!(after, set(&[".b", "ab"]), "what the failed flush was to save is in doubt");
    let again = [&log[..], &[write(0, b"c"), Entry::Flush]].concat();
    let after: BTreeSet<_> = crashes(2, &again).iter().filter(|s| s.position == 6).map(letters).collect();
    assert!(after.is_empty(), "written anew and flushed: {after:?}");
    let lied = [write(0, b"a"), Entry::FlushLied];
    assert!(crashes(2, &lied).iter().any(|state| letters(state) == ".." && state.position == 2));
}

#[test]
fn long_runs_without_a_flush_are_sampled_and_the_same_seed_gives_the_same() {
    let log: Vec<_> = (0..20).map(|sector| write(sector, &[b'a' + sector as u8])).collect();
    let run = |seed| -> Vec<String> {
        CrashStates::new(vec![0; 20 * 512], &log, Random::new(seed))
            .samples(50)
            .map(|s| letters(&s))
            .collect()
    };
    let states = run(7);
    assert!((60..=71).contains(&states.len()), "{}", states.len());
    assert_eq!(states, run(7));
    assert_ne!(states, run(8));
    let few: Vec<_> = log.iter().take(8).cloned().collect();
    assert_eq!(crashes(20, &few).len(), 1 + 8 + 255, "every choice of eight writes");
}
