//! A folder of another server, by the system's `ssh`.
//!
//! An object is written under a name that no object has, synced where the server can (`fsync@openssh.com`), given
//! its name by a hard link, which fails if the name is taken, and synced once more: SFTP cannot sync a folder, but
//! on ext4, xfs and btrfs that second sync brings the new name to disk as well. Where a server cannot do these, the
//! place says so in its remark.
//!
//! `ssh` asks nothing, reads no settings of a user, knows its servers by one file only, and ends with this process.
//! All calls share one connection; one that is lost is made anew by the next try.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use openssh_sftp_client::error::SftpErrorKind;
use openssh_sftp_client::file::File;
use openssh_sftp_client::fs::{DirEntry, Fs};
use openssh_sftp_client::metadata::Permissions;
use openssh_sftp_client::{Error as SftpError, Sftp, SftpOptions};
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, ChildStderr};
use tokio::sync::Mutex;
use tokio_stream::StreamExt as _;

use super::remote::{Remote, Server};
use super::retry::{Bandwidth, Limits, PIECE_BYTES, Trouble, step};
use super::{Kind, Object, Storage, StorageError, failed};
use crate::platform::backoff::random_u64;
use crate::platform::chain;
use crate::platform::clock::{Clock as _, SystemClock};
use crate::platform::command::{End, Program, Streams, printable};

/// The system's ssh.
pub const SSH: &str = "/usr/bin/ssh";
/// As in folders.
const UNFINISHED: &str = "-tmp-";
const LEFTOVER_AGE: Duration = Duration::from_secs(24 * 60 * 60);
/// What ssh says when it will not enter, whoever asks again.
const REFUSALS: &[&str] = &["Permission denied", "Host key verification failed", "No such file or directory"];
const COMPLAINT_BYTES_MAX: u64 = 4096;

/// Where a server is and who enters it.
#[derive(Clone, Debug)]
pub struct SftpPlace {
    /// Its name or address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Who enters.
    pub user: String,
    /// The repository's folder there; made if the one above it is there.
    pub path: String,
    /// The private key, without a passphrase.
    pub identity_file: PathBuf,
    /// Keys of servers, as `ssh-keyscan` writes them; one that is not in it is not spoken to.
    pub known_hosts: PathBuf,
}

impl fmt::Display for SftpPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port, user, path, .. } = self;
        write!(f, "sftp://{user}@{host}:{port}/{}", path.trim_start_matches('/'))
    }
}

impl SftpPlace {
    /// What [`SSH`] is called with to speak SFTP with this server: it asks nobody, and knows what is named here only.
    pub fn ssh_arguments(&self) -> Vec<OsString> {
        // Quiet lines die: ssh itself asks whether the server is still there.
        const OPTIONS: [&str; 10] = [
            "BatchMode=yes",
            "StrictHostKeyChecking=yes",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "GlobalKnownHostsFile=/dev/null",
            "ForwardAgent=no",
            "ClearAllForwardings=yes",
            "ServerAliveInterval=15",
            "ServerAliveCountMax=4",
            "UpdateHostKeys=no",
        ];
        let mut known_hosts = OsString::from("UserKnownHostsFile=");
        known_hosts.push(&self.known_hosts);
        let mut arguments: Vec<OsString> = ["-F", "none", "-T"].map(Into::into).to_vec();
        OPTIONS.iter().for_each(|option| arguments.extend([OsString::from("-o"), option.into()]));
        arguments.extend([OsString::from("-o"), known_hosts, "-i".into(), self.identity_file.clone().into()]);
        arguments.extend([OsString::from("-p"), self.port.to_string().into(), "-l".into(), self.user.clone().into()]);
        arguments.extend([OsString::from("-s"), "--".into(), self.host.clone().into(), "sftp".into()]);
        arguments
    }
}

/// Opens a folder of another server. Speaks to nobody yet.
///
/// # Errors
/// When the process has no thread left.
pub fn sftp(place: &SftpPlace, limits: &Limits) -> Result<Box<dyn Storage>, StorageError> {
    let folder = RemoteFolder {
        place: place.clone(),
        limits: limits.clone(),
        bandwidth: Bandwidth::new(limits.upload_bytes_per_second),
        connection: Mutex::default(),
        remark: RwLock::default(),
    };
    Ok(Box::new(Remote::new(limits, || Ok(folder))?))
}

struct RemoteFolder {
    place: SftpPlace,
    limits: Limits,
    bandwidth: Bandwidth,
    connection: Mutex<Option<Arc<Connection>>>,
    remark: RwLock<Option<String>>,
}

impl fmt::Debug for RemoteFolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RemoteFolder").field(&self.place).finish()
    }
}

/// A session; `ssh` is killed when the last user drops it.
struct Connection {
    sftp: Sftp,
    _ssh: Child,
}

/// Why a step failed: the server's word, or nothing for too long.
enum Hindrance {
    Said(SftpError),
    Stalled(Duration),
    Ssh(String),
    /// The key, or the server's own, is refused: no other try ends otherwise.
    Refused(String),
}

impl From<SftpError> for Hindrance {
    fn from(error: SftpError) -> Self {
        Self::Said(error)
    }
}

impl Hindrance {
    fn is(&self, wanted: SftpErrorKind) -> bool {
        matches!(self, Self::Said(SftpError::SftpError(kind, _)) if std::mem::discriminant(kind) == std::mem::discriminant(&wanted))
    }

    /// Whether the connection itself is no good any more.
    fn is_lost(&self) -> bool {
        !matches!(self, Self::Refused(_) | Self::Said(SftpError::SftpError(..) | SftpError::UnsupportedExtension(_)))
    }

    fn trouble(self, operation: &'static str, object: &Object) -> Trouble {
        if self.is(SftpErrorKind::NoSuchFile) {
            return StorageError::Missing(object.clone()).into();
        }
        self.about(operation, object)
    }

    fn about(self, operation: &'static str, what: impl fmt::Display) -> Trouble {
        let is_passing = self.is_lost();
        let reason = match self {
            Self::Said(error) => printable(chain(&error).as_bytes()),
            Self::Stalled(time) => format!("the server gets no further for {} s", time.as_secs_f64()),
            Self::Ssh(reason) | Self::Refused(reason) => reason,
        };
        Trouble { error: failed(operation, what, reason), is_passing }
    }
}

impl RemoteFolder {
    async fn connection(&self) -> Result<Arc<Connection>, Hindrance> {
        let mut slot = self.connection.lock().await;
        if let Some(connection) = &*slot {
            return Ok(connection.clone());
        }
        let program = Program::new(SSH).args(self.place.ssh_arguments());
        let limits = self.limits.clone();
        // On the network's own thread: a child dies with the thread that started it.
        let connected = tokio::runtime::Handle::current().spawn(async move { connect(&program, &limits).await });
        let connection = connected.await.map_err(|e| Hindrance::Ssh(e.to_string()))??;
        let connection = Arc::new(connection);
        *self.remark.write().unwrap_or_else(PoisonError::into_inner) = remark(&connection.sftp);
        *slot = Some(connection.clone());
        Ok(connection)
    }

    /// One try of something; afterwards a connection that is no good is forgotten.
    async fn with<T>(&self, work: impl AsyncFnOnce(&Sftp) -> Result<T, Hindrance>) -> Result<T, Hindrance> {
        let connection = self.connection().await?;
        let done = work(&connection.sftp).await;
        if done.as_ref().is_err_and(Hindrance::is_lost) {
            let mut slot = self.connection.lock().await;
            if slot.as_ref().is_some_and(|current| Arc::ptr_eq(current, &connection)) {
                *slot = None;
            }
        }
        done
    }

    async fn step<T>(&self, request: impl Future<Output = Result<T, SftpError>>) -> Result<T, Hindrance> {
        match step(&self.limits, request).await {
            Some(done) => done.map_err(Hindrance::Said),
            None => Err(Hindrance::Stalled(self.limits.stall_max)),
        }
    }

    fn path(&self, below: &str) -> String {
        format!("{}/{below}", self.place.path.trim_end_matches('/'))
    }

    async fn is_there(&self, fs: &mut Fs, path: &str) -> Result<bool, Hindrance> {
        match self.step(fs.symlink_metadata(path)).await {
            Ok(_) => Ok(true),
            Err(hindrance) if hindrance.is(SftpErrorKind::NoSuchFile) => Ok(false),
            Err(hindrance) => Err(hindrance),
        }
    }

    /// Makes the folders of an object, the root first.
    async fn make_folders(&self, fs: &mut Fs, object: &Object) -> Result<(), Hindrance> {
        let path = object.path();
        let ends = path.match_indices('/').map(|(at, _)| self.path(&path[..at]));
        let folders: Vec<String> = std::iter::once(self.place.path.clone()).chain(ends).collect();
        for folder in folders {
            if self.is_there(fs, &folder).await? {
                continue;
            }
            match self.step(fs.create_dir(&folder)).await {
                // Another writer was faster.
                Err(Hindrance::Said(SftpError::SftpError(SftpErrorKind::Failure, _))) => {}
                made => made?,
            }
            // Best effort: the server may set modes by itself, and only what is encrypted lies there.
            let _ = self.step(fs.set_permissions(&folder, owners_only(true))).await;
        }
        Ok(())
    }

    async fn create(&self, sftp: &Sftp, path: &str) -> Result<File, Hindrance> {
        let mut options = sftp.options();
        options.write(true).create_new(true);
        self.step(options.open(path)).await
    }

    async fn write(&self, file: &mut File, bytes: &Bytes) -> Result<(), Hindrance> {
        let _ = self.step(file.set_permissions(owners_only(false))).await;
        for piece in bytes.chunks(PIECE_BYTES) {
            self.bandwidth.take(piece.len()).await;
            self.step(file.write_all(piece)).await?;
        }
        Ok(())
    }

    async fn sync(&self, sftp: &Sftp, file: &mut File) -> Result<(), Hindrance> {
        if sftp.support_fsync() {
            self.step(file.sync_all()).await?;
        }
        Ok(())
    }

    /// False: the name is taken.
    async fn give_name(&self, sftp: &Sftp, unfinished: &str, path: &str) -> Result<bool, Hindrance> {
        let mut fs = sftp.fs();
        // The plain rename of SFTP 3 does not overwrite; `posix-rename`, which the library prefers, does.
        let renames = !sftp.support_posix_rename() || !sftp.support_hardlink();
        if renames && self.is_there(&mut fs, path).await? {
            return Ok(false);
        }
        let named = match renames {
            true => self.step(fs.rename(unfinished, path)).await,
            false => self.step(fs.hard_link(unfinished, path)).await,
        };
        match named {
            Ok(()) => Ok(true),
            Err(hindrance) if !hindrance.is_lost() && self.is_there(&mut fs, path).await? => Ok(false),
            Err(hindrance) => Err(hindrance),
        }
    }

    async fn store(&self, sftp: &Sftp, object: &Object, bytes: &Bytes) -> Result<bool, Hindrance> {
        let mut fs = sftp.fs();
        let path = self.path(&object.path());
        if self.is_there(&mut fs, &path).await? {
            return Ok(false);
        }
        let random = random_u64().map_err(|e| Hindrance::Ssh(e.to_string()))?;
        let unfinished = format!("{path}{UNFINISHED}{random:016x}");
        let mut file = match self.create(sftp, &unfinished).await {
            Err(hindrance) if hindrance.is(SftpErrorKind::NoSuchFile) => {
                self.make_folders(&mut fs, object).await?;
                self.create(sftp, &unfinished).await?
            }
            file => file?,
        };
        let stored = async {
            self.write(&mut file, bytes).await?;
            self.sync(sftp, &mut file).await?;
            let is_new = self.give_name(sftp, &unfinished, &path).await?;
            if is_new {
                self.sync(sftp, &mut file).await?;
            }
            Ok(is_new)
        };
        let stored: Result<bool, Hindrance> = stored.await;
        // Best effort: it may have its name already, and a leftover is removed when it is a day old.
        if !matches!(&stored, Err(hindrance) if hindrance.is_lost()) {
            let _ = self.step(fs.remove_file(&unfinished)).await;
            let _ = self.step(file.close()).await;
        }
        stored
    }

    /// Whether the server's disk is full; SFTP has no word for it.
    async fn is_full(&self, bytes: u64) -> bool {
        let free = self.with(async |sftp| {
            let free = self.step(sftp.fs().statvfs(&self.place.path)).await?;
            Ok(free.bavail.saturating_mul(free.frsize))
        });
        free.await.is_ok_and(|free| free < bytes)
    }

    /// Entries of a folder below the root. `None`: there is no such folder.
    async fn entries(&self, sftp: &Sftp, folder: &str) -> Result<Option<Vec<DirEntry>>, Hindrance> {
        let opened = self.step(sftp.fs().open_dir(self.path(folder))).await;
        let opened = match opened {
            Err(hindrance) if hindrance.is(SftpErrorKind::NoSuchFile) => return Ok(None),
            opened => opened?,
        };
        let mut entries = Box::pin(opened.read_dir());
        let mut found = Vec::new();
        loop {
            let entry = step(&self.limits, entries.next()).await;
            match entry.ok_or(Hindrance::Stalled(self.limits.stall_max))? {
                Some(entry) => found.push(entry?),
                None => return Ok(Some(found)),
            }
        }
    }

    async fn files(&self, sftp: &Sftp, folder: &str) -> Result<Option<Vec<(String, u64)>>, Hindrance> {
        let Some(entries) = self.entries(sftp, folder).await? else { return Ok(None) };
        let mut found = Vec::new();
        for entry in entries {
            let Some(name) = entry.filename().to_str() else { continue };
            let path = format!("{folder}/{name}");
            if is_leftover(&entry) {
                let _ = self.step(sftp.fs().remove_file(self.path(&path))).await;
            } else if entry.file_type().is_some_and(|kind| kind.is_file()) {
                let size = entry.metadata().len();
                found.push((path, size.ok_or_else(|| Hindrance::Ssh("the server tells no sizes".to_owned()))?));
            }
        }
        Ok(Some(found))
    }

    async fn packs(&self, sftp: &Sftp) -> Result<Option<Vec<(String, u64)>>, Hindrance> {
        let Some(folders) = self.entries(sftp, "data").await? else { return Ok(None) };
        let mut found = Vec::new();
        for folder in folders {
            let Some(name) = folder.filename().to_str() else { continue };
            let is_ours = name.len() == 2 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            if is_ours && folder.file_type().is_some_and(|kind| kind.is_dir()) {
                let files = self.files(sftp, &format!("data/{name}")).await?;
                let gone = || Hindrance::Ssh("a folder of packs went away meanwhile".to_owned());
                found.extend(files.ok_or_else(gone)?);
            }
        }
        Ok(Some(found))
    }
}

impl Server for RemoteFolder {
    fn place(&self) -> String {
        self.place.to_string()
    }

    fn remark(&self) -> Option<String> {
        self.remark.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn put(&self, object: &Object, bytes: &Bytes) -> Result<(), Trouble> {
        match self.with(async |sftp| self.store(sftp, object, bytes).await).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(StorageError::Exists(object.clone()).into()),
            Err(hindrance) if hindrance.is(SftpErrorKind::Failure) && self.is_full(bytes.len() as u64).await => {
                Err(StorageError::Full(object.clone()).into())
            }
            // No such folder: it is not this object that is missing.
            Err(hindrance) => Err(hindrance.about("store", object)),
        }
    }

    async fn settle(&self, object: &Object) -> Result<(), Trouble> {
        let settled = self.with(async |sftp| {
            let mut options = sftp.options();
            options.write(true);
            let mut file = self.step(options.open(self.path(&object.path()))).await?;
            self.sync(sftp, &mut file).await?;
            self.step(file.close()).await
        });
        settled.await.map_err(|e| e.trouble("sync", object))
    }

    async fn size(&self, object: &Object) -> Result<u64, Trouble> {
        let path = self.path(&object.path());
        let metadata = self.with(async |sftp| self.step(sftp.fs().symlink_metadata(&path)).await).await;
        let metadata = metadata.map_err(|e| e.trouble("read", object))?;
        match metadata.len().filter(|_| metadata.file_type().is_none_or(|kind| kind.is_file())) {
            Some(bytes) => Ok(bytes),
            None => Err(failed("read", object, "it is not a regular file").into()),
        }
    }

    async fn read(&self, object: &Object, offset: u64, length: u64) -> Result<Vec<u8>, Trouble> {
        let path = self.path(&object.path());
        let read = self.with(async |sftp| {
            let mut file = self.step(sftp.options().read(true).open(&path)).await?;
            let mut bytes = Vec::new();
            self.step(seek(&mut file, offset)).await?;
            while (bytes.len() as u64) < length {
                let wanted = u32::try_from(length - bytes.len() as u64).unwrap_or(u32::MAX);
                match self.step(file.read(wanted, BytesMut::new())).await? {
                    Some(piece) => bytes.extend_from_slice(&piece),
                    None => break,
                }
                // A server may give less than it was asked for; the library counts what was asked for.
                self.step(seek(&mut file, offset + bytes.len() as u64)).await?;
            }
            self.step(file.close()).await?;
            Ok(bytes)
        });
        read.await.map_err(|e| e.trouble("read", object))
    }

    async fn list(&self, kind: Kind) -> Result<Vec<(String, u64)>, Trouble> {
        let listed = self.with(async |sftp| {
            let found = match kind {
                Kind::Pack => self.packs(sftp).await?,
                kind => self.files(sftp, kind.folder()).await?,
            };
            match found {
                Some(found) => Ok(found),
                // Nothing of the kind yet, but only where the repository's own folder is there.
                None => self.step(sftp.fs().metadata(&self.place.path)).await.map(|_| Vec::new()),
            }
        });
        listed.await.map_err(|hindrance| match hindrance.is(SftpErrorKind::NoSuchFile) {
            true => StorageError::NoRoot(self.place.to_string()).into(),
            false => hindrance.about("list", kind.folder()),
        })
    }

    async fn remove(&self, object: &Object) -> Result<(), Trouble> {
        let path = self.path(&object.path());
        match self.with(async |sftp| self.step(sftp.fs().remove_file(&path)).await).await {
            Err(hindrance) if hindrance.is(SftpErrorKind::NoSuchFile) => Ok(()),
            removed => removed.map_err(|e| e.trouble("remove", object)),
        }
    }
}

async fn seek(file: &mut File, to: u64) -> Result<(), SftpError> {
    use tokio::io::AsyncSeekExt as _;
    file.seek(std::io::SeekFrom::Start(to)).await.map(drop).map_err(SftpError::from)
}

async fn connect(program: &Program, limits: &Limits) -> Result<Connection, Hindrance> {
    let spawned = program.spawn(Streams::piped(), End::WithParent, &[]);
    let mut ssh = spawned.map_err(|e| Hindrance::Ssh(chain(&e)))?;
    let (Some(input), Some(output)) = (ssh.stdin.take(), ssh.stdout.take()) else {
        return Err(Hindrance::Ssh("ssh has no pipes".to_owned()));
    };
    let complaints = ssh.stderr.take();
    match step(limits, Sftp::new(input, output, SftpOptions::new())).await {
        Some(Ok(sftp)) => Ok(Connection { sftp, _ssh: ssh }),
        Some(Err(error)) => {
            let complaint = complaint(complaints, &error, limits).await;
            let is_refused = REFUSALS.iter().any(|refusal| complaint.contains(refusal));
            Err(if is_refused { Hindrance::Refused(complaint) } else { Hindrance::Ssh(complaint) })
        }
        None => Err(Hindrance::Stalled(limits.stall_max)),
    }
}

/// What ssh says when it ends at once: a key that is refused, a server that is not known.
async fn complaint(stream: Option<ChildStderr>, error: &SftpError, limits: &Limits) -> String {
    let mut said = Vec::new();
    if let Some(stream) = stream {
        let _ = step(limits, stream.take(COMPLAINT_BYTES_MAX).read_to_end(&mut said)).await;
    }
    if said.is_empty() { chain(error) } else { format!("ssh: {}", printable(&said)) }
}

fn remark(sftp: &Sftp) -> Option<String> {
    let mut lacks = Vec::new();
    if !sftp.support_fsync() {
        lacks.push("the server does not offer fsync@openssh.com: whether objects survive a power cut is not known");
    }
    if sftp.support_posix_rename() && !sftp.support_hardlink() {
        lacks.push("the server does not offer hardlink@openssh.com: two writers of one name can overwrite");
    }
    (!lacks.is_empty()).then(|| lacks.join("; "))
}

fn owners_only(is_folder: bool) -> Permissions {
    let mut permissions = Permissions::new();
    permissions.set_read_by_owner(true).set_write_by_owner(true).set_execute_by_owner(is_folder);
    permissions
}

fn is_leftover(entry: &DirEntry) -> bool {
    let name = entry.filename().to_str().and_then(|name| name.split_once(UNFINISHED));
    let is_ours = name.is_some_and(|(object, _)| Object::new(Kind::Pack, object).is_well_named());
    let now = SystemTime::from(SystemClock.now());
    let age = entry.metadata().modified().and_then(|time| now.duration_since(time.as_system_time()).ok());
    is_ours && age.is_some_and(|age| age > LEFTOVER_AGE)
}
