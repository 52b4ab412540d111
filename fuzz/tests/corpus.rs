//! What was found worth keeping, fed to every target again. A crash's input is added to the corpus with its repair.

use std::{fs, path::Path};

use vmseal_fuzz::TARGETS;

#[test]
fn no_input_of_the_corpus_makes_a_target_panic() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (name, run) in TARGETS {
        let mut fed = 0;
        for entry in fs::read_dir(corpus.join(name)).unwrap_or_else(|e| panic!("corpus of {name}: {e}")) {
            let path = entry.unwrap().path();
            let data = fs::read(&path).unwrap();
            let done = std::panic::catch_unwind(|| run(&data));
            assert!(done.is_ok(), "{} makes {name} panic", path.display());
            fed += 1;
        }
        assert!(fed > 0, "the corpus of {name} is empty");
        println!("{name}: {fed} inputs");
    }
}

#[test]
fn every_target_has_a_program_and_a_corpus_and_no_corpus_is_without_a_target() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR"));
    let names = |folder: &str| {
        let mut names: Vec<String> = fs::read_dir(fuzz.join(folder))
            .unwrap()
            .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    };
    let targets: Vec<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names("fuzz_targets"), targets);
    assert_eq!(names("corpus"), targets);
}
