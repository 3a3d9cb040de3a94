//! What an index asks the publisher of a source when it has missed something.
//!
//! Two things can be asked for: frames that were published and got lost (cheap, while the publisher still keeps them),
//! and the state as it is now, given what the asker already has as bucket sums: only slices that differ are sent.
//! Everything is answered in frames ([`crate::frame`]), sent to the subject that the request names for replies.
//! Asking again is always right: an answer that got lost in part leaves the asker with fewer differences.
//!
//! A request is sealed ([`crate::sealed`], magic `KVAQ`); its body is an rkyv archive.

use crate::digest::{Buckets, InvalidBucketsError};
use crate::frame::{MAX_FRAME_BYTES, MAX_FRAME_OWNERS};
use crate::ids::{CacheGroup, Epoch, FrameSeq, MAX_MEDIUM_BYTES, Tier};
use crate::sealed::{OpenError, Seal};
use crate::shard::ShardId;

/// Version of the layout.
pub const REQUEST_VERSION: u16 = 2;
/// Most ranges of missing frames in one request; the next request has the rest.
pub const MAX_RANGES: usize = 64;
/// Most bucket sums in one request, over all owners: 512 KiB.
pub const MAX_REQUEST_BUCKETS: usize = 65_536;
const SEAL: Seal = Seal { what: "a request", magic: *b"KVAQ", version: REQUEST_VERSION };

/// Names a request of one asker, so that an answer to an earlier one is not taken for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// A request to the publisher of one source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Chosen by the asker.
    pub id: RequestId,
    /// The epoch it is about. A publisher in another epoch answers with a heartbeat, which says so.
    pub epoch: Epoch,
    /// Which part of the key space it is about. To a publisher that cuts it otherwise, nobody is asking.
    pub shard: ShardId,
    /// What is asked for.
    pub want: Want,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// These frames, first and last of each range, both included; at most [`MAX_RANGES`].
    Frames(Vec<(FrameSeq, FrameSeq)>),
    /// The state as it is now, where it differs from these owners'. Owners that are not listed hold nothing.
    State(Vec<OwnerBuckets>),
}

/// What the asker has of one owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerBuckets {
    /// Where the blocks lie.
    pub tier: Tier,
    /// The engine's name of the medium.
    pub medium: String,
    /// Cache group.
    pub group: CacheGroup,
    /// Sums by slice.
    pub buckets: Buckets,
}

/// The request would be too large.
#[derive(Debug, thiserror::Error)]
pub enum EncodeRequestError {
    /// More than one message takes.
    #[error(
        "a request with {owners} owners, {buckets} buckets and {ranges} ranges is too large: ask for less at once"
    )]
    TooLarge {
        /// Owners in it.
        owners: usize,
        /// Bucket sums in it.
        buckets: usize,
        /// Ranges in it.
        ranges: usize,
    },
    /// The archive could not be written.
    #[error("request could not be archived: {0}")]
    Archive(rkyv::rancor::Error),
}

/// A received request is not usable. It is dropped; the asker asks again.
#[derive(Debug, thiserror::Error)]
pub enum ParseRequestError {
    /// Longer than allowed.
    #[error("request of {0} bytes (a request has at most {MAX_FRAME_BYTES})")]
    Size(usize),
    /// Not a request of this version, or damaged.
    #[error(transparent)]
    Sealed(#[from] OpenError),
    /// The body is not a valid archive.
    #[error("archive is not valid: {0}")]
    Archive(rkyv::rancor::Error),
    /// A number has no meaning in this version.
    #[error("{field} {value} has no meaning in request version {REQUEST_VERSION}")]
    Unknown {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u8,
    },
    /// Bucket sums do not make slices.
    #[error(transparent)]
    Buckets(#[from] InvalidBucketsError),
    /// More of something than allowed, or a range that ends before it starts.
    #[error("request is inconsistent: {0}")]
    Inconsistent(&'static str),
}

/// The archived layout.
#[allow(missing_docs, unreachable_pub)]
mod wire {
    use rkyv::{Archive, Deserialize, Serialize};

    #[derive(Debug, Archive, Serialize, Deserialize)]
    pub struct Owner {
        pub tier: u8,
        pub group: u16,
        pub medium: String,
        pub sums: Vec<u64>,
    }

    #[derive(Debug, Archive, Serialize, Deserialize)]
    pub struct Range {
        pub first: u64,
        pub last: u64,
    }

    #[derive(Debug, Archive, Serialize, Deserialize)]
    pub struct Body {
        pub id: u64,
        pub epoch: u64,
        pub shard: u16,
        pub shards: u16,
        pub kind: u8,
        pub ranges: Vec<Range>,
        pub owners: Vec<Owner>,
    }
}

const KIND_FRAMES: u8 = 0;
const KIND_STATE: u8 = 1;

// === impl Request ===

impl Request {
    /// The request as a message.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeRequestError> {
        let (kind, ranges, owners) = match &self.want {
            Want::Frames(ranges) => (KIND_FRAMES, &ranges[..], &[][..]),
            Want::State(owners) => (KIND_STATE, &[][..], &owners[..]),
        };
        let buckets: usize = owners.iter().map(|owner| owner.buckets.sums().len()).sum();
        if ranges.len() > MAX_RANGES || owners.len() > MAX_FRAME_OWNERS || buckets > MAX_REQUEST_BUCKETS {
            let (owners, ranges) = (owners.len(), ranges.len());
            return Err(EncodeRequestError::TooLarge { owners, buckets, ranges });
        }
        let body = wire::Body {
            id: self.id.0,
            epoch: self.epoch.0,
            shard: self.shard.number(),
            shards: self.shard.of(),
            kind,
            ranges: ranges.iter().map(|(first, last)| wire::Range { first: first.0, last: last.0 }).collect(),
            owners: owners.iter().map(OwnerBuckets::to_wire).collect(),
        };
        let out = SEAL.start(64 + buckets * 8);
        let mut out = rkyv::api::high::to_bytes_in::<_, rkyv::rancor::Error>(&body, out)
            .map_err(EncodeRequestError::Archive)?;
        Seal::finish(&mut out);
        Ok(out)
    }

    /// Checks everything about a received request.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseRequestError> {
        if bytes.len() > MAX_FRAME_BYTES {
            return Err(ParseRequestError::Size(bytes.len()));
        }
        let body = rkyv::access::<wire::ArchivedBody, rkyv::rancor::Error>(SEAL.open(bytes)?)
            .map_err(ParseRequestError::Archive)?;
        let buckets: usize = body.owners.iter().map(|owner| owner.sums.len()).sum();
        if body.ranges.len() > MAX_RANGES
            || body.owners.len() > MAX_FRAME_OWNERS
            || buckets > MAX_REQUEST_BUCKETS
        {
            return Err(ParseRequestError::Inconsistent("too many ranges, owners or buckets"));
        }
        let want = match body.kind {
            KIND_FRAMES => Want::Frames(
                body.ranges
                    .iter()
                    .map(|range| (FrameSeq(range.first.to_native()), FrameSeq(range.last.to_native())))
                    .map(|range| if range.0 <= range.1 { Ok(range) } else { Err(range) })
                    .collect::<Result<_, _>>()
                    .map_err(|_| ParseRequestError::Inconsistent("a range ends before it starts"))?,
            ),
            KIND_STATE => Want::State(
                body.owners.iter().map(OwnerBuckets::from_wire).collect::<Result<_, ParseRequestError>>()?,
            ),
            value => return Err(ParseRequestError::Unknown { field: "kind", value }),
        };
        let shard = ShardId::new(body.shard.to_native(), body.shards.to_native())
            .ok_or(ParseRequestError::Inconsistent("there is no such shard"))?;
        Ok(Self { id: RequestId(body.id.to_native()), epoch: Epoch(body.epoch.to_native()), shard, want })
    }
}

// === impl OwnerBuckets ===

impl OwnerBuckets {
    fn to_wire(&self) -> wire::Owner {
        wire::Owner {
            tier: self.tier as u8,
            group: self.group.0,
            medium: self.medium.clone(),
            sums: self.buckets.sums().to_vec(),
        }
    }

    fn from_wire(owner: &wire::ArchivedOwner) -> Result<Self, ParseRequestError> {
        if owner.medium.len() > MAX_MEDIUM_BYTES {
            return Err(ParseRequestError::Inconsistent("a medium name is too long"));
        }
        Ok(Self {
            tier: Tier::from_index(owner.tier)
                .ok_or(ParseRequestError::Unknown { field: "tier", value: owner.tier })?,
            medium: owner.medium.as_str().to_owned(),
            group: CacheGroup(owner.group.to_native()),
            buckets: Buckets::from_sums(owner.sums.iter().map(|sum| sum.to_native()).collect())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::keys::BlockKey;

    fn request(want: Want) -> Request {
        Request { id: RequestId(7), epoch: Epoch(9), shard: ShardId::new(3, 8).unwrap(), want }
    }

    fn owner(bits: u8, keys: u64) -> OwnerBuckets {
        OwnerBuckets {
            tier: Tier::Cpu,
            medium: "CPU".to_owned(),
            group: CacheGroup(2),
            buckets: Buckets::of(bits, (0..keys).map(BlockKey)),
        }
    }

    proptest! {
        #[test]
        fn requests_round_trip(
            ranges in proptest::collection::vec((any::<u64>(), any::<u64>()), 0..MAX_RANGES),
            bits in 0u8..8,
            keys in 0u64..300,
        ) {
            let ranges = ranges.into_iter().map(|(a, b)| (FrameSeq(a.min(b)), FrameSeq(a.max(b)))).collect();
            for want in [Want::Frames(ranges), Want::State(vec![owner(bits, keys), owner(0, 0)])] {
                let request = request(want);
                prop_assert_eq!(Request::parse(&request.encode().unwrap()).unwrap(), request);
            }
        }

        #[test]
        fn hostile_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0usize..150) {
            prop_assert!(Request::parse(&bytes).is_err());
            let good = request(Want::State(vec![owner(3, 10)])).encode().unwrap();
            prop_assert!(Request::parse(&good[..cut.min(good.len() - 1)]).is_err());
        }
    }

    #[test]
    fn ranges_backwards_and_too_many_of_anything_are_refused() {
        let backwards = request(Want::Frames(vec![(FrameSeq(5), FrameSeq(4))])).encode().unwrap();
        assert!(matches!(Request::parse(&backwards), Err(ParseRequestError::Inconsistent(_))));
        let ranges = vec![(FrameSeq(0), FrameSeq(0)); MAX_RANGES + 1];
        assert!(request(Want::Frames(ranges)).encode().is_err());
        assert!(request(Want::State(vec![owner(14, 0); 5])).encode().is_err());
        assert!(request(Want::State(vec![owner(14, 0); 4])).encode().unwrap().len() <= MAX_FRAME_BYTES);
    }
}
