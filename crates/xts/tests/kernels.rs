//! Every kernel this processor can run against aws-lc: units, sizes, sector numbers, addresses, directions.

use std::cell::Cell;

use proptest::{prelude::*, test_runner::TestRunner};
use vmseal_xts::{Cipher, Kernel, XtsError};

fn others() -> Vec<Kernel> {
    Kernel::ALL.into_iter().filter(|kernel| *kernel != Kernel::AwsLc && kernel.is_available()).collect()
}

/// Cases of a differential run, each several comparisons: few in `make test`, many with VMSEAL_SOAK.
fn cases() -> u32 {
    if std::env::var_os("VMSEAL_SOAK").is_some() { 20_000 } else { 300 }
}

/// Bytes before and after every buffer that must stay as they are.
const MARGIN: usize = 128;
const UNTOUCHED: u8 = 0xa5;

#[derive(Debug, Clone)]
struct Case {
    key: [u8; 64],
    unit: usize,
    units: usize,
    first: u64,
    /// How far the source and the destination lie from where registers would like them.
    skews: (usize, usize),
    seed: u8,
}

fn case() -> impl Strategy<Value = Case> {
    let unit = prop_oneof![
        4 => Just(512usize), 3 => Just(4096), 1 => Just(1024), 1 => Just(1536), 1 => Just(65536)
    ];
    let first = prop_oneof![
        0u64..300,
        (1u64 << 32) - 200..(1 << 32) + 200,
        (1u64 << 40)..(1 << 40) + 500,
        any::<u64>(),
        u64::MAX - 3000..=u64::MAX
    ];
    let skew = || prop_oneof![Just(0usize), 0usize..64];
    (any::<[u8; 32]>(), any::<[u8; 32]>(), unit, 1usize..41, first, (skew(), skew()), any::<u8>()).prop_map(
        |(data, tweak, unit, units, first, skews, seed)| {
            let mut key = [0; 64];
            key[..32].copy_from_slice(&data);
            key[32..].copy_from_slice(&tweak);
            key[0] = !key[32];
            let units = if unit > 4096 { units % 4 + 1 } else { units };
            let step = unit as u64 / 512;
            // So that the last unit is the last there is, at most.
            let first = first.min(u64::MAX - units as u64 * step + 1) / step * step;
            Case { key, unit, units, first, skews, seed }
        },
    )
}

/// Bytes with margins, beginning `skew` bytes after a multiple of 64.
struct Room {
    bytes: Vec<u8>,
    at: usize,
    len: usize,
}

impl Room {
    fn new(skew: usize, content: &[u8]) -> Self {
        let mut bytes = vec![UNTOUCHED; content.len() + 2 * MARGIN + 128];
        let at = MARGIN + bytes.as_ptr().wrapping_add(MARGIN).align_offset(64) + skew;
        bytes[at..at + content.len()].copy_from_slice(content);
        Self { bytes, at, len: content.len() }
    }

    fn content(&self) -> &[u8] {
        &self.bytes[self.at..self.at + self.len]
    }

    fn content_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.at..self.at + self.len]
    }

    fn margins_are_untouched(&self) -> bool {
        let around = self.bytes[..self.at].iter().chain(&self.bytes[self.at + self.len..]);
        around.into_iter().all(|byte| *byte == UNTOUCHED)
    }
}

/// Results of one direction, in place and by copy, each compared; how many comparisons.
fn compare(cipher: &Cipher, encrypt: bool, case: &Case, text: &[u8], expected: &[u8]) -> usize {
    let about = || format!("{}, encrypt {encrypt}, {case:?}", cipher.kernel());
    let (source_skew, skew) = case.skews;
    let mut place = Room::new(skew, text);
    let source = Room::new(source_skew, text);
    let mut copy = Room::new(skew, &vec![0; text.len()]);
    if encrypt {
        cipher.encrypt(case.first, place.content_mut()).unwrap();
        cipher.encrypt_copy(case.first, source.content(), copy.content_mut()).unwrap();
    } else {
        cipher.decrypt(case.first, place.content_mut()).unwrap();
        cipher.decrypt_copy(case.first, source.content(), copy.content_mut()).unwrap();
    }
    assert!(place.content() == expected, "in place: {}", about());
    assert!(copy.content() == expected, "by copy: {}", about());
    assert!(source.content() == text, "source changed: {}", about());
    for room in [&place, &source, &copy] {
        assert!(room.margins_are_untouched(), "written outside: {}", about());
    }
    2
}

#[test]
fn differential_against_aws_lc() {
    let comparisons = Cell::new(0);
    let config = ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() };
    let outcome = TestRunner::new(config).run(&case(), |case| {
        let text: Vec<u8> = (0..case.unit * case.units)
            .map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ case.seed)
            .collect();
        let reference = Cipher::with_kernel(&case.key, case.unit, Kernel::AwsLc).unwrap();
        let (mut sealed, mut opened) = (text.clone(), text.clone());
        reference.encrypt(case.first, &mut sealed).unwrap();
        // Decryption of bytes that nobody encrypted.
        reference.decrypt(case.first, &mut opened).unwrap();
        for kernel in others() {
            let cipher = Cipher::with_kernel(&case.key, case.unit, kernel).unwrap();
            let done = compare(&cipher, true, &case, &text, &sealed)
                + compare(&cipher, false, &case, &text, &opened);
            comparisons.set(comparisons.get() + done);
        }
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
    println!("{} comparisons with aws-lc, kernels {:?}", comparisons.get(), others());
    assert_eq!(comparisons.get(), cases() as usize * 4 * others().len());
}

#[test]
fn fastest_available_kernel_is_detected_and_says_its_name() {
    let detected = Kernel::detected();
    assert_eq!(Cipher::new(&std::array::from_fn(|i| i as u8), 512).unwrap().kernel(), detected);
    let names: Vec<String> = Kernel::ALL.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["vaes-avx512", "vaes-avx2", "aws-lc"]);
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    if cfg!(all(target_arch = "x86_64", not(feature = "fips"))) && has("vaes") && has("vpclmulqdq") {
        assert_eq!(detected, if has("avx512bw") { Kernel::Vaes512 } else { Kernel::Vaes256 });
    } else {
        assert_eq!(detected, Kernel::AwsLc);
    }
}

#[test]
fn one_cipher_serves_many_threads() {
    for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
        let cipher = Cipher::with_kernel(&std::array::from_fn(|i| i as u8), 512, kernel).unwrap();
        let mut expected = vec![3; 4096];
        cipher.encrypt(9, &mut expected).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let mut data = vec![3; 4096];
                        cipher.encrypt(9, &mut data).unwrap();
                        assert!(data == expected, "{kernel}");
                    }
                });
            }
        });
    }
}

#[test]
fn kernel_that_does_not_run_here_is_refused_by_name() {
    for kernel in Kernel::ALL {
        assert_eq!(kernel.to_string().parse::<Kernel>().unwrap(), kernel);
        let made = Cipher::with_kernel(&std::array::from_fn(|i| i as u8), 512, kernel);
        match made {
            Ok(cipher) => assert!(kernel.is_available() && cipher.kernel() == kernel),
            Err(error) => {
                assert!(!kernel.is_available());
                assert!(
                    matches!(error, XtsError::NotHere { .. })
                        && error.to_string().contains(&kernel.to_string())
                );
            }
        }
    }
    let unknown = "vaes".parse::<Kernel>().unwrap_err().to_string();
    assert!(unknown.contains("'vaes'") && unknown.contains("vaes-avx2"), "{unknown}");
}

#[test]
fn threads_wait_for_contexts_of_the_library_and_all_are_served() {
    // More threads than there can be contexts.
    let cipher = Cipher::with_kernel(&std::array::from_fn(|i| i as u8), 4096, Kernel::AwsLc).unwrap();
    let start = std::sync::Barrier::new(16);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16u64)
            .map(|n| {
                let (cipher, start) = (&cipher, &start);
                scope.spawn(move || {
                    start.wait();
                    let mut data = vec![n as u8; 64 << 10];
                    cipher.encrypt(n * 1024, &mut data).unwrap();
                    cipher.decrypt(n * 1024, &mut data).unwrap();
                    data.iter().all(|byte| *byte == n as u8)
                })
            })
            .collect();
        assert!(threads.into_iter().all(|thread| thread.join().unwrap()));
    });
}
