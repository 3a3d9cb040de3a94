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
                keys.iter().for_each(|key| drop(held.remove(&key.0)));
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
