//! The terms of the cost as small pure functions. Times are milliseconds, speeds GB/s (10^9 bytes), sizes bytes.
//!
//! ```text
//! TTFT      = T_start + T_prefill + T_hand + T_admit + one decode step if the prompt was handed off
//! T_start   = max(T_queue, T_fetch) where the engine loads for queued requests, else their sum
//! T_fetch   = max(sum of the loads from p's own tiers, sum of the loads over the network), or the sum of all
//! T_prefill = (c0 + c1 m + c2 ((h + m)^2 - h^2)) * (1 + gamma * decode share)
//! T_hand    = alpha + max(t / L, t - T_prefill (L - 1) / L),  t = bytes the decoder lacks / bandwidth, L layers
//! ```
//!
//! Loads over the network count one after another: they share the port of the instance that pulls. That is exact where
//! this port is the narrowest part, and cautious where the senders are. A prompt that is decoded where it was prefilled
//! has its first token when the prefill is done: measured prefill times contain it.

use crate::profile::{DecodeCost, GroupKind, ModelProfile, PrefillCost};

/// Most sliding-window groups that are counted as such; further ones count as full, which is cautious. Known models
/// have one or two.
pub const MAX_WINDOW_GROUPS: usize = 4;
/// A queue whose utilisation is at least this is taken for this: the expectation has a pole at 1.
pub const MAX_UTILISATION: f64 = 0.99;
/// Bytes that one GB/s moves in a millisecond.
const BYTES_PER_MS: f64 = 1e6;

/// How many bytes a stretch of prompt is on its way to an instance.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KvSize {
    per_token: f64,
    /// (window in tokens, bytes per token of it).
    windows: [(f64, f64); MAX_WINDOW_GROUPS],
    state: f64,
}

// === impl KvSize ===

impl KvSize {
    /// What arrives at an instance with this many tensor-parallel ranks. What is replicated arrives once per rank; KV
    /// heads are replicated only where there are more ranks than heads.
    pub fn new(model: &ModelProfile, tensor_parallel: u32) -> Self {
        let ranks = f64::from(tensor_parallel);
        let copies_of_heads = (ranks / f64::from(model.kv_heads)).max(1.0);
        let mut size = Self::default();
        let mut windows = 0;
        for group in &model.groups {
            let copies = if group.replicated { ranks } else { copies_of_heads } * model.kv_dtype.scale();
            let per_token = group.bytes_per_token * copies;
            match group.kind {
                GroupKind::Window if windows < MAX_WINDOW_GROUPS => {
                    size.windows[windows] = (f64::from(group.window_tokens), per_token);
                    windows += 1;
                }
                GroupKind::Full | GroupKind::Window => size.per_token += per_token,
                GroupKind::State => size.state += group.state_bytes * copies,
            }
        }
        size
    }

    /// Bytes of a stretch of this many tokens that ends where the prefix ends: all of the full groups, of a window at
    /// most its length, a state once.
    pub fn bytes(&self, tokens: f64) -> f64 {
        if tokens <= 0.0 {
            return 0.0;
        }
        let windows: f64 = self.windows.iter().map(|(window, bytes)| bytes * window.min(tokens)).sum();
        self.per_token * tokens + windows + self.state
    }
}

/// Time to compute `new` tokens after `cached` ones, alone on the engine.
pub fn prefill_ms(cost: &PrefillCost, new_tokens: f64, cached_tokens: f64) -> f64 {
    let end = cached_tokens + new_tokens;
    cost.c0_ms
        + cost.c1_ms_per_token * new_tokens
        + cost.c2_ms_per_token2 * (end * end - cached_tokens * cached_tokens)
}

/// What the next token at this position costs to compute: the price that a fetch has to beat.
pub fn marginal_prefill_ms(cost: &PrefillCost, position_tokens: f64) -> f64 {
    cost.c1_ms_per_token + 2.0 * cost.c2_ms_per_token2 * position_tokens
}

/// By what a prefill is slower beside this many decoding requests.
pub fn interference(gamma: f64, running_requests: u32, max_running: u32) -> f64 {
    1.0 + gamma * (f64::from(running_requests) / f64::from(max_running.max(1))).min(1.0)
}

/// Work that is queued: `requests` prompts of equal length with `tokens` in all, less what of the first is done.
pub fn queued_ms(cost: &PrefillCost, requests: u32, tokens: u64, elapsed_ms: f64) -> f64 {
    if requests == 0 && tokens == 0 {
        return 0.0;
    }
    let (requests, tokens) = (f64::from(requests.max(1)), tokens as f64);
    let one = prefill_ms(cost, tokens / requests, 0.0);
    (requests * one - elapsed_ms.max(0.0)).max(0.0)
}

/// Expected wait in an M/D/1 queue: random arrivals, one service time.
pub fn md1_wait_ms(utilisation: f64, service_ms: f64) -> f64 {
    let rho = utilisation.clamp(0.0, MAX_UTILISATION);
    rho * service_ms / (2.0 * (1.0 - rho))
}

/// What is left of a link's speed beside `transfers` others.
pub fn shared_gb_per_s(gb_per_s: f64, transfers: u32) -> f64 {
    gb_per_s / (1.0 + f64::from(transfers))
}

/// Time to move bytes; infinite where nothing gets through.
pub fn moving_ms(bytes: f64, gb_per_s: f64) -> f64 {
    if bytes <= 0.0 { 0.0 } else { bytes / (gb_per_s * BYTES_PER_MS) }
}

/// Queue and fetch together.
pub fn start_ms(queue_ms: f64, fetch_ms: f64, loads_while_queued: bool) -> f64 {
    if loads_while_queued { queue_ms.max(fetch_ms) } else { queue_ms + fetch_ms }
}

/// Time from the end of the prefill to the end of the hand-off: with `layers` above 1 each layer moves while the next
/// one is computed.
pub fn hand_off_ms(alpha_ms: f64, transfer_ms: f64, prefill_ms: f64, layers: f64) -> f64 {
    alpha_ms + (transfer_ms / layers).max(transfer_ms - prefill_ms * (layers - 1.0) / layers)
}

/// One decode step with this many requests running.
pub fn step_ms(cost: &DecodeCost, running_requests: u32) -> f64 {
    cost.base_ms + cost.per_request_ms * f64::from(running_requests)
}

/// Wait for the running step and for KV space.
///
/// Space comes back as running requests end: within `output_tokens` steps all that run now have ended, so a deficit
/// waits its share of that.
pub fn admit_ms(
    need_tokens: f64,
    kv_usage: f64,
    capacity_tokens: Option<u64>,
    drain_ms: f64,
    step_ms: f64,
) -> f64 {
    let Some(capacity) = capacity_tokens.map(|tokens| tokens as f64).filter(|&tokens| tokens > 0.0) else {
        return step_ms / 2.0;
    };
    let used = kv_usage.clamp(0.0, 1.0) * capacity;
    let deficit = (need_tokens - (capacity - used)).max(0.0);
    let share = if deficit > 0.0 && used > 0.0 { (deficit / used).min(1.0) } else { 0.0 };
    step_ms / 2.0 + drain_ms * share
}

/// Probability that an entry of this age is still there.
pub fn still_there(age_ms: f64, tau_s: f64) -> f64 {
    if age_ms <= 0.0 { 1.0 } else { (-age_ms / (tau_s * 1e3)).exp() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::Profiles;

    const LLAMA_H100_TP8: PrefillCost =
        PrefillCost { c0_ms: 46.5, c1_ms_per_token: 0.0219, c2_ms_per_token2: 1.05e-5 };

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-9 * a.abs().max(b.abs()).max(1.0)
    }

    #[test]
    fn prefilling_in_two_parts_costs_the_fixed_part_twice_and_nothing_else() {
        let whole = prefill_ms(&LLAMA_H100_TP8, 4_096.0, 0.0);
        let parts = prefill_ms(&LLAMA_H100_TP8, 1_000.0, 0.0) + prefill_ms(&LLAMA_H100_TP8, 3_096.0, 1_000.0);
        assert!(close(whole + LLAMA_H100_TP8.c0_ms, parts), "{whole} {parts}");
    }

    #[test]
    fn moving_4096_tokens_takes_what_the_reference_says() {
        // (model, GB/s, ms): NVLink, PCIe 5, one 400G port, 100 GbE.
        let shipped = Profiles::shipped();
        let llama = KvSize::new(shipped.model("llama-3.1-70b").unwrap(), 1);
        let deepseek = KvSize::new(shipped.model("deepseek-v3").unwrap(), 1);
        for (size, gb_per_s, expected) in [
            (llama, 450.0, 3.0),
            (llama, 50.0, 27.0),
            (llama, 45.0, 30.0),
            (llama, 10.0, 134.0),
            (deepseek, 50.0, 5.8),
            (deepseek, 10.0, 29.0),
        ] {
            let ms = moving_ms(size.bytes(4_096.0), gb_per_s);
            assert!((ms - expected).abs() / expected < 0.02, "{ms} instead of {expected}");
        }
    }

    #[test]
    fn latent_attention_is_replicated_and_heads_only_beyond_their_number() {
        let shipped = Profiles::shipped();
        let bytes = |model: &str, ranks| KvSize::new(shipped.model(model).unwrap(), ranks).bytes(1.0);
        assert_eq!(bytes("deepseek-v3", 8), 8.0 * 70_272.0);
        assert_eq!(bytes("llama-3.1-70b", 8), 327_680.0);
        assert_eq!(bytes("qwen3-235b-a22b", 8), 2.0 * 192_512.0);
    }

    #[test]
    fn a_window_moves_at_most_its_length() {
        let size = KvSize::new(Profiles::shipped().model("gpt-oss-120b").unwrap(), 1);
        assert_eq!(size.bytes(100.0), 100.0 * 73_728.0);
        assert_eq!(size.bytes(1_000.0), 1_000.0 * 36_864.0 + 128.0 * 36_864.0);
    }

    #[test]
    fn queues_are_sums_of_work_or_expectations() {
        let cost = PrefillCost { c0_ms: 10.0, c1_ms_per_token: 0.1, c2_ms_per_token2: 1e-5 };
        assert_eq!(queued_ms(&cost, 0, 0, 0.0), 0.0);
        assert!(close(queued_ms(&cost, 2, 2_000, 50.0), 2.0 * (10.0 + 100.0 + 10.0) - 50.0));
        assert_eq!(queued_ms(&cost, 1, 100, 1e6), 0.0);
        assert!(close(md1_wait_ms(0.5, 100.0), 50.0));
        assert!(md1_wait_ms(2.0, 100.0).is_finite());
    }

    #[test]
    fn layers_hide_all_but_the_last_one_of_a_transfer() {
        assert!(close(hand_off_ms(1.0, 80.0, 1_000.0, 80.0), 2.0));
        assert!(close(hand_off_ms(1.0, 80.0, 1_000.0, 1.0), 81.0));
        assert!(close(hand_off_ms(0.0, 80.0, 40.0, 2.0), 60.0));
    }

    #[test]
    fn a_full_cache_waits_for_requests_to_end() {
        assert!(close(admit_ms(1_000.0, 0.5, Some(10_000), 4_000.0, 20.0), 10.0));
        assert!(close(admit_ms(1_000.0, 1.0, Some(10_000), 4_000.0, 20.0), 10.0 + 400.0));
        assert!(close(admit_ms(1_000.0, 1.0, None, 4_000.0, 20.0), 10.0));
    }

    #[test]
    fn an_entry_fades_with_its_age() {
        assert_eq!(still_there(0.0, 10.0), 1.0);
        assert!(close(still_there(10_000.0, 10.0), (-1.0_f64).exp()));
        assert_eq!(still_there(1e9, f64::INFINITY), 1.0);
    }

    #[test]
    fn infinite_and_no_bandwidth_are_values() {
        assert_eq!(moving_ms(1e9, f64::INFINITY), 0.0);
        assert_eq!(moving_ms(1e9, 0.0), f64::INFINITY);
        assert_eq!(moving_ms(0.0, 0.0), 0.0);
    }
}
