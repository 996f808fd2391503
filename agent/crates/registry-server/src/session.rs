//! Upload sessions: a file each under the root, until it becomes a blob or is given up.

use std::fs;
use std::io::{self, Read};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use ring::digest::{Context, SHA256, SHA512};

use crate::layout::Layouts;

const PREFIX: &str = ".upload-";
/// A session to which nothing was added for so long is taken for given up.
const STALE: Duration = Duration::from_secs(3600);

impl Layouts {
    /// Begins a session; its name.
    pub(crate) fn begin_session(&self) -> io::Result<String> {
        self.remove_stale_sessions()?;
        let (_, path) = self.temporary()?.keep().map_err(|error| error.error)?;
        Ok(path.file_name().unwrap_or_default().to_string_lossy().into_owned())
    }

    /// The file of a session; `None` if this can be no session's name.
    pub(crate) fn session(&self, name: &str) -> Option<PathBuf> {
        let plain = name.strip_prefix(PREFIX)?.bytes().all(|byte| byte.is_ascii_alphanumeric());
        plain.then(|| self.root().join(name))
    }

    /// Gives a session up.
    pub(crate) fn remove_session(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.session(name).ok_or(io::ErrorKind::NotFound)?)
    }

    /// Makes a session a blob; `false` if its bytes have another digest (they are removed then).
    pub(crate) fn take_session(&self, repository: &str, session: &str, digest: &str) -> io::Result<bool> {
        let path = self.session(session).ok_or(io::ErrorKind::NotFound)?;
        if self.blob(repository, digest).is_none() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let file = fs::File::open(&path)?;
        // From here on the file is gone if it does not become the blob.
        let mut file = tempfile::NamedTempFile::from_parts(file, tempfile::TempPath::try_from_path(path)?);
        let (algorithm, wanted) = digest.split_once(':').unwrap_or_default();
        let mut context = match algorithm {
            "sha256" => Context::new(&SHA256),
            "sha512" => Context::new(&SHA512),
            _ => return Ok(false),
        };
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let len = file.as_file_mut().read(&mut buffer)?;
            let Some(bytes) = buffer.get(..len).filter(|bytes| !bytes.is_empty()) else { break };
            context.update(bytes);
        }
        if hex::encode(context.finish()) != wanted {
            return Ok(false);
        }
        self.put_blob(repository, digest, file)?;
        Ok(true)
    }

    /// Removes sessions that were given up, of earlier processes too.
    pub(crate) fn remove_stale_sessions(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.root())? {
            let entry = entry?;
            if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
                continue;
            }
            let age = match entry.metadata() {
                Ok(meta) => SystemTime::now().duration_since(meta.modified()?).unwrap_or_default(),
                // Finished by somebody else just now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if age < STALE {
                continue;
            }
            match fs::remove_file(entry.path()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => tracing::info!(session = ?entry.file_name(), "an upload that was given up is removed"),
            }
        }
        Ok(())
    }
}
