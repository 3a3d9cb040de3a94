//! What an engine does in a step: whom it takes, whom it throws out, how long that lasts and what it brings about.

use kvatlas_planner::cost;
use kvatlas_proto::Tier;

use super::pool::Slot;
use super::{Admitted, Change, Engine, Outcome, Seq, Staged, Step, Wake};

// === impl Engine ===

impl Engine {
    pub(super) fn begin_step(&mut self, now_us: u64) -> Option<Wake> {
        let mut budget = self.config.max_batched_tokens;
        let preempted = self.schedule_running(&mut budget);
        if !preempted {
            self.schedule_loaded(&mut budget, now_us);
            self.schedule_waiting(&mut budget, now_us);
        }
        let due =
            self.loading.iter().chain(&self.waiting).map(|seq| seq.ready_us).filter(|at| *at > now_us).min();
        if self.running.is_empty() {
            return due.map(|at_us| self.wake(at_us));
        }
        let (mut chunks_ms, mut decodes, mut has_prefill) = (0.0, 0, false);
        let mut count = u32::MAX;
        for seq in &self.running {
            if seq.chunk > 0 {
                has_prefill = true;
                chunks_ms += self.chunk_ms(seq.chunk, seq.computed);
            } else if seq.computed >= seq.target {
                decodes += 1;
                let room = seq.slots.len() as u32 * self.config.block_tokens - seq.computed;
                count = count.min(room).min(seq.job.output_tokens - seq.generated);
            }
        }
        let decode = &self.config.decode;
        let fixed_ms = (if has_prefill { self.config.prefill.c0_ms } else { 0.0 }).max(if decodes > 0 {
            decode.base_ms
        } else {
            0.0
        });
        let ms = fixed_ms + chunks_ms + (cost::step_ms(decode, decodes) - decode.base_ms);
        let each_us = ((ms * 1e3).round() as u64).max(1);
        if has_prefill {
            count = 1;
        } else if let Some(due) = due {
            count = count.min((due - now_us).div_ceil(each_us) as u32);
        }
        let step = Step { start_us: now_us, each_us, count: count.max(1), has_prefill };
        let end_us = step.end_us();
        self.step = Some(step);
        Some(self.wake(end_us))
    }

    /// Says whether somebody had to be thrown out.
    fn schedule_running(&mut self, budget: &mut u32) -> bool {
        let mut preempted = false;
        let mut at = 0;
        while at < self.running.len() {
            let seq = &mut self.running[at];
            seq.chunk = 0;
            if seq.computed < seq.target {
                seq.chunk = (seq.target - seq.computed).min(*budget);
                *budget -= seq.chunk;
                self.name_scheduled(at);
            } else {
                *budget = budget.saturating_sub(1);
                let needed = (seq.computed + 1).div_ceil(self.config.block_tokens) as usize;
                while self.running.get(at).is_some_and(|seq| seq.slots.len() < needed) {
                    if let Some(slot) = self.new_slot() {
                        self.running[at].slots.push(slot);
                    } else {
                        preempted = true;
                        self.throw_out_last(budget);
                    }
                }
            }
            at += 1;
        }
        preempted
    }

    /// The one that came in last begins anew, before all others that wait.
    fn throw_out_last(&mut self, budget: &mut u32) {
        let mut seq = self.running.pop().expect("whoever needs a block is running");
        *budget += seq.chunk;
        seq.slots.iter().rev().for_each(|slot| self.pool.release(*slot));
        self.totals.preemptions += 1;
        seq.slots.clear();
        (seq.computed, seq.named, seq.chunk) = (0, 0, 0);
        seq.target = seq.job.prompt_tokens + seq.generated;
        seq.expected_tokens = seq.target;
        (seq.job.staged, seq.job.prefilled) = (Staged::default(), false);
        self.waiting.push_front(seq);
    }

    fn has_slot_for_one(&self) -> bool {
        self.running.len() + self.loading.len() < self.config.max_seqs as usize
    }

    /// Those whose blocks have come from lower tiers.
    fn schedule_loaded(&mut self, budget: &mut u32, now_us: u64) {
        let mut at = 0;
        while at < self.loading.len() && *budget > 0 {
            if self.loading[at].ready_us > now_us {
                at += 1;
                continue;
            }
            let seq = self.loading.remove(at);
            self.run(seq, budget, now_us);
        }
    }

    fn schedule_waiting(&mut self, budget: &mut u32, now_us: u64) {
        let mut at = 0;
        while at < self.waiting.len() && *budget > 0 && self.has_slot_for_one() {
            if self.waiting[at].ready_us > now_us {
                at += 1;
                continue;
            }
            let mut seq = self.waiting.remove(at).expect("it is among them");
            match self.admit(&mut seq, now_us) {
                Admitted::Now => self.run(seq, budget, now_us),
                Admitted::Later => self.loading.push(seq),
                Admitted::NoRoom => {
                    self.waiting.insert(at, seq);
                    return;
                }
            }
        }
    }

    fn run(&mut self, mut seq: Seq, budget: &mut u32, now_us: u64) {
        seq.chunk = (seq.target - seq.computed).min(*budget);
        *budget -= seq.chunk;
        seq.began_us = now_us;
        self.running.push(seq);
        self.name_scheduled(self.running.len() - 1);
    }

    /// Takes room for all of a prompt.
    fn admit(&mut self, seq: &mut Seq, now_us: u64) -> Admitted {
        let mut bytes = vec![0.0; self.tiers.len()];
        let cached = self.cached_blocks(&seq.job, seq.target, Some(&mut bytes));
        let total = seq.target.div_ceil(self.config.block_tokens);
        let hits: Vec<Option<Slot>> =
            seq.job.path[..cached as usize].iter().map(|block| self.pool.find(*block)).collect();
        let held = hits.iter().flatten().count() as u32;
        let from_line = hits.iter().flatten().filter(|slot| self.pool.is_free(**slot)).count() as u32;
        if total - held > self.pool.free() - from_line {
            return Admitted::NoRoom;
        }
        hits.iter().flatten().for_each(|slot| self.pool.hold(*slot));
        for at in 0..total as usize {
            let slot = match hits.get(at) {
                Some(Some(slot)) => *slot,
                _ => self.new_slot().expect("room was counted"),
            };
            seq.slots.push(slot);
        }
        self.tiers.touch(&seq.job.path[..cached as usize]);
        let cached_tokens = cached * self.config.block_tokens;
        seq.computed = if seq.job.prefilled { seq.target - 1 } else { cached_tokens };
        seq.cached_tokens.get_or_insert(cached_tokens);
        self.totals.loaded_bytes += bytes.iter().sum::<f64>();
        seq.ready_us = self.tiers.read(&bytes, now_us);
        if seq.ready_us > now_us { Admitted::Later } else { Admitted::Now }
    }

    fn new_slot(&mut self) -> Option<Slot> {
        let (slot, gone) = self.pool.take()?;
        self.changes.extend(gone.map(|block| Change { tier: Tier::Gpu, block, stored: false }));
        Some(slot)
    }

    /// What is computed by the end of the step can be found from now on, as in vLLM; events say so at its end.
    fn name_scheduled(&mut self, at: usize) {
        let seq = &mut self.running[at];
        let tokens = if seq.job.prefilled { seq.target } else { seq.computed + seq.chunk };
        let to = (tokens / self.config.block_tokens).min(seq.job.path.len() as u32);
        let from = seq.named.min(to);
        seq.named = to;
        let mut new = Vec::new();
        for position in from..to {
            let block = seq.job.path[position as usize];
            if self.pool.name(seq.slots[position as usize], block) {
                new.push(block);
            }
        }
        self.changes.extend(new.iter().map(|block| Change { tier: Tier::Gpu, block: *block, stored: true }));
        if !new.is_empty() && self.tiers.len() > 0 {
            self.tiers.write(&new, &mut self.changes);
        }
    }

    pub(super) fn end_step(&mut self, out: &mut Vec<Outcome>) {
        let Some(step) = self.step.take() else { return };
        let us = step.end_us() - step.start_us;
        self.totals.busy_us += us;
        self.totals.prefill_us += if step.has_prefill { us } else { 0 };
        let running = std::mem::take(&mut self.running);
        for mut seq in running {
            if seq.chunk == 0 && seq.computed < seq.target {
                // There was no budget left for it.
                self.running.push(seq);
                continue;
            }
            let is_decode = seq.chunk == 0;
            let tokens = if is_decode { step.count } else { seq.chunk };
            seq.computed += tokens;
            self.totals.computed_tokens += u64::from(if is_decode { 0 } else { tokens });
            if is_decode {
                seq.generated += step.count;
            } else if seq.computed >= seq.target {
                seq.generated += 1;
                if seq.generated == 1 {
                    let (request, cached_tokens) = (seq.job.request, seq.cached_tokens.unwrap_or(0));
                    if seq.job.hands_off {
                        let prefill_us = step.end_us() - seq.began_us;
                        out.push(Outcome::Prefilled { request, cached_tokens, prefill_us });
                        self.handing.insert(request, seq.slots);
                        continue;
                    }
                    out.push(Outcome::FirstToken { request, cached_tokens });
                }
            }
            seq.chunk = 0;
            if seq.generated >= seq.job.output_tokens && seq.computed >= seq.target {
                seq.slots.iter().rev().for_each(|slot| self.pool.release(*slot));
                out.push(Outcome::Finished { request: seq.job.request });
            } else {
                self.running.push(seq);
            }
        }
    }
}
