//! Engine pages smaller and larger than the scope's block, against a naive model after every message.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use common::{Reader, StoredEvent, batch_at, cleared, map, removed, shards};
use kvatlas_proto::keys::{KeyVariant, MultimodalItem, PromptExtras};
use kvatlas_proto::{InstanceId, KeyHasher, Partition};
use kvatlas_shim::source::{Source, SourceConfig};
use proptest::prelude::*;
use rmpv::Value;

const SCOPE_BLOCK: u32 = 4;
const MEDIA: [&str; 2] = ["GPU", "CPU"];
const PROMPTS: u32 = 3;
/// Tokens of each prompt; not a multiple of every page size.
const TOKENS: u32 = 21;

fn config(partition: Partition) -> SourceConfig {
    SourceConfig {
        partition,
        block_size: Some(SCOPE_BLOCK),
        has_replay: true,
        ..SourceConfig::new("m", InstanceId::new("a:1").unwrap())
    }
}

fn source(partition: Partition) -> Source {
    Source::new(config(partition), 1).unwrap()
}

/// The shim is restarted; the engine shows that it still lives the same life.
fn restarted(source: &Source, last: (u64, &[u8])) -> Source {
    let mut restored =
        Source::restore(config(source.partition()), &source.save().unwrap().unwrap(), 1).unwrap();
    restored.connected();
    restored.replayed(0, &[(last.0, Bytes::copy_from_slice(last.1))]);
    assert!(!restored.is_unproved() && restored.counts().restarts == 0);
    restored
}

/// Prompts share their first tokens: prompt p differs from token 5 * p on.
fn token(prompt: u32, at: u32) -> u32 {
    if at < 5 * prompt { at } else { prompt * 1_000 + at }
}

fn tokens(prompt: u32, range: std::ops::Range<u32>) -> Vec<u32> {
    range.map(|at| token(prompt, at)).collect()
}

/// The engine's name of page `page` of a prompt: a hash of everything up to its end.
fn page_hash(prompt: u32, page: u32, size: u32) -> u64 {
    tokens(prompt, 0..(page + 1) * size).iter().fold(u64::from(size), |hash, token| {
        (hash ^ u64::from(*token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
    })
}

#[derive(Clone, Debug)]
enum Step {
    Store { prompt: u32, pages: u32, medium: usize },
    Evict { prompt: u32, page: u32, medium: usize },
    Clear,
}

fn any_step() -> impl Strategy<Value = Step> {
    let medium = 0..MEDIA.len();
    prop_oneof![
        4 => (0..PROMPTS, 1..TOKENS, medium.clone())
            .prop_map(|(prompt, pages, medium)| Step::Store { prompt, pages, medium }),
        5 => (0..PROMPTS, 0..TOKENS, medium).prop_map(|(prompt, page, medium)| Step::Evict { prompt, page, medium }),
        1 => Just(Step::Clear),
    ]
}

/// Keys that are held: of every prompt, the blocks all of whose pages are.
fn truth(held: &BTreeMap<(usize, u64), u32>, size: u32) -> BTreeMap<(String, u16), BTreeSet<u64>> {
    let mut truth: BTreeMap<(String, u16), BTreeSet<u64>> = BTreeMap::new();
    for (medium, name) in MEDIA.iter().enumerate() {
        for prompt in 0..PROMPTS {
            let whole = TOKENS / size * size;
            let keys = KeyHasher::default().chain(&tokens(prompt, 0..whole), SCOPE_BLOCK);
            for (block, key) in (0u32..).zip(keys) {
                let (start, end) = (block * SCOPE_BLOCK, (block + 1) * SCOPE_BLOCK);
                let mut pages = start / size..end.div_ceil(size);
                if pages.all(|page| held.contains_key(&(medium, page_hash(prompt, page, size)))) {
                    truth.entry(((*name).to_owned(), 0)).or_default().insert(key.0);
                }
            }
        }
    }
    truth
}

fn run(partition: Partition, size: u32, steps: &[Step]) -> Result<(), TestCaseError> {
    let (mut source, mut reader) = (source(partition), Reader::new(partition));
    let (mut held, mut seq) = (BTreeMap::<(usize, u64), u32>::new(), 0);
    let pages_of_prompt = TOKENS / size;
    for step in steps {
        let event = match *step {
            Step::Store { prompt, pages, medium } => {
                let pages = pages.min(pages_of_prompt);
                // Children are stored under a parent that is there; what is there stays.
                let there = |page: &u32| held.contains_key(&(medium, page_hash(prompt, *page, size)));
                let first = (0..pages).find(|page| !there(page));
                let Some(first) = first else { continue };
                for page in first..pages {
                    *held.entry((medium, page_hash(prompt, page, size))).or_default() += 1;
                }
                // Extra keys are said (there are none), so that the second tier is taken at its word.
                let mut event = StoredEvent {
                    hashes: (first..pages).map(|page| page_hash(prompt, page, size)).collect(),
                    parent: first.checked_sub(1).map(|page| page_hash(prompt, page, size)),
                    tokens: tokens(prompt, first * size..pages * size),
                    block_size: size,
                    medium: Some(MEDIA[medium]),
                    ..StoredEvent::default()
                }
                .map();
                if let Value::Map(pairs) = &mut event {
                    let none = vec![Value::Nil; (pages - first) as usize];
                    pairs.push(("extra_keys".into(), Value::Array(none)));
                }
                event
            }
            Step::Evict { prompt, page, medium } => {
                let place = (medium, page_hash(prompt, page % pages_of_prompt, size));
                let Some(copies) = held.get_mut(&place) else { continue };
                *copies -= 1;
                if *copies == 0 {
                    held.remove(&place);
                }
                removed(&[place.1], Some(MEDIA[medium]), None)
            }
            Step::Clear => {
                held.clear();
                cleared()
            }
        };
        let message = batch_at(1e9 + seq as f64, vec![event]);
        source.live(seq, &message, false);
        if seq % 5 == 2 {
            source = restarted(&source, (seq, &message));
        }
        seq += 1;
        reader.follow(&mut source, seq, true);
        prop_assert_eq!(
            reader.held(),
            truth(&held, size),
            "pages of {} tokens, after {:?} of {:#?}",
            size,
            step,
            steps
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_block_is_held_while_all_its_pages_are(
        number in 1..6u32, size in prop_oneof![Just(1u32), Just(2)], steps in proptest::collection::vec(any_step(), 1..50),
    ) {
        run(shards(number), size, &steps)?;
    }

    #[test]
    fn an_engine_block_holds_all_the_scope_blocks_in_it(
        number in 1..6u32, size in prop_oneof![Just(4u32), Just(8), Just(12)], steps in proptest::collection::vec(any_step(), 1..50),
    ) {
        run(shards(number), size, &steps)?;
    }
}

/// One prompt of eight tokens with an adapter, an item over tokens 1 to 5 and a salt, in engine blocks of `size`.
fn with_extras(size: u32) -> (Vec<u64>, u64) {
    let hashes: Vec<Value> = (0..8 / size).map(|page| page_hash(0, page, size).into()).collect();
    let extras = (0..8 / size).map(|page| {
        let mut keys: Vec<Value> = vec!["adapter".into()];
        if page * size < 6 && (page + 1) * size > 1 {
            keys.push(Value::Array(vec!["image".into(), (1 - i64::from(page * size)).into()]));
        }
        if page == 0 {
            keys.push("salt".into());
        }
        Value::Array(keys)
    });
    let event = map(vec![
        ("type", "BlockStored".into()),
        ("block_hashes", Value::Array(hashes)),
        ("parent_block_hash", Value::Nil),
        ("token_ids", Value::Array(tokens(0, 0..8).into_iter().map(Value::from).collect())),
        ("block_size", size.into()),
        ("lora_name", "adapter".into()),
        ("extra_keys", Value::Array(extras.collect())),
    ]);
    let (mut source, mut reader) = (source(Partition::WHOLE), Reader::default());
    source.live(0, &batch_at(1e9, vec![event]), false);
    reader.follow(&mut source, 2, true);
    (reader.held().into_values().flatten().collect(), source.untracked_pages())
}

#[test]
fn items_over_several_pages_are_one_item_of_the_block() {
    let extras = PromptExtras {
        lora_name: Some("adapter".into()),
        cache_salt: Some("salt".into()),
        multimodal: vec![MultimodalItem { identifier: "image".into(), offset: 1, length: 5 }],
    };
    let mut keys = Vec::new();
    KeyHasher::default().chain_into(&tokens(0, 0..8), SCOPE_BLOCK, &extras, KeyVariant::default(), &mut keys);
    let mut expected: Vec<u64> = keys.iter().map(|key| key.0).collect();
    expected.sort_unstable();
    for size in [1, 2, 4] {
        assert_eq!(with_extras(size), (expected.clone(), 0), "pages of {size} tokens");
    }
}

#[test]
fn a_larger_block_with_an_item_is_left_out_and_counted() {
    assert_eq!(with_extras(8), (vec![], 1));
}
