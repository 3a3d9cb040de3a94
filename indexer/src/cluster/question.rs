//! What one index server asks another about a prompt.
//!
//! A prompt is cut into the segments of its chain ([`kvatlas_proto::shard`]); a question has those that lie in shards of the
//! server that is asked. It is sealed (magic `KVAS`); its body is an rkyv archive.

use kvatlas_proto::BlockKey;
use kvatlas_proto::keys::KeyVariant;
use kvatlas_proto::sealed::{OpenError, Seal};
use kvatlas_proto::shard::MAX_SHARDS;

/// Version of the layout.
const QUESTION_VERSION: u16 = 1;
/// Largest question or answer, in bytes: below NATS's default `max_payload` of 1 MiB. The longest prompt has a megabyte of
/// keys, divided among servers.
pub(crate) const MAX_MESSAGE_BYTES: usize = 1_000_000;
/// Most keys of a question, and most pieces.
const MAX_KEYS: usize = MAX_MESSAGE_BYTES / 8;
const SEAL: Seal = Seal { what: "a question to a shard server", magic: *b"KVAS", version: QUESTION_VERSION };

/// A question, with everything that is needed to answer it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardQuestion {
    /// Chosen by the asker, and the same when it asks again.
    pub(crate) number: u64,
    pub(crate) model: String,
    pub(crate) tenant: String,
    /// Instances to look for; empty: all.
    pub(crate) candidates: Vec<String>,
    pub(crate) chains: Vec<ChainQuestion>,
}

/// The part of a question about one chain of keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ChainQuestion {
    /// Tokens per block.
    pub(crate) block_size: u32,
    /// Only sources that shape their keys like this; `None`: all.
    pub(crate) variant: Option<KeyVariant>,
    /// The prompt has no multimodal items, so how a source shapes their keys makes no difference.
    pub(crate) text_only: bool,
    pub(crate) pieces: Vec<Piece>,
}

/// Consecutive blocks of a prompt that lie in one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Which one; `None`: whoever has the base knows.
    pub(crate) shard: Option<u16>,
    /// Position of the first key in the prompt.
    pub(crate) first: u32,
    /// The key before the first one, which stands for all blocks up to there.
    pub(crate) base: Option<BlockKey>,
    pub(crate) keys: Vec<BlockKey>,
}

/// Where the blocks of a question's pieces are in the prompt, and back. *Places* count through the pieces as if they were one
/// prompt: whoever holds a prefix holds one range of places, however many pieces it was cut into.
pub(crate) struct Places {
    /// Ascending, disjoint, none of them empty.
    spans: Vec<Span>,
}

/// Blocks that follow each other in the prompt and in the question.
struct Span {
    position: u32,
    place: u32,
    blocks: u32,
}

/// The question cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum EncodeQuestionError {
    /// The broker takes no message of this size.
    #[error(
        "a question of {0} bytes to a shard server is too large: ask about fewer candidates, or give a suffix"
    )]
    TooLarge(usize),
    /// The archive could not be written.
    #[error("a question to a shard server could not be archived: {0}")]
    Archive(rkyv::rancor::Error),
}

/// A received question is not usable. It is dropped, and whoever asked says what is missing.
#[derive(Debug, thiserror::Error)]
pub enum ParseQuestionError {
    /// Longer than allowed.
    #[error("question of {0} bytes (at most {MAX_MESSAGE_BYTES})")]
    Size(usize),
    /// Not a question of this version, or damaged.
    #[error(transparent)]
    Sealed(#[from] OpenError),
    /// The body is not a valid archive.
    #[error("archive is not valid: {0}")]
    Archive(rkyv::rancor::Error),
    /// Its parts do not fit together.
    #[error("question is inconsistent: {0}")]
    Inconsistent(&'static str),
}

#[allow(missing_docs, unreachable_pub)]
mod wire {
    use rkyv::{Archive, Deserialize, Serialize};

    #[derive(Debug, Archive, Serialize, Deserialize)]
    pub struct Chain {
        pub block_size: u32,
        pub pieces: u32,
        pub has_variant: bool,
        pub multimodal_offsets: bool,
        pub lookahead_tokens: u8,
        pub text_only: bool,
    }

    #[derive(Debug, Archive, Serialize, Deserialize)]
    pub struct Piece {
        pub base: u64,
        pub first: u32,
        pub keys: u32,
        pub shard: u16,
        pub has_base: bool,
    }

    #[derive(Debug, Archive, Serialize, Deserialize)]
    pub struct Body {
        pub number: u64,
        pub model: String,
        pub tenant: String,
        pub candidates: Vec<String>,
        pub chains: Vec<Chain>,
        pub pieces: Vec<Piece>,
        pub keys: Vec<u64>,
    }
}

const ANY_SHARD: u16 = u16::MAX;

// === impl Places ===

impl Places {
    pub(crate) fn of(chain: &ChainQuestion) -> Self {
        let mut spans: Vec<Span> = Vec::with_capacity(chain.pieces.len());
        for piece in &chain.pieces {
            // A base stands for all blocks up to it.
            let position = if piece.base.is_some() { 0 } else { piece.first };
            let blocks = piece.end() - position;
            if blocks == 0 {
                continue;
            }
            match spans.last_mut() {
                Some(last) if last.position + last.blocks == position => last.blocks += blocks,
                last => {
                    let place = last.map_or(0, |last| last.place + last.blocks);
                    spans.push(Span { position, place, blocks });
                }
            }
        }
        Self { spans }
    }

    /// Ascending ranges of positions as ranges of places. What no piece has falls away.
    pub(crate) fn of_positions(&self, ranges: &[(u32, u32)]) -> Vec<(u32, u32)> {
        translated(&self.spans, ranges, |span| span.position, |span| span.place)
    }

    /// Ascending ranges of places as ranges of positions.
    pub(crate) fn positions(&self, ranges: &[(u32, u32)]) -> Vec<(u32, u32)> {
        translated(&self.spans, ranges, |span| span.place, |span| span.position)
    }
}

fn translated(
    spans: &[Span],
    ranges: &[(u32, u32)],
    from: impl Fn(&Span) -> u32,
    to: impl Fn(&Span) -> u32,
) -> Vec<(u32, u32)> {
    let mut out: Vec<(u32, u32)> = Vec::new();
    for &(start, end) in ranges {
        let first = spans.partition_point(|span| from(span) + span.blocks <= start);
        for span in spans[first..].iter().take_while(|span| from(span) < end) {
            let (start, end) = (start.max(from(span)), end.min(from(span) + span.blocks));
            let (start, end) = (start - from(span) + to(span), end - from(span) + to(span));
            match out.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => out.push((start, end)),
            }
        }
    }
    out
}

// === impl Piece ===

impl Piece {
    /// The position after its last block.
    fn end(&self) -> u32 {
        self.first + self.keys.len() as u32
    }
}

// === impl ShardQuestion ===

impl ShardQuestion {
    /// Stretches of prompts that it asks about.
    pub fn pieces(&self) -> usize {
        self.chains.iter().map(|chain| chain.pieces.len()).sum()
    }

    /// The question as a message.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeQuestionError> {
        let chains = self.chains.iter().map(|chain| {
            let variant = chain.variant.unwrap_or_default();
            wire::Chain {
                block_size: chain.block_size,
                pieces: chain.pieces.len() as u32,
                has_variant: chain.variant.is_some(),
                multimodal_offsets: variant.multimodal_offsets,
                lookahead_tokens: variant.lookahead_tokens,
                text_only: chain.text_only,
            }
        });
        let pieces = || self.chains.iter().flat_map(|chain| &chain.pieces);
        let keys: usize = pieces().map(|piece| piece.keys.len()).sum();
        if keys > MAX_KEYS {
            return Err(EncodeQuestionError::TooLarge(keys * 8));
        }
        let body = wire::Body {
            number: self.number,
            model: self.model.clone(),
            tenant: self.tenant.clone(),
            candidates: self.candidates.clone(),
            chains: chains.collect(),
            pieces: pieces()
                .map(|piece| wire::Piece {
                    base: piece.base.map_or(0, |base| base.0),
                    first: piece.first,
                    keys: piece.keys.len() as u32,
                    shard: piece.shard.unwrap_or(ANY_SHARD),
                    has_base: piece.base.is_some(),
                })
                .collect(),
            keys: pieces().flat_map(|piece| &piece.keys).map(|key| key.0).collect(),
        };
        let mut out =
            rkyv::api::high::to_bytes_in::<_, rkyv::rancor::Error>(&body, SEAL.start(256 + keys * 8))
                .map_err(EncodeQuestionError::Archive)?;
        if out.len() > MAX_MESSAGE_BYTES {
            return Err(EncodeQuestionError::TooLarge(out.len()));
        }
        Seal::finish(&mut out);
        Ok(out)
    }

    /// Checks everything about a received question.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseQuestionError> {
        if bytes.len() > MAX_MESSAGE_BYTES {
            return Err(ParseQuestionError::Size(bytes.len()));
        }
        let body = rkyv::access::<wire::ArchivedBody, rkyv::rancor::Error>(SEAL.open(bytes)?)
            .map_err(ParseQuestionError::Archive)?;
        let mut pieces = body.pieces.iter();
        let mut keys = body.keys.as_slice();
        let mut chains = Vec::with_capacity(body.chains.len());
        for chain in body.chains.iter() {
            let mut own: Vec<Piece> = Vec::new();
            for _ in 0..chain.pieces.to_native() {
                let piece = pieces.next().ok_or(ParseQuestionError::Inconsistent("pieces are missing"))?;
                let (these, rest) = keys
                    .split_at_checked(piece.keys.to_native() as usize)
                    .ok_or(ParseQuestionError::Inconsistent("keys are missing"))?;
                keys = rest;
                let shard = piece.shard.to_native();
                let first = piece.first.to_native();
                if shard != ANY_SHARD && shard >= MAX_SHARDS {
                    return Err(ParseQuestionError::Inconsistent("there is no such shard"));
                }
                if first.checked_add(these.len() as u32).is_none() || (piece.has_base && first == 0) {
                    return Err(ParseQuestionError::Inconsistent("a piece is nowhere in a prompt"));
                }
                let is_in_order = match own.last() {
                    Some(before) => first >= before.end() && !piece.has_base,
                    None => true,
                };
                if !is_in_order {
                    return Err(ParseQuestionError::Inconsistent(
                        "pieces are not in the order of the prompt",
                    ));
                }
                own.push(Piece {
                    shard: (shard != ANY_SHARD).then_some(shard),
                    first,
                    base: piece.has_base.then(|| BlockKey(piece.base.to_native())),
                    keys: these.iter().map(|key| BlockKey(key.to_native())).collect(),
                });
            }
            chains.push(ChainQuestion {
                block_size: chain.block_size.to_native(),
                variant: chain.has_variant.then_some(KeyVariant {
                    multimodal_offsets: chain.multimodal_offsets,
                    lookahead_tokens: chain.lookahead_tokens,
                }),
                text_only: chain.text_only,
                pieces: own,
            });
        }
        Ok(Self {
            number: body.number.to_native(),
            model: body.model.as_str().to_owned(),
            tenant: body.tenant.as_str().to_owned(),
            candidates: body.candidates.iter().map(|name| name.as_str().to_owned()).collect(),
            chains,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn question(pieces: Vec<Piece>) -> ShardQuestion {
        let variant = Some(KeyVariant { multimodal_offsets: true, lookahead_tokens: 2 });
        ShardQuestion {
            number: 7,
            model: "m".into(),
            tenant: "t".into(),
            candidates: vec!["a:1".into()],
            chains: vec![
                ChainQuestion { block_size: 16, variant, text_only: true, pieces: pieces.clone() },
                ChainQuestion { block_size: 32, variant: None, text_only: false, pieces },
            ],
        }
    }

    proptest! {
        #[test]
        fn questions_round_trip(keys in proptest::collection::vec(any::<u64>(), 0..100), shard in 0u16..1_024) {
            let keys: Vec<_> = keys.into_iter().map(BlockKey).collect();
            let pieces = vec![
                Piece { shard: None, first: 9, base: Some(BlockKey(3)), keys: keys.clone() },
                Piece { shard: Some(shard), first: 120, base: None, keys },
            ];
            let question = question(pieces);
            prop_assert_eq!(ShardQuestion::parse(&question.encode().unwrap()).unwrap(), question);
        }

        /// `pieces`: blocks that others were asked about, and blocks of the piece after them.
        #[test]
        fn ranges_survive_the_way_over_places(
            pieces in proptest::collection::vec((0u32..4, 1usize..5), 0..12),
            base in proptest::option::of(1u32..20),
            held in proptest::collection::vec(any::<bool>(), 120),
        ) {
            let mut chain = ChainQuestion::default();
            let mut asked = vec![false; held.len()];
            let mut at = 0;
            if let Some(first) = base {
                chain.pieces.push(Piece { first, base: Some(BlockKey(1)), ..Piece::default() });
                asked[..first as usize].fill(true);
                at = first;
            }
            for (skipped, blocks) in pieces {
                let first = at + skipped;
                chain.pieces.push(Piece { first, keys: vec![BlockKey(1); blocks], ..Piece::default() });
                at = first + blocks as u32;
                asked[first as usize..at as usize].fill(true);
            }
            let ranges_of = |is_held: &dyn Fn(usize) -> bool| {
                let mut ranges: Vec<(u32, u32)> = Vec::new();
                for at in (0..held.len()).filter(|at| is_held(*at)) {
                    match ranges.last_mut() {
                        Some(last) if last.1 == at as u32 => last.1 += 1,
                        _ => ranges.push((at as u32, at as u32 + 1)),
                    }
                }
                ranges
            };
            let places = Places::of(&chain);
            let there = places.of_positions(&ranges_of(&|at| held[at]));
            prop_assert_eq!(places.positions(&there), ranges_of(&|at| held[at] && asked[at]));
            prop_assert!(places.of_positions(&ranges_of(&|_| true)).len() <= 1, "everything is one range");
        }

        #[test]
        fn hostile_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0usize..150) {
            prop_assert!(ShardQuestion::parse(&bytes).is_err());
            let good = question(vec![Piece::default()]).encode().unwrap();
            prop_assert!(ShardQuestion::parse(&good[..cut.min(good.len() - 1)]).is_err());
        }
    }

    #[test]
    fn a_question_that_no_broker_takes_is_refused_by_the_sender() {
        let keys = vec![BlockKey(1); MAX_KEYS + 1];
        let error = question(vec![Piece { keys, ..Piece::default() }]).encode().unwrap_err();
        assert!(error.to_string().contains("give a suffix"), "{error}");
    }
}
