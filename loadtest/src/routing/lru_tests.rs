//! The set itself, and the hit rates that a cache with this order has on traces.

use super::*;
use crate::routing::tests::public_trace;
use crate::routing::trace::{Trace, TraceOptions, read_trace};

#[test]
fn what_was_used_longest_ago_goes_first() {
    let mut lru = Lru::new(2);
    assert_eq!((lru.insert(1, ()), lru.insert(2, ())), (None, None));
    assert!(lru.touch(1) && !lru.touch(3));
    assert_eq!(lru.insert(3, ()), Some((2, ())));
    assert!(lru.remove(1) && !lru.remove(1));
    assert_eq!((lru.insert(4, ()), lru.insert(5, ())), (None, Some((3, ()))));
    assert_eq!(lru.len(), 2);
    assert_eq!(Lru::new(0).insert(1, ()), Some((1, ())));
}

/// Share of blocks that one cache has when a request comes: whole requests go in, leaves before their parents, so that
/// parents are newer. The last block counts also where it is not full.
fn hit_share(trace: &Trace, capacity: usize) -> f64 {
    let mut cache = Lru::new(capacity);
    let (mut blocks, mut hits) = (0, 0);
    for request in &trace.requests {
        let path = trace.tree.path(request.last);
        blocks += path.len();
        hits += path.iter().take_while(|block| cache.contains(**block)).count();
        for block in path.iter().rev() {
            cache.insert(*block, ());
        }
    }
    hits as f64 / blocks as f64
}

#[test]
fn parents_outlive_their_leaves() {
    let mut trace = Trace::empty(String::new(), 1);
    let mut ids = crate::routing::blocks::Ids::new(1);
    let mut ask = |prompts: &[&[u64]]| {
        trace.requests.clear();
        for prompt in prompts {
            let last = ids.last(&mut trace.tree, prompt);
            let request = crate::routing::trace::TraceRequest {
                prompt_tokens: prompt.len() as u32,
                output_tokens: 1,
                last,
                full_blocks: prompt.len() as u32,
                session: 0,
                conversation: 0,
                offset_us: 0,
                after: None,
                think_us: 0,
            };
            trace.requests.push(request);
        }
        (hit_share(&trace, 4), hit_share(&trace, usize::MAX))
    };
    // Three prompts of a common beginning in a cache of four: 1, 2, 3, then 4 in place of 3, then 3 in place of 4 ...
    let (bounded, ideal) = ask(&[&[1, 2, 3], &[1, 2, 4, 5], &[1, 2, 3]]);
    assert_eq!((bounded, ideal), (4.0 / 10.0, 5.0 / 10.0));
}

#[test]
fn the_published_points_of_the_mooncake_trace_are_reproduced() {
    let Some(path) = public_trace("mooncake-conversation.jsonl.zst") else { return };
    let trace = read_trace(&path, TraceOptions::default()).unwrap();
    assert_eq!(trace.requests.len(), 12_031);
    for (capacity, percent) in [
        (1_000, 4.45),
        (5_859, 13.61),
        (10_000, 21.16),
        (20_000, 28.78),
        (50_000, 35.46),
        (97_656, 36.35),
        (usize::MAX, 36.64),
    ] {
        let share = hit_share(&trace, capacity) * 100.0;
        assert!((share - percent).abs() < 0.005, "{capacity} blocks: {share} instead of {percent} %");
    }
}
