//! Requests that were recorded, or made up after published statistics, played in many copies.
//!
//! A recording knows which blocks prompts have in common, not their content. A fleet is larger than what was recorded, so
//! several copies run at the same time; they share only what is marked as common, such as a system prompt.

use foldhash::HashMap;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::forest::{Block, Forest};
use super::requests::{Request, Requests};

const NONE: u32 = u32::MAX;

/// Conversations (or whole traces) as trees of ids.
#[derive(Clone, Debug)]
pub(super) struct Recording {
    pub(super) conversations: Vec<Conversation>,
    /// Blocks that an id stands for.
    pub(super) blocks_per_id: u32,
    /// Whether a request continues the one before it, so that its prompt has that one's answer.
    pub(super) in_turns: bool,
    /// Copies that run at the same time.
    pub(super) open: usize,
}

/// Requests in their order, over one tree of ids.
#[derive(Clone, Debug, Default)]
pub(super) struct Conversation {
    /// What each id follows; [`Conversation::BEGINNING`] if it begins a prompt.
    pub(super) parents: Vec<u32>,
    pub(super) requests: Vec<Recorded>,
    /// So many ids from a prompt's beginning are the same in every copy.
    pub(super) common: usize,
}

/// One recorded request: everything up to an id.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recorded {
    pub(super) last: u32,
    /// Blocks of the last id that are full.
    pub(super) last_blocks: u32,
    /// Blocks that the answer fills.
    pub(super) answer: u32,
}

/// Plays a recording for ever.
pub(super) struct Replay {
    recording: Recording,
    random: StdRng,
    open: Vec<Copy>,
    /// By conversation, the first block of ids that copies share.
    common: Vec<HashMap<u32, Block>>,
    started: usize,
}

/// A conversation that is being played.
struct Copy {
    conversation: usize,
    next: usize,
    /// By id, its first block.
    blocks: Vec<Block>,
}

// === impl Conversation ===

impl Conversation {
    /// The parent of ids that have none.
    pub(super) const BEGINNING: u32 = NONE;

    /// Adds an id.
    pub(super) fn add(&mut self, parent: u32) -> u32 {
        self.parents.push(parent);
        self.parents.len() as u32 - 1
    }

    /// All ids up to this one.
    pub(super) fn path(&self, last: u32) -> Vec<u32> {
        let mut path = Vec::new();
        let mut at = last;
        while at != Self::BEGINNING {
            path.push(at);
            at = self.parents[at as usize];
        }
        path.reverse();
        path
    }
}

// === impl Replay ===

impl Replay {
    /// From the beginning.
    pub(super) fn new(recording: Recording, seed: u64) -> Self {
        let common = vec![HashMap::default(); recording.conversations.len()];
        Self { recording, random: StdRng::seed_from_u64(seed), open: Vec::new(), common, started: 0 }
    }

    fn open_one(&mut self) {
        // Every conversation once in a random order would be fairer still; the first round goes through all of them.
        let all = self.recording.conversations.len();
        let conversation = if self.started < all { self.started } else { self.random.random_range(0..all) };
        self.started += 1;
        let blocks = vec![NONE; self.recording.conversations[conversation].parents.len()];
        // Copies that began at the same time would all be at the same point.
        let requests = self.recording.conversations[conversation].requests.len();
        let next = if self.started <= self.recording.open && self.recording.in_turns {
            self.random.random_range(0..requests)
        } else {
            0
        };
        self.open.push(Copy { conversation, next, blocks });
    }

    /// The blocks of all ids of a path.
    fn grow(&mut self, copy: usize, path: &[u32], forest: &mut Forest) {
        let copy = &mut self.open[copy];
        let common = self.recording.conversations[copy.conversation].common;
        let shared = &mut self.common[copy.conversation];
        let per_id = self.recording.blocks_per_id;
        let mut parent = None;
        for (depth, id) in path.iter().enumerate() {
            let first = &mut copy.blocks[*id as usize];
            if *first == NONE && depth < common {
                *first = shared.get(id).copied().unwrap_or(NONE);
            }
            if *first == NONE {
                *first = forest.grow(parent);
                let mut last = *first;
                for _ in 1..per_id {
                    last = forest.grow(Some(last));
                }
                if depth < common {
                    shared.insert(*id, *first);
                }
            }
            parent = Some(*first + per_id - 1);
        }
    }
}

impl Requests for Replay {
    fn next(&mut self, forest: &mut Forest) -> Request {
        while self.open.len() < self.recording.open.max(1) {
            self.open_one();
        }
        let at = self.random.random_range(0..self.open.len());
        let (number, next) = (self.open[at].conversation, self.open[at].next);
        let conversation = &self.recording.conversations[number];
        let (recorded, following) =
            (conversation.requests[next], conversation.requests.get(next + 1).copied());
        let over = following.is_none();
        let per_id = self.recording.blocks_per_id;
        let path = conversation.path(recorded.last);
        let continued = following
            .filter(|_| self.recording.in_turns && recorded.last_blocks == per_id)
            .map(|following| conversation.path(following.last))
            .filter(|longer| longer.len() > path.len() && longer[path.len() - 1] == recorded.last);
        self.grow(at, &path, forest);
        let last = self.open[at].blocks[recorded.last as usize] + recorded.last_blocks - 1;
        let mut chain = forest.chain_to(last);
        let prompt = chain.len();
        if let Some(longer) = continued {
            self.grow(at, &longer, forest);
            let ids = longer[path.len()..].iter().take(recorded.answer.div_ceil(per_id) as usize);
            let blocks = ids.flat_map(|id| {
                let first = self.open[at].blocks[*id as usize];
                first..first + per_id
            });
            chain.extend(blocks.take(recorded.answer as usize));
        } else {
            forest.extend(&mut chain, recorded.answer);
        }
        if over {
            self.open.swap_remove(at);
        } else {
            self.open[at].next += 1;
        }
        Request { chain: chain.into(), prompt }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two turns over three ids, of which the first is common.
    fn recording(in_turns: bool) -> Recording {
        let mut conversation = Conversation { common: 1, ..Conversation::default() };
        let first = conversation.add(Conversation::BEGINNING);
        let second = conversation.add(first);
        let third = conversation.add(second);
        let of = |last, last_blocks| Recorded { last, last_blocks, answer: 3 };
        conversation.requests = vec![of(second, 4), of(third, 2)];
        Recording { conversations: vec![conversation], blocks_per_id: 4, in_turns, open: 1 }
    }

    #[test]
    fn a_turn_has_the_answer_before_it_and_copies_share_what_is_common() {
        let mut forest = Forest::new();
        let recording = Recording { open: 0, ..recording(true) };
        let mut replay = Replay::new(recording, 1);
        let requests: Vec<Request> = (0..4).map(|_| replay.next(&mut forest)).collect();
        let lengths: Vec<_> = requests.iter().map(|request| (request.prompt, request.chain.len())).collect();
        assert_eq!(lengths, [(8, 11), (10, 13), (8, 11), (10, 13)]);
        assert_eq!(requests[1].prompt(), &requests[0].chain[..10]);
        assert_eq!(requests[0].chain[..4], requests[2].chain[..4]);
        assert!(requests[0].chain[4..].iter().all(|block| !requests[2].chain.contains(block)));
    }

    #[test]
    fn requests_that_are_not_turns_of_one_conversation_share_no_answers() {
        let mut forest = Forest::new();
        let mut replay = Replay::new(recording(false), 1);
        let (first, second) = (replay.next(&mut forest), replay.next(&mut forest));
        assert_eq!(second.prompt()[..8], first.chain[..8]);
        assert!(!second.chain.contains(&first.chain[8]));
    }
}
