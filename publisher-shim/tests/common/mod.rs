//! Builds vLLM messages with the generic `rmpv` encoder, and a naive engine to compare the mirror with.

#![allow(dead_code, unreachable_pub)]

pub mod engine;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use kvatlas_proto::digest::Buckets;
use kvatlas_proto::frame::{Change, FrameHeader, FramePart, FrameView};
use kvatlas_proto::request::{OwnerBuckets, Request, RequestId, Want};
use kvatlas_proto::{BlockKey, CacheGroup, Digest, Epoch, Partition, ShardId, Tier};
use kvatlas_shim::source::{Outgoing, Source};
use rmpv::Value;

/// A `BlockStored` event under construction.
#[derive(Clone, Debug)]
pub struct StoredEvent {
    pub hashes: Vec<u64>,
    pub parent: Option<u64>,
    pub tokens: Vec<u32>,
    pub block_size: u32,
    pub medium: Option<&'static str>,
    pub group: Option<u32>,
    pub kind: Option<&'static str>,
    pub window: Option<u32>,
}

impl Default for StoredEvent {
    fn default() -> Self {
        Self {
            hashes: vec![],
            parent: None,
            tokens: vec![],
            block_size: 4,
            medium: Some("GPU"),
            group: None,
            kind: None,
            window: None,
        }
    }
}

impl StoredEvent {
    /// The map form (vLLM from 0.24).
    pub fn map(&self) -> Value {
        let mut pairs = vec![
            ("type", Value::from("BlockStored")),
            ("block_hashes", integers(&self.hashes)),
            ("parent_block_hash", self.parent.map_or(Value::Nil, Value::from)),
            ("token_ids", Value::Array(self.tokens.iter().map(|&t| t.into()).collect())),
            ("block_size", self.block_size.into()),
            ("lora_id", Value::Nil),
            ("medium", self.medium.map_or(Value::Nil, Value::from)),
        ];
        if let Some(group) = self.group {
            pairs.push(("group_idx", group.into()));
        }
        if let Some(kind) = self.kind {
            pairs.push(("kv_cache_spec_kind", kind.into()));
        }
        if let Some(window) = self.window {
            pairs.push(("kv_cache_spec_sliding_window", window.into()));
        }
        map(pairs)
    }

    /// The array form (vLLM up to 0.23), up to and including `medium`.
    pub fn array(&self) -> Value {
        Value::Array(vec![
            "BlockStored".into(),
            integers(&self.hashes),
            self.parent.map_or(Value::Nil, Value::from),
            Value::Array(self.tokens.iter().map(|&t| t.into()).collect()),
            self.block_size.into(),
            Value::Nil,
            self.medium.map_or(Value::Nil, Value::from),
        ])
    }
}

pub fn removed(hashes: &[u64], medium: Option<&str>, group: Option<u32>) -> Value {
    let mut pairs = vec![
        ("type", Value::from("BlockRemoved")),
        ("block_hashes", integers(hashes)),
        ("medium", medium.map_or(Value::Nil, Value::from)),
    ];
    if let Some(group) = group {
        pairs.push(("group_idx", group.into()));
    }
    map(pairs)
}

pub fn cleared() -> Value {
    map(vec![("type", Value::from("AllBlocksCleared"))])
}

pub fn map(pairs: Vec<(&str, Value)>) -> Value {
    Value::Map(pairs.into_iter().map(|(key, value)| (key.into(), value)).collect())
}

fn integers(hashes: &[u64]) -> Value {
    Value::Array(hashes.iter().map(|&hash| hash.into()).collect())
}

/// `[time, events, rank]`, encoded.
pub fn batch(events: Vec<Value>) -> Vec<u8> {
    batch_at(1_795_168_931.5, events)
}

/// The same at another time, which makes it another message.
pub fn batch_at(time: f64, events: Vec<Value>) -> Vec<u8> {
    encode(&Value::Array(vec![time.into(), Value::Array(events), 0.into()]))
}

pub fn encode(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, value).unwrap();
    bytes
}

/// What a reader of all frames so far believes, shard by shard, as an index would. Checks sequences, epochs, digests, and that
/// each frame is where it belongs. An epoch that begins with something else than the reader holds makes it ask the source for
/// what differs.
#[derive(Clone, Debug)]
pub struct Reader {
    pub lanes: Vec<Lane>,
    pub health: String,
    /// Answers that were needed.
    pub repairs: usize,
    /// What each block was last said to follow.
    pub parents: BTreeMap<u64, u64>,
}

/// The same of one shard.
#[derive(Clone, Debug)]
pub struct Lane {
    pub shard: ShardId,
    pub held: Held,
    pub epoch: u64,
    pub next: u64,
    /// What is held is not what the epoch began with.
    pub stale: bool,
    tiers: BTreeMap<(String, u16), Tier>,
}

/// Keys by medium and cache group; without owners that hold nothing.
pub type Held = BTreeMap<(String, u16), BTreeSet<u64>>;

/// The partition into this many shards.
pub fn shards(number: u32) -> Partition {
    Partition::new(number).unwrap()
}

/// Without the shards they travel in.
pub fn frames(outgoing: Vec<Outgoing>) -> Vec<Bytes> {
    outgoing.into_iter().map(|outgoing| outgoing.frame).collect()
}

impl Default for Reader {
    fn default() -> Self {
        Self::new(Partition::WHOLE)
    }
}

impl Reader {
    pub fn new(partition: Partition) -> Self {
        let lanes = partition.all().map(Lane::new).collect();
        Self { lanes, health: String::new(), repairs: 0, parents: BTreeMap::new() }
    }

    /// What is held in all shards together.
    pub fn held(&self) -> Held {
        let mut held = Held::new();
        for (name, keys) in self.lanes.iter().flat_map(|lane| &lane.held) {
            let before = held.entry(name.clone()).or_default();
            for key in keys {
                assert!(before.insert(*key), "a block lies in one shard");
            }
        }
        held
    }

    /// How many blocks that is.
    pub fn blocks(&self) -> usize {
        self.held().values().map(BTreeSet::len).sum()
    }

    /// The newest epoch of any shard.
    pub fn epoch(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.epoch).max().unwrap()
    }

    pub fn is_stale(&self) -> bool {
        self.lanes.iter().any(|lane| lane.stale)
    }

    /// Loses what is held, as a server that was killed.
    pub fn forget(&mut self) {
        for lane in &mut self.lanes {
            lane.held.clear();
            lane.stale = true;
        }
    }

    /// Forgets some blocks and invents some.
    pub fn damage(&mut self, seed: u64) {
        for lane in &mut self.lanes {
            for keys in lane.held.values_mut() {
                let gone: Vec<u64> =
                    keys.iter().copied().filter(|key| (key ^ seed).is_multiple_of(5)).collect();
                gone.iter().for_each(|key| _ = keys.remove(key));
                keys.extend(gone.iter().map(|key| key.rotate_left(seed as u32 % 63 + 1)));
            }
            lane.held.retain(|_, keys| !keys.is_empty());
        }
    }

    /// Reads what the source publishes now, and asks it if that is not enough.
    pub fn follow(&mut self, source: &mut Source, now_ns: u64, heartbeat: bool) {
        for outgoing in source.take_frames(now_ns, heartbeat).unwrap() {
            self.read(&outgoing);
        }
        for lane in 0..self.lanes.len() {
            if self.lanes[lane].stale {
                self.repairs += 1;
                let answer = source.answer(&self.lanes[lane].request(self.repairs as u64)).unwrap();
                self.repair(lane, &answer);
                assert!(!self.lanes[lane].stale, "an answer makes a reader right");
            }
        }
    }

    /// Reads one published frame.
    pub fn read(&mut self, outgoing: &Outgoing) {
        let view = FrameView::parse(&outgoing.frame).unwrap();
        assert_eq!(view.header().shard, outgoing.shard, "a frame travels in its own shard");
        self.health = view.header().health.name().to_owned();
        let lane = &mut self.lanes[usize::from(outgoing.shard.number())];
        assert_eq!(lane.shard, outgoing.shard);
        lane.read(&view, &mut self.parents);
    }

    /// The same of a frame that was sent again to the lane that had asked.
    pub fn read_again(&mut self, frame: &Bytes) {
        let shard = FrameView::parse(frame).unwrap().header().shard;
        self.read(&Outgoing { shard, frame: frame.clone() });
    }

    /// Applies the answer to the request that was made of what is held now.
    pub fn repair(&mut self, lane: usize, answer: &[Bytes]) {
        self.lanes[lane].repair(answer, &mut self.parents);
    }
}

impl Lane {
    fn new(shard: ShardId) -> Self {
        Self { shard, held: Held::new(), epoch: 0, next: 0, stale: false, tiers: BTreeMap::new() }
    }

    fn read(&mut self, view: &FrameView<'_>, parents: &mut BTreeMap<u64, u64>) {
        let header = view.header();
        if header.epoch.0 != self.epoch {
            assert!(header.epoch.0 > self.epoch, "epochs only grow");
            assert_eq!(header.part, FramePart::Start, "an epoch begins with its start");
            (self.epoch, self.next, self.stale) = (header.epoch.0, 0, false);
        }
        assert_eq!(header.seq.0, self.next, "frames are contiguous");
        self.next += 1;
        if header.part == FramePart::Start {
            self.stale = !self.equals(header);
        }
        if self.stale {
            return;
        }
        self.apply(view, parents, &mut |_, _| unreachable!("only repairs have buckets"));
        if !header.digests.is_empty() {
            assert!(view.ops().next().is_none(), "frames with digests have no operations");
            assert!(self.equals(header), "digests are those of the mirror after the frame");
        }
    }

    /// Asks for what differs from what is held.
    pub fn request(&self, id: u64) -> Request {
        let owner = |(name, keys): (&(String, u16), &BTreeSet<u64>)| OwnerBuckets {
            tier: self.tiers[name],
            medium: name.0.clone(),
            group: CacheGroup(name.1),
            buckets: Buckets::of(Buckets::bits_for(keys.len() as u64), keys.iter().map(|key| BlockKey(*key))),
        };
        let want = Want::State(self.held.iter().map(owner).collect());
        Request { id: RequestId(id), epoch: Epoch(self.epoch), shard: self.shard, want }
    }

    fn repair(&mut self, answer: &[Bytes], parents: &mut BTreeMap<u64, u64>) {
        let bits: BTreeMap<(String, u16), u8> = self
            .held
            .iter()
            .map(|(name, keys)| (name.clone(), Buckets::bits_for(keys.len() as u64)))
            .collect();
        for (piece, frame) in answer.iter().enumerate() {
            let view = FrameView::parse(frame).unwrap();
            let header = view.header();
            let reply = header.reply.unwrap();
            assert_eq!((header.part, header.epoch.0), (FramePart::Repair, self.epoch));
            assert_eq!((reply.piece as usize, reply.pieces as usize), (piece, answer.len()));
            assert_eq!(header.shard, self.shard, "an answer is about the shard that was asked about");
            assert_eq!(header.seq.0 + 1, self.next, "an answer is of the last published frame");
            let known: BTreeSet<_> =
                header.owners.iter().map(|owner| (owner.medium.clone(), owner.group.0)).collect();
            self.held.retain(|name, _| known.contains(name));
            let slice_of = |name: &(String, u16), key| Buckets::slice(bits[name], key);
            self.apply(&view, parents, &mut |name, key| slice_of(name, key));
            if piece + 1 == answer.len() {
                self.stale = !self.equals(header);
            }
        }
    }

    fn apply(
        &mut self,
        view: &FrameView<'_>,
        parents: &mut BTreeMap<u64, u64>,
        slice_of: &mut dyn FnMut(&(String, u16), BlockKey) -> u32,
    ) {
        for op in view.ops() {
            let owner = &view.header().owners[op.owner];
            let name = (owner.medium.clone(), owner.group.0);
            self.tiers.insert(name.clone(), owner.tier);
            let keys = self.held.entry(name.clone()).or_default();
            match op.change {
                Change::Stored { mut parent, keys: run } => {
                    for key in run.iter() {
                        assert!(keys.insert(key.0), "a visible block is not stored again");
                        parents.insert(key.0, parent.0);
                        parent = key;
                    }
                }
                Change::Removed(run) => {
                    for key in run.iter() {
                        assert!(keys.remove(&key.0), "only a visible block is removed");
                    }
                }
                Change::Cleared => keys.clear(),
                Change::Bucket { slice, blocks } => {
                    keys.retain(|key| slice_of(&name, BlockKey(*key)) != slice);
                    for (parent, key) in blocks.iter() {
                        assert_eq!(slice_of(&name, key), slice, "a slice has its own blocks only");
                        assert!(keys.insert(key.0), "a block is in one slice");
                        parents.insert(key.0, parent.0);
                    }
                }
            }
        }
        self.held.retain(|_, keys| !keys.is_empty());
    }

    fn equals(&self, header: &FrameHeader) -> bool {
        let named: BTreeMap<_, _> = header
            .owners
            .iter()
            .map(|owner| (owner.medium.clone(), owner.group.0))
            .zip(&header.digests)
            .filter(|(_, digest)| !digest.is_empty())
            .collect();
        let digest = |keys: &BTreeSet<u64>| Digest::of(keys.iter().map(|key| BlockKey(*key)));
        named.len() == self.held.len()
            && self.held.iter().all(|(name, keys)| named.get(name) == Some(&&digest(keys)))
    }
}
