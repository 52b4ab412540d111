//! Other people's programs.

use std::{
    path::PathBuf,
    process::{Command, Output},
};

/// The program, if it is installed. A missing one fails the test, unless VMSEAL_SKIP_MISSING_TOOLS is set.
pub(crate) fn tool(name: &str) -> Option<Command> {
    let found = if name.contains('/') {
        Some(PathBuf::from(name)).filter(|path| path.is_file())
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).map(|directory| directory.join(name)).find(|path| path.is_file())
    };
    match found {
        Some(path) => Some(Command::new(path)),
        None => {
            missing(name);
            None
        }
    }
}

/// Fails for want of something, or says that it was skipped.
pub(crate) fn missing(name: &str) {
    assert!(
        std::env::var_os("VMSEAL_SKIP_MISSING_TOOLS").is_some(),
        "this test needs {name}; install it, or set VMSEAL_SKIP_MISSING_TOOLS to go without"
    );
    eprintln!("skipped: {name} is missing");
}

/// The system's Python with libnbd's module.
pub(crate) fn python(script: &str) -> Option<Command> {
    let mut python = tool("/usr/bin/python3")?;
    if !Command::new("/usr/bin/python3").args(["-c", "import nbd"]).status().unwrap().success() {
        missing("python3-libnbd");
        return None;
    }
    python.args(["-c", script]);
    Some(python)
}

/// Runs to the end; the program must succeed.
pub(crate) fn ok(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}\n{}", text(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs to the end; the program must fail.
pub(crate) fn fails(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{command:?}\n{}", text(&output));
    text(&output)
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
