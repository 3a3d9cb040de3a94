//! What a server found of a prompt in its shards.
//!
//! Who holds which stretches of the prompt, by source and owner, and how far each source can be trusted. Ages are relative, so
//! that no clocks have to agree. Sealed (magic `KVAT`); the body is an rkyv archive, in which stretches are places of the question
//! ([`Places`]): an answer can be read only by whoever knows what was asked, and a source that holds a prefix costs the same
//! however many segments it has.

use kvatlas_proto::frame::FrameOwner;
use kvatlas_proto::ids::{InvalidInstanceError, MAX_MEDIUM_BYTES};
use kvatlas_proto::sealed::{OpenError, Seal};
use kvatlas_proto::{CacheGroup, DpRank, GroupKind, InstanceId, SourceId, Tier};

use super::question::{MAX_MESSAGE_BYTES, Places, ShardQuestion};
use crate::sources::SourceState;

const ANSWER_VERSION: u16 = 2;
const SEAL: Seal = Seal { what: "an answer of a shard server", magic: *b"KVAT", version: ANSWER_VERSION };
/// An age that nobody knows.
const NO_AGE: u32 = u32::MAX;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardAnswer {
    /// Shards that were asked for and are not, or not yet, this server's.
    pub(crate) missing: Vec<u16>,
    /// Whether a piece with a base was found here.
    pub(crate) base_found: bool,
    /// Who holds something, in the order of chains; of one chain, each source once.
    pub(crate) held: Vec<HeldBySource>,
    /// Who may hold more than is said, and why: sources that are not (only) live or verified.
    pub(crate) doubtful: Vec<Doubt>,
}

/// A source and what it holds of one chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeldBySource {
    /// Position of the chain in the question.
    pub(crate) chain: u16,
    pub(crate) source: SourceId,
    pub(crate) state: SourceState,
    /// Milliseconds since digests were equal.
    pub(crate) verified_age_ms: Option<u32>,
    /// All owners of the source, those without a block of the prompt included.
    pub(crate) owners: Vec<HeldByOwner>,
}

/// An owner and the blocks of the prompt that it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeldByOwner {
    pub(crate) owner: FrameOwner,
    /// First position, and the one after the last; ascending, disjoint.
    pub(crate) ranges: Vec<(u32, u32)>,
}

/// A source that cannot be fully relied on in some shard that was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Doubt {
    pub(crate) source: SourceId,
    pub(crate) block_size: u32,
    pub(crate) state: SourceState,
}

/// The answer cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum EncodeAnswerError {
    /// The broker takes no message of this size.
    #[error("an answer of {0} bytes is too large: ask about fewer candidates")]
    TooLarge(usize),
    /// The archive could not be written.
    #[error("an answer could not be archived: {0}")]
    Archive(rkyv::rancor::Error),
}

/// A received answer is not usable. It is dropped, and what it was about is missing.
#[derive(Debug, thiserror::Error)]
pub enum ParseAnswerError {
    /// Longer than allowed.
    #[error("answer of {0} bytes (at most {MAX_MESSAGE_BYTES})")]
    Size(usize),
    /// Not an answer of this version, or damaged.
    #[error(transparent)]
    Sealed(#[from] OpenError),
    /// The body is not a valid archive.
    #[error("archive is not valid: {0}")]
    Archive(rkyv::rancor::Error),
    /// A name of an instance is not valid.
    #[error(transparent)]
    Instance(#[from] InvalidInstanceError),
    /// Its parts do not fit together.
    #[error("answer is inconsistent: {0}")]
    Inconsistent(&'static str),
}

#[allow(missing_docs, unreachable_pub)]
mod wire {
    use rkyv::{Archive, Deserialize, Serialize};

    #[derive(Debug, PartialEq, Archive, Serialize, Deserialize)]
    pub struct Kind {
        pub medium: String,
        pub window_tokens: u32,
        pub block_tokens: u32,
        pub load_blocks: u32,
        pub group: u16,
        pub tier: u8,
        pub needs: u8,
    }

    #[derive(Debug, Archive, Serialize, Deserialize)]
    pub struct Source {
        pub instance: String,
        pub rank: u32,
        pub age_ms: u32,
        pub chain: u16,
        pub owners: u16,
        pub state: u8,
    }

    #[derive(Debug, Archive, Serialize, Deserialize)]
    pub struct Owner {
        pub kind: u16,
        pub ranges: u32,
    }

    #[derive(Debug, Archive, Serialize, Deserialize)]
    pub struct Doubt {
        pub instance: String,
        pub rank: u32,
        pub block_size: u32,
        pub state: u8,
    }

    #[derive(Debug, Archive, Serialize, Deserialize)]
    pub struct Body {
        pub missing: Vec<u16>,
        pub base_found: bool,
        /// Each kind of owner once: a fleet has a handful.
        pub kinds: Vec<Kind>,
        pub sources: Vec<Source>,
        pub owners: Vec<Owner>,
        pub ranges: Vec<u32>,
        pub doubtful: Vec<Doubt>,
    }
}

// === impl ShardAnswer ===

impl ShardAnswer {
    /// The answer to `question` as a message.
    pub fn encode(&self, question: &ShardQuestion) -> Result<Vec<u8>, EncodeAnswerError> {
        let places: Vec<Places> = question.chains.iter().map(Places::of).collect();
        let mut body = wire::Body {
            missing: self.missing.clone(),
            base_found: self.base_found,
            kinds: Vec::new(),
            sources: Vec::with_capacity(self.held.len()),
            owners: Vec::new(),
            ranges: Vec::new(),
            doubtful: self.doubtful.iter().map(Doubt::to_wire).collect(),
        };
        let mut known: Vec<&FrameOwner> = Vec::new();
        for held in &self.held {
            body.sources.push(wire::Source {
                instance: held.source.instance.as_str().to_owned(),
                rank: held.source.rank.0,
                age_ms: held.verified_age_ms.unwrap_or(NO_AGE),
                chain: held.chain,
                owners: held.owners.len() as u16,
                state: state_number(held.state),
            });
            for owner in &held.owners {
                let kind = known.iter().position(|kind| **kind == owner.owner).unwrap_or_else(|| {
                    known.push(&owner.owner);
                    body.kinds.push(kind_of(&owner.owner));
                    known.len() - 1
                });
                let places = places.get(usize::from(held.chain));
                let ranges = places.map_or_else(Vec::new, |places| places.of_positions(&owner.ranges));
                body.owners.push(wire::Owner { kind: kind as u16, ranges: ranges.len() as u32 });
                body.ranges.extend(ranges.iter().flat_map(|(start, end)| [*start, *end]));
            }
        }
        let room = 256 + body.sources.len() * 48 + body.owners.len() * 8 + body.ranges.len() * 4;
        let mut out = rkyv::api::high::to_bytes_in::<_, rkyv::rancor::Error>(&body, SEAL.start(room))
            .map_err(EncodeAnswerError::Archive)?;
        if out.len() > MAX_MESSAGE_BYTES {
            return Err(EncodeAnswerError::TooLarge(out.len()));
        }
        Seal::finish(&mut out);
        Ok(out)
    }

    /// Checks everything about a received answer to `question`.
    pub fn parse(bytes: &[u8], question: &ShardQuestion) -> Result<Self, ParseAnswerError> {
        if bytes.len() > MAX_MESSAGE_BYTES {
            return Err(ParseAnswerError::Size(bytes.len()));
        }
        let body = rkyv::access::<wire::ArchivedBody, rkyv::rancor::Error>(SEAL.open(bytes)?)
            .map_err(ParseAnswerError::Archive)?;
        let places: Vec<Places> = question.chains.iter().map(Places::of).collect();
        let kinds: Vec<FrameOwner> = body.kinds.iter().map(owner_of).collect::<Result<_, _>>()?;
        let mut owners = body.owners.iter();
        let mut ranges = body.ranges.as_slice().chunks_exact(2);
        let mut held = Vec::with_capacity(body.sources.len());
        for source in body.sources.iter() {
            let places = places.get(usize::from(source.chain.to_native()));
            let places = places.ok_or(ParseAnswerError::Inconsistent("a chain was not asked about"))?;
            let mut own = Vec::with_capacity(usize::from(source.owners.to_native()));
            for _ in 0..source.owners.to_native() {
                let owner = owners.next().ok_or(ParseAnswerError::Inconsistent("owners are missing"))?;
                let kind = kinds.get(usize::from(owner.kind.to_native()));
                let kind = kind.ok_or(ParseAnswerError::Inconsistent("an owner is of no kind"))?;
                let mut stretches = Vec::new();
                let mut least = 0;
                for _ in 0..owner.ranges.to_native() {
                    let range = ranges.next().ok_or(ParseAnswerError::Inconsistent("ranges are missing"))?;
                    let (start, end) = (range[0].to_native(), range[1].to_native());
                    if start < least || start >= end {
                        return Err(ParseAnswerError::Inconsistent("ranges are not in order"));
                    }
                    least = end;
                    stretches.push((start, end));
                }
                own.push(HeldByOwner { owner: kind.clone(), ranges: places.positions(&stretches) });
            }
            let age = source.age_ms.to_native();
            held.push(HeldBySource {
                chain: source.chain.to_native(),
                source: source_of(source.instance.as_str(), source.rank.to_native())?,
                state: state_of(source.state)?,
                verified_age_ms: (age != NO_AGE).then_some(age),
                owners: own,
            });
        }
        Ok(Self {
            missing: body.missing.iter().map(|shard| shard.to_native()).collect(),
            base_found: body.base_found,
            held,
            doubtful: body.doubtful.iter().map(Doubt::from_wire).collect::<Result<_, _>>()?,
        })
    }
}

// === impl Doubt ===

impl Doubt {
    fn to_wire(&self) -> wire::Doubt {
        wire::Doubt {
            instance: self.source.instance.as_str().to_owned(),
            rank: self.source.rank.0,
            block_size: self.block_size,
            state: state_number(self.state),
        }
    }

    fn from_wire(doubt: &wire::ArchivedDoubt) -> Result<Self, ParseAnswerError> {
        Ok(Self {
            source: source_of(doubt.instance.as_str(), doubt.rank.to_native())?,
            block_size: doubt.block_size.to_native(),
            state: state_of(doubt.state)?,
        })
    }
}

fn source_of(instance: &str, rank: u32) -> Result<SourceId, ParseAnswerError> {
    Ok(SourceId { instance: InstanceId::new(instance)?, rank: DpRank(rank) })
}

fn state_number(state: SourceState) -> u8 {
    SourceState::ALL.iter().position(|known| *known == state).unwrap_or_default() as u8
}

fn state_of(number: u8) -> Result<SourceState, ParseAnswerError> {
    let state = SourceState::ALL.get(usize::from(number)).copied();
    state.ok_or(ParseAnswerError::Inconsistent("a source is in no known state"))
}

fn kind_of(owner: &FrameOwner) -> wire::Kind {
    let (kind, window_tokens, block_tokens) = match owner.kind {
        GroupKind::Full => (0, 0, 0),
        GroupKind::SlidingWindow { window_tokens, block_tokens } => (1, window_tokens, block_tokens),
        GroupKind::State { block_tokens } => (2, 0, block_tokens),
        GroupKind::Unknown => (3, 0, 0),
    };
    wire::Kind {
        medium: owner.medium.clone(),
        window_tokens,
        block_tokens,
        load_blocks: owner.load_blocks,
        group: owner.group.0,
        tier: owner.tier as u8,
        needs: kind,
    }
}

fn owner_of(record: &wire::ArchivedKind) -> Result<FrameOwner, ParseAnswerError> {
    let (window_tokens, block_tokens) = (record.window_tokens.to_native(), record.block_tokens.to_native());
    let kind = match record.needs {
        0 => GroupKind::Full,
        1 if window_tokens > 0 && block_tokens > 0 => {
            GroupKind::SlidingWindow { window_tokens, block_tokens }
        }
        2 if block_tokens > 0 => GroupKind::State { block_tokens },
        3 => GroupKind::Unknown,
        _ => return Err(ParseAnswerError::Inconsistent("a group is of no known kind")),
    };
    if record.medium.len() > MAX_MEDIUM_BYTES {
        return Err(ParseAnswerError::Inconsistent("a medium name is too long"));
    }
    Ok(FrameOwner {
        tier: Tier::from_index(record.tier).ok_or(ParseAnswerError::Inconsistent("a tier is not known"))?,
        medium: record.medium.as_str().to_owned(),
        group: CacheGroup(record.group.to_native()),
        kind,
        load_blocks: record.load_blocks.to_native(),
    })
}

#[cfg(test)]
mod tests {
    use kvatlas_proto::BlockKey;
    use proptest::prelude::*;

    use super::super::question::{ChainQuestion, Piece};
    use super::*;

    fn held(chain: u16, name: &str, ranges: Vec<(u32, u32)>) -> HeldBySource {
        let owner =
            |tier, kind| FrameOwner { tier, medium: "M".into(), group: CacheGroup(1), kind, load_blocks: 2 };
        let window = GroupKind::SlidingWindow { window_tokens: 64, block_tokens: 16 };
        HeldBySource {
            chain,
            source: source_of(name, 3).unwrap(),
            state: SourceState::Verified,
            verified_age_ms: (chain > 0).then_some(70),
            owners: vec![
                HeldByOwner { owner: owner(Tier::Gpu, GroupKind::Full), ranges },
                HeldByOwner { owner: owner(Tier::Cpu, window), ranges: Vec::new() },
            ],
        }
    }

    /// A question about two chains: one whole, one of which others know the blocks from 40 to 60.
    fn question() -> ShardQuestion {
        let piece = |first, blocks| Piece { first, keys: vec![BlockKey(1); blocks], ..Piece::default() };
        let chain = |pieces| ChainQuestion { block_size: 16, pieces, ..ChainQuestion::default() };
        let chains = vec![chain(vec![piece(0, 100)]), chain(vec![piece(0, 40), piece(60, 40)])];
        ShardQuestion { chains, ..ShardQuestion::default() }
    }

    proptest! {
        #[test]
        fn answers_round_trip(steps in proptest::collection::vec(1u32..9, 0..20), missing in any::<Vec<u16>>()) {
            let mut ends = steps.iter().scan(0, |at, step| { *at += step; Some(*at) }).filter(|end| *end < 40);
            let mut ranges = Vec::new();
            while let (Some(start), Some(end)) = (ends.next(), ends.next()) {
                ranges.push((start, end));
            }
            let mut beyond = ranges.clone();
            beyond.push((60, 70));
            let doubt = |state| Doubt { source: source_of("d:1", 0).unwrap(), block_size: 16, state };
            let answer = ShardAnswer {
                missing,
                base_found: ranges.len() % 2 == 0,
                held: vec![held(0, "a:1", ranges), held(1, "b:1", Vec::new()), held(1, "a:1", beyond)],
                doubtful: SourceState::ALL.into_iter().map(doubt).collect(),
            };
            prop_assert_eq!(ShardAnswer::parse(&answer.encode(&question()).unwrap(), &question()).unwrap(), answer);
        }

        #[test]
        fn hostile_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0usize..150) {
            prop_assert!(ShardAnswer::parse(&bytes, &question()).is_err());
            let good = ShardAnswer { held: vec![held(0, "a:1", vec![(0, 3)])], ..ShardAnswer::default() };
            let good = good.encode(&question()).unwrap();
            prop_assert!(ShardAnswer::parse(&good[..cut.min(good.len() - 1)], &question()).is_err());
        }
    }

    #[test]
    fn a_prefix_costs_the_same_however_many_segments_it_is_cut_into() {
        let bytes = |piece_blocks: u32| {
            let first = (0..2_048).step_by(2 * piece_blocks as usize);
            let keys = vec![BlockKey(1); piece_blocks as usize];
            let piece = |first| Piece { first, keys: keys.clone(), ..Piece::default() };
            let pieces: Vec<Piece> = first.map(piece).collect();
            let ranges = pieces.iter().map(|piece| (piece.first, piece.first + piece_blocks)).collect();
            let chain = ChainQuestion { block_size: 16, pieces, ..ChainQuestion::default() };
            let question = ShardQuestion { chains: vec![chain], ..ShardQuestion::default() };
            let answer = ShardAnswer { held: vec![held(0, "a:1", ranges)], ..ShardAnswer::default() };
            answer.encode(&question).unwrap().len()
        };
        assert_eq!(bytes(16), bytes(64));
    }

    #[test]
    fn an_answer_about_what_was_not_asked_is_refused() {
        let answer = ShardAnswer { held: vec![held(1, "a:1", vec![(0, 3)])], ..ShardAnswer::default() };
        let bytes = answer.encode(&question()).unwrap();
        let error = ShardAnswer::parse(&bytes, &ShardQuestion::default()).unwrap_err();
        assert!(error.to_string().contains("not asked"), "{error}");
    }
}
