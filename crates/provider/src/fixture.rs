//! For tests only: a provider whose keys can be searched for, a directory of its own, and stock tools.

use std::{
    fs,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use vmseal_keys::{Kdk, SecretBytes, random_bytes};
use vmseal_model::id::ProviderUuid;

use crate::{
    native::{Generation, NativeProvider},
    p12::Cost,
};

/// 2026-11-24T10:00:00Z.
pub(crate) const NOW_MS: i64 = 1_795_514_400_000;
/// Good for tests only: next to no work.
pub(crate) const CHEAP: Cost = Cost { pbes2: 100, mac: 100 };
pub(crate) const PASSWORD: &str = "VMSEAL-TEST-SECRET password";

/// The KDK of a generation in tests: the marker, and the number.
pub(crate) fn kdk_bytes(generation: u32) -> [u8; 32] {
    let text = format!("VMSEAL-TEST-SECRET-kdk{generation:010}");
    text.as_bytes().try_into().expect("22 characters and 10 digits")
}

/// Provider `main` with generations 1 to `generations`, none backed up.
pub(crate) fn provider(generations: u32) -> NativeProvider {
    let all = (1..=generations)
        .map(|n| Generation::new(n, Kdk::new(SecretBytes::take_from(&mut kdk_bytes(n))), NOW_MS, None))
        .collect();
    let uuid = ProviderUuid::from_bytes(*b"\x1b\x4e\x28\xba\x2f\xa1\x41\xd2\x88\x3f\x00\x16\xd3\xcc\xa4\x27");
    NativeProvider::from_generations("main".parse().unwrap(), uuid, all).unwrap()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A directory of its own, removed with it.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        let tag = u64::from_le_bytes(random_bytes().unwrap());
        let path = std::env::temp_dir().join(format!("vmseal-provider-{tag:016x}"));
        fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).unwrap();
        file.write_all(bytes).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs a program with `input` on its standard input.
pub(crate) fn run(program: &str, args: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program} is needed by this test: {error}"));
    // It may end without having read anything.
    let _ = child.stdin.take().expect("piped").write_all(input);
    child.wait_with_output().unwrap()
}
