//! The store as a file that any process can open: a FUSE file system with one file, served by this process.
//!
//! It is mounted nowhere: the kernel gives a descriptor of the new mount, and the file is opened through that. So
//! nothing is left when a test is killed. Locks are the kernel's own, as on a local file. Needs root.
//!
//! What a process had begun goes on when it is killed, as on a disk: an operation that is held here is done when it is
//! released. A process that waited for it itself does not end before; one that gave it to an io_uring does.

use std::{
    ffi::{CStr, CString, OsStr},
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    path::PathBuf,
    time::{Duration, SystemTime},
};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request,
    Session, SessionACL, WriteFlags,
};

use crate::medium::{Answer, Medium, Operation, Reply};

const ROOT: INodeNo = INodeNo::ROOT;
const FILE: INodeNo = INodeNo(2);
const NAME: &str = "volume";
/// How long the kernel may believe an attribute: not at all.
const NOT_KEPT: Duration = Duration::ZERO;
/// Most bytes of one write.
const MAX_WRITE: u32 = 1 << 20;

/// Whether the kernel keeps pages of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caching {
    /// Reads may come from the page cache; writes go through it at once.
    Pages,
    /// Every read and write comes here, several at a time (FOPEN_DIRECT_IO).
    None,
}

/// A mounted store. It goes away with the last descriptor of its file.
pub struct Mounted {
    root: OwnedFd,
    medium: Medium,
}

impl Mounted {
    /// Mounts it.
    ///
    /// # Errors
    ///
    /// The kernel's: no FUSE, or not root.
    pub fn new(medium: Medium, caching: Caching) -> io::Result<Self> {
        let (root, device) = mount()?;
        let store = OneFile { medium: medium.clone(), caching };
        let session = Session::from_fd(store, device, SessionACL::All, Config::default())?;
        // The thread ends with the file system, which ends with its last descriptor.
        session.spawn()?;
        Ok(Self { root, medium })
    }

    /// The store.
    pub fn medium(&self) -> &Medium {
        &self.medium
    }

    /// Where any process of root's can open the file, as long as this one lives.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}/{NAME}", std::process::id(), self.root.as_raw_fd()).into()
    }

    /// The file, for reading and writing, with flags such as `O_DIRECT`.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn open(&self, flags: i32) -> io::Result<File> {
        let name = CString::new(NAME)?;
        let flags = libc::O_RDWR | libc::O_CLOEXEC | flags;
        // SAFETY: the directory is open, the name NUL-terminated.
        let fd = unsafe { libc::openat(self.root.as_raw_fd(), name.as_ptr(), flags) };
        // SAFETY: a descriptor that was opened just now and has no other owner.
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { File::from_raw_fd(fd) }) }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Nothing may wait for an answer that nobody will give.
        self.medium.heal();
        self.medium.release();
    }
}

/// Makes a mount that is nowhere, and the device on which the kernel asks.
fn mount() -> io::Result<(OwnedFd, OwnedFd)> {
    let device = File::options().read(true).write(true).open("/dev/fuse").map_err(|error| {
        io::Error::new(error.kind(), format!("the test store needs FUSE and root: /dev/fuse: {error}"))
    })?;
    let fd = device.as_raw_fd().to_string();
    // SAFETY: each call takes integers and NUL-terminated strings that outlive it, and gives a new descriptor or an
    // error.
    unsafe {
        let context = new_fd(libc::syscall(libc::SYS_fsopen, c"fuse".as_ptr(), 1))?;
        set_string(&context, c"fd", &fd)?;
        set_string(&context, c"rootmode", "40000")?;
        set_string(&context, c"user_id", "0")?;
        set_string(&context, c"group_id", "0")?;
        // FSCONFIG_SET_FLAG, FSCONFIG_CMD_CREATE.
        let none = std::ptr::null::<u8>();
        checked(libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), 0, c"allow_other".as_ptr(), none, 0))?;
        checked(libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), 6, none, none, 0))?;
        let root = new_fd(libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, 0))?;
        Ok((root, device.into()))
    }
}

/// FSCONFIG_SET_STRING.
///
/// # Safety
///
/// None beyond its arguments: it is unsafe as every system call is.
unsafe fn set_string(context: &impl AsFd, key: &CStr, value: &str) -> io::Result<()> {
    let value = CString::new(value)?;
    let fd: RawFd = context.as_fd().as_raw_fd();
    // SAFETY: an open descriptor and two NUL-terminated strings.
    checked(unsafe { libc::syscall(libc::SYS_fsconfig, fd, 1, key.as_ptr(), value.as_ptr(), 0) }).map(drop)
}

fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::new(
            error.kind(),
            format!("the test store cannot mount FUSE (root?): {error}"),
        ));
    }
    Ok(result)
}

/// # Safety
///
/// A result that is not negative is a descriptor nobody owns yet.
unsafe fn new_fd(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = checked(result)?;
    // SAFETY: the caller says that it is new.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The file system.
struct OneFile {
    medium: Medium,
    caching: Caching,
}

impl OneFile {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let size = if inode == FILE { self.medium.len().unwrap_or(0) } else { 0 };
        let time = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: if inode == FILE { FileType::RegularFile } else { FileType::Directory },
            perm: if inode == FILE { 0o600 } else { 0o700 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

/// How an operation without a result is answered.
fn empty(reply: ReplyEmpty) -> Reply {
    Box::new(move |answer| match answer {
        Answer::Failed(errno) => reply.error(Errno::from_i32(errno)),
        _ => reply.ok(),
    })
}

impl Filesystem for OneFile {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _ = config.set_max_write(MAX_WRITE);
        let _ = config.add_capabilities(fuser::InitFlags::FUSE_ASYNC_DIO);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == ROOT && name == NAME {
            reply.entry(&NOT_KEPT, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&NOT_KEPT, &self.attributes(inode));
    }

    fn setattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<fuser::TimeOrNow>,
        _mtime: Option<fuser::TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let Some(len) = size else { return reply.attr(&NOT_KEPT, &self.attributes(inode)) };
        let attributes = FileAttr { size: len, blocks: len.div_ceil(512), ..self.attributes(inode) };
        let answer: Reply = Box::new(move |answer| match answer {
            Answer::Failed(errno) => reply.error(Errno::from_i32(errno)),
            _ => reply.attr(&NOT_KEPT, &attributes),
        });
        self.medium.submit(Operation::SetLen { len }, answer);
    }

    fn open(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let flags = match self.caching {
            // Kept when another opens it: that would wait for pages whose write is held.
            Caching::Pages => FopenFlags::FOPEN_KEEP_CACHE,
            Caching::None => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        };
        // This very process may be the last that closes it, at its end, when nobody serves any more.
        let flags = flags | FopenFlags::FOPEN_NOFLUSH;
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let answer: Reply = Box::new(move |answer| match answer {
            Answer::Data(data) => reply.data(&data),
            Answer::Failed(errno) => reply.error(Errno::from_i32(errno)),
            _ => reply.error(Errno::EIO),
        });
        self.medium.submit(Operation::Read { offset, len: size as usize }, answer);
    }

    fn write(
        &self,
        request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let answer: Reply = Box::new(move |answer| match answer {
            Answer::Written(bytes) => reply.written(bytes as u32),
            Answer::Failed(errno) => reply.error(Errno::from_i32(errno)),
            _ => reply.error(Errno::EIO),
        });
        self.medium.submit(Operation::Write { offset, data: data.to_vec(), thread: request.pid() }, answer);
    }

    fn fsync(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.medium.submit(Operation::Flush, empty(reply));
    }

    fn fallocate(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let keeps = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let operation = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            libc::FALLOC_FL_PUNCH_HOLE if keeps => Operation::Punch { offset, len: length },
            libc::FALLOC_FL_ZERO_RANGE if keeps => Operation::Punch { offset, len: length },
            0 if keeps => return reply.ok(),
            0 => {
                let now = self.medium.len().unwrap_or(0);
                let len = offset.saturating_add(length);
                if len <= now {
                    return reply.ok();
                }
                Operation::SetLen { len }
            }
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        self.medium.submit(operation, empty(reply));
    }
}
