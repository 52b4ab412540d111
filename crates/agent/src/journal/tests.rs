use proptest::prelude::*;

use super::*;
use crate::scratch::Scratch;

const TASK: TaskId = TaskId::from_bytes([5; 16]);

fn entries(n: u64) -> Vec<Entry> {
    let step = |i: u64| match i % 3 {
        0 => Entry::Step { target: "vda".into(), step: format!("s{i}"), data: serde_json::json!({ "i": i }) },
        1 => Entry::Progress { target: "vda".into(), step: "copied".into(), durable: i << 20 },
        _ => Entry::Step {
            target: String::new(),
            step: "note".into(),
            data: "x".repeat(i as usize * 7).into(),
        },
    };
    let begun = Entry::TaskBegun { command: serde_json::json!({ "what": "encrypt-vm" }) };
    std::iter::once(begun).chain((0..n).map(step)).collect()
}

fn written(scratch: &Scratch, entries: &[Entry]) -> PathBuf {
    let mut journal = Journal::create(scratch.path(), TASK).unwrap();
    entries.iter().for_each(|e| journal.append(e).unwrap());
    journal.path().to_owned()
}

/// Where each entry ends, and the header.
fn ends(entries: &[Entry]) -> Vec<usize> {
    let mut at = HEADER.len();
    let mut ends = vec![at];
    for entry in entries {
        at += encode(entry).len();
        ends.push(at);
    }
    ends
}

#[test]
fn checksum_is_that_of_rfc_3720() {
    assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}

#[test]
fn what_was_appended_reads_back_and_can_be_continued() {
    let scratch = Scratch::new();
    let all = entries(9);
    let path = written(&scratch, &all);
    let (mut journal, read) = Journal::recover(&path).unwrap();
    assert_eq!(read, all);
    let outcome = Outcome { state: TaskState::Succeeded, message: "m".into(), code: None, hint: "".into() };
    journal.append(&Entry::Finished { outcome: outcome.clone() }).unwrap();
    assert_eq!(Journal::read(&path).unwrap().last(), Some(&Entry::Finished { outcome }));
    assert_eq!(Journal::list(scratch.path()).unwrap(), [(TASK, path)]);
    assert!(matches!(Journal::create(scratch.path(), TASK), Err(JournalError::Exists { .. })));
}

#[test]
fn state_is_that_of_the_last_entries() {
    let all = entries(9);
    assert_eq!(durable(&all, "vda", "copied"), 7 << 20);
    assert_eq!(durable(&all, "vdb", "copied"), 0);
    assert!(is_done(&all, "vda", "s6") && !is_done(&all, "vda", "s7") && !is_done(&all, "vdb", "s6"));
    assert_eq!(step_data::<serde_json::Value>(&all, "vda", "s3").unwrap()["i"], 3);
    assert_eq!(step_data::<u64>(&all, "vda", "s3"), None);
}

#[test]
fn every_tear_gives_the_last_whole_entry() {
    let scratch = Scratch::new();
    let all = entries(6);
    let path = written(&scratch, &all);
    let good = fs::read(&path).unwrap();
    let ends = ends(&all);
    for cut in 0..=good.len() {
        // Cut short; and as long as it should be with zeros where the end never came.
        let whole = ends.iter().filter(|end| **end <= cut).count().saturating_sub(1);
        let last = ends.iter().copied().filter(|end| *end <= cut).max().unwrap_or(0);
        let next = ends.iter().copied().find(|end| *end > cut).unwrap_or(cut);
        let mut zeroed = good[..cut].to_vec();
        zeroed.resize(next, 0);
        for torn in [&good[..cut], &zeroed] {
            match parse(torn) {
                Parsed::Good { entries, len } => {
                    assert_eq!((&entries[..], len), (&all[..whole], last.max(HEADER.len())))
                }
                Parsed::NoHeader => assert!(cut < HEADER.len()),
                _ => panic!("torn at {cut} is no damage"),
            }
            // Flushing is slow: a few go through the file.
            if cut % 60 != 0 {
                continue;
            }
            fs::write(&path, torn).unwrap();
            let (mut journal, read) = Journal::recover(&path).unwrap();
            assert_eq!(read, all[..whole], "cut at {cut}");
            assert_eq!(fs::metadata(&path).unwrap().len() as usize, last.max(HEADER.len()));
            journal.append(&all[0]).unwrap();
            assert_eq!(Journal::read(&path).unwrap().len(), whole + 1);
        }
    }
}

#[test]
fn damage_before_the_end_is_an_error_and_not_a_shorter_history() {
    let scratch = Scratch::new();
    let all = entries(6);
    let path = written(&scratch, &all);
    let good = fs::read(&path).unwrap();
    let last_begins = ends(&all)[all.len() - 1];
    for at in HEADER.len()..last_begins {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        assert!(matches!(parse(&bad), Parsed::Damaged { .. }), "byte {at}");
        fs::write(&path, &bad).unwrap();
    }
    assert!(matches!(Journal::recover(&path), Err(JournalError::Damaged { .. })));
}

#[test]
fn other_version_and_other_file_are_told_apart() {
    let scratch = Scratch::new();
    let path = written(&scratch, &entries(1));
    let mut bytes = fs::read(&path).unwrap();
    bytes[8] = 2;
    fs::write(&path, &bytes).unwrap();
    assert!(matches!(Journal::recover(&path), Err(JournalError::Version { .. })));
    fs::write(&path, "something else altogether").unwrap();
    assert!(matches!(Journal::recover(&path), Err(JournalError::Damaged { at: 0, .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// A crash may leave any bytes in the place of the last entry.
    #[test]
    fn garbage_in_the_last_entry_costs_that_entry_only(
        n in 1u64..8,
        garbage in proptest::collection::vec(any::<u8>(), 1..200),
        keep in 0usize..40,
    ) {
        let all = entries(n);
        let mut bytes = HEADER.to_vec();
        all.iter().for_each(|e| bytes.extend(encode(e)));
        let begins = ends(&all)[all.len() - 1];
        bytes.truncate(bytes.len().min(begins + keep));
        bytes.extend(&garbage);
        match parse(&bytes) {
            Parsed::Good { entries, len } => {
                prop_assert_eq!(&entries[..], &all[..all.len() - 1]);
                prop_assert_eq!(len, begins);
            }
            _ => prop_assert!(false, "a torn end is no damage"),
        }
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut with_header = HEADER.to_vec();
        with_header.extend(&bytes);
        for bytes in [&bytes, &with_header] {
            let _ = parse(bytes);
        }
    }
}
