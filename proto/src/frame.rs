//! Event frames: what a publisher tells the index, one source and one shard per frame.
//!
//! A frame is sealed ([`crate::sealed`], magic `KVAF`); its body is an rkyv archive, little-endian, readable at any
//! address. It is read in place, but only after [`FrameView::parse`] has checked all of it: seal, size, archive
//! structure, names, and that operations and keys add up. A frame that fails is dropped and counted by the receiver.
//! Token ids never travel: a stored block costs its 8-byte key plus a share of its operation.
//!
//! One source (instance and rank) has, in each virtual shard ([`crate::shard`]; one where the key space is not cut), one
//! contiguous sequence for all its tiers and cache groups, so that a block
//! that moves between tiers moves in one step. An epoch begins with [`FramePart::Start`] at sequence 0, which says by
//! digests what the source holds at that moment; every later frame is a change. Who has missed something asks
//! ([`crate::request`]) and is answered in frames of the parts [`FramePart::Live`] (the very frames that are missing),
//! [`FramePart::Repair`] and [`FramePart::Unavailable`], sent to whoever asked and to nobody else.

use crate::digest::{Digest, MAX_BUCKET_BITS};
use crate::ids::{
    CacheGroup, DpRank, Epoch, FrameSeq, GroupKind, InstanceId, InvalidInstanceError, MAX_MEDIUM_BYTES,
    SourceId, Tier,
};
use crate::keys::{BlockKey, KeyVariant};
use crate::request::RequestId;
use crate::scope::{InvalidScopeError, Scope};
use crate::sealed::{OpenError, Seal};
use crate::shard::ShardId;
use wire::{DigestRecord, OpRecord, OwnerRecord};

/// Version of the layout.
pub const FRAME_VERSION: u16 = 3;
/// Largest frame, in bytes. Below NATS's default `max_payload` of 1 MiB.
pub const MAX_FRAME_BYTES: usize = 768 * 1024;
/// Most owners (tier and cache group) one source can have.
pub const MAX_FRAME_OWNERS: usize = 256;
const SEAL: Seal = Seal { what: "an event frame", magic: *b"KVAF", version: FRAME_VERSION };

/// What a frame is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FramePart {
    /// Changes as they happen; none as a heartbeat.
    Live = 0,
    /// The first frame of an epoch, at sequence 0, without operations: its digests say what is held already.
    Start = 1,
    /// A piece of the answer to a request for state: what is held after frame `seq`.
    Repair = 2,
    /// The answer to a request for frames that are not kept any more.
    Unavailable = 3,
}

/// Which piece of which answer a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyPart {
    /// What is answered.
    pub request: RequestId,
    /// Number of this piece, from 0.
    pub piece: u32,
    /// How many pieces there are, at least 1.
    pub pieces: u32,
}

/// What the publisher knows about the truth of its own mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SourceHealth {
    /// Every event since the engine started (or its last reset) was seen.
    Exact = 0,
    /// The publisher joined a running engine: blocks stored before are missing (under-reported).
    JoinedLate = 1,
    /// Events were lost and could not be replayed: state was dropped and is being rebuilt (under-reported).
    EventsLost = 2,
    /// A message of the engine could not be decoded; its changes are unknown.
    Undecodable = 3,
    /// A bound of the publisher was reached; some blocks are not tracked (under-reported).
    OverLimit = 4,
}

/// One tier and cache group of the source.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FrameOwner {
    /// Where the blocks lie.
    pub tier: Tier,
    /// The engine's name of the medium.
    pub medium: String,
    /// Cache group.
    pub group: CacheGroup,
    /// What the group needs to serve a prefix.
    pub kind: GroupKind,
    /// Consecutive blocks that the medium can only load together, aligned to the prompt's start; 1 for nearly all.
    pub load_blocks: u32,
}

/// Everything in a frame but the operations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Which key space.
    pub scope: Scope,
    /// Who publishes.
    pub source: SourceId,
    /// Which part of the key space: all blocks in it are of this shard, and digests count these.
    pub shard: ShardId,
    /// How this engine shapes extra keys.
    pub variant: KeyVariant,
    /// Publisher's lifetime.
    pub epoch: Epoch,
    /// Position in the epoch, contiguous from 0.
    pub seq: FrameSeq,
    /// Changes, the start of an epoch, or an answer.
    pub part: FramePart,
    /// What the publisher knows about its own truth.
    pub health: SourceHealth,
    /// Wall clock of the newest engine event inside, nanoseconds since the Unix epoch; 0 for a heartbeat.
    pub engine_time_ns: u64,
    /// The owners that operations refer to by position: all that the source has.
    pub owners: Vec<FrameOwner>,
    /// What each owner holds after this frame, by position; empty if the frame does not say.
    pub digests: Vec<Digest>,
    /// Present in answers ([`FramePart::Repair`], [`FramePart::Unavailable`]) and nowhere else.
    pub reply: Option<ReplyPart>,
}

/// The operations of a frame under construction, in order.
#[derive(Clone, Debug, Default)]
pub struct OpBuffer {
    ops: Vec<OpRecord>,
    keys: Vec<u64>,
}

/// A validated frame, read in place.
#[derive(Debug)]
pub struct FrameView<'a> {
    header: FrameHeader,
    archived: &'a wire::ArchivedBody,
}

/// One operation of a validated frame.
#[derive(Debug)]
pub struct Op<'a> {
    /// Position in [`FrameHeader::owners`].
    pub owner: usize,
    /// What happened.
    pub change: Change<'a>,
}

/// What happened to an owner's blocks.
#[derive(Debug)]
pub enum Change<'a> {
    /// The owner now holds these consecutive blocks; the first one follows `parent`.
    Stored {
        /// Key of the block before the first one; the seed's root key if the first one begins a prompt, or a segment of
        /// the shard.
        parent: BlockKey,
        /// Consecutive keys.
        keys: Keys<'a>,
    },
    /// The owner no longer holds these blocks, in any order.
    Removed(Keys<'a>),
    /// The owner holds nothing.
    Cleared,
    /// In a repair: of one slice of the owner's keys ([`crate::digest::Buckets`], in as many slices as were asked for),
    /// the owner holds exactly these.
    Bucket {
        /// Which slice.
        slice: u32,
        /// The slice's blocks, in any order.
        blocks: Blocks<'a>,
    },
}

/// A run of keys inside a frame.
#[derive(Clone, Copy, Debug)]
pub struct Keys<'a>(&'a [rkyv::rend::unaligned::u64_ule]);

/// Blocks with their parents inside a frame.
#[derive(Clone, Copy, Debug)]
pub struct Blocks<'a>(&'a [rkyv::rend::unaligned::u64_ule]);

/// A frame would be larger than [`MAX_FRAME_BYTES`] or has too many owners.
#[derive(Debug, thiserror::Error)]
pub enum EncodeFrameError {
    /// Too many bytes: split the operations over several frames.
    #[error("frame of {0} bytes exceeds {MAX_FRAME_BYTES}: split it")]
    TooLarge(usize),
    /// More owners than an operation can name.
    #[error("{0} owners exceed {MAX_FRAME_OWNERS}")]
    TooManyOwners(usize),
    /// The archive could not be written.
    #[error("frame could not be archived: {0}")]
    Archive(rkyv::rancor::Error),
}

/// A received frame is not usable. It is dropped as a whole.
#[derive(Debug, thiserror::Error)]
pub enum ParseFrameError {
    /// Longer than allowed.
    #[error("frame of {0} bytes (a frame has at most {MAX_FRAME_BYTES})")]
    Size(usize),
    /// Not a frame of this version, or damaged.
    #[error(transparent)]
    Sealed(#[from] OpenError),
    /// The body is not a valid archive.
    #[error("archive is not valid: {0}")]
    Archive(rkyv::rancor::Error),
    /// The scope is not valid.
    #[error(transparent)]
    Scope(#[from] InvalidScopeError),
    /// The instance name is not valid.
    #[error(transparent)]
    Instance(#[from] InvalidInstanceError),
    /// A number has no meaning in this version.
    #[error("{field} {value} has no meaning in frame version {FRAME_VERSION}")]
    Unknown {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u32,
    },
    /// Operations, owners and keys do not add up.
    #[error("operations are inconsistent: {0}")]
    Inconsistent(&'static str),
}

/// The archived layout. Private: readers go through [`FrameView`].
#[allow(missing_docs, unreachable_pub)]
mod wire {
    use rkyv::{Archive, Deserialize, Serialize};

    #[derive(Clone, Debug, Archive, Serialize, Deserialize)]
    #[rkyv(derive(Debug))]
    pub struct OwnerRecord {
        pub tier: u8,
        pub kind: u8,
        pub group: u16,
        pub window_tokens: u32,
        pub block_tokens: u32,
        pub load_blocks: u32,
        pub medium: String,
    }

    #[derive(Clone, Copy, Debug, Archive, Serialize, Deserialize)]
    #[rkyv(derive(Debug))]
    pub struct OpRecord {
        pub kind: u8,
        pub owner: u8,
        pub len: u32,
        pub parent: u64,
    }

    #[derive(Clone, Copy, Debug, Archive, Serialize, Deserialize)]
    #[rkyv(derive(Debug))]
    pub struct DigestRecord {
        pub count: u64,
        pub sum_low: u64,
        pub sum_high: u64,
    }

    #[derive(Debug, Archive, Serialize, Deserialize)]
    #[rkyv(derive(Debug))]
    pub struct Body {
        pub epoch: u64,
        pub seq: u64,
        pub engine_time_ns: u64,
        pub rank: u32,
        pub block_size: u32,
        pub shard: u16,
        pub shards: u16,
        pub key_version: u16,
        pub part: u8,
        pub health: u8,
        pub multimodal_offsets: u8,
        pub lookahead_tokens: u8,
        pub request: u64,
        pub piece: u32,
        pub pieces: u32,
        pub model: String,
        pub tenant: String,
        pub instance: String,
        pub owners: Vec<OwnerRecord>,
        pub digests: Vec<DigestRecord>,
        pub ops: Vec<OpRecord>,
        pub keys: Vec<u64>,
    }
}

const OP_STORED: u8 = 0;
const OP_REMOVED: u8 = 1;
const OP_CLEARED: u8 = 2;
const OP_BUCKET: u8 = 3;

const KIND_FULL: u8 = 0;
const KIND_SLIDING_WINDOW: u8 = 1;
const KIND_STATE: u8 = 2;
const KIND_UNKNOWN: u8 = 3;

// === impl FramePart ===

impl FramePart {
    fn from_index(index: u8) -> Option<Self> {
        [Self::Live, Self::Start, Self::Repair, Self::Unavailable].get(usize::from(index)).copied()
    }

    /// True for the parts that only answer a request.
    fn is_answer(self) -> bool {
        matches!(self, Self::Repair | Self::Unavailable)
    }
}

// === impl SourceHealth ===

impl SourceHealth {
    /// All values, exact first.
    pub const ALL: [Self; 5] =
        [Self::Exact, Self::JoinedLate, Self::EventsLost, Self::Undecodable, Self::OverLimit];

    /// Name for answers and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::JoinedLate => "joined_late",
            Self::EventsLost => "events_lost",
            Self::Undecodable => "undecodable",
            Self::OverLimit => "over_limit",
        }
    }
}

// === impl FrameOwner ===

impl FrameOwner {
    fn to_record(&self) -> OwnerRecord {
        let (kind, window_tokens, block_tokens) = match self.kind {
            GroupKind::Full => (KIND_FULL, 0, 0),
            GroupKind::SlidingWindow { window_tokens, block_tokens } => {
                (KIND_SLIDING_WINDOW, window_tokens, block_tokens)
            }
            GroupKind::State { block_tokens } => (KIND_STATE, 0, block_tokens),
            GroupKind::Unknown => (KIND_UNKNOWN, 0, 0),
        };
        OwnerRecord {
            tier: self.tier as u8,
            kind,
            group: self.group.0,
            window_tokens,
            block_tokens,
            load_blocks: self.load_blocks,
            medium: self.medium.clone(),
        }
    }

    fn from_archived(record: &wire::ArchivedOwnerRecord) -> Result<Self, ParseFrameError> {
        let unknown = |field, value: u32| ParseFrameError::Unknown { field, value };
        let (window_tokens, block_tokens) =
            (record.window_tokens.to_native(), record.block_tokens.to_native());
        let kind = match record.kind {
            KIND_FULL => GroupKind::Full,
            KIND_SLIDING_WINDOW if window_tokens > 0 && block_tokens > 0 => {
                GroupKind::SlidingWindow { window_tokens, block_tokens }
            }
            KIND_STATE if block_tokens > 0 => GroupKind::State { block_tokens },
            KIND_SLIDING_WINDOW | KIND_STATE => {
                return Err(ParseFrameError::Inconsistent("a window or state group without sizes"));
            }
            KIND_UNKNOWN => GroupKind::Unknown,
            other => return Err(unknown("group kind", other.into())),
        };
        if record.medium.len() > MAX_MEDIUM_BYTES {
            return Err(ParseFrameError::Inconsistent("a medium name is too long"));
        }
        if record.load_blocks == 0 {
            return Err(ParseFrameError::Inconsistent("a medium loads no blocks"));
        }
        Ok(Self {
            tier: Tier::from_index(record.tier).ok_or_else(|| unknown("tier", record.tier.into()))?,
            medium: record.medium.as_str().to_owned(),
            group: CacheGroup(record.group.to_native()),
            kind,
            load_blocks: record.load_blocks.to_native(),
        })
    }
}

// === impl OpBuffer ===

impl OpBuffer {
    /// Nothing to say.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Upper bound of the encoded operations, in bytes.
    pub fn encoded_bytes(&self) -> usize {
        self.ops.len() * size_of::<wire::ArchivedOpRecord>() + self.keys.len() * size_of::<u64>()
    }

    /// Forgets all operations and keeps the memory.
    pub fn clear(&mut self) {
        self.ops.clear();
        self.keys.clear();
    }

    /// Takes operations off the front, in order, of at most about `max_bytes` (at least one key). A long run is cut.
    #[must_use]
    pub fn take_chunk(&mut self, max_bytes: usize) -> Self {
        if self.encoded_bytes() <= max_bytes {
            return std::mem::take(self);
        }
        let (mut ops, mut keys, mut bytes) = (0, 0, 0);
        let mut rest = None;
        while ops < self.ops.len() {
            let op = &mut self.ops[ops];
            bytes += size_of::<wire::ArchivedOpRecord>();
            let room = (max_bytes.saturating_sub(bytes) / size_of::<u64>()).max(usize::from(keys == 0));
            if room < op.len as usize {
                if room > 0 {
                    // The second part of a cut run follows the last key of the first.
                    let parent = if op.kind == OP_STORED { self.keys[keys + room - 1] } else { 0 };
                    rest = Some(OpRecord { len: op.len - room as u32, parent, ..*op });
                    op.len = room as u32;
                    keys += room;
                    ops += 1;
                }
                break;
            }
            keys += op.len as usize;
            bytes += op.len as usize * size_of::<u64>();
            ops += 1;
        }
        let tail = Self {
            ops: rest.into_iter().chain(self.ops.drain(ops..)).collect(),
            keys: self.keys.split_off(keys),
        };
        std::mem::replace(self, tail)
    }

    /// `owner` now holds `key`, which follows `parent`. Extends the last operation where it is the same run.
    #[inline]
    pub fn stored(&mut self, owner: u8, parent: BlockKey, key: BlockKey) {
        match self.ops.last_mut() {
            Some(op) if op.kind == OP_STORED && op.owner == owner && self.keys.last() == Some(&parent.0) => {
                op.len += 1;
            }
            _ => self.ops.push(OpRecord { kind: OP_STORED, owner, len: 1, parent: parent.0 }),
        }
        self.keys.push(key.0);
    }

    /// `owner` no longer holds `key`.
    #[inline]
    pub fn removed(&mut self, owner: u8, key: BlockKey) {
        match self.ops.last_mut() {
            Some(op) if op.kind == OP_REMOVED && op.owner == owner => op.len += 1,
            _ => self.ops.push(OpRecord { kind: OP_REMOVED, owner, len: 1, parent: 0 }),
        }
        self.keys.push(key.0);
    }

    /// `owner` holds nothing any more.
    pub fn cleared(&mut self, owner: u8) {
        self.ops.push(OpRecord { kind: OP_CLEARED, owner, len: 0, parent: 0 });
    }

    /// Of one slice, `owner` holds exactly these blocks, each given as (parent, key). Only in repairs.
    pub fn bucket(&mut self, owner: u8, slice: u32, blocks: impl IntoIterator<Item = (BlockKey, BlockKey)>) {
        let before = self.keys.len();
        self.keys.extend(blocks.into_iter().flat_map(|(parent, key)| [parent.0, key.0]));
        let len = (self.keys.len() - before) as u32;
        self.ops.push(OpRecord { kind: OP_BUCKET, owner, len, parent: slice.into() });
    }
}

// === impl FrameHeader ===

impl FrameHeader {
    /// Encodes a frame with these operations; `ops` is left empty with its memory kept.
    pub fn encode(&self, ops: &mut OpBuffer) -> Result<Vec<u8>, EncodeFrameError> {
        if self.owners.len() > MAX_FRAME_OWNERS {
            return Err(EncodeFrameError::TooManyOwners(self.owners.len()));
        }
        let body = wire::Body {
            epoch: self.epoch.0,
            seq: self.seq.0,
            engine_time_ns: self.engine_time_ns,
            rank: self.source.rank.0,
            block_size: self.scope.block_size(),
            shard: self.shard.number(),
            shards: self.shard.of(),
            key_version: self.scope.key_version(),
            part: self.part as u8,
            health: self.health as u8,
            multimodal_offsets: u8::from(self.variant.multimodal_offsets),
            lookahead_tokens: self.variant.lookahead_tokens,
            request: self.reply.map_or(0, |reply| reply.request.0),
            piece: self.reply.map_or(0, |reply| reply.piece),
            pieces: self.reply.map_or(0, |reply| reply.pieces),
            model: self.scope.model().to_owned(),
            tenant: self.scope.tenant().to_owned(),
            instance: self.source.instance.as_str().to_owned(),
            owners: self.owners.iter().map(FrameOwner::to_record).collect(),
            digests: self.digests.iter().map(digest_record).collect(),
            ops: std::mem::take(&mut ops.ops),
            keys: std::mem::take(&mut ops.keys),
        };
        let out =
            SEAL.start(256 + body.ops.len() * size_of::<wire::ArchivedOpRecord>() + body.keys.len() * 8);
        let archived = rkyv::api::high::to_bytes_in::<_, rkyv::rancor::Error>(&body, out);
        (ops.ops, ops.keys) = (body.ops, body.keys);
        ops.clear();
        let mut out = archived.map_err(EncodeFrameError::Archive)?;
        if out.len() > MAX_FRAME_BYTES {
            return Err(EncodeFrameError::TooLarge(out.len()));
        }
        Seal::finish(&mut out);
        Ok(out)
    }
}

// === impl FrameView ===

impl<'a> FrameView<'a> {
    /// Checks everything about a received frame and gives access to it.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ParseFrameError> {
        if bytes.len() > MAX_FRAME_BYTES {
            return Err(ParseFrameError::Size(bytes.len()));
        }
        let body = SEAL.open(bytes)?;
        let archived = rkyv::access::<wire::ArchivedBody, rkyv::rancor::Error>(body)
            .map_err(ParseFrameError::Archive)?;
        let header = parse_header(archived)?;
        check_ops(archived, &header)?;
        Ok(Self { header, archived })
    }

    /// Everything but the operations.
    pub fn header(&self) -> &FrameHeader {
        &self.header
    }

    /// The operations in order.
    pub fn ops(&self) -> impl Iterator<Item = Op<'a>> + use<'a> {
        let keys = self.archived.keys.as_slice();
        let mut at = 0;
        self.archived.ops.as_slice().iter().map(move |op| {
            let run = Keys(&keys[at..at + op.len.to_native() as usize]);
            at += run.len();
            let change = match op.kind {
                OP_STORED => Change::Stored { parent: BlockKey(op.parent.to_native()), keys: run },
                OP_REMOVED => Change::Removed(run),
                OP_BUCKET => Change::Bucket { slice: op.parent.to_native() as u32, blocks: Blocks(run.0) },
                _ => Change::Cleared,
            };
            Op { owner: usize::from(op.owner), change }
        })
    }
}

fn parse_header(body: &wire::ArchivedBody) -> Result<FrameHeader, ParseFrameError> {
    let unknown = |field, value: u8| ParseFrameError::Unknown { field, value: value.into() };
    if body.owners.len() > MAX_FRAME_OWNERS {
        return Err(ParseFrameError::Inconsistent("too many owners"));
    }
    let part = FramePart::from_index(body.part).ok_or_else(|| unknown("part", body.part))?;
    let (piece, pieces) = (body.piece.to_native(), body.pieces.to_native());
    if part.is_answer() && piece >= pieces {
        return Err(ParseFrameError::Inconsistent("an answer's piece is not one of its pieces"));
    }
    if !body.digests.is_empty() && body.digests.len() != body.owners.len() {
        return Err(ParseFrameError::Inconsistent("digests and owners do not add up"));
    }
    if part == FramePart::Start && body.seq != 0 {
        return Err(ParseFrameError::Inconsistent("an epoch starts elsewhere than at sequence 0"));
    }
    Ok(FrameHeader {
        scope: Scope::new(
            body.model.as_str(),
            body.tenant.as_str(),
            body.block_size.to_native(),
            body.key_version.to_native(),
        )?,
        source: SourceId {
            instance: InstanceId::new(body.instance.as_str())?,
            rank: DpRank(body.rank.to_native()),
        },
        shard: ShardId::new(body.shard.to_native(), body.shards.to_native())
            .ok_or(ParseFrameError::Inconsistent("there is no such shard"))?,
        variant: KeyVariant {
            multimodal_offsets: body.multimodal_offsets != 0,
            lookahead_tokens: body.lookahead_tokens,
        },
        epoch: Epoch(body.epoch.to_native()),
        seq: FrameSeq(body.seq.to_native()),
        part,
        health: SourceHealth::ALL
            .get(usize::from(body.health))
            .copied()
            .ok_or_else(|| unknown("health", body.health))?,
        engine_time_ns: body.engine_time_ns.to_native(),
        owners: body.owners.iter().map(FrameOwner::from_archived).collect::<Result<_, _>>()?,
        digests: body.digests.iter().map(digest).collect(),
        reply: part.is_answer().then(|| ReplyPart {
            request: RequestId(body.request.to_native()),
            piece,
            pieces,
        }),
    })
}

fn digest_record(digest: &Digest) -> DigestRecord {
    DigestRecord { count: digest.count, sum_low: digest.sum as u64, sum_high: (digest.sum >> 64) as u64 }
}

fn digest(record: &wire::ArchivedDigestRecord) -> Digest {
    let (low, high) = (record.sum_low.to_native(), record.sum_high.to_native());
    Digest { count: record.count.to_native(), sum: (u128::from(high) << 64) | u128::from(low) }
}

/// After this check, [`FrameView::ops`] cannot go out of range.
fn check_ops(body: &wire::ArchivedBody, header: &FrameHeader) -> Result<(), ParseFrameError> {
    let owners = header.owners.len();
    if !body.ops.is_empty() && matches!(header.part, FramePart::Start | FramePart::Unavailable) {
        return Err(ParseFrameError::Inconsistent("a frame of this part has no operations"));
    }
    let mut keys = 0usize;
    for op in body.ops.iter() {
        let len = op.len.to_native() as usize;
        if usize::from(op.owner) >= owners {
            return Err(ParseFrameError::Inconsistent("an operation names no owner"));
        }
        match op.kind {
            OP_STORED | OP_REMOVED if len > 0 => keys += len,
            OP_CLEARED if len == 0 => {}
            OP_BUCKET
                if header.part == FramePart::Repair
                    && len.is_multiple_of(2)
                    && op.parent.to_native() < 1 << MAX_BUCKET_BITS =>
            {
                keys += len;
            }
            OP_STORED | OP_REMOVED | OP_CLEARED | OP_BUCKET => {
                return Err(ParseFrameError::Inconsistent(
                    "an operation is not one of this part, or has the wrong number of keys",
                ));
            }
            other => {
                return Err(ParseFrameError::Unknown { field: "operation", value: other.into() });
            }
        }
    }
    if keys != body.keys.len() {
        return Err(ParseFrameError::Inconsistent("keys and operations do not add up"));
    }
    Ok(())
}

// === impl Keys ===

impl<'a> Keys<'a> {
    /// Number of keys.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// A validated frame has no empty runs, but a slice may.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The keys in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = BlockKey> + use<'a> {
        self.0.iter().map(|key| BlockKey(key.to_native()))
    }
}

// === impl Blocks ===

impl<'a> Blocks<'a> {
    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.0.len() / 2
    }

    /// True for a slice that holds nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The blocks as (parent, key).
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (BlockKey, BlockKey)> + use<'a> {
        self.0.chunks_exact(2).map(|pair| (BlockKey(pair[0].to_native()), BlockKey(pair[1].to_native())))
    }
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
