//! The program `vmseal-rbd` as the agent runs it: one question, one answer; or a helper that serves.
//!
//! Configuration and a location in, a command line without secrets out. It runs as a user of its own, with an empty
//! environment.

use std::{
    ffi::OsString,
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use crate::{
    backend::process::Process,
    config::AgentConfig,
    rbd::{Location, RbdError},
    spawn::ServiceUser,
};

/// How long a cluster may take to be reached.
pub(crate) const REACH: Duration = Duration::from_secs(4);
/// How long a question to it may take in all; an image is removed object by object.
const ANSWER: Duration = Duration::from_secs(20);
const REMOVAL: Duration = Duration::from_secs(24 * 3600);
/// What begins each line of the program's log.
const NAME: &str = "vmseal-rbd[";

/// Where the program is, whom it runs as, and what it is told of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tool {
    program: PathBuf,
    account: Option<ServiceUser>,
    conf: Option<PathBuf>,
    keyring: Option<PathBuf>,
    user: Option<String>,
    pub(crate) state_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) log_dir: PathBuf,
}

/// What there is to know of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Info {
    /// Ceph's id of it: another image of that name has another.
    pub id: String,
    /// Its length.
    pub bytes: u64,
    /// When it was made, in nanoseconds since 1970.
    pub created_ns: u64,
    /// When it was written to, as far as Ceph notes that: about once a minute.
    pub modified_ns: u64,
    /// How many snapshots it has.
    pub snapshots: u64,
    /// Whether it can be locked.
    pub can_lock: bool,
    /// Clients that have it open for writing, by their addresses.
    pub watchers: Vec<String>,
}

impl Tool {
    /// As the configuration says.
    ///
    /// # Errors
    ///
    /// [`RbdError::NoProgram`], [`RbdError::NoUser`].
    pub fn new(config: &AgentConfig) -> Result<Self, RbdError> {
        let program = config.rbd_program();
        if !program.is_file() {
            return Err(RbdError::NoProgram { program });
        }
        let account = ServiceUser::find(&config.rbd_user)
            .map_err(|_| RbdError::NoUser { name: config.rbd_user.clone() })?;
        Ok(Self {
            program,
            account,
            conf: config.ceph_conf.clone(),
            keyring: config.ceph_keyring.clone(),
            user: config.ceph_user.clone(),
            state_dir: config.state_dir.clone(),
            run_dir: config.run_dir.clone(),
            log_dir: config.log_dir.clone(),
        })
    }

    /// The uid helpers run as; none for this process's own.
    pub(crate) fn uid(&self) -> Option<u32> {
        self.account.map(|account| account.uid)
    }

    /// Whether Ceph's libraries are there.
    ///
    /// # Errors
    ///
    /// [`RbdError::Library`] says which is not, in words.
    pub fn check(&self) -> Result<(), RbdError> {
        self.run("the libraries", vec!["check".into()], ANSWER).map(drop)
    }

    /// What an image is; none if it is not there.
    ///
    /// # Errors
    ///
    /// [`RbdError`].
    pub fn info(&self, at: &Location) -> Result<Option<Info>, RbdError> {
        match self.ask("info", at, &[], ANSWER) {
            Ok(output) => Ok(Some(Info::read(&String::from_utf8_lossy(&output)))),
            Err(RbdError::Absent { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Bytes of an image as it is now, whoever has it; fewer where it ends.
    ///
    /// # Errors
    ///
    /// [`RbdError`].
    pub fn read(&self, at: &Location, offset: u64, bytes: u64) -> Result<Vec<u8>, RbdError> {
        let (offset, bytes) = (offset.to_string(), bytes.to_string());
        self.ask("read", at, &["--offset", &offset, "--bytes", &bytes], ANSWER)
    }

    /// Makes an image.
    ///
    /// # Errors
    ///
    /// [`RbdError::Exists`]; [`RbdError`].
    pub fn create(&self, at: &Location, bytes: u64) -> Result<(), RbdError> {
        self.ask("create", at, &["--bytes", &bytes.to_string()], ANSWER).map(drop)
    }

    /// Gives an image another name, unless that is taken.
    ///
    /// # Errors
    ///
    /// [`RbdError::Exists`]; [`RbdError`].
    pub fn rename(&self, at: &Location, to: &Location) -> Result<(), RbdError> {
        self.ask("rename", at, &["--to", &to.image], ANSWER).map(drop)
    }

    /// Removes an image. One that is not there is removed already.
    ///
    /// # Errors
    ///
    /// [`RbdError`]: it is open somewhere, or has snapshots.
    pub fn remove(&self, at: &Location) -> Result<(), RbdError> {
        match self.ask("remove", at, &[], REMOVAL) {
            Err(RbdError::Absent { .. }) => Ok(()),
            done => done.map(drop),
        }
    }

    /// Breaks whoever's lock of an image and keeps that client from writing ever again; who it was, in words.
    ///
    /// # Errors
    ///
    /// [`RbdError`].
    pub fn fence(&self, at: &Location) -> Result<String, RbdError> {
        let output = self.ask("fence", at, &[], ANSWER)?;
        Ok(String::from_utf8_lossy(&output).trim().to_owned())
    }

    fn ask(&self, verb: &str, at: &Location, more: &[&str], within: Duration) -> Result<Vec<u8>, RbdError> {
        let mut arguments = vec![OsString::from(verb)];
        arguments.extend(self.image(at));
        arguments.extend(more.iter().map(OsString::from));
        self.run(&at.name(), arguments, within)
    }

    /// Which image, on which cluster, as whom.
    fn image(&self, at: &Location) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["--pool".into(), (&at.pool).into()];
        let mut option = |name: &str, value: Option<OsString>| {
            arguments.extend(value.into_iter().flat_map(|value| [OsString::from(name), value]));
        };
        option("--image", Some((&at.image).into()));
        option("--namespace", at.namespace.as_ref().map(Into::into));
        // The administrator of this host has the last word on whose key is used.
        option("--user", self.user.as_ref().or(at.user.as_ref()).map(Into::into));
        option("--conf", at.conf.as_ref().map(Into::into).or(self.conf.as_ref().map(Into::into)));
        option("--monitors", at.monitors.as_ref().map(Into::into));
        option("--keyring", self.keyring.as_ref().map(Into::into));
        option("--patience", Some(REACH.as_secs().to_string().into()));
        arguments
    }

    fn command(&self, arguments: &[OsString]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).env_clear().current_dir("/").stdin(Stdio::null());
        if let Some(account) = self.account {
            // The standard library gives up all other groups with it.
            command.uid(account.uid).gid(account.gid);
        }
        command
    }

    fn run(&self, image: &str, arguments: Vec<OsString>, within: Duration) -> Result<Vec<u8>, RbdError> {
        let io = |action| {
            let image = image.to_owned();
            move |source| RbdError::Io { action, image, source }
        };
        let mut command = self.command(&arguments);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.map_err(io("start the helper"))?;
        let process = match Process::open(child.id().cast_signed()) {
            Ok(process) => process,
            Err(source) => {
                // What nobody hears of must not go on.
                let _ = child.kill().and_then(|()| child.wait());
                return Err(io("watch the helper")(source));
            }
        };
        let (sender, receiver) = mpsc::channel();
        let wait = move || drop(sender.send(child.wait_with_output()));
        if let Err(source) = thread::Builder::new().name("rbd".to_owned()).spawn(wait) {
            process.kill();
            return Err(io("start a thread")(source));
        }
        let output: Output = match receiver.recv_timeout(within) {
            Ok(output) => output.map_err(io("hear the helper"))?,
            Err(_) => {
                process.kill();
                return Err(RbdError::Silent { image: image.to_owned(), seconds: within.as_secs() });
            }
        };
        if output.status.success() {
            return Ok(output.stdout);
        }
        Err(error_of(output.status.code(), image, &String::from_utf8_lossy(&output.stderr)))
    }

    /// Starts a helper that serves whoever listens at `socket`, in a session of its own; its log goes to `log`.
    pub(crate) fn serve(
        &self,
        at: &Location,
        socket: &Path,
        more: &[OsString],
        log: Stdio,
    ) -> io::Result<Child> {
        let mut arguments = vec![OsString::from("serve")];
        arguments.extend(self.image(at));
        arguments.extend([OsString::from("--socket"), socket.into()]);
        arguments.extend(more.iter().cloned());
        let mut command = self.command(&arguments);
        command.stdout(Stdio::piped()).stderr(log);
        // SAFETY: between fork and exec only this system call is made.
        unsafe {
            command.pre_exec(|| if libc::setsid() < 0 { Err(io::Error::last_os_error()) } else { Ok(()) });
        }
        command.spawn()
    }
}

/// What the program's end means.
pub(crate) fn error_of(code: Option<i32>, image: &str, log: &str) -> RbdError {
    let image = image.to_owned();
    let lines = log.lines().map(str::trim).filter(|line| !line.is_empty());
    // Of Ceph's own lines only where there is none of ours.
    let ours = |line: &&str| line.starts_with(NAME);
    let said = lines.clone().rfind(ours).or_else(|| lines.clone().next_back());
    let said = said.map_or("it ended without a word", |line| match line.strip_prefix(NAME) {
        Some(rest) => rest.split_once("] ").map_or(rest, |(_, said)| said),
        None => line,
    });
    let said: String = said.chars().map(|c| if c.is_control() { ' ' } else { c }).take(600).collect();
    match code {
        Some(3) => RbdError::Held { image, said },
        Some(4) => RbdError::Absent { image },
        Some(5) => RbdError::Exists { image },
        Some(6) => RbdError::Library { said },
        _ => RbdError::Failed { image, said },
    }
}

impl Info {
    fn read(text: &str) -> Self {
        let mut info = Self::default();
        for (name, value) in text.lines().filter_map(|line| line.split_once(' ')) {
            let number = || value.parse().unwrap_or_default();
            match name {
                "id" => info.id = value.to_owned(),
                "bytes" => info.bytes = number(),
                "created_ns" => info.created_ns = number(),
                "modified_ns" => info.modified_ns = number(),
                "snapshots" => info.snapshots = number(),
                "lock" => info.can_lock = value == "1",
                "watcher" => info.watchers.push(value.to_owned()),
                // A newer helper may say more.
                _ => {}
            }
        }
        info
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_argument_is_a_secret_and_this_hosts_user_comes_first() {
        let tool = Tool {
            program: "/p".into(),
            account: None,
            conf: Some("/c".into()),
            keyring: Some("/k".into()),
            user: Some("vmseal".into()),
            state_dir: "/s".into(),
            run_dir: "/r".into(),
            log_dir: "/l".into(),
        };
        let at = Location::parse(r"rbd:p/x:id=libvirt:mon_host=h\:1").unwrap();
        let arguments = tool.image(&at);
        let line: Vec<_> = arguments.iter().map(|a| a.to_string_lossy()).collect();
        assert_eq!(
            line.join(" "),
            "--pool p --image x --user vmseal --conf /c --monitors h:1 --keyring /k --patience 4"
        );
    }

    #[test]
    fn ends_of_the_program_are_told_apart_and_its_last_line_is_the_reason() {
        let log = "2026-01-01 -1 auth: unable to find a keyring\nvmseal-rbd[7] image p/x is in use: 10.0.0.9 has it\n\
                   did not load config file\n";
        let error = error_of(Some(3), "p/x", log);
        assert_eq!(
            error.to_string(),
            "RBD image p/x is in use by another client: image p/x is in use: 10.0.0.9 has it"
        );
        assert!(error.hint().contains("vmseal-agent fence-rbd p/x"), "{}", error.hint());
        assert!(matches!(error_of(Some(6), "p/x", log), RbdError::Library { .. }));
        assert_eq!(
            error_of(None, "p/x", "").to_string(),
            "RBD image p/x cannot be used: it ended without a word"
        );
    }

    #[test]
    fn facts_are_read_and_unknown_ones_passed_over() {
        let info =
            Info::read("id 1f\nbytes 4096\nlock 1\nwatcher 10.0.0.9:0/1\nwatcher 10.0.0.8:0/2\nnew x\n");
        assert_eq!((info.id.as_str(), info.bytes, info.can_lock), ("1f", 4096, true));
        assert_eq!(info.watchers, ["10.0.0.9:0/1", "10.0.0.8:0/2"]);
    }
}
