//! A synthetic stream of cache events, and look-ups whose right answer is known.
//!
//! Conversations grow over popular system prompts and shared documents; each is served by a worker with a bounded
//! cache. Prefill stores come in chunks, decode stores one block at a time, and once the caches are full every stored
//! block evicts the least recently used one, deepest first. Blocks are nodes of one tree; structures convert events and
//! queries to types of their own outside the measured time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use foldhash::{HashMap, HashMapExt};
use kvatlas_proto::keys::LocalHash;
use kvatlas_proto::{BlockKey, KeyHasher};

pub const NONE: u32 = u32::MAX;

/// The defaults give four million (holder, block) entries with much sharing.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub workers: usize,
    pub resident: usize,
    pub system_prompts: usize,
    pub documents: usize,
    pub conversations: usize,
    pub prefill_chunk: usize,
    pub seed: u64,
}

pub struct Rng(u64);

#[derive(Clone, Copy)]
pub struct Event {
    pub worker: u32,
    pub removed: bool,
    pub parent: u32,
    start: u32,
    len: u32,
}

#[derive(Default)]
pub struct Log {
    pub events: Vec<Event>,
    nodes: Vec<u32>,
    pub stored: usize,
    pub removed: usize,
}

/// All blocks ever met.
#[derive(Default)]
pub struct Tree {
    pub local: Vec<u64>,
    pub key: Vec<u64>,
    pub parent: Vec<u32>,
    pub depth: Vec<u32>,
    children: HashMap<(u32, u64), u32>,
    hasher: KeyHasher,
}

/// A look-up: the blocks of `path`, then content that nobody stored.
pub struct Query {
    pub locals: Vec<u64>,
    pub keys: Vec<u64>,
    pub path: Vec<u32>,
}

struct Conversation {
    turns: Vec<u32>,
    worker: usize,
}

type Oldest = BinaryHeap<Reverse<(u32, Reverse<u32>, u32)>>;

pub struct Workload {
    pub shape: Shape,
    pub tree: Tree,
    pub leaves: Vec<u32>,
    pub held: Vec<HashMap<u32, u32>>,
    pub resident: usize,
    oldest: Vec<Oldest>,
    clock: u32,
    rng: Rng,
    unique: u64,
    conversations: Vec<Conversation>,
    system: Vec<usize>,
    document: Vec<usize>,
    system_rank: Zipf,
    document_rank: Zipf,
}

struct Zipf(Vec<f64>);

impl Default for Shape {
    fn default() -> Self {
        Self {
            workers: 64,
            resident: 4_000_000,
            system_prompts: 256,
            documents: 4_096,
            conversations: 6_000,
            prefill_chunk: 256,
            seed: 7,
        }
    }
}

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
    fn log_uniform(&mut self, low: usize, high: usize) -> usize {
        let (low, high) = ((low as f64).ln(), (high as f64).ln());
        (low + self.unit() * (high - low)).exp().round() as usize
    }
}

fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

impl Zipf {
    fn new(items: usize, exponent: f64) -> Self {
        let mut sum = 0.0;
        let add = |rank: usize| {
            sum += (rank as f64).powf(-exponent);
            sum
        };
        Self((1..=items).map(add).collect())
    }
    fn sample(&self, rng: &mut Rng) -> usize {
        let target = rng.unit() * self.0[self.0.len() - 1];
        self.0.partition_point(|edge| *edge < target)
    }
}

impl Log {
    pub fn push(&mut self, worker: usize, removed: bool, parent: u32, nodes: &[u32]) {
        let start = self.nodes.len() as u32;
        self.events.push(Event { worker: worker as u32, removed, parent, start, len: nodes.len() as u32 });
        self.nodes.extend_from_slice(nodes);
        *(if removed { &mut self.removed } else { &mut self.stored }) += nodes.len();
    }
    pub fn nodes(&self, event: &Event) -> &[u32] {
        &self.nodes[event.start as usize..(event.start + event.len) as usize]
    }
    pub fn blocks(&self) -> usize {
        self.stored + self.removed
    }
}

impl Tree {
    fn child(&mut self, parent: u32, local: u64) -> u32 {
        if let Some(node) = self.children.get(&(parent, local)) {
            return *node;
        }
        let node = self.local.len() as u32;
        let above = if parent == NONE { self.hasher.root() } else { BlockKey(self.key[parent as usize]) };
        self.key.push(self.hasher.extend(above, LocalHash(local)).0);
        self.local.push(local);
        self.parent.push(parent);
        self.depth.push(if parent == NONE { 0 } else { self.depth[parent as usize] + 1 });
        self.children.insert((parent, local), node);
        node
    }

    pub fn path(&self, node: u32) -> Vec<u32> {
        let mut path = Vec::new();
        let mut at = node;
        while at != NONE {
            path.push(at);
            at = self.parent[at as usize];
        }
        path.reverse();
        path
    }
}

impl Workload {
    pub fn new(shape: Shape) -> Self {
        let mut rng = Rng::new(shape.seed);
        Self {
            system: (0..shape.system_prompts).map(|_| rng.log_uniform(32, 256)).collect(),
            document: (0..shape.documents).map(|_| rng.log_uniform(64, 2048)).collect(),
            tree: Tree::default(),
            leaves: Vec::new(),
            held: (0..shape.workers).map(|_| HashMap::new()).collect(),
            oldest: (0..shape.workers).map(|_| BinaryHeap::new()).collect(),
            resident: 0,
            clock: 0,
            rng,
            unique: 0,
            conversations: Vec::new(),
            system_rank: Zipf::new(shape.system_prompts, 1.0),
            document_rank: Zipf::new(shape.documents, 0.9),
            shape,
        }
    }

    /// Requests until the workers hold what they can.
    pub fn fill(&mut self) -> Log {
        let mut log = Log::default();
        while self.resident < self.shape.resident {
            self.request(&mut log, false);
        }
        log
    }

    /// Requests into full caches until `stored` blocks were stored.
    pub fn churn(&mut self, stored: usize) -> Log {
        if self.oldest.iter().all(BinaryHeap::is_empty) {
            for (held, oldest) in self.held.iter().zip(&mut self.oldest) {
                let entry = |(node, touched): (&u32, &u32)| {
                    Reverse((*touched, Reverse(self.tree.depth[*node as usize]), *node))
                };
                *oldest = held.iter().map(entry).collect();
            }
        }
        let mut log = Log::default();
        while log.stored < stored {
            self.request(&mut log, true);
        }
        log
    }

    fn request(&mut self, log: &mut Log, evict: bool) {
        self.clock += 1;
        let shape = self.shape;
        let (index, tail) = if !self.conversations.is_empty() && self.rng.unit() < 0.7 {
            let index = self.rng.below(self.conversations.len());
            let turns = &self.conversations[index].turns;
            // One turn in twelve is an edit or a second try: it forks from an earlier turn.
            let fork = turns.len() > 1 && self.rng.unit() < 0.08;
            let turn = if fork { self.rng.below(turns.len() - 1) } else { turns.len() - 1 };
            let tail = turns[turn];
            if self.rng.unit() < 0.25 {
                self.conversations[index].worker = self.rng.below(shape.workers);
            }
            (index, tail)
        } else {
            self.open_conversation()
        };
        let worker = self.conversations[index].worker;
        let mut path = self.tree.path(tail);
        let user = self.rng.log_uniform(2, 48);
        if self.rng.unit() < 0.1 {
            // A canned message: the same content under many prefixes.
            let canned = self.rng.below(1000) as u64;
            for block in 0..user.min(8) as u64 {
                self.grow(&mut path, mix(4 << 60 | canned << 20 | block));
            }
        } else {
            self.grow_unique(&mut path, user);
        }
        let prompt = path.len();
        let response = self.rng.log_uniform(4, 48);
        self.grow_unique(&mut path, response);
        let tail = path[path.len() - 1];
        self.conversations[index].turns.push(tail);
        self.leaves.push(tail);

        let cached = path.iter().take_while(|node| self.held[worker].contains_key(node)).count();
        for node in &path {
            self.resident += usize::from(self.held[worker].insert(*node, self.clock).is_none());
            if evict {
                let depth = self.tree.depth[*node as usize];
                self.oldest[worker].push(Reverse((self.clock, Reverse(depth), *node)));
            }
        }
        let mut at = cached;
        while at < path.len() {
            let end = if at < prompt { (at + shape.prefill_chunk).min(prompt) } else { at + 1 };
            if evict {
                self.evict(worker, end - at, log);
            }
            log.push(worker, false, if at == 0 { NONE } else { path[at - 1] }, &path[at..end]);
            at = end;
        }
    }

    fn open_conversation(&mut self) -> (usize, u32) {
        let shape = self.shape;
        let system = self.system_rank.sample(&mut self.rng);
        let mut path = Vec::new();
        for block in 0..self.system[system] {
            self.grow(&mut path, mix(1 << 60 | (system as u64) << 20 | block as u64));
        }
        if self.rng.unit() < 0.35 {
            let document = self.document_rank.sample(&mut self.rng);
            for block in 0..self.document[document] {
                self.grow(&mut path, mix(2 << 60 | (document as u64) << 20 | block as u64));
            }
        }
        // A cache-aware router keeps a system prompt on a few home workers.
        let worker = if self.rng.unit() < 0.7 {
            (mix(system as u64 * 4 + self.rng.below(4) as u64) % shape.workers as u64) as usize
        } else {
            self.rng.below(shape.workers)
        };
        let tail = path[path.len() - 1];
        let conversation = Conversation { turns: vec![tail], worker };
        if self.conversations.len() < shape.conversations {
            self.conversations.push(conversation);
            return (self.conversations.len() - 1, tail);
        }
        let index = self.rng.below(self.conversations.len());
        self.conversations[index] = conversation;
        (index, tail)
    }

    fn grow(&mut self, path: &mut Vec<u32>, local: u64) {
        path.push(self.tree.child(path.last().copied().unwrap_or(NONE), local));
    }

    fn grow_unique(&mut self, path: &mut Vec<u32>, blocks: usize) {
        for _ in 0..blocks {
            self.unique += 1;
            self.grow(path, mix(self.unique ^ 3 << 60));
        }
    }

    fn evict(&mut self, worker: usize, count: usize, log: &mut Log) {
        let mut gone = Vec::with_capacity(count);
        while gone.len() < count
            && let Some(Reverse((touched, _, node))) = self.oldest[worker].pop()
        {
            if self.held[worker].get(&node) == Some(&touched) && touched != self.clock {
                self.held[worker].remove(&node);
                self.resident -= 1;
                gone.push(node);
            }
        }
        if !gone.is_empty() {
            log.push(worker, true, NONE, &gone);
        }
    }

    /// Single-block stores: each of the latest conversations in turn grows by a block, on a worker that holds its end.
    pub fn decode(&mut self, events: usize) -> Log {
        let mut log = Log::default();
        let recent = self.leaves.len().saturating_sub(4_000);
        let mut tails: Vec<(usize, u32)> = self.leaves[recent..]
            .iter()
            .filter_map(|leaf| Some((self.held.iter().position(|held| held.contains_key(leaf))?, *leaf)))
            .collect();
        for at in 0..events {
            let count = tails.len();
            let (worker, tail) = &mut tails[at % count];
            self.unique += 1;
            let node = self.tree.child(*tail, mix(self.unique ^ 3 << 60));
            self.held[*worker].insert(node, self.clock);
            self.resident += 1;
            log.push(*worker, false, *tail, &[node]);
            *tail = node;
        }
        log
    }

    /// Every worker loses this share of its blocks at random. Returns the removals and what was lost.
    pub fn punch(&mut self, share: f64) -> (Log, Vec<Vec<u32>>) {
        let mut log = Log::default();
        let mut holes = Vec::new();
        for worker in 0..self.shape.workers {
            let mut nodes: Vec<u32> = self.held[worker].keys().copied().collect();
            nodes.sort_unstable();
            nodes.retain(|_| self.rng.unit() < share);
            for chunk in nodes.chunks(4) {
                log.push(worker, true, NONE, chunk);
            }
            for node in &nodes {
                self.held[worker].remove(node);
            }
            self.resident -= nodes.len();
            holes.push(nodes);
        }
        (log, holes)
    }

    /// Stores what was lost again, parents first, one block per event.
    pub fn heal(&mut self, holes: &[Vec<u32>]) -> Log {
        let mut log = Log::default();
        for (worker, nodes) in holes.iter().enumerate() {
            let mut nodes = nodes.clone();
            nodes.sort_unstable_by_key(|node| self.tree.depth[*node as usize]);
            for node in nodes {
                log.push(worker, false, self.tree.parent[node as usize], &[node]);
                self.held[worker].insert(node, self.clock);
                self.resident += 1;
            }
        }
        log
    }

    pub fn distinct(&self) -> usize {
        let mut seen = vec![false; self.tree.local.len()];
        let all = self.held.iter().flat_map(HashMap::keys);
        all.filter(|node| !std::mem::replace(&mut seen[**node as usize], true)).count()
    }

    /// Look-ups of `blocks` blocks. The share of recent requests' content in them is drawn uniformly from 0 to 1: a
    /// fixed list of shares would favour structures that probe at just those positions.
    pub fn queries(&self, blocks: usize, count: usize, seed: u64) -> Vec<Query> {
        let mut rng = Rng::new(seed);
        let mut recent: Vec<u32> = self.leaves[self.leaves.len().saturating_sub(60_000)..].to_vec();
        recent.sort_unstable_by_key(|leaf| self.tree.depth[*leaf as usize]);
        (0..count)
            .map(|_| {
                let mut matched = rng.below(blocks + 1);
                let mut enough =
                    recent.partition_point(|leaf| ((self.tree.depth[*leaf as usize] + 1) as usize) < matched);
                if enough == recent.len() {
                    enough = recent.len() - 1;
                    matched = self.tree.depth[recent[enough] as usize] as usize + 1;
                }
                let leaf = recent[enough + rng.below(recent.len() - enough)];
                let mut path = self.tree.path(leaf);
                path.truncate(matched);
                let mut locals: Vec<u64> = path.iter().map(|node| self.tree.local[*node as usize]).collect();
                locals.resize_with(blocks, || rng.next());
                let mut above = self.tree.hasher.root();
                let chain = |local: &u64| {
                    above = self.tree.hasher.extend(above, LocalHash(*local));
                    above.0
                };
                let keys = locals.iter().map(chain).collect();
                Query { locals, keys, path }
            })
            .collect()
    }

    /// Per worker, how many leading blocks of the query it holds now.
    pub fn truth(&self, query: &Query, out: &mut Vec<u32>) {
        out.clear();
        out.extend(
            self.held
                .iter()
                .map(|held| query.path.iter().take_while(|node| held.contains_key(node)).count() as u32),
        );
    }
}
