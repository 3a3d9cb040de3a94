//! What a source needs to go on after its shim's own restart, as bytes: sealed ([`kvatlas_proto::sealed`], magic `KVAS`), an
//! rkyv archive.
//!
//! Nothing in it is believed for being in the file. The engine may have gone on, or may have been restarted, while the shim
//! was down. So what is read counts only after the engine's replay has shown the very messages whose fingerprints are in
//! the file ([`crate::source::Source::restore`]); until then the source publishes nothing. What was written for another engine,
//! model, key seed or setting that changes keys is refused by name.
//!
//! Scope, owners, digests, epoch and health are kept as the heartbeats that would say them, one per virtual shard: one layout,
//! one place that checks it. Keys, holders and digests are worked out anew and compared with those heartbeats.

use kvatlas_proto::KeyHasher;
use kvatlas_proto::frame::{EncodeFrameError, ParseFrameError};
use kvatlas_proto::keys::KEY_VERSION;
use kvatlas_proto::sealed::{OpenError, Seal};

use crate::mirror::RemovalPolicy;
use crate::source::SourceConfig;

/// Version of the layout. A file of another version is refused; the source then starts cold.
pub const STATE_VERSION: u16 = 2;
const SEAL: Seal = Seal { what: "a shim's state", magic: *b"KVAS", version: STATE_VERSION };
/// Bytes of the preamble that mean nothing yet, and that its checksum does not cover.
const RESERVED: std::ops::Range<usize> = 6..8;

/// The state could not be written.
#[derive(Debug, thiserror::Error)]
pub enum SaveStateError {
    /// A heartbeat in it could not be encoded.
    #[error(transparent)]
    Frame(#[from] EncodeFrameError),
    /// The archive could not be written.
    #[error("the state could not be archived: {0}")]
    Archive(rkyv::rancor::Error),
}

/// A saved state is not used; the source starts cold.
#[derive(Debug, thiserror::Error)]
pub enum RestoreStateError {
    /// Not a state of this version, or damaged.
    #[error(transparent)]
    Sealed(#[from] OpenError),
    /// Two bytes that have to be 0 are not.
    #[error("the preamble of the state is damaged")]
    Preamble,
    /// The body is not a valid archive.
    #[error("the state's archive is not valid: {0}")]
    Archive(rkyv::rancor::Error),
    /// A heartbeat in it is not valid.
    #[error("a heartbeat of the state is not valid: {0}")]
    Frame(#[from] ParseFrameError),
    /// It is of something else.
    #[error("the state was written for another {what}")]
    Foreign {
        /// What differs.
        what: &'static str,
    },
    /// It contradicts itself.
    #[error("the state is inconsistent: {0}")]
    Inconsistent(&'static str),
    /// It holds more than this source is allowed to.
    #[error("the state holds more {what} than the bound of {max}")]
    OverLimit {
        /// Of what.
        what: &'static str,
        /// The bound.
        max: usize,
    },
}

/// The archived layout.
#[allow(missing_docs, unreachable_pub)]
pub(crate) mod wire {
    use rkyv::{Archive, Deserialize, Serialize};

    #[derive(Archive, Serialize, Deserialize)]
    pub struct State {
        pub identity: Identity,
        /// Adapter's name; empty while not recognised.
        pub adapter: String,
        /// The heartbeats at the moment of writing, as frames, by shard.
        pub heartbeats: Vec<Vec<u8>>,
        /// Sequence of the last engine message applied.
        pub last: Option<u64>,
        /// Fingerprints of the messages applied last, newest first.
        pub history: Vec<Applied>,
        pub mirror: Mirror,
        pub repager: Option<Repager>,
    }

    #[derive(Archive, Serialize, Deserialize)]
    pub struct Identity {
        pub model: String,
        pub tenant: String,
        pub instance: String,
        pub endpoint: String,
        pub key_version: u16,
        pub seed: u64,
        pub per_copy: bool,
        pub block_size: Option<u32>,
        pub store_only_ttl_ns: u64,
        /// How many virtual shards the key space is cut into.
        pub shards: u16,
    }

    #[derive(Archive, Serialize, Deserialize)]
    pub struct Applied {
        pub seq: u64,
        pub fingerprint: u64,
    }

    #[derive(Archive, Serialize, Deserialize)]
    pub struct Mirror {
        pub now_ns: u64,
        /// By the numbers of the heartbeat's owners.
        pub places: Vec<Place>,
        pub hashes: Vec<Hash>,
        /// Those of all hashes, in their order.
        pub copies: Vec<Copies>,
        pub waiting: Vec<Waiting>,
        /// Hashes that are held nowhere, oldest first.
        pub ghosts: Vec<u128>,
    }

    #[derive(Archive, Serialize, Deserialize)]
    pub struct Place {
        pub remote: bool,
        pub chunk: u32,
        /// It says what it drops.
        pub announced: bool,
        pub deadlines: Vec<Deadline>,
    }

    #[derive(Archive, Serialize, Deserialize)]
    pub struct Deadline {
        pub hash: u128,
        pub at_ns: u64,
    }

    #[derive(Archive, Serialize, Deserialize)]
    pub struct Hash {
        pub name: u128,
        /// Key, parent and place are known.
        pub linked: bool,
        pub key: u64,
        pub parent: u64,
        pub shard: u16,
        /// Blocks of its segment that come before it.
        pub step: u8,
        /// Number of its entries in `copies`.
        pub places: u16,
    }

    #[derive(Archive, Serialize, Deserialize)]
    pub struct Copies {
        pub place: u8,
        pub copies: u32,
    }

    #[derive(Archive, Serialize, Deserialize)]
    pub struct Waiting {
        pub hash: u128,
        pub parent: u128,
        pub local: u64,
    }

    #[derive(Archive, Serialize, Deserialize)]
    pub struct Repager {
        pub media: Vec<Medium>,
        pub pages: Vec<Page>,
        /// Pages that are held nowhere, oldest first.
        pub ghosts: Vec<u128>,
    }

    #[derive(Archive, Serialize, Deserialize)]
    pub struct Medium {
        pub name: Vec<u8>,
        pub remote: bool,
        pub group: Option<u16>,
        /// 0 same, 1 larger, 2 smaller, 3 unfit.
        pub ratio: u8,
        pub parts: u32,
    }

    #[derive(Archive, Serialize, Deserialize)]
    pub struct Page {
        pub hash: u128,
        pub position: u32,
        pub parent: Option<u128>,
        pub tokens: Vec<u32>,
        pub extras: Option<Vec<Extra>>,
        pub lora_name: Vec<u8>,
        pub lora_id: Option<i64>,
        pub cache_salt: Vec<u8>,
        pub copies: Vec<Copies>,
        pub blocks: Vec<u128>,
        pub members: Vec<u128>,
    }

    #[derive(Archive, Serialize, Deserialize)]
    pub struct Extra {
        /// 0 text, 1 multimodal, 2 bytes.
        pub kind: u8,
        pub value: Vec<u8>,
        pub offset: i64,
    }
}

/// The state as sealed bytes.
pub(crate) fn seal(state: &wire::State) -> Result<Vec<u8>, SaveStateError> {
    let out = SEAL.start(256 + state.mirror.hashes.len() * size_of::<wire::ArchivedHash>());
    let mut out = rkyv::api::high::to_bytes_in::<_, rkyv::rancor::Error>(state, out)
        .map_err(SaveStateError::Archive)?;
    Seal::finish(&mut out);
    Ok(out)
}

/// Checks seal and structure, and that it was written for the same source with the same settings.
pub(crate) fn open<'a>(
    bytes: &'a [u8],
    config: &SourceConfig,
) -> Result<&'a wire::ArchivedState, RestoreStateError> {
    let body = SEAL.open(bytes)?;
    if bytes[RESERVED] != [0, 0] {
        return Err(RestoreStateError::Preamble);
    }
    let state =
        rkyv::access::<wire::ArchivedState, rkyv::rancor::Error>(body).map_err(RestoreStateError::Archive)?;
    match differs(&state.identity, &identity(config)) {
        Some(what) => Err(RestoreStateError::Foreign { what }),
        None => Ok(state),
    }
}

/// What has to be the same for a state to mean anything.
pub(crate) fn identity(config: &SourceConfig) -> wire::Identity {
    wire::Identity {
        model: config.model.clone(),
        tenant: config.tenant.clone(),
        instance: config.instance.as_str().to_owned(),
        endpoint: config.endpoint.clone(),
        key_version: KEY_VERSION,
        seed: seed_fingerprint(&config.hasher),
        per_copy: config.removal == RemovalPolicy::PerCopy,
        block_size: config.block_size,
        store_only_ttl_ns: config.limits.store_only_ttl_ns,
        shards: config.partition.shards(),
    }
}

fn differs(saved: &wire::ArchivedIdentity, now: &wire::Identity) -> Option<&'static str> {
    let block_size = saved.block_size.as_ref().map(|size| size.to_native());
    [
        ("model", saved.model == now.model),
        ("tenant", saved.tenant == now.tenant),
        ("instance", saved.instance == now.instance),
        ("endpoint", saved.endpoint == now.endpoint),
        ("key version", saved.key_version == now.key_version),
        ("key seed", saved.seed == now.seed),
        ("removal policy", saved.per_copy == now.per_copy),
        ("block size", block_size == now.block_size),
        ("number of shards", saved.shards == now.shards),
        ("lifetime on media that announce no removals", saved.store_only_ttl_ns == now.store_only_ttl_ns),
    ]
    .into_iter()
    .find(|(_, same)| !same)
    .map(|(what, _)| what)
}

/// The key of a fixed block: tells seeds apart and gives away no more than any block's key does.
fn seed_fingerprint(hasher: &KeyHasher) -> u64 {
    hasher.extend(hasher.root(), hasher.local(&[0x6b76_6173], &[])).0
}

// === impl RestoreStateError ===

impl RestoreStateError {
    /// All values of [`Self::reason`], and `unreadable` for a file that could not be read.
    pub const REASONS: [&'static str; 6] =
        ["damaged", "version", "foreign", "inconsistent", "over_limit", "unreadable"];

    /// Short name for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Sealed(OpenError::Version { .. })
            | Self::Frame(ParseFrameError::Sealed(OpenError::Version { .. })) => "version",
            Self::Sealed(OpenError::Magic(_)) | Self::Foreign { .. } => "foreign",
            Self::Sealed(_) | Self::Preamble | Self::Archive(_) => "damaged",
            Self::Frame(_) | Self::Inconsistent(_) => "inconsistent",
            Self::OverLimit { .. } => "over_limit",
        }
    }
}
