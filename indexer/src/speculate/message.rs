//! What a server tells all others: blocks that a request will bring to an instance. Sealed (magic `KVAE`); the body is an rkyv
//! archive.

use kvatlas_proto::ids::InvalidInstanceError;
use kvatlas_proto::sealed::{OpenError, Seal};
use kvatlas_proto::{BlockKey, DpRank, InstanceId, SourceId};

use super::table::{MAX_BLOCKS, MAX_CHAINS, MAX_TTL_MS};

const VERSION: u16 = 1;
const SEAL: Seal = Seal { what: "what a server expects", magic: *b"KVAE", version: VERSION };
/// Largest message, bytes: below NATS's default `max_payload` of 1 MiB.
const MAX_BYTES: usize = 1_000_000;

/// Blocks that a request will bring to an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expected {
    /// Name of the request; a second message with the same one replaces the first.
    pub(crate) request: String,
    pub(crate) model: String,
    pub(crate) tenant: String,
    pub(crate) source: SourceId,
    /// Tokens per block.
    pub(crate) block_size: u32,
    /// How long, milliseconds, from when a server hears of it.
    pub(crate) ttl_ms: u32,
    /// One per shape of keys that is in use; nearly always one.
    pub(crate) chains: Vec<ExpectedChain>,
}

/// Keys of consecutive blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExpectedChain {
    /// Position of the first key in the prompt.
    pub(crate) first: u32,
    pub(crate) keys: Vec<BlockKey>,
}

/// It cannot be sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EncodeError {
    #[error("what is expected has {0} bytes, and a broker takes {MAX_BYTES}: give a suffix")]
    TooLarge(usize),
    #[error("what is expected could not be archived: {0}")]
    Archive(rkyv::rancor::Error),
}

/// A received message is not usable. It is dropped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ParseError {
    #[error("{0} bytes (at most {MAX_BYTES})")]
    Size(usize),
    #[error(transparent)]
    Sealed(#[from] OpenError),
    #[error("archive is not valid: {0}")]
    Archive(rkyv::rancor::Error),
    #[error(transparent)]
    Instance(#[from] InvalidInstanceError),
    #[error("inconsistent: {0}")]
    Inconsistent(&'static str),
}

#[allow(missing_docs, unreachable_pub)]
mod wire {
    use rkyv::{Archive, Deserialize, Serialize};

    #[derive(Debug, Archive, Serialize, Deserialize)]
    pub struct Chain {
        pub keys: Vec<u64>,
        pub first: u32,
    }

    #[derive(Debug, Archive, Serialize, Deserialize)]
    pub struct Body {
        pub request: String,
        pub model: String,
        pub tenant: String,
        pub instance: String,
        pub rank: u32,
        pub block_size: u32,
        pub ttl_ms: u32,
        pub chains: Vec<Chain>,
    }
}

// === impl Expected ===

impl Expected {
    /// As a message.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        let chain = |chain: &ExpectedChain| wire::Chain {
            keys: chain.keys.iter().map(|key| key.0).collect(),
            first: chain.first,
        };
        let body = wire::Body {
            request: self.request.clone(),
            model: self.model.clone(),
            tenant: self.tenant.clone(),
            instance: self.source.instance.as_str().to_owned(),
            rank: self.source.rank.0,
            block_size: self.block_size,
            ttl_ms: self.ttl_ms,
            chains: self.chains.iter().map(chain).collect(),
        };
        let mut out = rkyv::api::high::to_bytes_in::<_, rkyv::rancor::Error>(&body, SEAL.start(256))
            .map_err(EncodeError::Archive)?;
        if out.len() > MAX_BYTES {
            return Err(EncodeError::TooLarge(out.len()));
        }
        Seal::finish(&mut out);
        Ok(out)
    }

    /// Checks everything about a received message.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ParseError> {
        if bytes.len() > MAX_BYTES {
            return Err(ParseError::Size(bytes.len()));
        }
        let body = rkyv::access::<wire::ArchivedBody, rkyv::rancor::Error>(SEAL.open(bytes)?)
            .map_err(ParseError::Archive)?;
        let chains: Vec<ExpectedChain> = body
            .chains
            .iter()
            .map(|chain| ExpectedChain {
                first: chain.first.to_native(),
                keys: chain.keys.iter().map(|key| BlockKey(key.to_native())).collect(),
            })
            .collect();
        let blocks = |chain: &ExpectedChain| chain.keys.len();
        if chains.is_empty()
            || chains.len() > MAX_CHAINS
            || chains.iter().any(|chain| blocks(chain) > MAX_BLOCKS)
        {
            return Err(ParseError::Inconsistent("more or fewer keys than a prompt has"));
        }
        if chains.iter().any(|chain| chain.first.checked_add(blocks(chain) as u32).is_none()) {
            return Err(ParseError::Inconsistent("keys are nowhere in a prompt"));
        }
        let ttl_ms = body.ttl_ms.to_native();
        if !(1..=MAX_TTL_MS).contains(&ttl_ms) {
            return Err(ParseError::Inconsistent("it is to be kept too long, or not at all"));
        }
        Ok(Self {
            request: body.request.as_str().to_owned(),
            model: body.model.as_str().to_owned(),
            tenant: body.tenant.as_str().to_owned(),
            source: SourceId {
                instance: InstanceId::new(body.instance.as_str())?,
                rank: DpRank(body.rank.to_native()),
            },
            block_size: body.block_size.to_native(),
            ttl_ms,
            chains,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn expected(keys: Vec<u64>, first: u32) -> Expected {
        Expected {
            request: "r".into(),
            model: "m".into(),
            tenant: "t".into(),
            source: SourceId { instance: InstanceId::new("a:1").unwrap(), rank: DpRank(2) },
            block_size: 16,
            ttl_ms: 5_000,
            chains: vec![ExpectedChain { first, keys: keys.into_iter().map(BlockKey).collect() }],
        }
    }

    proptest! {
        #[test]
        fn messages_round_trip(keys in proptest::collection::vec(any::<u64>(), 0..50), first in 0u32..1_000) {
            let expected = expected(keys, first);
            prop_assert_eq!(Expected::parse(&expected.encode().unwrap()).unwrap(), expected);
        }

        #[test]
        fn hostile_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0usize..100) {
            prop_assert!(Expected::parse(&bytes).is_err());
            let good = expected(vec![1, 2], 0).encode().unwrap();
            prop_assert!(Expected::parse(&good[..cut.min(good.len() - 1)]).is_err());
        }
    }

    #[test]
    fn what_would_be_kept_too_long_is_refused() {
        let mut long = expected(vec![1], 0);
        long.ttl_ms = MAX_TTL_MS + 1;
        assert!(matches!(Expected::parse(&long.encode().unwrap()), Err(ParseError::Inconsistent(_))));
    }
}
