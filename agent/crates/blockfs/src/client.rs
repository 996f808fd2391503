//! The agent's side of its block files: where sources are added, and reads that are not local are answered.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::options::{Options, Way};
use crate::protocol::{FileRecord, Head, Kind, Message, VERSION, WHOLE};
use crate::server::{files::file_name, start_within};
use crate::{BlockFsError, BlockSource, ReadError};

/// The agent's block files: one per layer that is not complete. Dropped, it leaves a server of its own process to those
/// that come after; a server within this process ends with it.
#[derive(Debug)]
pub struct BlockFs {
    dir: PathBuf,
    way: (Way, String),
    server: u32,
    client: Arc<Client>,
    /// Files that the server had from an earlier agent and that nobody has asked for yet. Several may have the same name.
    left: Mutex<Vec<FileRecord>>,
    next: AtomicU64,
}

/// What the threads and tasks of an agent have in common.
#[derive(Debug)]
struct Client {
    stream: UnixStream,
    /// Messages must not be mixed.
    writing: Mutex<()>,
    /// Held from when something is found to be local until that is told, and while a file is given another source: what was lost is not
    /// told to be local of the new one.
    telling: Mutex<()>,
    state: Mutex<State>,
    /// True once the server is gone though this side did not part from it.
    lost: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    sources: HashMap<u64, Arc<dyn BlockSource>>,
    /// Who waits for the server's word: by inode, and 0 for the unmounting.
    expected: HashMap<u64, Sender<u64>>,
    closed: bool,
    /// This side ends the conversation.
    parting: bool,
}

impl BlockFs {
    /// Mounts on `dir` and serves within this process; reads that wait are driven by `runtime`.
    pub fn mount(dir: &Path, options: Options, runtime: Handle) -> Result<Self, BlockFsError> {
        Self::greet(dir, start_within(dir, options)?, runtime)
    }

    /// Takes over from whatever agent there was at the server that [`crate::serve`]s at `socket`, mounted on `dir`.
    ///
    /// `NotFound` or `ConnectionRefused` by [`BlockFsError::Server`]: there is no server.
    pub fn connect(dir: &Path, socket: &Path, runtime: Handle) -> Result<Self, BlockFsError> {
        let failed = |source| BlockFsError::Server { path: socket.to_path_buf(), source };
        Self::greet(dir, UnixStream::connect(socket).map_err(failed)?, runtime)
    }

    fn greet(dir: &Path, stream: UnixStream, runtime: Handle) -> Result<Self, BlockFsError> {
        let failed = |source| BlockFsError::Server { path: dir.to_path_buf(), source };
        let hello = Message::receive(&stream).map_err(failed)?;
        if hello.kind != Kind::Hello || hello.a != VERSION {
            return Err(BlockFsError::ServerVersion { server: hello.a, agent: VERSION });
        }
        let text = String::from_utf8_lossy(&hello.bytes).into_owned();
        let mut lines = text.lines();
        let way = match lines.next() {
            Some("zero_copy") => Way::ZeroCopy,
            Some("io_uring") => Way::IoUring,
            _ => Way::Classic,
        };
        let reason = lines.next().unwrap_or_default().to_owned();
        let left = lines.filter_map(FileRecord::parse).collect();
        let (lost, _) = watch::channel(false);
        let client = Arc::new(Client {
            stream,
            writing: Mutex::default(),
            telling: Mutex::default(),
            state: Mutex::default(),
            lost,
        });
        let reader = Arc::clone(&client);
        let read = move || reader.listen(&runtime);
        std::thread::Builder::new().name("block-agent".to_owned()).spawn(read).map_err(failed)?;
        let next = AtomicU64::new(hello.b);
        let server = u32::try_from(hello.id).unwrap_or(0);
        Ok(Self { dir: dir.to_path_buf(), way: (way, reason), server, client, left: Mutex::new(left), next })
    }

    /// In which way the kernel is served, and why in that.
    pub fn way(&self) -> (Way, &str) {
        (self.way.0, &self.way.1)
    }

    /// Process of the server; this one if it serves within.
    pub fn server(&self) -> u32 {
        self.server
    }

    /// Names of files that the server has from an earlier agent and that were not added yet.
    pub fn left(&self) -> Vec<String> {
        lock(&self.left).iter().map(|file| file.name.clone()).collect()
    }

    /// Removes what [`Self::left`] has of this name: nobody knows what is in it any more, and reads of it fail.
    pub fn remove_left(&self, name: &str) -> Result<(), BlockFsError> {
        let named = |file: &mut FileRecord| file.name == name;
        let left: Vec<_> = lock(&self.left).extract_if(.., named).collect();
        left.iter().try_for_each(|file| self.remove_inode(file.inode))
    }

    /// Adds a file; returns its path, or those of all that an earlier agent had by the same name and size. These go on:
    /// who has one open notices nothing. Waits for the server's word.
    pub fn add(&self, name: &str, source: Arc<dyn BlockSource>) -> Result<Vec<PathBuf>, BlockFsError> {
        let same = |file: &mut FileRecord| file.name == name && file.size == source.size();
        let mut inodes: Vec<_> = lock(&self.left).extract_if(.., same).map(|file| file.inode).collect();
        if inodes.is_empty() {
            inodes.push(self.next.fetch_add(1, Ordering::Relaxed));
        }
        inodes.into_iter().map(|inode| self.add_inode(inode, name, Arc::clone(&source))).collect()
    }

    /// Gives a file, by the path that `add` gave, another source; only what that one says to be local is local from then on. Waits
    /// for the server's word.
    pub fn add_again(&self, path: &Path, source: Arc<dyn BlockSource>) -> Result<(), BlockFsError> {
        let file_name = path.file_name().and_then(|name| name.to_str());
        let Some((inode, (_, name))) = inode_of(path).zip(file_name.and_then(|name| name.split_once('-')))
        else {
            let source = io::ErrorKind::NotFound.into();
            return Err(BlockFsError::Open { path: path.to_path_buf(), source });
        };
        self.add_inode(inode, name, source).map(drop)
    }

    fn add_inode(
        &self,
        inode: u64,
        name: &str,
        source: Arc<dyn BlockSource>,
    ) -> Result<PathBuf, BlockFsError> {
        let failed = |source| BlockFsError::Server { path: self.dir.clone(), source };
        let added = self.client.expect(inode).map_err(failed)?;
        let head = Head { a: source.size(), ..Head::new(Kind::Add, inode) };
        let file = source.file();
        {
            let _telling = lock(&self.client.telling);
            self.client.state().sources.insert(inode, Arc::clone(&source));
            self.client.say_with(head, name.as_bytes(), file.as_deref().map(AsFd::as_fd)).map_err(failed)?;
        }
        self.client.tell_local(inode, source.as_ref(), 0, source.size()).map_err(failed)?;
        added.recv().map_err(|_closed| failed(io::ErrorKind::ConnectionAborted.into()))?;
        Ok(self.dir.join(file_name(inode, name)))
    }

    /// Tells the server what of a file, by the path that `add` gave, is in its source's local file now: reads of that are not asked
    /// for any more.
    pub fn is_local(&self, path: &Path) -> Result<(), BlockFsError> {
        let Some(inode) = inode_of(path) else { return Ok(()) };
        let Some(source) = self.client.state().sources.get(&inode).cloned() else { return Ok(()) };
        let failed = |source| BlockFsError::Server { path: self.dir.clone(), source };
        self.client.tell_local(inode, source.as_ref(), 0, source.size()).map_err(failed)
    }

    /// All of a file, by the path that `add` gave, is in its source's local file: reads of it that wait are answered from there, whether
    /// this agent lives or not. A hand-over of its devices waits for the reads under way, in the kernel, where nothing can end it;
    /// if one of them waited for an agent that was just killed, it would never end.
    pub fn all_is_local(&self, path: &Path) -> Result<(), BlockFsError> {
        let failed = |source| BlockFsError::Server { path: self.dir.clone(), source };
        let head = |inode| Head { a: 0, b: WHOLE, ..Head::new(Kind::Local, inode) };
        inode_of(path).map_or(Ok(()), |inode| self.client.say(head(inode), &[]).map_err(failed))
    }

    /// Removes a file by the path that `add` gave. Whoever has it open gets ESTALE from now on.
    pub fn remove(&self, path: &Path) -> Result<(), BlockFsError> {
        inode_of(path).map_or(Ok(()), |inode| self.remove_inode(inode))
    }

    fn remove_inode(&self, inode: u64) -> Result<(), BlockFsError> {
        self.client.state().sources.remove(&inode);
        let failed = |source| BlockFsError::Server { path: self.dir.clone(), source };
        self.client.say(Head::new(Kind::Remove, inode), &[]).map_err(failed)
    }

    /// Has the server keep a descriptor open until this agent is gone, so that the agent's end does not wait for what the kernel does
    /// when the last one is closed.
    pub fn hold(&self, descriptor: OwnedFd) -> Result<(), BlockFsError> {
        let failed = |source| BlockFsError::Server { path: self.dir.clone(), source };
        self.client.say_with(Head::new(Kind::Hold, 0), &[], Some(descriptor.as_fd())).map_err(failed)
    }

    /// Ready when the server died. Block files are served again by one that is started in its place, and
    /// after [`crate::Device::hand_over`] of the devices that were on its files.
    pub fn lost(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut lost = self.client.lost.subscribe();
        async move {
            if lost.wait_for(|lost| *lost).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Takes the mount out of the tree and ends the server. Loop devices that still read a file of it fail once the
    /// server's process ends.
    pub fn unmount(self) -> Result<(), BlockFsError> {
        let failed = |source| BlockFsError::Server { path: self.dir.clone(), source };
        let unmounted = self.client.expect(0).map_err(failed)?;
        self.client.state().parting = true;
        self.client.say(Head::new(Kind::Unmount, 0), &[]).map_err(failed)?;
        match unmounted.recv() {
            Ok(0) => Ok(()),
            Ok(errno) => Err(failed(io::Error::from_raw_os_error(errno as i32))),
            // With nothing left to serve the server may have ended before its word came.
            Err(_closed) if !sluice_kernel::mount::is_mount_point(&self.dir)? => Ok(()),
            Err(_closed) => Err(failed(io::ErrorKind::ConnectionAborted.into())),
        }
    }
}

impl Drop for BlockFs {
    fn drop(&mut self) {
        self.client.state().parting = true;
        if let Err(error) = self.client.stream.shutdown(std::net::Shutdown::Both) {
            tracing::debug!(%error, "the server is gone already");
        }
    }
}

impl Client {
    /// Takes what the server says until it goes.
    fn listen(self: &Arc<Self>, runtime: &Handle) {
        loop {
            let message = match Message::receive(&self.stream) {
                Ok(message) => message,
                Err(error) => {
                    tracing::debug!(%error, "no more reads come from the server of block files");
                    break;
                }
            };
            match message.kind {
                Kind::Added => self.heard(message.id, 0),
                Kind::Unmounted => self.heard(0, message.a),
                Kind::Read => {
                    let len = message.bytes.first_chunk().map_or(0, |len| u64::from_le_bytes(*len) as usize);
                    let source = self.state().sources.get(&message.a).cloned();
                    let client = Arc::clone(self);
                    runtime.spawn(async move { client.answer(&message, source, len).await });
                }
                _ => tracing::error!(kind = ?message.kind, "the server of block files says what agents say"),
            }
        }
        let mut state = self.state();
        state.closed = true;
        // Whoever waits for a word of the server learns that none will come.
        state.expected.clear();
        if !state.parting {
            self.lost.send_replace(true);
        }
    }

    /// Answers a read, now or when its bytes are there; nobody is held up by it but the reader.
    async fn answer(&self, message: &Message, source: Option<Arc<dyn BlockSource>>, len: usize) {
        let (id, inode, offset) = (message.id, message.a, message.b);
        let unreadable = message.bytes.get(8..).is_some_and(|bytes| bytes.iter().any(|byte| *byte != 0));
        let supplied = match source {
            Some(source) => self.supply((id, unreadable), inode, &source, offset, len).await,
            None => self.say(Head { a: ESTALE, ..Head::new(Kind::Failed, id) }, &[]),
        };
        if let Err(error) = supplied {
            tracing::warn!(%error, "the server of block files does not take an answer");
        }
    }

    async fn supply(
        &self,
        (id, unreadable): (u64, bool),
        inode: u64,
        source: &Arc<dyn BlockSource>,
        offset: u64,
        len: usize,
    ) -> io::Result<()> {
        let end = offset + len as u64;
        if unreadable {
            source.unreadable(offset, len);
        } else if source.on_disk(offset..end) == (offset..end) {
            self.tell_local(inode, source.as_ref(), offset, end)?;
            return self.say(Head::new(Kind::InFile, id), &[]);
        }
        let read = match try_read(source, offset, len) {
            Some(read) => read,
            None => read_whole(source, offset, len).await,
        };
        match read {
            Ok(bytes) => {
                self.say(Head::new(Kind::Bytes, id), &bytes)?;
                self.tell_local(inode, source.as_ref(), offset, end)
            }
            Err(error) => {
                tracing::error!(offset, size = len, %error, "a read fails");
                self.say(Head { a: error.errno as u64, ..Head::new(Kind::Failed, id) }, &[])
            }
        }
    }

    /// Tells the server what of the file, around `offset` to `end`, is in the local file: those reads come no more.
    fn tell_local(&self, inode: u64, source: &dyn BlockSource, offset: u64, end: u64) -> io::Result<()> {
        // What was fetched lies in chunks around what was asked for.
        const CHUNK: u64 = 256 << 10;
        let (mut at, end) = (offset - offset % CHUNK, end.next_multiple_of(CHUNK).min(source.size()));
        loop {
            let _telling = lock(&self.telling);
            let local = source.on_disk(at..end);
            if local.is_empty() {
                return Ok(());
            }
            self.say(Head { a: local.start, b: local.end, ..Head::new(Kind::Local, inode) }, &[])?;
            at = local.end;
        }
    }

    fn expect(&self, id: u64) -> io::Result<Receiver<u64>> {
        let (sender, receiver) = channel();
        let mut state = self.state();
        if state.closed {
            return Err(io::ErrorKind::NotConnected.into());
        }
        state.expected.insert(id, sender);
        Ok(receiver)
    }

    fn heard(&self, id: u64, word: u64) {
        let expected = self.state().expected.remove(&id);
        if expected.is_none_or(|sender| sender.send(word).is_err()) {
            tracing::debug!(id, "nobody waits for this word of the server");
        }
    }

    fn say(&self, head: Head, bytes: &[u8]) -> io::Result<()> {
        self.say_with(head, bytes, None)
    }

    /// The server reads at once whatever comes, so this does not wait for anything but copying.
    fn say_with(&self, head: Head, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let _whole = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        head.send(&self.stream, bytes, descriptor)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn inode_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.split_once('-')?.0.parse().ok()
}

/// The errno of a file that nobody has (all architectures of Linux but MIPS).
const ESTALE: u64 = 116;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn try_read(source: &Arc<dyn BlockSource>, offset: u64, len: usize) -> Option<Result<Bytes, ReadError>> {
    let mut buffer = vec![0; len];
    match source.try_read(offset, &mut buffer) {
        Ok(true) => Some(Ok(buffer.into())),
        Ok(false) => None,
        Err(error) => Some(Err(ReadError::of_store(&error))),
    }
}

/// Reads until all is there. The kernel would take less for the end of the file and (buffered) shrink its idea of the size.
async fn read_whole(source: &Arc<dyn BlockSource>, offset: u64, len: usize) -> Result<Bytes, ReadError> {
    let mut bytes = Arc::clone(source).read(offset, len).await?;
    while bytes.len() < len {
        let missing = len - bytes.len();
        let next = Arc::clone(source).read(offset + bytes.len() as u64, missing).await?;
        if next.is_empty() {
            return Err(ReadError::other_length(bytes.len(), len));
        }
        bytes = [bytes, next].concat().into();
    }
    if bytes.len() > len { Err(ReadError::other_length(bytes.len(), len)) } else { Ok(bytes) }
}
