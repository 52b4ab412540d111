//! Every kernel this processor can run against aws-lc: units, sizes, sector numbers, addresses, directions.

use proptest::prelude::*;
use vmseal_xts::{Cipher, Kernel};

fn others() -> Vec<Kernel> {
    Kernel::ALL.into_iter().filter(|kernel| *kernel != Kernel::AwsLc && kernel.is_available()).collect()
}

/// Cases of a differential run: few in `make test`, many with VMSEAL_SOAK.
fn cases() -> u32 {
    if std::env::var_os("VMSEAL_SOAK").is_some() { 60_000 } else { 400 }
}

const MARGIN: usize = 80;

#[derive(Debug, Clone)]
struct Case {
    key: [u8; 64],
    unit: usize,
    units: usize,
    first: u64,
    skew: usize,
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
        u64::MAX - 3000..u64::MAX
    ];
    (any::<[u8; 32]>(), any::<[u8; 32]>(), unit, 1usize..41, first, 0usize..64, any::<u8>()).prop_map(
        |(data, tweak, unit, units, first, skew, seed)| {
            let mut key = [0; 64];
            key[..32].copy_from_slice(&data);
            key[32..].copy_from_slice(&tweak);
            key[0] = !key[32];
            let units = if unit > 4096 { units % 3 + 1 } else { units };
            let step = unit as u64 / 512;
            let last = u64::MAX - (units as u64 * step) + 1;
            let first = first.min(last) / step * step;
            Case { key, unit, units, first, skew, seed }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn differential_against_aws_lc(case in case()) {
        let Case { key, unit, units, first, skew, seed } = case;
        let length = unit * units;
        let plain: Vec<u8> = (0..length).map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed).collect();
        let reference = Cipher::with_kernel(&key, unit, Kernel::AwsLc).unwrap();
        let (mut sealed, mut opened) = (plain.clone(), plain.clone());
        reference.encrypt(first, &mut sealed).unwrap();
        // Decryption of arbitrary bytes, not only of what was encrypted.
        reference.decrypt(first, &mut opened).unwrap();
        for kernel in others() {
            let cipher = Cipher::with_kernel(&key, unit, kernel).unwrap();
            for (encrypt, expected) in [(true, &sealed), (false, &opened)] {
                let mut room = vec![0xa5; skew + length + MARGIN];
                let place = &mut room[skew..skew + length];
                if seed % 2 == 0 {
                    place.copy_from_slice(&plain);
                    if encrypt { cipher.encrypt(first, place).unwrap() } else { cipher.decrypt(first, place).unwrap() }
                } else if encrypt {
                    cipher.encrypt_copy(first, &plain, place).unwrap();
                } else {
                    cipher.decrypt_copy(first, &plain, place).unwrap();
                }
                prop_assert!(place == &expected[..], "{kernel}, encrypt {encrypt}");
                let around = room[..skew].iter().chain(&room[skew + length..]);
                prop_assert!(around.into_iter().all(|byte| *byte == 0xa5), "{kernel} wrote outside");
            }
        }
    }
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
