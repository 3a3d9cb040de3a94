use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::naive::NaiveTable;

/// A tree of blocks: block 0 has no parent; every other one follows a smaller one (or none).
#[derive(Clone, Debug)]
struct Tree(Vec<Option<usize>>);

#[derive(Clone, Debug)]
enum Operation {
    /// Holder, last block of the run, length of the run.
    Store(u32, usize, usize),
    Remove(u32, Vec<usize>),
    /// Holder, and whether to give the pieces back one by one.
    Clear(u32, bool),
}

const BLOCKS: usize = 40;

impl Tree {
    fn key(block: usize) -> BlockKey {
        BlockKey(1_000 + block as u64)
    }

    /// Blocks from the root to this one.
    fn path(&self, block: usize) -> Vec<usize> {
        let mut path = vec![block];
        while let Some(parent) = self.0[path[path.len() - 1]] {
            path.push(parent);
        }
        path.reverse();
        path
    }

    fn keys(&self, block: usize) -> Vec<BlockKey> {
        self.path(block).into_iter().map(Self::key).collect()
    }
}

fn tree(fork: usize) -> impl Strategy<Value = Tree> {
    proptest::collection::vec((0..fork, 0..1_000usize), BLOCKS).prop_map(move |choices| {
        let follow = |(at, (kind, other)): (usize, (usize, usize))| match kind {
            _ if at == 0 => None,
            0 => Some(other % at),
            1 if fork > 2 => None,
            _ => Some(at - 1),
        };
        Tree(choices.into_iter().enumerate().map(follow).collect())
    })
}

fn operation(holders: u32) -> impl Strategy<Value = Operation> {
    prop_oneof![
        8 => (0..holders, 0..BLOCKS, 1..12usize).prop_map(|(holder, block, length)| Operation::Store(holder, block, length)),
        5 => (0..holders, proptest::collection::vec(0..BLOCKS, 1..6)).prop_map(|(holder, blocks)| Operation::Remove(holder, blocks)),
        2 => (0..holders, 0..BLOCKS, 1..8usize).prop_map(|(holder, block, length)| Operation::Remove(
            holder,
            (block.saturating_sub(length)..=block).rev().collect()
        )),
        1 => (0..holders, any::<bool>()).prop_map(|(holder, pieces)| Operation::Clear(holder, pieces)),
    ]
}

/// Spreads small numbers over words, so that all forms of sets are met.
fn holder(number: u32, spread: u32) -> Holder {
    Holder(number * spread % MAX_HOLDERS)
}

fn depths(seen: &mut Match) -> BTreeMap<u32, u32> {
    let mut depths = BTreeMap::new();
    seen.each_depth(|holder, depth| assert!(depths.insert(holder.0, depth).is_none()));
    depths
}

fn positions(seen: &Match, holder: Holder) -> BTreeSet<u32> {
    let runs: Vec<_> = seen.runs().collect();
    assert!(runs.windows(2).all(|pair| pair[0].end <= pair[1].start));
    for run in &runs {
        let mut count = 0;
        run.each_holder(|holder| {
            assert!(run.contains(holder));
            count += 1;
        });
        assert_eq!(count, run.holders());
    }
    runs.iter().filter(|run| run.contains(holder)).flat_map(|run| run.start..run.end).collect()
}

fn apply(
    engine: &Engine,
    naive: &mut NaiveTable,
    tree: &Tree,
    operation: &Operation,
    spread: u32,
) -> Result<(), TestCaseError> {
    let mut writer = engine.write();
    match operation {
        Operation::Store(number, block, length) => {
            let path = tree.path(*block);
            let run = &path[path.len().saturating_sub(*length)..];
            let keys: Vec<_> = run.iter().map(|block| Tree::key(*block)).collect();
            let holder = holder(*number, spread);
            let parent = tree.0[run[0]].map(Tree::key);
            let stored = writer.store(holder, parent, &keys);
            let new = keys.iter().filter(|key| naive.store(Holder(holder.0), **key)).count();
            prop_assert_eq!(stored.new, new);
            prop_assert_eq!(stored.refused, 0);
        }
        Operation::Remove(number, blocks) => {
            let holder = holder(*number, spread);
            let keys: Vec<_> = blocks.iter().map(|block| Tree::key(*block)).collect();
            let removed = writer.remove(holder, &keys);
            let gone = keys.iter().filter(|key| naive.remove(Holder(holder.0), **key)).count();
            prop_assert_eq!(removed.blocks, gone);
        }
        Operation::Clear(number, pieces) => {
            let holder = holder(*number, spread);
            let mut retired = writer.retire(holder);
            while !writer.release(&mut retired, if *pieces { 1 } else { usize::MAX }) {
                prop_assert_eq!(writer.check(), Ok(()));
            }
            prop_assert_eq!(retired.blocks(), naive.clear(Holder(holder.0)));
        }
    }
    prop_assert_eq!(writer.check(), Ok(()));
    Ok(())
}

fn compare(
    engine: &Engine,
    naive: &NaiveTable,
    tree: &Tree,
    holders: u32,
    spread: u32,
) -> Result<(), TestCaseError> {
    let mut seen = Match::default();
    for block in 0..BLOCKS {
        let keys = tree.keys(block);
        engine.find(&keys, &mut seen);
        let found = depths(&mut seen);
        engine.find_beyond(&keys, &mut seen);
        prop_assert_eq!(&depths(&mut seen), &found);
        for number in 0..holders {
            let owner = holder(number, spread);
            let naive_owner = Holder(owner.0);
            let depth = naive.match_depth(naive_owner, &keys) as u32;
            prop_assert_eq!(found.get(&owner.0).copied().unwrap_or(0), depth, "{:?} of {:?}", owner, keys);
            let held: BTreeSet<u32> =
                (0..keys.len() as u32).filter(|at| naive.holds(naive_owner, keys[*at as usize])).collect();
            prop_assert_eq!(positions(&seen, owner), held, "{:?} of {:?}", owner, keys);
        }
        // As a suffix of every length.
        for cut in 1..keys.len() {
            engine.find_after(keys[cut - 1], cut as u32, &keys[cut..], true, &mut seen);
            for number in 0..holders {
                let owner = holder(number, spread);
                let holds = |at: u32| naive.holds(Holder(owner.0), keys[at as usize]);
                let mut held: BTreeSet<u32> =
                    (cut as u32..keys.len() as u32).filter(|at| holds(*at)).collect();
                if holds(cut as u32 - 1) {
                    held.extend(0..cut as u32);
                }
                // Without the base, nothing is known about what follows it.
                let known = engine.shared.find(keys[cut - 1], &engine.write().writer.token);
                if known.is_ok_and(|place| place.is_some()) {
                    prop_assert_eq!(positions(&seen, owner), held, "{:?} of {:?} after {}", owner, keys, cut);
                }
            }
        }
    }
    let writer = engine.write();
    for number in 0..holders {
        let owner = holder(number, spread);
        let mut keys = Vec::new();
        writer.keys_of(owner, |parent, key| {
            let block = (key.0 - 1_000) as usize;
            assert_eq!(parent, tree.0[block].map(Tree::key));
            keys.push(key);
        });
        keys.sort_unstable();
        prop_assert_eq!(writer.blocks_of(owner), keys.len());
        prop_assert_eq!(keys, naive.sorted_keys(Holder(owner.0)));
        for block in 0..BLOCKS {
            let key = Tree::key(block);
            prop_assert_eq!(writer.holds(owner, key), naive.holds(Holder(owner.0), key));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_answer_equals_the_naive_model(
        tree in (2..6usize).prop_flat_map(tree),
        script in proptest::collection::vec(operation(4), 0..60),
        spread in prop_oneof![Just(1), Just(40), Just(70), Just(3_001), Just(16_001)],
    ) {
        let engine = Engine::default();
        let mut naive = NaiveTable::default();
        for operation in &script {
            apply(&engine, &mut naive, &tree, operation, spread)?;
        }
        compare(&engine, &naive, &tree, 4, spread)?;
        // And nothing is left when nobody holds anything.
        for number in 0..4 {
            engine.write().clear(holder(number, spread));
        }
        let totals = engine.totals();
        prop_assert_eq!((totals.entries, totals.distinct, totals.ghosts, totals.floating), (0, 0, 0, 0));
    }
}

/// Chains of `LENGTH` blocks with a common beginning; the key says chain and position.
fn chain(number: u64, length: u64) -> Vec<BlockKey> {
    (0..length).map(|at| BlockKey(if at < 8 { at + 1 } else { (number + 1) << 32 | at })).collect()
}

/// Holder h stores chain blocks in order and removes them from the end, one by one: at any moment it holds a beginning.
/// Beside that, holder h + 1 always holds exactly one block more or as many as holder h. A reader that mixes two
/// moments would sooner or later see something else.
#[test]
fn readers_beside_a_writer_see_states_that_existed() {
    const LENGTH: usize = if cfg!(miri) { 12 } else { 300 };
    const ROUNDS: usize = if cfg!(miri) { 2 } else { 60 };
    const CHAINS: u64 = 3;
    let engine = Engine::default();
    let done = std::sync::atomic::AtomicBool::new(false);
    let looked = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for reader in 0..2 {
            let (engine, done, looked) = (&engine, &done, &looked);
            scope.spawn(move || {
                let mut seen = Match::default();
                let mut at = reader;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    at += 1;
                    let number = at % CHAINS;
                    let keys = chain(number, LENGTH as u64);
                    engine.find(&keys, &mut seen);
                    let found = depths(&mut seen);
                    let of = |holder: u64| found.get(&(holder as u32)).copied().unwrap_or(0);
                    let (behind, ahead) = (of(2 * number), of(2 * number + 1));
                    assert!(ahead == behind || ahead == behind + 1, "{behind} and {ahead} of chain {number}");
                    // What is held has no hole.
                    for run in seen.runs().filter(|run| run.contains(Holder(2 * number as u32))) {
                        assert!(run.end <= behind, "{run:?} behind {behind}");
                    }
                    looked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
            });
        }
        for round in 0..ROUNDS {
            for number in 0..CHAINS {
                let keys = chain(number, LENGTH as u64);
                let (behind, ahead) = (Holder(2 * number as u32), Holder(2 * number as u32 + 1));
                for (at, key) in keys.iter().enumerate() {
                    let parent = at.checked_sub(1).map(|before| keys[before]);
                    let mut writer = engine.write();
                    writer.store(ahead, parent, &[*key]);
                    writer.store(behind, parent, &[*key]);
                }
                // A third holder comes and goes as a whole.
                let guest = Holder(100 + round as u32 % 7);
                engine.write().store(guest, None, &keys);
                engine.write().clear(guest);
                for key in keys.iter().rev() {
                    let mut writer = engine.write();
                    writer.remove(behind, &[*key]);
                    writer.remove(ahead, &[*key]);
                }
            }
        }
        while looked.load(std::sync::atomic::Ordering::Relaxed) < 4 {
            std::thread::yield_now();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let writer = engine.write();
    assert_eq!(writer.check(), Ok(()));
    assert_eq!(writer.entries(), 0);
}

#[test]
fn at_the_memory_limit_the_least_recently_used_leaves_go_first() {
    let empty = Engine::default().write().bytes();
    let engine = Engine::new(EngineLimits { max_bytes: empty + 100_000 });
    let mut writer = engine.write();
    // A shared beginning with many conversations below it.
    let shared: Vec<_> = (1..=32).map(BlockKey).collect();
    assert_eq!(writer.store(Holder(0), None, &shared).refused, 0);
    let conversation =
        |number: u64| -> Vec<BlockKey> { (0..50).map(|at| BlockKey((number + 2) << 32 | at)).collect() };
    for number in 0..1_000 {
        let keys = conversation(number);
        let stored = writer.store(Holder(number as u32 % 3), Some(BlockKey(32)), &keys);
        assert_eq!((stored.refused, stored.new), (0, 50));
        // The first conversation is in use all the time.
        writer.store(Holder(0), Some(BlockKey(32)), &conversation(0));
        // A store may go a little beyond, and what readers might still look at waits to be freed.
        assert!(writer.bytes() <= empty + 100_000 + 64_000, "{}", writer.bytes());
    }
    assert_eq!(writer.check(), Ok(()));
    let totals = writer.totals();
    assert!(totals.evicted > 10_000 && totals.entries > 1_000, "{totals:?}");
    // What is left is what was used last, and the parents of it.
    assert!(writer.holds(Holder(0), BlockKey(1)) && writer.holds(Holder(0), BlockKey(32)));
    assert!(conversation(0).iter().all(|key| writer.holds(Holder(0), *key)));
    let left = (0..1_000).filter(|number| writer.holds(Holder(*number as u32 % 3), conversation(*number)[0]));
    let left: Vec<_> = left.skip(1).collect();
    assert!(left.len() > 10 && left.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{left:?}");
    assert_eq!(left.last(), Some(&999));
}

#[test]
fn what_was_matched_counts_as_used() {
    let empty = Engine::default().write().bytes();
    let engine = Engine::new(EngineLimits { max_bytes: empty + 100_000 });
    let conversation =
        |number: u64| -> Vec<BlockKey> { (0..50).map(|at| BlockKey((number + 2) << 32 | at)).collect() };
    let mut seen = Match::default();
    for number in 0..400 {
        assert_eq!(engine.write().store(Holder(0), None, &conversation(number)).refused, 0);
        engine.find(&conversation(0), &mut seen);
        assert_eq!(depths(&mut seen)[&0], 50);
        engine.note_matches(&mut seen);
    }
    assert!(!engine.write().holds(Holder(0), conversation(1)[0]));
}

#[test]
fn a_parent_that_is_not_known_comes_later_in_any_order() {
    let keys: Vec<_> = (1..=200).map(BlockKey).collect();
    let mut order: Vec<usize> = (0..keys.len()).collect();
    for turn in 0..6 {
        // Forwards, backwards, and mixed.
        match turn {
            1 => order.reverse(),
            _ => order.sort_unstable_by_key(|at| (at * 7_919 + turn * 31) % (turn * 61 + 1)),
        }
        let engine = Engine::default();
        let mut writer = engine.write();
        for (done, at) in order.iter().enumerate() {
            let parent = at.checked_sub(1).map(|before| keys[before]);
            assert_eq!(writer.store(Holder(3), parent, &[keys[*at]]).new, 1);
            assert_eq!(writer.entries(), done + 1);
            assert_eq!(writer.check(), Ok(()));
        }
        assert_eq!(writer.totals().floating, 0);
        drop(writer);
        let mut seen = Match::default();
        engine.find(&keys, &mut seen);
        assert_eq!(depths(&mut seen), BTreeMap::from([(3, 200)]));
        assert_eq!(engine.write().clear(Holder(3)), 200);
        assert_eq!(engine.totals().ghosts, 0);
    }
}

#[test]
fn strands_longer_than_their_bound_and_parts_that_grow_and_shrink_lose_nothing() {
    let engine = Engine::default();
    let total = if cfg!(miri) { 6_000 } else { 200_000 };
    let keys: Vec<_> = (1..=total).map(BlockKey).collect();
    let mut writer = engine.write();
    assert_eq!(writer.store(Holder(1), None, &keys).new, keys.len());
    assert_eq!(writer.store(Holder(2), None, &keys[..5_000]).new, 5_000);
    assert_eq!(writer.check(), Ok(()));
    drop(writer);
    let mut seen = Match::default();
    engine.find(&keys, &mut seen);
    assert_eq!(depths(&mut seen), BTreeMap::from([(1, total as u32), (2, 5_000)]));
    let large = engine.write().bytes();
    assert_eq!(engine.write().clear(Holder(1)), keys.len());
    assert_eq!(engine.write().check(), Ok(()));
    engine.find(&keys, &mut seen);
    assert_eq!(depths(&mut seen), BTreeMap::from([(2, 5_000)]));
    let mut retired = engine.write().retire(Holder(2));
    while !engine.write().release(&mut retired, 1) {}
    let totals = engine.totals();
    assert_eq!((totals.entries, totals.ghosts), (0, 0));
    assert!(totals.bytes < large, "{} of {large} bytes", totals.bytes);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Lists that repeat keys, and give them other parents than before, change what is held as told and nothing else.
    #[test]
    fn contradictions_leave_every_part_in_agreement(
        script in proptest::collection::vec(
            (0..4u32, any::<bool>(), proptest::option::of(0..12u64), proptest::collection::vec(0..12u64, 1..7)),
            1..60,
        ),
    ) {
        let engine = Engine::default();
        let mut naive: BTreeMap<u32, BTreeSet<u64>> = BTreeMap::new();
        for (number, add, parent, keys) in script {
            let keys: Vec<_> = keys.into_iter().map(BlockKey).collect();
            let mut writer = engine.write();
            let held = naive.entry(number).or_default();
            if add {
                let before = held.len();
                held.extend(keys.iter().map(|key| key.0));
                let stored = writer.store(Holder(number), parent.map(BlockKey), &keys);
                prop_assert_eq!((stored.new, stored.refused), (held.len() - before, 0));
            } else {
                let before = held.len();
                held.retain(|held| !keys.contains(&BlockKey(*held)));
                prop_assert_eq!(writer.remove(Holder(number), &keys).blocks, before - held.len());
            }
            prop_assert_eq!(writer.check(), Ok(()));
            for (number, held) in &naive {
                let mut keys = BTreeSet::new();
                writer.keys_of(Holder(*number), |_, key| assert!(keys.insert(key.0)));
                prop_assert_eq!(&keys, held);
                let digest = kvatlas_proto::Digest::of(held.iter().map(|key| BlockKey(*key)));
                prop_assert_eq!(writer.digest_of(Holder(*number)), digest);
            }
        }
    }
}
