//! The server of block files: one FUSE mount, one read-only file per layer, and one agent at a time that knows the rest.
//!
//! It answers by itself what is in the layers' local files, and asks the agent for everything else. When the agent dies it
//! goes on doing the former, keeps the reads that wait, and asks the next agent again. Why it is a process of its own: the
//! kernel (Linux 6.18) gives requests to the ring entries of a process that is being killed without telling anyone what they
//! were (`fuse_uring_send_in_task` with `IO_URING_F_TASK_DEAD`), and no notification makes it send them again
//! (`FUSE_NOTIFY_RESEND` is about `/dev/fuse` alone). So what may be killed at any time must not have rings.

mod classic;
pub(crate) mod files;
mod misses;
mod rings;
mod wire;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::unistd::Pid;
use sluice_kernel::mount::UnmountOptions;
use sluice_kernel::process::{pidfd_open, wait_for_end};

use crate::BlockFsError;
use crate::options::{Choice, Options, Way};
use crate::protocol::{Head, Kind, Message, VERSION, WHOLE};
use files::Files;
use misses::{Misses, Outgoing, Supply};

/// What all threads of a server have in common.
#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    options: Options,
    files: Files,
    misses: Misses,
    way: OnceLock<(Way, String)>,
    classic: Mutex<Option<fuser::BackgroundSession>>,
    ended: Mutex<Option<Sender<()>>>,
    /// Where agents connect, until the mount is gone.
    socket: Mutex<Option<PathBuf>>,
}

/// How a conversation with an agent ended.
#[derive(Debug, PartialEq, Eq)]
enum Parting {
    /// Its end of the socket is closed.
    Gone,
    /// It had the mount taken away.
    Unmounted,
}

/// Serves the agents that connect to `socket` one after the other, mounted on `dir`, until one of them says to unmount.
///
/// It is for a process of its own, which must not die with any agent: not in the control group that the service manager kills
/// with it (`KillMode=process`), not the out-of-memory killer's choice (asked for here). It wants a descriptor for each layer that
/// is not complete; without one, reads of that layer are all asked of the agent. What an earlier server left mounted on `dir`
/// must have been unmounted. `ready` is called once agents can connect.
pub fn serve(
    dir: &Path,
    socket: &Path,
    options: Options,
    ready: impl FnOnce() -> io::Result<()>,
) -> Result<(), BlockFsError> {
    let failed = |source| BlockFsError::Server { path: socket.to_path_buf(), source };
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::debug!(%error, "the out-of-memory killer may choose the server of block files");
    }
    let (shared, ended) = Shared::start(dir, options)?;
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(socket).map_err(failed)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    *shared.socket.lock().unwrap_or_else(PoisonError::into_inner) = Some(socket.to_path_buf());
    let accepting = Arc::clone(&shared);
    std::thread::spawn(move || accept(&accepting, &listener));
    ready().map_err(failed)?;
    // The sender goes when the file system ends.
    if ended.recv().is_err() {
        tracing::debug!("the server was dropped");
    }
    shared.close().map_err(failed)
}

/// A server in this process, for one agent in this process: it ends with it.
pub(crate) fn start_within(dir: &Path, options: Options) -> Result<UnixStream, BlockFsError> {
    let failed = |source| BlockFsError::Server { path: dir.to_path_buf(), source };
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    let (shared, _ended) = Shared::start(dir, options)?;
    let attend = move || {
        if shared.attend(&ours) == Parting::Gone {
            shared.unmount().unwrap_or_else(|error| tracing::debug!(%error, "the mount is gone already"));
        }
    };
    std::thread::Builder::new().name("block-server".to_owned()).spawn(attend).map_err(failed)?;
    Ok(theirs)
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener) {
    let mut present: Option<UnixStream> = None;
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::error!(%error, "an agent cannot connect");
                continue;
            }
        };
        // One agent at a time: the new one knows that it is the one.
        if let Some(former) = present.take()
            && let Err(error) = former.shutdown(std::net::Shutdown::Both)
        {
            tracing::debug!(%error, "the former agent is gone already");
        }
        match stream.try_clone() {
            Ok(own) => {
                present = Some(stream);
                let shared = Arc::clone(shared);
                std::thread::spawn(move || shared.attend(&own));
            }
            Err(error) => tracing::error!(%error, "an agent cannot be served"),
        }
    }
}

impl Shared {
    /// Mounts by the way that is wanted. The receiver ends when the file system does.
    fn start(dir: &Path, options: Options) -> Result<(Arc<Self>, Receiver<()>), BlockFsError> {
        let (ending, ended) = channel();
        let shared = Arc::new(Self {
            dir: dir.to_path_buf(),
            options,
            files: Files::default(),
            misses: Misses::default(),
            way: OnceLock::new(),
            classic: Mutex::default(),
            ended: Mutex::new(Some(ending)),
            socket: Mutex::default(),
        });
        let way = shared.mount().map_err(|source| BlockFsError::Fuse { path: dir.to_path_buf(), source })?;
        tracing::info!(way = %way.0, reason = way.1, "block files are served");
        shared.way.get_or_init(|| way);
        let watched = Arc::clone(&shared);
        std::thread::spawn(move || watched.misses.watch(watched.options.patience));
        Ok((shared, ended))
    }

    fn mount(self: &Arc<Self>) -> io::Result<(Way, String)> {
        let wanted = match &self.options.choice {
            Choice::Auto => &[Way::IoUring, Way::Classic][..],
            Choice::ZeroCopy => &[Way::ZeroCopy, Way::IoUring, Way::Classic],
            Choice::Only(way) => std::slice::from_ref(way),
        };
        let mut failed = None;
        for way in wanted {
            match self.mount_by(*way) {
                Ok(()) => {
                    let chosen = if *way == Way::Classic { "as configured" } else { "the kernel offers it" };
                    let fallen = |(way, error)| format!("no {way}: {error}");
                    return Ok((*way, failed.map_or(chosen.to_owned(), fallen)));
                }
                Err(error) => failed = Some((way, error)),
            }
        }
        Err(failed.map_or(io::ErrorKind::InvalidInput.into(), |(_, error)| error))
    }

    fn mount_by(self: &Arc<Self>, way: Way) -> io::Result<()> {
        if way != Way::Classic {
            return rings::start(self, &self.dir, way);
        }
        let session = classic::start(self, &self.dir)?;
        *self.classic.lock().unwrap_or_else(PoisonError::into_inner) = Some(session);
        Ok(())
    }

    /// The file system is no more, say the threads that served it in this way.
    fn ended(&self, served: Way) {
        // Threads of a way that was tried and failed end, too: the other way goes on.
        if self.way.get().is_some_and(|(way, _)| *way == served) {
            self.misses.end();
            drop(self.ended.lock().unwrap_or_else(PoisonError::into_inner).take());
        }
    }

    /// From now on agents find no server here.
    fn close(&self) -> io::Result<()> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner).take();
        socket.map_or(Ok(()), std::fs::remove_file)
    }

    /// Takes the mount out of the tree. Loop devices that still read a file of it are served until the process ends.
    fn unmount(&self) -> io::Result<()> {
        // Joining the session would wait for the last open file; its threads end with the process.
        std::mem::forget(self.classic.lock().unwrap_or_else(PoisonError::into_inner).take());
        let options = UnmountOptions { lazy: true, force: false };
        sluice_kernel::unmount(&self.dir, options).map_err(io::Error::other)
    }

    /// Talks with one agent until it goes.
    fn attend(self: &Arc<Self>, stream: &UnixStream) -> Parting {
        let (outgoing, messages) = channel();
        let writer = match stream.try_clone() {
            Ok(writer) => writer,
            Err(error) => {
                tracing::error!(%error, "an agent cannot be served");
                return Parting::Gone;
            }
        };
        std::thread::spawn(move || write_all(&writer, &messages));
        let number = self.misses.agent_came(outgoing.clone());
        let parting = self.converse(stream, number, &outgoing);
        self.misses.agent_gone(number);
        match parting {
            Ok(parting) => parting,
            Err(error) => {
                if error.kind() != io::ErrorKind::UnexpectedEof {
                    tracing::warn!(%error, "the agent's connection fails");
                }
                Parting::Gone
            }
        }
    }

    fn converse(&self, stream: &UnixStream, number: u64, outgoing: &Sender<Outgoing>) -> io::Result<Parting> {
        let say = |head: Head, bytes: Vec<u8>| {
            outgoing.send((head, bytes)).map_err(|_closed| io::Error::from(io::ErrorKind::BrokenPipe))
        };
        let hello = Head {
            a: VERSION,
            b: self.files.next_inode(),
            ..Head::new(Kind::Hello, std::process::id().into())
        };
        say(hello, self.introduction().into_bytes())?;
        let mut held = Held::of(stream);
        loop {
            let message = Message::receive(stream)?;
            let (id, a, b) = (message.id, message.a, message.b);
            match message.kind {
                Kind::Add => {
                    let name = String::from_utf8_lossy(&message.bytes).into_owned();
                    self.files.add(id, name, a, message.descriptor.map(File::from));
                    self.misses.file_added(number, id);
                    say(Head::new(Kind::Added, id), Vec::new())?;
                }
                Kind::Remove => {
                    self.files.remove(id);
                    self.misses.file_removed(id);
                }
                Kind::Local => {
                    self.files.set_local(id, a, b);
                    // As before a hand-over, which waits for the reads under way: none of them must need an agent that may die.
                    if let Some(file) = self.files.disk(id).filter(|_| a == 0 && b == WHOLE) {
                        self.misses.is_whole(id, &file);
                    }
                }
                Kind::InFile => self.misses.answer(id, |waiting| match self.files.disk(waiting.inode) {
                    Some(file) => Supply::InFile(file),
                    None => Supply::Failed(0),
                }),
                Kind::Bytes => self.misses.answer(id, |_| Supply::Bytes(message.bytes)),
                Kind::Failed => {
                    self.misses.answer(id, |_| Supply::Failed(i32::try_from(a).unwrap_or(0)));
                }
                Kind::Hold => held.descriptors.extend(message.descriptor),
                Kind::Unmount => {
                    let errno = self.unmount().err().map_or(0, |error| error.raw_os_error().unwrap_or(5));
                    if errno == 0 {
                        self.close()?;
                        self.misses.abandon();
                    }
                    say(Head { a: errno as u64, ..Head::new(Kind::Unmounted, 0) }, Vec::new())?;
                    if errno == 0 {
                        return Ok(Parting::Unmounted);
                    }
                }
                Kind::Hello | Kind::Added | Kind::Read | Kind::Unmounted => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "the agent says what servers say",
                    ));
                }
            }
        }
    }

    /// The way, why, and the files, a line each.
    fn introduction(&self) -> String {
        let (way, reason) = self.way.get().map_or((Way::Classic, ""), |(way, reason)| (*way, reason));
        let mut text = format!("{way}\n{}\n", reason.replace('\n', " "));
        self.files.list().iter().for_each(|file| text.push_str(&file.line()));
        text
    }
}

/// What an agent left here to be closed after its end, which may take the kernel seconds: no reader waits for it.
struct Held {
    descriptors: Vec<OwnedFd>,
    /// None if it is gone already, or not to be found from here.
    agent: Option<OwnedFd>,
}

/// An agent that goes and stays alive keeps nothing open here for longer.
const LONGEST_HOLD: Duration = Duration::from_secs(60);

impl Held {
    fn of(stream: &UnixStream) -> Self {
        let agent =
            getsockopt(stream, PeerCredentials).and_then(|peer| pidfd_open(Pid::from_raw(peer.pid())));
        Self { descriptors: Vec::new(), agent: agent.ok() }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let (descriptors, agent) = (std::mem::take(&mut self.descriptors), self.agent.take());
        if descriptors.is_empty() {
            return;
        }
        std::thread::spawn(move || {
            // Its connection may be closed before its own copies are.
            if let Some(Err(error)) = agent.map(|agent| wait_for_end(&agent, Some(LONGEST_HOLD))) {
                tracing::debug!(%error, "cannot wait for the agent's end");
            }
            drop(descriptors);
        });
    }
}

fn write_all(stream: &UnixStream, messages: &Receiver<Outgoing>) {
    for (head, bytes) in messages {
        if let Err(error) = head.send(stream, &bytes, None) {
            tracing::debug!(%error, "the agent is gone");
            return;
        }
    }
}
