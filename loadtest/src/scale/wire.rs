//! What a fleet's publishers put on the bus: real frames, one sequence per pod and shard, and how much that is.
//!
//! A publisher sends what an engine's step changed at once, one frame per shard that is concerned; heartbeats follow the rule
//! of the shim: one per lane and second, and where nothing is new every second time.

use bytes::Bytes;
use kvatlas_proto::frame::{
    EncodeFrameError, FrameHeader, FrameOwner, FramePart, OpBuffer, ReplyPart, SourceHealth,
};
use kvatlas_proto::keys::{KEY_VERSION, KeyVariant};
use kvatlas_proto::request::RequestId;
use kvatlas_proto::scope::InvalidScopeError;
use kvatlas_proto::shard::SEGMENT_BLOCKS;
use kvatlas_proto::subject::Subjects;
use kvatlas_proto::{
    BlockKey, CacheGroup, Digest, DpRank, Epoch, FrameSeq, GroupKind, InstanceId, Partition, Scope, ShardId,
    SourceId, Tier,
};
use kvatlas_shim::source::{FRAME_OPS_BYTES, IDLE_HEARTBEAT_BEATS};
use serde::Serialize;

use super::cut::Cut;
use super::fleet::Change;
use super::forest::{Block, Forest};

/// Model of the fleet.
pub(super) const MODEL: &str = "meta-llama/Llama-3.3-70B-Instruct";
/// Tokens per block, as far as scopes and queries are concerned.
pub(super) const BLOCK_TOKENS: u32 = 16;
/// What NATS adds to a message beside the subject: `PUB`, the length, two line ends.
const ENVELOPE_BYTES: u64 = 4 + 1 + 4 + 2 + 2;

/// What went over the bus.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Traffic {
    /// Blocks stored and removed.
    pub operations: u64,
    /// Frames with operations.
    pub frames: u64,
    /// Bytes of them, subjects and NATS's own included.
    pub frame_bytes: u64,
    /// Frames without operations.
    pub heartbeats: u64,
    /// Bytes of them.
    pub heartbeat_bytes: u64,
}

/// All publishers of a fleet.
pub(super) struct Publishers {
    partition: Partition,
    pods: Vec<FrameHeader>,
    /// By pod and shard.
    lanes: Vec<Lane>,
    /// By shard, what is waiting.
    waiting: Vec<OpBuffer>,
    concerned: Vec<u16>,
    subject_bytes: u64,
    beat: u64,
    root: BlockKey,
    /// Nobody gets the frames, so what digests say makes no difference.
    only_counts: bool,
    pub(super) traffic: Traffic,
}

#[derive(Clone, Copy)]
struct Lane {
    next: FrameSeq,
    digest: Digest,
    /// The sequence after the last heartbeat.
    told: Option<FrameSeq>,
}

/// The name of a pod.
pub(super) fn instance(pod: usize) -> InstanceId {
    let name = format!("10.{}.{}.{}:8000", 64 + (pod >> 16), (pod >> 8) & 255, pod & 255);
    InstanceId::new(name).expect("an address and a port are a valid name")
}

/// What is said of a pod in every frame.
pub(super) fn header(pod: usize) -> Result<FrameHeader, InvalidScopeError> {
    let gpu = FrameOwner {
        tier: Tier::Gpu,
        medium: "GPU".to_owned(),
        group: CacheGroup(0),
        kind: GroupKind::Full,
        load_blocks: 1,
    };
    Ok(FrameHeader {
        scope: Scope::new(MODEL, "", BLOCK_TOKENS, KEY_VERSION)?,
        source: SourceId { instance: instance(pod), rank: DpRank(0) },
        shard: ShardId::WHOLE,
        variant: KeyVariant::default(),
        epoch: Epoch(1),
        seq: FrameSeq(0),
        part: FramePart::Live,
        health: SourceHealth::Exact,
        engine_time_ns: 0,
        owners: vec![gpu],
        digests: Vec::new(),
        reply: None,
    })
}

// === impl Publishers ===

impl Publishers {
    /// Publishers that have said nothing.
    pub(super) fn new(pods: usize, partition: Partition, root: BlockKey) -> Result<Self, InvalidScopeError> {
        let shards = usize::from(partition.shards());
        let headers = (0..pods).map(header).collect::<Result<Vec<_>, _>>()?;
        let subject_bytes = headers.first().map_or(0, |header| {
            let last = partition.shard(u16::MAX);
            Subjects::default().events(header.scope.token(), last, &header.source).len() as u64
        });
        Ok(Self {
            partition,
            pods: headers,
            lanes: vec![Lane { next: FrameSeq(0), digest: Digest::default(), told: None }; pods * shards],
            waiting: vec![OpBuffer::default(); shards],
            concerned: Vec::new(),
            subject_bytes,
            beat: 0,
            root,
            only_counts: false,
            traffic: Traffic::default(),
        })
    }

    /// The same for who only counts what they send. They may come in at any time.
    pub(super) fn counting(
        pods: usize,
        partition: Partition,
        root: BlockKey,
    ) -> Result<Self, InvalidScopeError> {
        Ok(Self { only_counts: true, ..Self::new(pods, partition, root)? })
    }

    /// The starts of all lanes of a pod that holds nothing.
    pub(super) fn start(&mut self, pod: usize, out: &mut Vec<Bytes>) -> Result<(), EncodeFrameError> {
        for shard in self.partition.all() {
            self.start_lane(pod, shard, out)?;
        }
        Ok(())
    }

    /// The start of one lane.
    pub(super) fn start_lane(
        &mut self,
        pod: usize,
        shard: ShardId,
        out: &mut Vec<Bytes>,
    ) -> Result<(), EncodeFrameError> {
        let header = &mut self.pods[pod];
        (header.part, header.digests) = (FramePart::Start, vec![Digest::default()]);
        let frame = self.push(pod, shard, &mut OpBuffer::default());
        let header = &mut self.pods[pod];
        (header.part, header.digests) = (FramePart::Live, Vec::new());
        out.push(frame?);
        Ok(())
    }

    /// The frames about what a step of a pod changed.
    pub(super) fn publish(
        &mut self,
        forest: &Forest,
        pod: usize,
        changes: impl IntoIterator<Item = Change>,
        out: &mut Vec<Bytes>,
    ) -> Result<(), EncodeFrameError> {
        for change in changes {
            let (Change::Stored(block) | Change::Removed(block)) = change;
            let shard = Cut::Segment(SEGMENT_BLOCKS).shard(forest, self.partition, 0, block);
            let waiting = &mut self.waiting[usize::from(shard)];
            if waiting.is_empty() {
                self.concerned.push(shard);
            }
            let digest =
                &mut self.lanes[pod * usize::from(self.partition.shards()) + usize::from(shard)].digest;
            let key = forest.key(block);
            match change {
                Change::Stored(_) => waiting.stored(0, parent_in_shard(forest, self.root, block), key),
                Change::Removed(_) => waiting.removed(0, key),
            }
            match change {
                _ if self.only_counts => {}
                Change::Stored(_) => digest.add(key),
                Change::Removed(_) => digest.remove(key),
            }
            self.traffic.operations += 1;
        }
        while let Some(shard) = self.concerned.pop() {
            let mut waiting = std::mem::take(&mut self.waiting[usize::from(shard)]);
            while !waiting.is_empty() {
                let mut chunk = waiting.take_chunk(FRAME_OPS_BYTES);
                let frame = self.push(pod, self.partition.shard(shard), &mut chunk)?;
                self.traffic.frames += 1;
                self.traffic.frame_bytes += self.on_the_bus(&frame);
                out.push(frame);
            }
        }
        Ok(())
    }

    /// The heartbeats of all pods, once a second. With `all`, those that the rule leaves out too.
    pub(super) fn heartbeats(&mut self, all: bool, out: &mut Vec<Bytes>) -> Result<(), EncodeFrameError> {
        let shards = usize::from(self.partition.shards());
        for pod in 0..self.pods.len() {
            for shard in self.partition.all() {
                let lane = self.lanes[pod * shards + usize::from(shard.number())];
                let is_turn = (self.beat + u64::from(shard.number())).is_multiple_of(IDLE_HEARTBEAT_BEATS);
                if !(all || is_turn || lane.told != Some(lane.next)) {
                    continue;
                }
                self.pods[pod].digests = vec![lane.digest];
                let frame = self.push(pod, shard, &mut OpBuffer::default())?;
                self.pods[pod].digests.clear();
                let lane = &mut self.lanes[pod * shards + usize::from(shard.number())];
                lane.told = Some(lane.next);
                self.traffic.heartbeats += 1;
                self.traffic.heartbeat_bytes += self.on_the_bus(&frame);
                out.push(frame);
            }
        }
        self.beat += 1;
        Ok(())
    }

    fn push(&mut self, pod: usize, shard: ShardId, ops: &mut OpBuffer) -> Result<Bytes, EncodeFrameError> {
        let at = pod * usize::from(self.partition.shards()) + usize::from(shard.number());
        let header = &mut self.pods[pod];
        (header.shard, header.seq) = (shard, self.lanes[at].next);
        self.lanes[at].next = header.seq.next();
        Ok(Bytes::from(header.encode(ops)?))
    }

    fn on_the_bus(&self, frame: &Bytes) -> u64 {
        frame.len() as u64 + self.subject_bytes + ENVELOPE_BYTES
    }
}

/// What precedes a block in its shard.
fn parent_in_shard(forest: &Forest, root: BlockKey, block: Block) -> BlockKey {
    let parent = forest.parent(block).filter(|_| !forest.depth(block).is_multiple_of(SEGMENT_BLOCKS));
    parent.map_or(root, |parent| forest.key(parent))
}

/// Bytes of a pod's state as it is sent to a server that takes over shards: pieces of an answer, and how many blocks.
pub(super) fn state_bytes(
    forest: &Forest,
    partition: Partition,
    blocks: &[Block],
) -> Result<(u64, u64), EncodeFrameError> {
    let mut lanes = vec![OpBuffer::default(); usize::from(partition.shards())];
    for block in blocks {
        let shard = Cut::Segment(SEGMENT_BLOCKS).shard(forest, partition, 0, *block);
        let parent = parent_in_shard(forest, forest.root_key(), *block);
        lanes[usize::from(shard)].stored(0, parent, forest.key(*block));
    }
    let mut bytes = 0;
    let Ok(mut header) = header(0) else { return Ok((0, 0)) };
    header.part = FramePart::Repair;
    header.digests = vec![Digest::default()];
    for (shard, mut ops) in partition.all().zip(lanes) {
        header.shard = shard;
        while !ops.is_empty() {
            header.reply = Some(ReplyPart { request: RequestId(1), piece: 0, pieces: 1 });
            bytes += header.encode(&mut ops.take_chunk(FRAME_OPS_BYTES))?.len() as u64;
        }
    }
    Ok((bytes, blocks.len() as u64))
}
