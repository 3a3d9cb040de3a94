//! Many servers give the answer of one: the same events into one whole index and into several that own parts.

use std::collections::BTreeSet;

use bytes::Bytes;
use kvatlas_proto::frame::{FrameOwner, FrameView};
use kvatlas_proto::keys::KeySeed;
use kvatlas_proto::shard::{Place, SEGMENT_BLOCKS};
use kvatlas_proto::{BlockKey, GroupKind, Partition, ShardSet, Tier};
use proptest::prelude::*;

use super::answer::ShardAnswer;
use crate::frames::{Op, Publisher, owner};
use crate::index::{Index, IndexLimits};
use crate::matching::TierWeights;
use crate::query::{PromptInput, ScoreAnswer, ScoreQuery};

/// One source in every form: whole, and by shard.
struct Source {
    whole: Publisher,
    lanes: Vec<Publisher>,
}

struct World {
    partition: Partition,
    whole: Index,
    servers: Vec<Index>,
    sets: Vec<ShardSet>,
}

/// A stretch of a prompt that a source holds: which owner, of which prompt, from where to where.
#[derive(Clone, Debug)]
struct Holding {
    source: usize,
    owner: u8,
    prompt: usize,
    blocks: std::ops::Range<usize>,
}

fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.rotate_left(29) ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 31)
}

/// Prompts that share beginnings: prompt n leaves prompt 0 after `shared` blocks.
fn prompts(shapes: &[(usize, usize)]) -> Vec<Vec<u64>> {
    shapes
        .iter()
        .enumerate()
        .map(|(number, (shared, length))| {
            let mut key = 1;
            let of = |at: usize| if at < *shared { 0 } else { number as u64 };
            (0..*length)
                .map(|at| {
                    key = mix(key, of(at) << 32 | at as u64);
                    key
                })
                .collect()
        })
        .collect()
}

fn owners() -> Vec<FrameOwner> {
    let window = GroupKind::SlidingWindow { window_tokens: 48, block_tokens: 16 };
    vec![
        owner(Tier::Gpu, 0, GroupKind::Full),
        owner(Tier::Cpu, 0, GroupKind::Full),
        owner(Tier::Gpu, 1, window),
        owner(Tier::Gpu, 2, GroupKind::State { block_tokens: 16 }),
    ]
}

// === impl Source ===

impl Source {
    fn new(number: usize, groups: usize, partition: Partition) -> Self {
        let publisher =
            || Publisher::new("m", &format!("pod-{number}:1")).owners(owners()[..groups].to_vec());
        let lanes = partition.all().map(|shard| {
            let mut lane = publisher();
            lane.header.shard = shard;
            lane
        });
        Self { whole: publisher(), lanes: lanes.collect() }
    }
}

// === impl World ===

impl World {
    fn new(shards: u32, servers: u32) -> Self {
        let partition = Partition::new(shards).unwrap();
        let sets: Vec<_> = ShardSet::new(0, servers).unwrap().siblings().collect();
        let server = |set: &ShardSet| {
            let index = Index::cut(IndexLimits::default(), KeySeed::PUBLISHED, partition);
            index.own(&set.shards(partition));
            index
        };
        let whole = Index::new(IndexLimits::default(), KeySeed::PUBLISHED);
        Self { partition, whole, servers: sets.iter().map(server).collect(), sets }
    }

    fn publish(&self, source: &mut Source, ops: &[Op], places: &[(u64, Place, u64)]) {
        send(&self.whole, &source.whole.frame(ops));
        for lane in &mut source.lanes {
            let of_lane = |key: &u64| {
                places
                    .iter()
                    .find(|(known, ..)| known == key)
                    .is_some_and(|(_, place, _)| place.shard == lane.header.shard.number())
            };
            let mut own = Vec::new();
            for op in ops {
                match op {
                    Op::StoredAfter(owner, _, keys) => {
                        for key in keys.iter().filter(|key| of_lane(key)) {
                            let (_, place, parent) = places.iter().find(|(known, ..)| known == key).unwrap();
                            let parent = if place.starts_segment() { lane.root } else { *parent };
                            own.push(Op::StoredAfter(*owner, parent, vec![*key]));
                        }
                    }
                    Op::Removed(owner, keys) => {
                        let keys: Vec<u64> = keys.iter().copied().filter(|key| of_lane(key)).collect();
                        if !keys.is_empty() {
                            own.push(Op::Removed(*owner, keys));
                        }
                    }
                    other => own.push(other.clone()),
                }
            }
            let frame = lane.frame(&own);
            for (server, set) in self.servers.iter().zip(&self.sets) {
                if set.shards(self.partition).contains(&lane.header.shard) {
                    send(server, &frame);
                }
            }
        }
    }

    /// What server `asked` would answer if all others answered, except those in `silent`.
    fn ask(&self, asked: usize, query: &ScoreQuery<'_>, silent: &[usize]) -> (ScoreAnswer, f64) {
        let coordinator = &self.servers[asked];
        let inquiry = coordinator.inquire(query).unwrap();
        let shards = inquiry.shards(self.partition);
        let (mut answers, mut unanswered) = (Vec::new(), Vec::new());
        for (number, (server, set)) in self.servers.iter().zip(&self.sets).enumerate() {
            let own: BTreeSet<u16> = set.shards(self.partition).iter().map(|shard| shard.number()).collect();
            let asked_for: Vec<u16> = shards.iter().copied().filter(|shard| own.contains(shard)).collect();
            if silent.contains(&number) {
                unanswered.extend(asked_for);
                continue;
            }
            if asked_for.is_empty() {
                continue;
            }
            let question = inquiry.question(7, |shard| asked_for.contains(&shard));
            let question = super::question::ShardQuestion::parse(&question.encode().unwrap()).unwrap();
            let answer = server.look_up(&question, |shard| own.contains(&shard.number()), 0);
            assert!(answer.missing.is_empty());
            answers.push(ShardAnswer::parse(&answer.encode(&question).unwrap(), &question).unwrap());
        }
        let coverage = inquiry.coverage(&answers, &unanswered).share();
        (coordinator.conclude(query, inquiry, &answers, 0), coverage)
    }
}

fn send(index: &Index, frame: &[u8]) {
    let bytes = Bytes::copy_from_slice(frame);
    index.apply(&FrameView::parse(&bytes).unwrap(), &bytes, 0).unwrap();
}

fn query<'a>(input: PromptInput<'a>, candidates: &'a [String]) -> ScoreQuery<'a> {
    ScoreQuery {
        model: "m",
        tenant: "",
        block_size: Some(16),
        input,
        candidates,
        weights: TierWeights::default(),
        limit: None,
    }
}

fn by_keys(keys: &[u64]) -> PromptInput<'_> {
    PromptInput::Keys { keys, prompt_tokens: Some(keys.len() as u32 * 16 + 1) }
}

/// Everything that an answer says of rows, for comparison.
fn shown(answer: &ScoreAnswer) -> Vec<String> {
    answer.rows.iter().map(|row| format!("{row:?}")).collect()
}

fn holding(sources: usize, prompts: usize) -> impl Strategy<Value = Holding> {
    (0..sources, 0u8..4, 0..prompts, 0usize..150, 1usize..150).prop_map(
        |(source, owner, prompt, start, length)| Holding {
            source,
            owner,
            prompt,
            // Most begin at the beginning, as engines' do.
            blocks: if length % 3 == 0 { start..start + length } else { 0..length },
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn many_servers_give_the_answer_of_one(
        shapes in proptest::collection::vec((0usize..140, 1usize..150), 1..4),
        stored in proptest::collection::vec(holding(4, 3), 1..14),
        removed in proptest::collection::vec(holding(4, 3), 0..6),
        groups in proptest::collection::vec(1usize..=4, 4),
        shards in 2u32..24,
        servers in 1u32..5,
        base in 1usize..140,
        names_segment in any::<bool>(),
    ) {
        let world = World::new(shards.max(servers), servers);
        let prompts = prompts(&shapes);
        let mut places: Vec<(u64, Place, u64)> = Vec::new();
        for prompt in &prompts {
            let (mut before, mut parent) = (None, Publisher::new("m", "x:1").root);
            for key in prompt {
                let key_ = BlockKey(*key);
                let place = before.map_or_else(|| world.partition.first(key_), |at| world.partition.next(at, key_));
                if !places.iter().any(|(known, ..)| known == key) {
                    places.push((*key, place, parent));
                }
                (before, parent) = (Some(place), *key);
            }
        }
        let mut sources: Vec<Source> =
            groups.iter().enumerate().map(|(n, groups)| Source::new(n, *groups, world.partition)).collect();
        for source in &mut sources {
            world.publish(source, &[], &places);
        }
        for (holding, stores) in stored.iter().map(|h| (h, true)).chain(removed.iter().map(|h| (h, false))) {
            let prompt = &prompts[holding.prompt % prompts.len()];
            let blocks = holding.blocks.start.min(prompt.len())..holding.blocks.end.min(prompt.len());
            let owner = holding.owner % groups[holding.source] as u8;
            if blocks.is_empty() {
                continue;
            }
            let keys = prompt[blocks.clone()].to_vec();
            let source = &mut sources[holding.source];
            let parent = if blocks.start == 0 { source.whole.root } else { prompt[blocks.start - 1] };
            let op = if stores { Op::StoredAfter(owner, parent, keys) } else { Op::Removed(owner, keys) };
            world.publish(source, &[op], &places);
        }
        let known: Vec<String> = (0..5).map(|n| format!("pod-{n}:1")).collect();
        for prompt in &prompts {
            for candidates in [&known[..0], &known[..]] {
                let base = base.min(prompt.len());
                let segment = (base - 1) - (base - 1) % SEGMENT_BLOCKS as usize;
                let suffix = PromptInput::Suffix {
                    base_key: prompt[base - 1],
                    base_blocks: base as u32,
                    keys: &prompt[base..],
                    base_segment: names_segment.then(|| prompt[segment]),
                    prompt_tokens: Some(prompt.len() as u32 * 16 + 5),
                };
                for query in [query(by_keys(prompt), candidates), query(suffix, candidates)] {
                    let expected = world.whole.score(&query).unwrap();
                    for asked in 0..world.servers.len() {
                        let (answer, coverage) = world.ask(asked, &query, &[]);
                        prop_assert_eq!(shown(&answer), shown(&expected), "server {}", asked);
                        prop_assert_eq!((answer.prompt_blocks, coverage), (expected.prompt_blocks, 1.0));
                    }
                    // Who does not answer is missed, and never leads to a deeper match than there is.
                    if world.servers.len() > 1 {
                        let (partial, coverage) = world.ask(0, &query, &[1]);
                        prop_assert!((0.0..=1.0).contains(&coverage));
                        for row in &partial.rows {
                            let whole = expected.rows.iter().find(|known| known.instance == row.instance);
                            let most = whole.map_or(0, |row| row.matched.matched_blocks);
                            prop_assert!(row.matched.matched_blocks <= most);
                        }
                        if shown(&partial) != shown(&expected) {
                            prop_assert!(coverage < 1.0, "something is missing and nobody says so");
                        }
                    }
                }
            }
        }
        for index in world.servers.iter().chain([&world.whole]) {
            prop_assert_eq!(index.check(), Ok(()));
        }
    }
}

#[test]
fn shards_that_are_given_up_take_their_blocks_along() {
    let world = World::new(8, 1);
    let mut source = Source::new(0, 1, world.partition);
    let [prompt] = &prompts(&[(0, 300)])[..] else { panic!("one prompt") };
    let mut places = Vec::new();
    let (mut before, mut parent) = (None, source.whole.root);
    for key in prompt {
        let place = before.map_or_else(
            || world.partition.first(BlockKey(*key)),
            |at| world.partition.next(at, BlockKey(*key)),
        );
        places.push((*key, place, parent));
        (before, parent) = (Some(place), *key);
    }
    let op = Op::StoredAfter(0, source.whole.root, prompt.clone());
    world.publish(&mut source, &[op], &places);
    let server = &world.servers[0];
    assert_eq!(server.totals(0).blocks, 300);
    let half = ShardSet::new(0, 2).unwrap().shards(world.partition);
    server.own(&half);
    let kept = places.iter().filter(|(_, place, _)| half.iter().any(|s| s.number() == place.shard)).count();
    assert_eq!(server.totals(0).blocks, kept);
    server.check().unwrap();
    let late = source.lanes[usize::from(places[0].1.shard)].heartbeat();
    let bytes = Bytes::from(late);
    let ours = half.iter().any(|shard| shard.number() == places[0].1.shard);
    assert_eq!(server.apply(&FrameView::parse(&bytes).unwrap(), &bytes, 0).is_ok(), ours);
    assert_eq!(server.totals(0).blocks, kept);
}

#[test]
fn a_source_of_a_checkpoint_is_found_out_once_it_is_proved_in_every_shard() {
    let partition = Partition::new(2).unwrap();
    let mut source = Source::new(0, 1, partition);
    let server = || {
        let index = Index::cut(IndexLimits::default(), KeySeed::PUBLISHED, partition);
        index.own(&ShardSet::ALL.shards(partition));
        index
    };
    let before = server();
    for (lane, key) in source.lanes.iter_mut().zip(1..) {
        let root = lane.root;
        send(&before, &lane.frame(&[Op::StoredAfter(0, root, vec![key])]));
    }
    let (checkpoint, _) = before.write_checkpoint(std::io::Cursor::new(Vec::new())).unwrap();
    let after = server();
    after.restore(checkpoint.get_ref(), 0).unwrap();
    assert!(!after.is_finding_out(0), "whether it still lives is not known");
    send(&after, &source.lanes[0].heartbeat());
    assert!(after.is_finding_out(0));
    send(&after, &source.lanes[1].heartbeat());
    assert!(!after.is_finding_out(0));
}

#[test]
fn a_shard_that_is_given_up_and_taken_back_leaves_no_turns_behind() {
    let partition = Partition::new(2).unwrap();
    let index = Index::cut(IndexLimits::default(), KeySeed::PUBLISHED, partition);
    let mut source = Source::new(0, 1, partition);
    let (root, all) = (source.lanes[0].root, ShardSet::ALL.shards(partition));
    source.lanes[0].frame(&[Op::StoredAfter(0, root, vec![1])]);
    for _ in 0..3 {
        index.own(&all);
        // What is held is not known, so it has to be asked.
        send(&index, &source.lanes[0].heartbeat());
        assert!(index.is_troubled());
        index.own(&[]);
        assert!(!index.is_troubled());
    }
    index.check().unwrap();
}
