//! The file in which one source's state survives the shim: read once at the start, written from time to time and at the end.
//!
//! A file that cannot be read or used never stops the shim: it says so, counts it, and the source starts cold. A file is
//! replaced by renaming a complete new one over it, so a crash leaves the old one or the new one. It is readable by its owner
//! only: pages smaller than a block carry token ids.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use kvatlas_proto::InstanceId;
use kvatlas_proto::scope::InvalidScopeError;
use xxhash_rust::xxh3::xxh3_64;

use crate::source::{Source, SourceConfig};
use crate::state::RestoreStateError;

/// Largest file that is read: offsets in it have 32 bits, and every bound of a source fits.
const MAX_STATE_BYTES: u64 = 2 << 30;
/// Who may read a file: its owner.
const MODE: u32 = 0o600;

/// What became of a source's state file. Counters since the shim was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateCounts {
    /// The source began with what was saved.
    pub restored: bool,
    /// Why what was saved is not used; one of [`RestoreStateError::REASONS`].
    pub refused: Option<&'static str>,
    /// Times that the state was written.
    pub saves: u64,
    /// Times that it could not be.
    pub failures: u64,
    /// Size of what was written last.
    pub bytes: u64,
}

/// Where one source's state is kept.
#[derive(Clone, Debug)]
pub(super) struct StateFile(PathBuf);

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error(transparent)]
    Read(#[from] io::Error),
    #[error("{0} bytes are more than any state has")]
    Size(u64),
    #[error(transparent)]
    Content(#[from] RestoreStateError),
}

// === impl StateFile ===

impl StateFile {
    /// The file of one endpoint of one instance, with a name that no other has. The directory has to exist.
    pub(super) fn new(dir: &Path, instance: &InstanceId, endpoint: &str) -> Self {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
        let name: String = instance.as_str().chars().map(plain).collect();
        let tag = xxh3_64(format!("{instance}\n{endpoint}").as_bytes());
        Self(dir.join(format!("shim-{name}-{tag:016x}.state")))
    }

    /// The source that the file says, or a new one.
    pub(super) fn open(
        &self,
        config: SourceConfig,
        now_ns: u64,
    ) -> Result<(Source, StateCounts), InvalidScopeError> {
        let (file, has_replay) = (self.0.display(), config.has_replay);
        let restored = self
            .read()
            .and_then(|bytes| bytes.map(|bytes| restore(config.clone(), &bytes, now_ns)).transpose());
        let mut counts = StateCounts::default();
        match restored {
            Ok(Some(source)) if has_replay => {
                let blocks = source.mirror().visible_blocks();
                tracing::info!(%file, blocks, "read what was held; it counts once the engine's replay has shown the same life");
                counts.restored = true;
                return Ok((source, counts));
            }
            Ok(Some(source)) => {
                tracing::info!(%file, "what was held is not used: without a replay socket nothing can show that it still is");
                return Ok((source, counts));
            }
            Ok(None) => tracing::info!(%file, "there is no saved state: the source starts cold"),
            Err(error) => {
                let reason = match &error {
                    LoadError::Content(error) => error.reason(),
                    LoadError::Read(_) | LoadError::Size(_) => "unreadable",
                };
                counts.refused = Some(reason);
                tracing::warn!(
                    %file, reason, %error,
                    "the saved state is refused and the source starts cold; the next state replaces the file"
                );
            }
        }
        Ok((Source::new(config, now_ns)?, counts))
    }

    fn read(&self) -> Result<Option<Vec<u8>>, LoadError> {
        let file = match File::open(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let size = file.metadata()?.len();
        if size > MAX_STATE_BYTES {
            return Err(LoadError::Size(size));
        }
        let mut bytes = Vec::with_capacity(size as usize);
        file.take(MAX_STATE_BYTES).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    /// Replaces the file. Waits for the disk.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let unfinished = self.0.with_extension("state.new");
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(MODE).open(&unfinished)?;
        // One that an interrupted write left behind keeps the mode that it has.
        file.set_permissions(Permissions::from_mode(MODE))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&unfinished, &self.0)?;
        // The new name is on disk only with its directory.
        let folder = self.0.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

fn restore(config: SourceConfig, bytes: &[u8], now_ns: u64) -> Result<Source, LoadError> {
    Source::restore(config, bytes, now_ns).map_err(LoadError::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(name: &str) -> InstanceId {
        InstanceId::new(name).unwrap()
    }

    fn config() -> SourceConfig {
        SourceConfig { block_size: Some(16), has_replay: true, ..SourceConfig::new("m", instance("a:1")) }
    }

    #[test]
    fn every_endpoint_of_every_instance_has_a_file_of_its_own() {
        let dir = Path::new("/nowhere");
        let name = |name: &str, endpoint: &str| StateFile::new(dir, &instance(name), endpoint).0;
        assert_ne!(name("a:1", "tcp://a:5557"), name("a:1", "tcp://a:5558"));
        assert_ne!(name("a:1", "tcp://a:5557"), name("a_1", "tcp://a:5557"));
        assert!(name("../../etc", "x").starts_with(dir) && name("../../etc", "x").parent() == Some(dir));
    }

    #[test]
    fn a_missing_file_is_a_cold_start_and_an_unusable_one_is_counted_by_its_reason() {
        let dir = tempfile::tempdir().unwrap();
        let file = StateFile::new(dir.path(), &instance("a:1"), "");
        let open = |file: &StateFile| file.open(config(), 5).unwrap().1;
        assert_eq!(open(&file), StateCounts::default());
        file.write(b"KVAS").unwrap();
        assert_eq!(open(&file).refused, Some("damaged"));
        fs::remove_file(&file.0).unwrap();
        fs::create_dir(&file.0).unwrap();
        assert_eq!(open(&file).refused, Some("unreadable"));
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_and_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let file = StateFile::new(dir.path(), &instance("a:1"), "");
        let first = Source::new(config(), 5).unwrap();
        // What an interrupted write left behind is in nobody's way.
        fs::write(file.0.with_extension("state.new"), b"half").unwrap();
        file.write(&first.save().unwrap().unwrap()).unwrap();
        let (source, counts) = file.open(config(), 3).unwrap();
        assert!(counts.restored, "{counts:?}");
        assert!(source.epoch() > first.epoch());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(fs::metadata(&file.0).unwrap().permissions().mode() & 0o777, MODE);
    }
}
