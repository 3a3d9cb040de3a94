//! The simulated fleet: requests are routed to pods, pods compute, store and evict blocks, step by step in virtual time.
//!
//! * A request goes to the pod that served the deepest block of its prompt last, if that is at least half of the prompt and
//!   the pod is not busy; else to the less busy one of two. That is session affinity where there are sessions.
//! * An engine takes a step every [`STEP_MS`]: at most [`PREFILL_BLOCKS`] blocks of a prompt are computed in one, and one
//!   token of each answer. Its events come once a step.
//! * Requests arrive as fast as the fleet's rate of block operations (stored and removed) asks for.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::rc::Rc;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::forest::{Block, Forest};
use super::pod::Pod;
use super::requests::{Request, Requests};

/// Time of an engine's step, virtual milliseconds: 40 tokens a second for each answer.
pub(super) const STEP_MS: u64 = 25;
/// Steps in a second.
pub(super) const STEPS_PER_SECOND: u64 = 1_000 / STEP_MS;
/// Prompt blocks that a request computes in a step: vLLM's default budget of 8,192 tokens, in blocks of 16.
const PREFILL_BLOCKS: usize = 512;
/// A pod with more than so many times the mean number of running requests (and a few) gets no request that could go
/// elsewhere.
const BUSY: usize = 2;
/// Requests that every pod may have running before it can be busy.
const NEVER_BUSY: usize = 8;

/// A change of what a pod holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Stored(Block),
    Removed(Block),
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) requests: u64,
    pub(super) prompt_blocks: u64,
    pub(super) cached_blocks: u64,
    pub(super) stored: u64,
    pub(super) removed: u64,
}

/// What the fleet is.
#[derive(Clone, Copy, Debug)]
pub(super) struct FleetConfig {
    pub(super) pods: u16,
    pub(super) blocks_per_pod: usize,
    /// Blocks stored and removed by a pod in a second, on average.
    pub(super) operations_per_pod: u64,
    /// Tokens of a block: an answer fills one in as many steps.
    pub(super) block_tokens: u64,
}

/// The fleet.
pub(super) struct Fleet {
    config: FleetConfig,
    pub(super) forest: Forest,
    requests: Box<dyn Requests>,
    pub(super) pods: Vec<Pod>,
    /// Requests that each pod runs.
    running: Vec<usize>,
    flights: Vec<Flight>,
    free: Vec<usize>,
    /// What is due: step, order of arrival, flight.
    due: BinaryHeap<Reverse<(u64, u64, usize)>>,
    arrivals: u64,
    random: StdRng,
    step: u64,
    /// Operations that admitted requests will have caused.
    admitted: u64,
    pub(super) counts: Counts,
    /// By pod, what the step changed.
    changes: Vec<Vec<Change>>,
}

/// A request that a pod works on.
struct Flight {
    pod: u16,
    chain: Rc<[Block]>,
    prompt: usize,
    /// Blocks that are dealt with.
    done: usize,
}

// === impl Fleet ===

impl Fleet {
    /// Empty pods.
    pub(super) fn new(config: FleetConfig, forest: Forest, requests: Box<dyn Requests>, seed: u64) -> Self {
        let pods = usize::from(config.pods);
        Self {
            config,
            forest,
            requests,
            pods: (0..pods).map(|_| Pod::new(config.blocks_per_pod)).collect(),
            running: vec![0; pods],
            flights: Vec::new(),
            free: Vec::new(),
            due: BinaryHeap::new(),
            arrivals: 0,
            random: StdRng::seed_from_u64(seed ^ 0xf1ee7),
            step: 0,
            admitted: 0,
            counts: Counts::default(),
            changes: vec![Vec::new(); pods],
        }
    }

    /// The next request of the stream, which nobody serves.
    pub(super) fn peek(&mut self) -> Request {
        self.requests.next(&mut self.forest)
    }

    /// Lets one step pass. Afterwards [`Self::changes`] says what it changed.
    pub(super) fn step(&mut self) {
        self.changes.iter_mut().for_each(Vec::clear);
        self.step += 1;
        let rate = u64::from(self.config.pods) * self.config.operations_per_pod;
        while self.admitted < self.step * rate / STEPS_PER_SECOND {
            self.admit();
        }
        while let Some(Reverse((step, _, flight))) = self.due.peek().copied() {
            if step > self.step {
                break;
            }
            self.due.pop();
            self.advance(flight);
        }
    }

    /// By pod, what the last step changed, in order.
    pub(super) fn changes(&self) -> impl Iterator<Item = (u16, &[Change])> {
        let changed = self.changes.iter().enumerate().filter(|(_, changes)| !changes.is_empty());
        changed.map(|(pod, changes)| (pod as u16, changes.as_slice()))
    }

    fn admit(&mut self) {
        let request = self.requests.next(&mut self.forest);
        let pod = self.route(request.prompt());
        let held = &mut self.pods[usize::from(pod)];
        let cached = held.depth_of(request.prompt());
        held.touch(&request.chain[..cached]);
        self.counts.requests += 1;
        self.counts.prompt_blocks += request.prompt as u64;
        self.counts.cached_blocks += cached as u64;
        // Every block that is stored makes another one give way.
        self.admitted += 2 * (request.chain.len() - cached).max(1) as u64;
        self.running[usize::from(pod)] += 1;
        let flight = Flight { pod, chain: request.chain, prompt: request.prompt, done: cached };
        let number = self.free.pop().unwrap_or(self.flights.len());
        if number == self.flights.len() {
            self.flights.push(flight);
        } else {
            self.flights[number] = flight;
        }
        self.wake(number, self.step);
    }

    fn wake(&mut self, flight: usize, step: u64) {
        self.arrivals += 1;
        self.due.push(Reverse((step, self.arrivals, flight)));
    }

    fn route(&mut self, prompt: &[Block]) -> u16 {
        let known =
            prompt.iter().enumerate().rev().find_map(|(at, block)| Some((at, self.forest.served(*block)?)));
        let mean = self.running.iter().sum::<usize>() / self.running.len();
        let is_busy = |pod: u16| self.running[usize::from(pod)] > BUSY * mean + NEVER_BUSY;
        match known {
            Some((at, pod)) if 2 * at >= prompt.len() && !is_busy(pod) => pod,
            _ => {
                let [a, b] = [(); 2].map(|()| self.random.random_range(0..self.config.pods));
                if self.running[usize::from(b)] < self.running[usize::from(a)] { b } else { a }
            }
        }
    }

    /// One step of a request.
    fn advance(&mut self, number: usize) {
        let flight = &self.flights[number];
        let (pod, chain, prompt, done) = (flight.pod, Rc::clone(&flight.chain), flight.prompt, flight.done);
        let end = if done < prompt { prompt.min(done + PREFILL_BLOCKS) } else { chain.len().min(done + 1) };
        self.store(pod, &chain[done..end]);
        self.flights[number].done = end;
        if end == chain.len() {
            // As an engine that is done with a request frees its blocks: the end is the first to go.
            self.pods[usize::from(pod)].touch(&chain);
            self.running[usize::from(pod)] -= 1;
            self.flights[number].chain = Rc::from([]);
            self.free.push(number);
            return;
        }
        let wait = if end < prompt { 1 } else { self.config.block_tokens };
        self.wake(number, self.step + wait);
    }

    fn store(&mut self, pod: u16, blocks: &[Block]) {
        let (held, changes) = (&mut self.pods[usize::from(pod)], &mut self.changes[usize::from(pod)]);
        // An engine makes room for all that a step needs before it stores any of it.
        let mut stored = Vec::with_capacity(blocks.len());
        for block in blocks {
            self.forest.note_served(*block, pod);
            if held.holds(*block) {
                continue;
            }
            if let Some(evicted) = held.store(*block) {
                changes.push(Change::Removed(evicted));
                self.counts.removed += 1;
            }
            stored.push(Change::Stored(*block));
        }
        self.counts.stored += stored.len() as u64;
        changes.append(&mut stored);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::requests::{ChatConfig, Chats};
    use super::*;

    fn fleet(seed: u64) -> Fleet {
        let mut forest = Forest::new();
        let chats = Chats::new(ChatConfig::zipf(40, seed), &mut forest, seed);
        let config =
            FleetConfig { pods: 8, blocks_per_pod: 6_000, operations_per_pod: 1_000, block_tokens: 16 };
        Fleet::new(config, forest, Box::new(chats), seed)
    }

    #[test]
    fn changes_add_up_to_what_pods_hold() {
        let mut fleet = fleet(1);
        let mut held = vec![BTreeSet::new(); 8];
        for _ in 0..1_500 {
            fleet.step();
            for (pod, changes) in fleet.changes() {
                for change in changes {
                    match change {
                        Change::Stored(block) => assert!(held[usize::from(pod)].insert(*block)),
                        Change::Removed(block) => assert!(held[usize::from(pod)].remove(block)),
                    }
                }
            }
        }
        assert!(fleet.counts.removed > 10_000, "{:?}", fleet.counts);
        for (pod, held) in fleet.pods.iter().zip(held) {
            assert_eq!(pod.blocks(), held.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_full_fleet_makes_as_many_operations_as_it_is_asked_for() {
        let mut fleet = fleet(2);
        (0..4_000).for_each(|_| fleet.step());
        let before = fleet.counts;
        (0..40 * STEPS_PER_SECOND).for_each(|_| fleet.step());
        let operations = fleet.counts.stored + fleet.counts.removed - before.stored - before.removed;
        // Less by what several requests of one moment have in common.
        let wanted = 8 * 1_000 * 40;
        assert!((wanted * 8 / 10..wanted * 11 / 10).contains(&operations), "{operations}");
    }
}
