//! The structures, each driven through its own public calls.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use dynamo_kv_router::ConcurrentRadixTreeCompressed;
use dynamo_kv_router::indexer::{SyncIndexer, WorkerTask};
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData, KvCacheStoreData,
    KvCacheStoredBlockData, LocalBlockHash, RouterEvent, StorageTier,
};
use kvatlas_proto::BlockKey;
use parking_lot::RwLock;

use crate::engine::{Change, ChangeKind, Engine, Holder, Match, Outcome};
use crate::system;
use crate::workload::{Event, Log, NONE, Query, Tree};

/// Events that a structure refused.
pub static REFUSED: AtomicUsize = AtomicUsize::new(0);

pub trait Structure {
    type Event: Send;
    type Query: Send + Sync;
    type Reader: Reader<Query = Self::Query> + Send;
    const NAME: &'static str;
    fn new(workers: usize) -> Self;
    fn event(tree: &Tree, log: &Log, event: &Event) -> Self::Event;
    fn query(query: &Query) -> Self::Query;
    fn apply(&mut self, events: &mut Vec<Self::Event>);
    fn reader(&self) -> Self::Reader;
    /// CPU time of whatever applies events.
    fn cpu(&self) -> u64 {
        system::cpu()
    }
    /// Brings the query into the cache, where it is after its keys were computed or parsed.
    fn warm(query: &Self::Query);
    /// What it would do in the background, before memory is read.
    fn settle(&mut self) {}
    fn shape(&self) -> String;
}

pub trait Reader {
    type Query;
    /// Writes each worker's depth; `out` is zeroed by the caller's structure as it needs.
    fn depths(&mut self, query: &Self::Query, out: &mut [u32]);
}

// --- ours ---

pub struct Ours {
    pub engine: Arc<Engine>,
}

pub struct OursReader {
    engine: Arc<Engine>,
    seen: Match,
}

pub struct OursEvent {
    pub holder: Holder,
    pub removed: bool,
    pub parent: Option<BlockKey>,
    pub keys: Vec<BlockKey>,
}

/// Events under one turn of the writer.
const BATCH: usize = 256;

impl Structure for Ours {
    type Event = OursEvent;
    type Query = Vec<BlockKey>;
    type Reader = OursReader;
    const NAME: &'static str = "kvatlas";
    fn new(_: usize) -> Self {
        Self { engine: Arc::default() }
    }
    fn event(tree: &Tree, log: &Log, event: &Event) -> OursEvent {
        OursEvent {
            holder: Holder(event.worker),
            removed: event.removed,
            parent: (event.parent != NONE).then(|| BlockKey(tree.key[event.parent as usize])),
            keys: log.nodes(event).iter().map(|node| BlockKey(tree.key[*node as usize])).collect(),
        }
    }
    fn query(query: &Query) -> Vec<BlockKey> {
        query.keys.iter().copied().map(BlockKey).collect()
    }
    fn warm(query: &Self::Query) {
        std::hint::black_box(query.iter().fold(0, |sum, key| sum ^ key.0));
    }
    fn apply(&mut self, events: &mut Vec<OursEvent>) {
        let mut changes = Vec::with_capacity(BATCH);
        // As an index does that applies a frame at a time: others get their turn in between.
        for batch in events.chunks(BATCH) {
            changes.clear();
            changes.extend(batch.iter().map(|event| Change {
                holder: event.holder,
                kind: if event.removed { ChangeKind::Removed } else { ChangeKind::Stored(event.parent) },
                keys: &event.keys,
            }));
            self.engine.write().apply(&changes, |_, outcome| {
                if let Outcome::Stored(stored) = outcome {
                    REFUSED.fetch_add(stored.refused, Ordering::Relaxed);
                }
            });
        }
    }
    fn reader(&self) -> OursReader {
        OursReader { engine: Arc::clone(&self.engine), seen: Match::default() }
    }
    fn shape(&self) -> String {
        format!("{:?}", self.engine.totals())
    }
}

impl Reader for OursReader {
    type Query = Vec<BlockKey>;
    fn depths(&mut self, query: &Vec<BlockKey>, out: &mut [u32]) {
        out.fill(0);
        self.engine.find(query, &mut self.seen);
        self.seen.each_depth(|holder, depth| out[holder.0 as usize] = depth);
    }
}

// --- smg kv-index: ChainIndex, read through score_into ---

pub struct SmgChain {
    index: Arc<kv_index::ChainIndex>,
    maps: Vec<kv_index::ChainBlockMap>,
}

pub struct SmgEvent {
    worker: u32,
    parent: Option<u64>,
    stored: Vec<kv_index::StoredBlock>,
    removed: Vec<kv_index::SequenceHash>,
}

pub struct SmgReader(Arc<kv_index::ChainIndex>);

impl Structure for SmgChain {
    type Event = SmgEvent;
    type Query = Vec<kv_index::ContentHash>;
    type Reader = SmgReader;
    const NAME: &'static str = "smg-chain";
    fn new(workers: usize) -> Self {
        let index = kv_index::ChainIndex::with_max_workers(workers);
        for worker in 0..workers {
            let number = index.intern_worker(&format!("worker-{worker}")).expect("there is room");
            assert_eq!(number as usize, worker);
        }
        Self { index: Arc::new(index), maps: (0..workers).map(|_| kv_index::ChainBlockMap::new()).collect() }
    }
    fn event(tree: &Tree, log: &Log, event: &Event) -> SmgEvent {
        let nodes = log.nodes(event);
        let sequence = |node: &u32| kv_index::SequenceHash(tree.key[*node as usize]);
        let block = |node: &u32| kv_index::StoredBlock {
            seq_hash: sequence(node),
            content_hash: kv_index::ContentHash(tree.local[*node as usize]),
        };
        SmgEvent {
            worker: event.worker,
            parent: (event.parent != NONE).then(|| tree.key[event.parent as usize]),
            stored: if event.removed { Vec::new() } else { nodes.iter().map(block).collect() },
            removed: if event.removed { nodes.iter().map(sequence).collect() } else { Vec::new() },
        }
    }
    fn query(query: &Query) -> Self::Query {
        query.locals.iter().copied().map(kv_index::ContentHash).collect()
    }
    fn warm(query: &Self::Query) {
        std::hint::black_box(query.iter().fold(0, |sum, key| sum ^ key.0));
    }
    fn apply(&mut self, events: &mut Vec<SmgEvent>) {
        for event in events {
            let map = &mut self.maps[event.worker as usize];
            if event.stored.is_empty() {
                self.index.apply_removed(event.worker, &event.removed, map);
            } else {
                let parent = event.parent.map(kv_index::SequenceHash);
                let done = self.index.apply_stored(event.worker, &event.stored, parent, map);
                REFUSED.fetch_add(usize::from(done.is_err()), Ordering::Relaxed);
            }
        }
    }
    fn reader(&self) -> SmgReader {
        SmgReader(Arc::clone(&self.index))
    }
    fn shape(&self) -> String {
        let stats = self.index.stats();
        let maps: usize = self.maps.iter().map(|map| map.capacity() * 17).sum();
        format!("runs={} blocks={} worker_map_bytes={maps}", stats.runs_live, stats.blocks_live)
    }
}

impl Reader for SmgReader {
    type Query = Vec<kv_index::ContentHash>;
    fn depths(&mut self, query: &Self::Query, out: &mut [u32]) {
        out.fill(0);
        self.0.score_into(query, |content| content.0, false, |worker, depth| out[worker as usize] = depth);
    }
}

// --- smg radix-tree, behind the lock that its service holds ---

pub struct SmgRadix {
    tree: Arc<RwLock<radix_tree::RadixTree>>,
    holders: Vec<radix_tree::HolderId>,
}

pub struct SmgRadixEvent {
    worker: u32,
    parent: Option<u64>,
    stored: Vec<(u64, u64)>,
    removed: Vec<u64>,
}

pub struct SmgRadixReader {
    tree: Arc<RwLock<radix_tree::RadixTree>>,
    scratch: radix_tree::OverlapScratch,
    found: Vec<radix_tree::Overlap>,
}

impl Structure for SmgRadix {
    type Event = SmgRadixEvent;
    type Query = Vec<u64>;
    type Reader = SmgRadixReader;
    const NAME: &'static str = "smg-radix-tree";
    fn new(workers: usize) -> Self {
        let mut tree = radix_tree::RadixTree::new(radix_tree::Config::default());
        let holders = (0..workers).map(|worker| tree.create_holder(&format!("worker-{worker}"))).collect();
        Self { tree: Arc::new(RwLock::new(tree)), holders }
    }
    fn event(tree: &Tree, log: &Log, event: &Event) -> SmgRadixEvent {
        let nodes = log.nodes(event);
        let block = |node: &u32| (tree.key[*node as usize], tree.local[*node as usize]);
        let key = |node: &u32| tree.key[*node as usize];
        SmgRadixEvent {
            worker: event.worker,
            parent: (event.parent != NONE).then(|| tree.key[event.parent as usize]),
            stored: if event.removed { Vec::new() } else { nodes.iter().map(block).collect() },
            removed: if event.removed { nodes.iter().map(key).collect() } else { Vec::new() },
        }
    }
    fn query(query: &Query) -> Vec<u64> {
        query.locals.clone()
    }
    fn warm(query: &Self::Query) {
        std::hint::black_box(query.iter().fold(0, |sum, key| sum ^ key));
    }
    fn apply(&mut self, events: &mut Vec<SmgRadixEvent>) {
        for event in events {
            let holder = self.holders[event.worker as usize];
            let mut tree = self.tree.write();
            if event.stored.is_empty() {
                tree.remove(holder, &event.removed);
            } else {
                let done = tree.store(holder, event.parent, &event.stored);
                REFUSED.fetch_add(usize::from(done.is_err()), Ordering::Relaxed);
            }
        }
    }
    fn reader(&self) -> SmgRadixReader {
        SmgRadixReader { tree: Arc::clone(&self.tree), scratch: Default::default(), found: Vec::new() }
    }
    fn shape(&self) -> String {
        self.tree.read().debug_footprint().replace('\n', " ")
    }
}

impl Reader for SmgRadixReader {
    type Query = Vec<u64>;
    fn depths(&mut self, query: &Vec<u64>, out: &mut [u32]) {
        out.fill(0);
        self.tree.read().overlap(query, &mut self.scratch, &mut self.found);
        for found in &self.found {
            out[found.holder.parts().0 as usize] = found.depth;
        }
    }
}

// --- Dynamo's concurrent compressed radix tree, through its own worker loop ---

pub struct Crtc {
    index: Arc<ConcurrentRadixTreeCompressed>,
    tasks: flume::Sender<WorkerTask>,
    thread: Option<JoinHandle<()>>,
}

pub struct CrtcReader(Arc<ConcurrentRadixTreeCompressed>);

impl Structure for Crtc {
    type Event = Option<RouterEvent>;
    type Query = Vec<LocalBlockHash>;
    type Reader = CrtcReader;
    const NAME: &'static str = "dynamo-crtc";
    fn new(_: usize) -> Self {
        let index = Arc::new(ConcurrentRadixTreeCompressed::new());
        // The peer's own channel type has no bound here; batches are flushed before the next one is sent.
        let (tasks, receiver) = flume::unbounded();
        let backend = Arc::clone(&index);
        let thread = std::thread::spawn(move || backend.worker(receiver, None).expect("worker loop"));
        Self { index, tasks, thread: Some(thread) }
    }
    fn event(tree: &Tree, log: &Log, event: &Event) -> Option<RouterEvent> {
        let nodes = log.nodes(event);
        let hash = |node: &u32| ExternalSequenceBlockHash(tree.key[*node as usize]);
        let data = if event.removed {
            KvCacheEventData::Removed(KvCacheRemoveData { block_hashes: nodes.iter().map(hash).collect() })
        } else {
            let block = |node: &u32| KvCacheStoredBlockData {
                block_hash: hash(node),
                tokens_hash: LocalBlockHash(tree.local[*node as usize]),
                mm_extra_info: None,
            };
            KvCacheEventData::Stored(KvCacheStoreData {
                parent_hash: (event.parent != NONE).then(|| hash(&event.parent)),
                start_position: None,
                blocks: nodes.iter().map(block).collect(),
            })
        };
        let event_of = KvCacheEvent { event_id: 0, data, dp_rank: 0 };
        Some(RouterEvent::with_storage_tier(u64::from(event.worker), event_of, StorageTier::Device))
    }
    fn query(query: &Query) -> Self::Query {
        query.locals.iter().copied().map(LocalBlockHash).collect()
    }
    fn warm(query: &Self::Query) {
        std::hint::black_box(query.iter().fold(0, |sum, key| sum ^ key.0));
    }
    fn apply(&mut self, events: &mut Vec<Self::Event>) {
        for event in events.iter_mut().filter_map(Option::take) {
            self.tasks.send(WorkerTask::Event(event)).expect("worker alive");
        }
        let (done, wait) = tokio::sync::oneshot::channel();
        self.tasks.send(WorkerTask::Flush(done)).expect("worker alive");
        wait.blocking_recv().expect("flushed");
    }
    fn reader(&self) -> CrtcReader {
        CrtcReader(Arc::clone(&self.index))
    }
    fn cpu(&self) -> u64 {
        system::cpu_of(self.thread.as_ref().expect("running"))
    }
    fn settle(&mut self) {
        self.index.run_cleanup_task();
    }
    fn shape(&self) -> String {
        String::new()
    }
}

impl Reader for CrtcReader {
    type Query = Vec<LocalBlockHash>;
    fn depths(&mut self, query: &Self::Query, out: &mut [u32]) {
        out.fill(0);
        for (worker, depth) in self.0.find_matches(query, false).scores {
            out[worker.worker_id as usize] = depth;
        }
    }
}

impl Drop for Crtc {
    fn drop(&mut self) {
        let _ = self.tasks.send(WorkerTask::Terminate);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
