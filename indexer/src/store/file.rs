//! The checkpoint file. It is replaced by renaming a complete new one over it, so a crash leaves the old one or the new one.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use tokio::task::spawn_blocking;

use super::{CheckpointStore, LoadError, SaveError, WriteCheckpoint};
use crate::checkpoint::CheckpointSize;

/// A file. A second file beside it, with `.new` behind its name, exists while one is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileStore {
    path: PathBuf,
}

// === impl FileStore ===

impl FileStore {
    /// The file need not exist yet; its directory must.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }
}

#[async_trait]
impl CheckpointStore for FileStore {
    fn kind(&self) -> &'static str {
        "file"
    }

    fn place(&self) -> String {
        format!("file:{}", self.path.display())
    }

    async fn load(&self, max_bytes: u64) -> Result<Option<Vec<u8>>, LoadError> {
        let path = self.path.clone();
        let read = spawn_blocking(move || read(&path, max_bytes)).await;
        read.unwrap_or_else(|panic| Err(io::Error::other(panic).into()))
    }

    async fn save(&self, write: WriteCheckpoint) -> Result<CheckpointSize, SaveError> {
        let path = self.path.clone();
        let replaced = spawn_blocking(move || replace(&path, write)).await;
        Ok(replaced.unwrap_or_else(|panic| Err(io::Error::other(panic)))?)
    }
}

fn read(path: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>, LoadError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let bytes = file.metadata()?.len();
    if bytes > max_bytes {
        return Err(LoadError::TooLarge { bytes, max_bytes });
    }
    let mut content = Vec::with_capacity(usize::try_from(bytes).unwrap_or(0));
    file.take(max_bytes).read_to_end(&mut content)?;
    Ok(Some(content))
}

fn replace(path: &Path, write: WriteCheckpoint) -> io::Result<CheckpointSize> {
    let mut name = path.file_name().ok_or_else(|| io::Error::other("the path names no file"))?.to_owned();
    name.push(".new");
    let unfinished = path.with_file_name(name);
    let mut out = BufWriter::new(File::create(&unfinished)?);
    let size = write(&mut out)?;
    let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_all()?;
    fs::rename(&unfinished, path)?;
    // The new name is on disk only with its directory.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_beyond_the_bound_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index.checkpoint");
        let store = FileStore::new(&path);
        assert!(store.load(3).await.unwrap().is_none());
        fs::write(&path, "1234").unwrap();
        assert_eq!(store.load(4).await.unwrap().unwrap(), b"1234");
        let error = store.load(3).await.unwrap_err();
        assert_eq!(error.reason(), "too_large");
        assert!(error.to_string().contains("--max-blocks"), "{error}");
    }

    #[tokio::test]
    async fn a_write_that_fails_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index.checkpoint");
        fs::write(&path, "old").unwrap();
        let store = FileStore::new(&path);
        let write: WriteCheckpoint = Box::new(|out| {
            out.write_all(b"half")?;
            Err(io::Error::other("no more"))
        });
        assert_eq!(store.save(write).await.unwrap_err().reason(), "unwritable");
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }
}
