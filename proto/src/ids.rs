//! Names of the things that hold blocks.
//!
//! Identity includes the incarnation: a restarted publisher is a new [`Epoch`], never the old one again.

use std::fmt;

/// Longest instance name, in bytes. Names travel in every frame and in NATS subjects.
pub const MAX_INSTANCE_BYTES: usize = 128;
/// Longest medium name that an unknown tier keeps, in bytes.
pub const MAX_MEDIUM_BYTES: usize = 64;

/// What a gateway can route to: `ip:port`, a host name with port, or `pool:NAME` / `node:NAME` for a shared store.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId(String);

/// An instance name was empty, too long, or held a control character or white space.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "instance name {name:?} is not usable: give 1 to {MAX_INSTANCE_BYTES} printable characters without spaces, \
     for example 10.0.0.7:8000"
)]
pub struct InvalidInstanceError {
    name: String,
}

/// Data-parallel rank of an engine process, 0 where the engine has no data parallelism.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DpRank(pub u32);

/// One lifetime of a source's publisher.
///
/// Larger is newer. A publisher takes its start time in nanoseconds since the Unix epoch, or one more than its
/// last epoch if that is larger, so that two lives never share a number even when a clock is set back within a
/// process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch(pub u64);

/// Position of a frame in its source's epoch: contiguous from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrameSeq(pub u64);

/// Who publishes: one data-parallel rank of one instance. Its owners (tiers and cache groups) share one sequence.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceId {
    /// What a gateway routes to.
    pub instance: InstanceId,
    /// The data-parallel rank inside that instance.
    pub rank: DpRank,
}

/// Where a block lies. The order is from fastest to slowest; an unknown medium is last and scores 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Tier {
    /// Device memory of the engine.
    Gpu = 0,
    /// Host memory of the engine's node.
    Cpu = 1,
    /// Local disk or a file system.
    Ssd = 2,
    /// A remote or shared store.
    Remote = 3,
    /// A medium this version does not know. Its name is kept beside it; it is never taken for another tier.
    Unknown = 4,
}

/// KV-cache group index inside an engine (hybrid models have several), 0 where there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CacheGroup(pub u16);

/// What a cache group needs to serve a prefix of length L.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupKind {
    /// Every block up to L (full attention, MLA, sink attention).
    Full,
    /// The last `ceil((window_tokens - 1) / block_tokens)` blocks before L.
    SlidingWindow {
        /// Attention window, tokens.
        window_tokens: u32,
        /// Tokens per block of this group; may differ from the scope's block size.
        block_tokens: u32,
    },
    /// One entry exactly at L (Mamba and other linear state).
    State {
        /// Tokens per block of this group.
        block_tokens: u32,
    },
    /// The engine did not say. Such a group fails closed: it never counts as held.
    Unknown,
}

/// One owner as answers and dumps name it: a source's tier and cache group.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct OwnerRef {
    /// Instance and rank.
    pub source: SourceId,
    /// Where the blocks lie.
    pub tier: Tier,
    /// The engine's own name of the medium, kept for [`Tier::Unknown`].
    pub medium: String,
    /// Cache group.
    pub group: CacheGroup,
}

// === impl InstanceId ===

impl InstanceId {
    /// Accepts 1 to [`MAX_INSTANCE_BYTES`] bytes without white space or control characters.
    pub fn new(name: impl Into<String>) -> Result<Self, InvalidInstanceError> {
        let name = name.into();
        let printable = !name.chars().any(|c| c.is_whitespace() || c.is_control());
        if name.is_empty() || name.len() > MAX_INSTANCE_BYTES || !printable {
            return Err(InvalidInstanceError { name });
        }
        Ok(Self(name))
    }

    /// The name as given.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for DpRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for SourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.instance, self.rank)
    }
}

// === impl FrameSeq ===

impl FrameSeq {
    /// The sequence that follows.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

// === impl Tier ===

impl Tier {
    /// All tiers, fastest first.
    pub const ALL: [Self; 5] = [Self::Gpu, Self::Cpu, Self::Ssd, Self::Remote, Self::Unknown];

    /// The tier with this number, as used in frames.
    pub fn from_index(index: u8) -> Option<Self> {
        Self::ALL.get(usize::from(index)).copied()
    }

    /// Lower-case name, as used in answers, labels and configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::Cpu => "cpu",
            Self::Ssd => "ssd",
            Self::Remote => "remote",
            Self::Unknown => "unknown",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instance_names_without_spaces_are_accepted_and_others_explained() {
        assert!(InstanceId::new("10.0.0.7:8000").is_ok());
        assert!(InstanceId::new("pool:lmcache").is_ok());
        for bad in ["", "a b", "a\n", &"x".repeat(MAX_INSTANCE_BYTES + 1)] {
            let error = InstanceId::new(bad).unwrap_err().to_string();
            assert!(error.contains("for example"), "{error}");
        }
    }

    #[test]
    fn tier_numbers_round_trip() {
        for tier in Tier::ALL {
            assert_eq!(Tier::from_index(tier as u8), Some(tier));
        }
        assert_eq!(Tier::from_index(9), None);
    }
}
