//! One engine by itself: what a step takes, who waits, who is thrown out.

use super::*;

const MS: u64 = 1_000;

fn engine(gpu_blocks: u32, max_batched_tokens: u32, cpu_blocks: u32) -> Engine {
    let cpu = TierConfig { tier: Tier::Cpu, blocks: cpu_blocks, alpha_ms: 1.0, gb_per_s: 1.0 };
    Engine::new(EngineConfig {
        block_tokens: 10,
        gpu_blocks,
        tiers: if cpu_blocks > 0 { vec![cpu] } else { Vec::new() },
        block_bytes: 1e6,
        max_batched_tokens,
        max_seqs: 8,
        prefill: PrefillCost { c0_ms: 5.0, c1_ms_per_token: 1.0, c2_ms_per_token2: 0.0 },
        decode: DecodeCost { base_ms: 10.0, per_request_ms: 1.0 },
    })
}

fn job(request: u32, path: std::ops::Range<u32>, prompt_tokens: u32, output_tokens: u32) -> Job {
    Job {
        request,
        path: path.collect(),
        prompt_tokens,
        output_tokens,
        staged: Staged::default(),
        hands_off: false,
        prefilled: false,
    }
}

/// Goes on until nothing is left to do; what happened when, ms.
fn drain(engine: &mut Engine, mut now_us: u64) -> Vec<(u64, Outcome)> {
    let mut happened = Vec::new();
    let mut out = Vec::new();
    let mut wake = engine.advance(now_us, &mut out);
    loop {
        happened.extend(out.drain(..).map(|outcome| (now_us / MS, outcome)));
        let Some(Wake { at_us, .. }) = wake else { return happened };
        now_us = at_us;
        wake = engine.advance(now_us, &mut out);
    }
}

fn first(request: u32, cached_tokens: u32) -> Outcome {
    Outcome::FirstToken { request, cached_tokens }
}

fn finished(request: u32) -> Outcome {
    Outcome::Finished { request }
}

#[test]
fn a_prompt_is_prefilled_in_chunks_and_then_decoded() {
    let mut engine = engine(20, 20, 0);
    assert!(engine.submit(job(0, 0..2, 25, 3)));
    // Chunks of 20 and 5 tokens, each with the fixed part, then two decode steps of 11 ms.
    assert_eq!(drain(&mut engine, 0), [(35, first(0, 0)), (57, finished(0))]);
}

#[test]
fn a_second_prompt_finds_what_the_first_one_left_and_computes_at_least_a_token() {
    let mut engine = engine(20, 100, 0);
    engine.submit(job(0, 0..3, 30, 1));
    assert_eq!(drain(&mut engine, 0), [(35, first(0, 0)), (35, finished(0))]);
    engine.submit(job(1, 0..3, 30, 1));
    assert_eq!(drain(&mut engine, 100 * MS), [(115, first(1, 20)), (115, finished(1))]);
}

#[test]
fn who_comes_while_others_decode_waits_for_the_end_of_the_step_only() {
    let mut engine = engine(40, 100, 0);
    let mut out = Vec::new();
    engine.submit(job(0, 0..1, 10, 100));
    let Some(Wake { at_us, .. }) = engine.advance(0, &mut out) else { panic!("it prefills") };
    // Nine tokens fit the last block, so nine steps are taken at once.
    let Some(Wake { at_us: decoded, .. }) = engine.advance(at_us, &mut out) else { panic!("it decodes") };
    assert_eq!((at_us / MS, decoded / MS), (15, 125));
    engine.submit(job(1, 5..6, 10, 1));
    let Some(Wake { at_us, .. }) = engine.advance(30 * MS, &mut out) else { panic!("the step ends earlier") };
    assert_eq!(at_us / MS, 37);
    out.clear();
    // The base of the decode step, ten tokens to prefill, one that decodes.
    assert_eq!(engine.advance(at_us, &mut out).map(|wake| wake.at_us / MS), Some(58));
}

#[test]
fn a_prompt_waits_until_all_of_it_has_room() {
    let mut engine = engine(4, 100, 0);
    engine.submit(job(0, 0..2, 20, 5));
    engine.submit(job(1, 5..8, 30, 1));
    assert_eq!(
        drain(&mut engine, 0),
        [(25, first(0, 0)), (69, finished(0)), (104, first(1, 0)), (104, finished(1))]
    );
    assert!(!engine.submit(job(2, 0..0, 41, 1)), "it would never have room");
    assert_eq!((engine.totals.refused, engine.totals.preemptions), (1, 0));
}

#[test]
fn where_no_block_is_left_to_decode_the_last_one_in_begins_anew() {
    let mut engine = engine(4, 100, 0);
    engine.submit(job(0, 0..1, 15, 10));
    engine.submit(job(1, 5..6, 15, 10));
    let happened = drain(&mut engine, 0);
    let order: Vec<Outcome> = happened.into_iter().map(|(_, outcome)| outcome).collect();
    // Both end, the second one later, and its first token does not come twice.
    assert_eq!(order, [first(0, 0), first(1, 0), finished(0), finished(1)]);
    assert_eq!(engine.totals.preemptions, 1);
    assert_eq!(engine.load(0).kv_usage, 0.0);
}

#[test]
fn what_the_gpu_lost_is_read_from_host_memory() {
    let mut engine = engine(3, 100, 10);
    engine.submit(job(0, 0..2, 21, 1));
    drain(&mut engine, 0);
    engine.submit(job(1, 5..7, 21, 1));
    drain(&mut engine, 100 * MS);
    assert!(!engine.holds(Tier::Gpu, 0) && engine.holds(Tier::Cpu, 0) && engine.holds(Tier::Cpu, 1));
    let staged = engine.stage(&[0, 1], 21, &[], 200 * MS);
    assert_eq!((staged.ranges.clone(), staged.ready_us / MS), (vec![(0, 2)], 203));
    engine.submit(Job { staged, ..job(2, 0..2, 21, 1) });
    // Two megabytes and the start-up take 3 ms, the last token 6.
    assert_eq!(drain(&mut engine, 200 * MS), [(209, first(2, 20)), (209, finished(2))]);
}

#[test]
fn what_is_handed_off_is_held_until_it_is_released_and_what_comes_is_decoded() {
    let (mut prefill, mut decode) = (engine(4, 100, 0), engine(4, 100, 0));
    prefill.submit(Job { hands_off: true, ..job(0, 0..2, 20, 3) });
    assert_eq!(
        drain(&mut prefill, 0),
        [(25, Outcome::Prefilled { request: 0, cached_tokens: 0, prefill_us: 25 * MS })]
    );
    assert_eq!(prefill.load(25 * MS).kv_usage, 0.5);
    prefill.release(0);
    assert_eq!(prefill.load(25 * MS).kv_usage, 0.0);
    let staged = Staged { ranges: vec![(0, 2)], ready_us: 30 * MS };
    decode.submit(Job { prefilled: true, staged, ..job(0, 0..2, 20, 3) });
    // One token of the prompt is computed for the first one of the answer.
    assert_eq!(drain(&mut decode, 30 * MS)[0].0, 36);
    assert!(decode.holds(Tier::Gpu, 1));
}

#[test]
fn prompts_are_compared_by_where_they_part() {
    assert_eq!(common_blocks(&[1, 2, 3], &[1, 2, 4, 5]), 2);
    assert_eq!((common_blocks(&[], &[1]), common_blocks(&[1], &[1]), common_blocks(&[2], &[1])), (0, 1, 0));
}
