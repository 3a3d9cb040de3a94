//! The simulated engine against a naive reading of its own events.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// An index built from events alone: copies per hash, and which hash follows which tokens.
#[derive(Default)]
struct Replayed {
    copies: BTreeMap<EngineHash, u32>,
    children: BTreeMap<(Option<EngineHash>, Vec<u32>), EngineHash>,
}

impl Replayed {
    fn apply(&mut self, events: &[Event]) {
        for event in events {
            match event {
                Event::Stored(stored) => self.store(stored),
                Event::Removed(removed) => {
                    let [hash] = removed.block_hashes.as_slice() else { panic!("one hash per removal") };
                    let copies = self.copies.get_mut(hash).expect("only cached blocks are removed");
                    *copies -= 1;
                    if *copies == 0 {
                        self.copies.remove(hash);
                    }
                }
                Event::Cleared => self.copies.clear(),
            }
        }
    }

    fn store(&mut self, stored: &BlockStored) {
        let blocks = stored.token_ids.chunks(stored.block_size as usize);
        assert_eq!(blocks.len(), stored.block_hashes.len());
        let mut parent = stored.parent_block_hash.clone();
        for (hash, block) in stored.block_hashes.iter().zip(blocks) {
            if let Some(parent) = &parent {
                assert!(self.copies.contains_key(parent), "a block is stored under a cached parent");
            }
            *self.copies.entry(hash.clone()).or_default() += 1;
            self.children.insert((parent, block.to_vec()), hash.clone());
            parent = Some(hash.clone());
        }
    }

    /// Leading tokens of a prompt whose blocks are all cached.
    fn cached_tokens(&self, prompt: &[u32], block_size: u32) -> u32 {
        let mut parent = None;
        let mut tokens = 0;
        for block in prompt.chunks_exact(block_size as usize) {
            let child = self.children.get(&(parent, block.to_vec()));
            let Some(hash) = child.filter(|hash| self.copies.contains_key(hash)) else { break };
            parent = Some(hash.clone());
            tokens += block_size;
        }
        tokens
    }
}

fn engine(blocks: u32, block_size: u32, max_step_tokens: u32) -> SimEngine {
    let config = SimConfig { blocks, block_size, max_step_tokens, max_running: 3, hashes: HashForm::Int };
    SimEngine::new(config, 7).unwrap()
}

fn prompt(range: std::ops::Range<u32>) -> Vec<u32> {
    range.collect()
}

#[test]
fn a_fully_cached_prompt_still_computes_its_last_block_and_stores_a_second_copy() {
    let mut engine = engine(64, 4, 100);
    let first = engine.submit(&prompt(0..16), 1).unwrap();
    assert_eq!((first.report.cached_tokens, first.report.blocks_prefilled), (0, 4));
    let second = engine.submit(&prompt(0..16), 1).unwrap();
    assert_eq!((second.report.cached_tokens, second.report.blocks_prefilled), (12, 1));
    assert_eq!(engine.cached_tokens(&prompt(0..16)), 16);
    assert_eq!(engine.held().values().copied().max(), Some(2));
}

#[test]
fn prefill_is_cut_into_chunks_with_one_stored_event_each() {
    let mut engine = engine(64, 4, 8);
    let submitted = engine.submit(&prompt(0..21), 1).unwrap();
    let stored: Vec<usize> = submitted
        .batches
        .iter()
        .flatten()
        .map(|event| match event {
            Event::Stored(stored) => stored.block_hashes.len(),
            _ => panic!("nothing is removed"),
        })
        .collect();
    assert_eq!(stored, [2, 2, 1]);
}

#[test]
fn decoding_stores_one_block_each_time_it_fills_one() {
    let mut engine = engine(64, 4, 100);
    let submitted = engine.submit(&prompt(0..4), 9).unwrap();
    assert_eq!(submitted.batches.len(), 3, "the prompt and two blocks of the answer");
    assert_eq!(submitted.report.output, answer(&prompt(0..4), 9));
    let text: Vec<u32> = prompt(0..4).into_iter().chain(submitted.report.output).collect();
    assert_eq!(engine.cached_tokens(&text), 12);
}

#[test]
fn removals_come_before_the_store_that_needed_the_space() {
    let mut engine = engine(4, 4, 100);
    engine.submit(&prompt(0..16), 1).unwrap();
    let submitted = engine.submit(&prompt(100..108), 1).unwrap();
    let kinds: Vec<bool> =
        submitted.batches[0].iter().map(|event| matches!(event, Event::Removed(_))).collect();
    assert_eq!(kinds, [true, true, false]);
    assert_eq!(engine.cached_tokens(&prompt(0..16)), 8, "the tail went first");
}

#[test]
fn running_out_of_blocks_preempts_the_latest_request_and_everybody_finishes() {
    let mut engine = engine(6, 4, 100);
    engine.enqueue(&prompt(0..8), 12).unwrap();
    engine.enqueue(&prompt(50..58), 12).unwrap();
    let mut reports = Vec::new();
    while !engine.is_idle() {
        reports.extend(engine.step().finished);
    }
    assert_eq!(reports.iter().map(|report| report.preemptions > 0).collect::<Vec<_>>(), [false, true]);
    assert_eq!(reports[1].output, answer(&prompt(50..58), 12));
}

#[test]
fn a_reset_is_refused_while_running_and_published_with_the_next_step() {
    let mut engine = engine(16, 4, 4);
    engine.enqueue(&prompt(0..8), 1).unwrap();
    engine.step();
    assert!(!engine.reset_prefix_cache());
    while !engine.is_idle() {
        engine.step();
    }
    assert!(engine.reset_prefix_cache());
    assert!(engine.held().is_empty());
    assert_eq!(engine.step(), StepReport::default(), "an idle engine publishes nothing");
    let submitted = engine.submit(&prompt(0..8), 1).unwrap();
    assert_eq!(submitted.batches[0][0], Event::Cleared);
    assert_eq!(submitted.report.cached_tokens, 0);
}

#[test]
fn bytes_and_integers_name_the_same_blocks() {
    let config = SimConfig { hashes: HashForm::Bytes, ..Default::default() };
    let mut engine = SimEngine::new(config, 7).unwrap();
    engine.submit(&prompt(0..64), 1).unwrap();
    let held = engine.held();
    assert_eq!(held.len(), 4);
    assert!(held.keys().all(|hash| matches!(hash, EngineHash::Bytes(bytes) if bytes.len() == 32)));
}

#[test]
fn what_cannot_run_is_refused_and_explained() {
    let mut engine = engine(4, 4, 100);
    assert_eq!(engine.enqueue(&[], 1), Err(EnqueueError::Empty));
    assert_eq!(engine.enqueue(&[1], 0), Err(EnqueueError::Empty));
    assert!(engine.enqueue(&prompt(0..16), 1).is_ok());
    assert_eq!(engine.enqueue(&prompt(0..16), 2), Err(EnqueueError::TooLong { needed: 5, blocks: 4 }));
    for _ in 1..MAX_WAITING_REQUESTS {
        engine.enqueue(&[1], 1).unwrap();
    }
    assert_eq!(engine.enqueue(&[1], 1), Err(EnqueueError::Full));
    let error = SimEngine::new(SimConfig { blocks: 0, ..Default::default() }, 0).unwrap_err();
    assert!(error.to_string().contains("blocks is 0"), "{error}");
}

/// Prompts that share prefixes: (first token, length, last token).
fn prompts() -> impl Strategy<Value = Vec<(u32, usize, u32, u32)>> {
    proptest::collection::vec((0u32..3, 1usize..30, 0u32..3, 1u32..12), 1..30)
}

fn build((first, length, last, _): (u32, usize, u32, u32)) -> Vec<u32> {
    let mut tokens = vec![first; length];
    tokens[length - 1] = last;
    tokens
}

proptest! {
    #[test]
    fn events_alone_reproduce_the_cache_after_every_step(
        script in prompts(),
        blocks in 10u32..40,
        step_tokens in 1u32..40,
        arrivals in 1usize..4,
    ) {
        let mut engine = engine(blocks, 4, step_tokens);
        let mut replayed = Replayed::default();
        let mut waiting = script.iter();
        let mut finished = 0;
        loop {
            for request in waiting.by_ref().take(arrivals) {
                engine.enqueue(&build(*request), request.3).unwrap();
            }
            if engine.is_idle() {
                break;
            }
            let step = engine.step();
            replayed.apply(&step.events);
            finished += step.finished.len();
            prop_assert_eq!(&replayed.copies, &engine.held());
            prop_assert!(replayed.copies.values().sum::<u32>() <= blocks);
        }
        prop_assert_eq!(finished, script.len());
    }

    #[test]
    fn a_hit_is_the_longest_cached_prefix_short_of_the_last_token(script in prompts(), blocks in 10u32..40) {
        let mut engine = engine(blocks, 4, 16);
        let mut replayed = Replayed::default();
        for request in script {
            let tokens = build(request);
            let whole = replayed.cached_tokens(&tokens, 4);
            prop_assert_eq!(engine.cached_tokens(&tokens), whole);
            let expected = replayed.cached_tokens(&tokens[..tokens.len() - 1], 4);
            let submitted = engine.submit(&tokens, request.3).unwrap();
            submitted.batches.iter().for_each(|batch| replayed.apply(batch));
            prop_assert_eq!(submitted.report.cached_tokens, expected);
            let reused = expected / 4 + submitted.report.blocks_prefilled;
            prop_assert_eq!(reused, submitted.report.prompt_tokens.div_ceil(4));
            prop_assert_eq!(submitted.report.output, answer(&tokens, request.3));
        }
    }
}
