//! Checkpoints: what an index holds, written down so that a restart costs what has changed since and not everything.
//!
//! A checkpoint may be stale or of another time altogether. Nothing of it counts before its publisher proved it, and what
//! differs is asked for slice by slice. So a checkpoint makes a restart warm and can never make it wrong.
//!
//! ```text
//! 16 bytes  preamble as in [`kvatlas_proto::sealed`], magic "KVAC", checksum over everything behind it
//! then per source: u64 LE length, and an rkyv archive of that many bytes
//! ```
//!
//! Written source by source, so that memory and the time for which the writer of the index waits are those of one source.

use std::io::{self, Seek, SeekFrom, Write};

use kvatlas_proto::frame::{FrameOwner, MAX_FRAME_OWNERS};
use kvatlas_proto::ids::{InvalidInstanceError, MAX_MEDIUM_BYTES};
use kvatlas_proto::keys::KeyVariant;
use kvatlas_proto::scope::InvalidScopeError;
use kvatlas_proto::sealed::{OpenError, PREAMBLE_BYTES, Seal};
use kvatlas_proto::{
    BlockKey, CacheGroup, DpRank, Epoch, GroupKind, InstanceId, Scope, ShardId, SourceId, Tier,
};
use xxhash_rust::xxh3::Xxh3;

/// Version of the layout. A file of another version is refused; the index then starts cold.
pub const CHECKPOINT_VERSION: u16 = 2;
const SEAL: Seal = Seal { what: "an index checkpoint", magic: *b"KVAC", version: CHECKPOINT_VERSION };

/// What a checkpoint says of one source in one shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SavedSource {
    pub(crate) scope: Scope,
    pub(crate) shard: ShardId,
    pub(crate) source: SourceId,
    pub(crate) epoch: Epoch,
    pub(crate) variant: KeyVariant,
    pub(crate) owners: Vec<SavedOwner>,
}

/// What a checkpoint says of one owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SavedOwner {
    pub(crate) owner: FrameOwner,
    /// (parent, key)
    pub(crate) blocks: Vec<(BlockKey, BlockKey)>,
}

/// Sizes of a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckpointSize {
    /// Sources in it.
    pub sources: usize,
    /// Blocks in it, counted once per owner.
    pub blocks: usize,
    /// Its length.
    pub bytes: u64,
}

/// A checkpoint cannot be used; the index starts cold.
#[derive(Debug, thiserror::Error)]
pub enum ReadCheckpointError {
    /// Not a checkpoint of this version, or damaged.
    #[error(transparent)]
    Sealed(#[from] OpenError),
    /// A record ends beyond the end.
    #[error("a record of {bytes} bytes ends beyond the end of the checkpoint")]
    Length {
        /// Its stated length.
        bytes: u64,
    },
    /// A record is not a valid archive.
    #[error("a record of the checkpoint is not valid: {0}")]
    Archive(rkyv::rancor::Error),
    /// A record names an impossible scope.
    #[error(transparent)]
    Scope(#[from] InvalidScopeError),
    /// A record names an impossible instance.
    #[error(transparent)]
    Instance(#[from] InvalidInstanceError),
    /// A record contradicts itself.
    #[error("a record of the checkpoint is inconsistent: {0}")]
    Inconsistent(&'static str),
}

/// Writes a checkpoint, one source after the other.
pub(crate) struct CheckpointWriter<W> {
    out: W,
    hash: Xxh3,
    size: CheckpointSize,
}

mod wire {
    use rkyv::{Archive, Deserialize, Serialize};

    #[derive(Archive, Serialize, Deserialize)]
    pub(super) struct Source {
        pub(super) model: String,
        pub(super) tenant: String,
        pub(super) block_size: u32,
        pub(super) key_version: u16,
        pub(super) shard: u16,
        pub(super) shards: u16,
        pub(super) instance: String,
        pub(super) rank: u32,
        pub(super) epoch: u64,
        pub(super) multimodal_offsets: bool,
        pub(super) lookahead_tokens: u8,
        pub(super) owners: Vec<Owner>,
    }

    #[derive(Archive, Serialize, Deserialize)]
    pub(super) struct Owner {
        pub(super) tier: u8,
        pub(super) group: u16,
        pub(super) medium: String,
        /// See [`super::kind_of`].
        pub(super) kind: u8,
        pub(super) window_tokens: u32,
        pub(super) block_tokens: u32,
        pub(super) load_blocks: u32,
        pub(super) parents: Vec<u64>,
        pub(super) keys: Vec<u64>,
    }
}

// === impl CheckpointWriter ===

impl<W: Write + Seek> CheckpointWriter<W> {
    pub(crate) fn new(mut out: W) -> io::Result<Self> {
        out.write_all(&SEAL.start(0))?;
        let size = CheckpointSize { bytes: PREAMBLE_BYTES as u64, ..CheckpointSize::default() };
        Ok(Self { out, hash: Xxh3::new(), size })
    }

    pub(crate) fn add(&mut self, source: &SavedSource) -> io::Result<()> {
        let record = rkyv::to_bytes::<rkyv::rancor::Error>(&source.to_wire()).map_err(io::Error::other)?;
        for part in [&(record.len() as u64).to_le_bytes()[..], &record] {
            self.hash.update(part);
            self.out.write_all(part)?;
            self.size.bytes += part.len() as u64;
        }
        self.size.sources += 1;
        self.size.blocks += source.owners.iter().map(|owner| owner.blocks.len()).sum::<usize>();
        Ok(())
    }

    /// Seals the checkpoint. Until then its checksum is wrong, so a half-written one is refused.
    pub(crate) fn finish(mut self) -> io::Result<(W, CheckpointSize)> {
        self.out.seek(SeekFrom::Start(8))?;
        self.out.write_all(&self.hash.digest().to_le_bytes())?;
        self.out.flush()?;
        Ok((self.out, self.size))
    }
}

/// All sources of a checkpoint, or why it cannot be used. Nothing is believed before everything was checked.
pub(crate) fn read(bytes: &[u8]) -> Result<Vec<SavedSource>, ReadCheckpointError> {
    let mut rest = SEAL.open(bytes)?;
    let mut sources = Vec::new();
    while !rest.is_empty() {
        let (length, behind) = rest.split_first_chunk().ok_or(ReadCheckpointError::Length { bytes: 8 })?;
        let length = u64::from_le_bytes(*length);
        let fits = usize::try_from(length).ok().and_then(|length| behind.split_at_checked(length));
        let (record, behind) = fits.ok_or(ReadCheckpointError::Length { bytes: length })?;
        let record = rkyv::access::<wire::ArchivedSource, rkyv::rancor::Error>(record)
            .map_err(ReadCheckpointError::Archive)?;
        sources.push(SavedSource::from_wire(record)?);
        rest = behind;
    }
    Ok(sources)
}

// === impl SavedSource ===

impl SavedSource {
    fn to_wire(&self) -> wire::Source {
        wire::Source {
            model: self.scope.model().to_owned(),
            tenant: self.scope.tenant().to_owned(),
            block_size: self.scope.block_size(),
            key_version: self.scope.key_version(),
            shard: self.shard.number(),
            shards: self.shard.of(),
            instance: self.source.instance.as_str().to_owned(),
            rank: self.source.rank.0,
            epoch: self.epoch.0,
            multimodal_offsets: self.variant.multimodal_offsets,
            lookahead_tokens: self.variant.lookahead_tokens,
            owners: self.owners.iter().map(SavedOwner::to_wire).collect(),
        }
    }

    fn from_wire(record: &wire::ArchivedSource) -> Result<Self, ReadCheckpointError> {
        if record.owners.len() > MAX_FRAME_OWNERS {
            return Err(ReadCheckpointError::Inconsistent("a source has too many owners"));
        }
        Ok(Self {
            scope: Scope::new(
                record.model.as_str(),
                record.tenant.as_str(),
                record.block_size.to_native(),
                record.key_version.to_native(),
            )?,
            shard: ShardId::new(record.shard.to_native(), record.shards.to_native())
                .ok_or(ReadCheckpointError::Inconsistent("there is no such shard"))?,
            source: SourceId {
                instance: InstanceId::new(record.instance.as_str())?,
                rank: DpRank(record.rank.to_native()),
            },
            epoch: Epoch(record.epoch.to_native()),
            variant: KeyVariant {
                multimodal_offsets: record.multimodal_offsets,
                lookahead_tokens: record.lookahead_tokens,
            },
            owners: record.owners.iter().map(SavedOwner::from_wire).collect::<Result<_, _>>()?,
        })
    }
}

// === impl SavedOwner ===

impl SavedOwner {
    fn to_wire(&self) -> wire::Owner {
        let (kind, window_tokens, block_tokens) = match self.owner.kind {
            GroupKind::Full => (0, 0, 0),
            GroupKind::SlidingWindow { window_tokens, block_tokens } => (1, window_tokens, block_tokens),
            GroupKind::State { block_tokens } => (2, 0, block_tokens),
            GroupKind::Unknown => (3, 0, 0),
        };
        wire::Owner {
            tier: self.owner.tier as u8,
            group: self.owner.group.0,
            medium: self.owner.medium.clone(),
            kind,
            window_tokens,
            block_tokens,
            load_blocks: self.owner.load_blocks,
            parents: self.blocks.iter().map(|(parent, _)| parent.0).collect(),
            keys: self.blocks.iter().map(|(_, key)| key.0).collect(),
        }
    }

    fn from_wire(record: &wire::ArchivedOwner) -> Result<Self, ReadCheckpointError> {
        let bad = ReadCheckpointError::Inconsistent;
        if record.medium.len() > MAX_MEDIUM_BYTES || record.load_blocks == 0 {
            return Err(bad("an owner's medium cannot be"));
        }
        if record.parents.len() != record.keys.len() {
            return Err(bad("keys and parents do not add up"));
        }
        let tier = Tier::from_index(record.tier).ok_or(bad("a tier is not known"))?;
        let kind = kind_of(record).ok_or(bad("a cache group's kind cannot be"))?;
        let pairs = record.parents.iter().zip(record.keys.iter());
        Ok(Self {
            owner: FrameOwner {
                tier,
                medium: record.medium.as_str().to_owned(),
                group: CacheGroup(record.group.to_native()),
                kind,
                load_blocks: record.load_blocks.to_native(),
            },
            blocks: pairs.map(|(p, k)| (BlockKey(p.to_native()), BlockKey(k.to_native()))).collect(),
        })
    }
}

fn kind_of(record: &wire::ArchivedOwner) -> Option<GroupKind> {
    let (window_tokens, block_tokens) = (record.window_tokens.to_native(), record.block_tokens.to_native());
    match record.kind {
        0 => Some(GroupKind::Full),
        1 if window_tokens > 0 && block_tokens > 0 => {
            Some(GroupKind::SlidingWindow { window_tokens, block_tokens })
        }
        2 if block_tokens > 0 => Some(GroupKind::State { block_tokens }),
        3 => Some(GroupKind::Unknown),
        _ => None,
    }
}

// === impl ReadCheckpointError ===

impl ReadCheckpointError {
    /// Name for metric labels.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Sealed(OpenError::Version { .. }) => "version",
            Self::Sealed(OpenError::Magic(_)) => "foreign",
            Self::Sealed(OpenError::Size { .. } | OpenError::Checksum(_)) => "damaged",
            Self::Length { .. }
            | Self::Archive(_)
            | Self::Scope(_)
            | Self::Instance(_)
            | Self::Inconsistent(_) => "inconsistent",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn saved() -> SavedSource {
        let owner = |tier, kind, blocks: u64| SavedOwner {
            owner: FrameOwner { tier, medium: "M".into(), group: CacheGroup(3), kind, load_blocks: 2 },
            blocks: (0..blocks).map(|n| (BlockKey(n), BlockKey(n + 1))).collect(),
        };
        let window = GroupKind::SlidingWindow { window_tokens: 64, block_tokens: 16 };
        SavedSource {
            scope: Scope::new("m", "t", 16, 1).unwrap(),
            shard: ShardId::new(3, 8).unwrap(),
            source: SourceId { instance: InstanceId::new("10.0.0.7:8000").unwrap(), rank: DpRank(2) },
            epoch: Epoch(77),
            variant: KeyVariant { multimodal_offsets: true, lookahead_tokens: 1 },
            owners: vec![
                owner(Tier::Gpu, GroupKind::Full, 5),
                owner(Tier::Unknown, window, 0),
                owner(Tier::Cpu, GroupKind::State { block_tokens: 32 }, 1),
                owner(Tier::Ssd, GroupKind::Unknown, 2),
            ],
        }
    }

    fn written(sources: &[SavedSource]) -> Vec<u8> {
        let mut writer = CheckpointWriter::new(Cursor::new(Vec::new())).unwrap();
        sources.iter().for_each(|source| writer.add(source).unwrap());
        let (out, size) = writer.finish().unwrap();
        assert_eq!((size.sources, size.bytes), (sources.len(), out.get_ref().len() as u64));
        out.into_inner()
    }

    #[test]
    fn what_was_written_is_read() {
        for sources in [vec![], vec![saved()], vec![saved(), saved()]] {
            assert_eq!(read(&written(&sources)).unwrap(), sources);
        }
    }

    #[test]
    fn every_truncation_and_every_damaged_byte_is_refused() {
        let good = written(&[saved()]);
        for at in 0..good.len() {
            assert!(read(&good[..at]).is_err(), "cut at {at}");
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert_eq!(read(&bad).is_ok(), at == 6 || at == 7, "byte {at}");
        }
    }

    #[test]
    fn another_version_is_refused_and_says_which() {
        let mut newer = written(&[saved()]);
        newer[4] += 1;
        let error = read(&newer).unwrap_err();
        assert_eq!(error.reason(), "version");
        assert!(
            error.to_string().contains("version 3") && error.to_string().contains("version 2"),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_was_not_finished_is_refused() {
        let mut writer = CheckpointWriter::new(Cursor::new(Vec::new())).unwrap();
        writer.add(&saved()).unwrap();
        assert_eq!(read(writer.out.get_ref()).unwrap_err().reason(), "damaged");
    }
}
