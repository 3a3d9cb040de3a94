//! Where recordings come from: public traces, if somebody has them, or statistics that were published about them.
//!
//! * Mooncake, conversation trace (Qin et al., FAST'25): ids of 512 tokens, cut into blocks of 16.
//! * Claude-Code conversations (kv-cache-tester, v8): ids are blocks of 64 tokens.

use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::replay::{Conversation, Recorded, Recording};
use crate::stored::{ReadFileError, read_file};

/// Names of the traces in their folder.
const MOONCAKE: &str = "mooncake-conversation.jsonl.zst";
const CLAUDE_CODE: &str = "claude-code-v8-local.jsonl.zst";
/// Most bytes of a trace, decompressed: they have a few hundred megabytes.
const MAX_TRACE_BYTES: u64 = 1 << 30;
/// Tokens of a Mooncake id, and of the blocks that it is cut into.
const MOONCAKE_ID_TOKENS: u32 = 512;
const MOONCAKE_BLOCK_TOKENS: u32 = 16;
const MOONCAKE_BLOCKS_PER_ID: u32 = MOONCAKE_ID_TOKENS / MOONCAKE_BLOCK_TOKENS;
/// Tokens of a block of a coding agent's conversation.
const AGENT_BLOCK_TOKENS: u32 = 64;
/// Requests of a made-up trace.
const SYNTHETIC_REQUESTS: usize = 12_000;
/// Conversations of a made-up trace of agents.
const SYNTHETIC_CONVERSATIONS: usize = 300;

/// A recording and where it is from.
pub(super) struct Sourced {
    pub(super) recording: Recording,
    pub(super) source: String,
}

/// A trace cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadTraceError {
    /// It could not be read.
    #[error(transparent)]
    File(#[from] ReadFileError),
    /// A line is not of the trace's form.
    #[error("line {line} of {path} is not a record of this trace: {source}; leave --traces out to use made-up ones", path = path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// There is no request in it.
    #[error("{path} has no requests; leave --traces out to use made-up ones", path = path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

#[derive(Deserialize)]
struct MooncakeLine {
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u32>,
}

#[derive(Deserialize)]
struct AgentLine {
    tool_tokens: u32,
    system_tokens: u32,
    requests: Vec<AgentRequest>,
}

/// A request, or the requests of a sub-agent.
#[derive(Deserialize)]
struct AgentRequest {
    #[serde(default)]
    hash_ids: Vec<u32>,
    #[serde(default)]
    out: u32,
    #[serde(default)]
    requests: Vec<AgentRequest>,
}

/// The Mooncake conversation trace, in `copies` at the same time.
pub(super) fn mooncake(folder: Option<&Path>, copies: usize, seed: u64) -> Result<Sourced, ReadTraceError> {
    let conversation = match folder {
        Some(folder) => read_mooncake(&folder.join(MOONCAKE))?,
        None => synthetic_mooncake(seed),
    };
    let from = if folder.is_some() { "trace" } else { "made up after the trace's statistics" };
    Ok(Sourced {
        source: format!("Mooncake conversation, {from}, {copies} copies at a time"),
        recording: Recording {
            conversations: vec![conversation],
            blocks_per_id: MOONCAKE_BLOCKS_PER_ID,
            in_turns: false,
            open: copies,
        },
    })
}

/// Conversations of coding agents, `open` at the same time.
pub(super) fn agents(folder: Option<&Path>, open: usize, seed: u64) -> Result<Sourced, ReadTraceError> {
    let conversations = match folder {
        Some(folder) => read_agents(&folder.join(CLAUDE_CODE))?,
        None => synthetic_agents(seed),
    };
    let from = if folder.is_some() { "traces" } else { "made up after the traces' statistics" };
    Ok(Sourced {
        source: format!("Claude Code conversations, {from}, {open} open at a time"),
        recording: Recording { conversations, blocks_per_id: 1, in_turns: true, open },
    })
}

fn read_lines<T: DeserializeOwned>(path: &Path, mut with: impl FnMut(T)) -> Result<(), ReadTraceError> {
    let content = read_file(path, MAX_TRACE_BYTES)?;
    for (at, line) in content.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty()) {
        let bad = |source| ReadTraceError::Line { path: path.to_owned(), line: at + 1, source };
        with(serde_json::from_slice(line).map_err(bad)?);
    }
    Ok(())
}

fn read_mooncake(path: &Path) -> Result<Conversation, ReadTraceError> {
    let mut ids = Ids::default();
    read_lines(path, |line: MooncakeLine| {
        let full_ids = (line.input_length / MOONCAKE_ID_TOKENS) as usize;
        let rest = line.input_length % MOONCAKE_ID_TOKENS / MOONCAKE_BLOCK_TOKENS;
        let answer = line.output_length / MOONCAKE_BLOCK_TOKENS;
        // The last id may be of a block that is not full.
        let (used, last_blocks) =
            if rest == 0 { (full_ids, MOONCAKE_BLOCKS_PER_ID) } else { (full_ids + 1, rest) };
        let used = used.min(line.hash_ids.len());
        ids.request(&line.hash_ids[..used], last_blocks, answer);
    })?;
    ids.conversation.common = 1;
    if ids.conversation.requests.is_empty() {
        return Err(ReadTraceError::Empty { path: path.to_owned() });
    }
    Ok(ids.conversation)
}

fn read_agents(path: &Path) -> Result<Vec<Conversation>, ReadTraceError> {
    let mut conversations = Vec::new();
    read_lines(path, |line: AgentLine| {
        let mut ids = Ids::default();
        ids.agent(&line.requests);
        ids.conversation.common = ((line.tool_tokens + line.system_tokens) / AGENT_BLOCK_TOKENS) as usize;
        if !ids.conversation.requests.is_empty() {
            conversations.push(ids.conversation);
        }
    })?;
    if conversations.is_empty() {
        return Err(ReadTraceError::Empty { path: path.to_owned() });
    }
    Ok(conversations)
}

/// Ids of a trace as ids of a conversation's tree. In these traces an id has one place only, so the last id of a request
/// names all of it.
#[derive(Default)]
struct Ids {
    conversation: Conversation,
    known: foldhash::HashMap<u32, u32>,
}

// === impl Ids ===

impl Ids {
    fn request(&mut self, ids: &[u32], last_blocks: u32, answer: u32) {
        let mut at = Conversation::BEGINNING;
        for id in ids {
            let conversation = &mut self.conversation;
            at = *self.known.entry(*id).or_insert_with(|| conversation.add(at));
        }
        if at != Conversation::BEGINNING {
            self.conversation.requests.push(Recorded { last: at, last_blocks, answer });
        }
    }

    fn agent(&mut self, requests: &[AgentRequest]) {
        for request in requests {
            self.request(&request.hash_ids, 1, request.out / AGENT_BLOCK_TOKENS);
            self.agent(&request.requests);
        }
    }
}

/// A positive number whose logarithm is normally distributed, by the sum of twelve uniform ones.
fn log_normal(random: &mut StdRng, median: f64, sigma: f64) -> f64 {
    let normal: f64 = (0..12).map(|_| random.random_range(0.0..1.0)).sum::<f64>() - 6.0;
    median * (sigma * normal).exp()
}

/// Like the Mooncake trace: prompts of 12,035 tokens on average, half of them below 6,909; all begin with one id; about
/// 37 % of blocks were there before.
fn synthetic_mooncake(seed: u64) -> Conversation {
    let mut random = StdRng::seed_from_u64(seed ^ 0x300);
    let mut conversation = Conversation { common: 1, ..Conversation::default() };
    let root = conversation.add(Conversation::BEGINNING);
    // Ends of what may be continued.
    let mut ends: Vec<u32> = Vec::new();
    for _ in 0..SYNTHETIC_REQUESTS {
        let continues = !ends.is_empty() && random.random_range(0.0..1.0) < 0.30;
        let mut at = root;
        if continues {
            at = ends.swap_remove(random.random_range(0..ends.len()));
        }
        let median = if continues { 2_600.0 } else { 5_200.0 };
        let tokens = log_normal(&mut random, median, 1.05).clamp(16.0, 120_000.0) as u32;
        for _ in 0..tokens.div_ceil(MOONCAKE_ID_TOKENS) {
            at = conversation.add(at);
        }
        let rest = (tokens % MOONCAKE_ID_TOKENS / MOONCAKE_BLOCK_TOKENS).max(1);
        let answer = log_normal(&mut random, 280.0, 0.6) as u32 / MOONCAKE_BLOCK_TOKENS;
        conversation.requests.push(Recorded { last: at, last_blocks: rest, answer });
        // What is continued are full blocks, so the partial one is not part of it.
        let full = conversation.parents[at as usize];
        if ends.len() < 2_000 {
            ends.push(full);
        }
    }
    conversation
}

/// Like the Claude Code traces: about 1,900 blocks a request, of which 96 % were there before.
fn synthetic_agents(seed: u64) -> Vec<Conversation> {
    let mut random = StdRng::seed_from_u64(seed ^ 0xa9e);
    let conversation = |_| {
        let mut conversation = Conversation { common: 265, ..Conversation::default() };
        let mut at = Conversation::BEGINNING;
        for _ in 0..conversation.common {
            at = conversation.add(at);
        }
        for _ in 0..random.random_range(20..=76) {
            for _ in 0..log_normal(&mut random, 38.0, 1.0).clamp(1.0, 2_000.0) as u32 {
                at = conversation.add(at);
            }
            conversation.requests.push(Recorded { last: at, last_blocks: 1, answer: 10 });
        }
        conversation
    };
    (0..SYNTHETIC_CONVERSATIONS).map(conversation).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::io::Write as _;

    use super::*;

    /// Mean blocks of a request and the share of blocks that were in requests before, whatever a cache could keep.
    fn statistics(conversations: &[Conversation], blocks_per_id: u32) -> (f64, f64) {
        let (mut requests, mut blocks, mut known) = (0u64, 0u64, 0u64);
        for conversation in conversations {
            let mut seen = HashSet::new();
            for request in &conversation.requests {
                let path = conversation.path(request.last);
                let of = |ids: usize| ids as u64 * u64::from(blocks_per_id);
                blocks += of(path.len() - 1) + u64::from(request.last_blocks);
                known += of(path.iter().take_while(|id| seen.contains(*id)).count());
                seen.extend(path);
                requests += 1;
            }
        }
        (blocks as f64 / requests as f64, known as f64 / blocks as f64)
    }

    #[test]
    fn the_made_up_mooncake_trace_has_the_statistics_of_the_real_one() {
        let conversation = synthetic_mooncake(1);
        let (mean, hit) = statistics(std::slice::from_ref(&conversation), MOONCAKE_BLOCKS_PER_ID);
        let tokens = mean * f64::from(MOONCAKE_BLOCK_TOKENS);
        assert!((10_500.0..13_500.0).contains(&tokens), "{tokens} tokens");
        assert!((0.33..0.41).contains(&hit), "{hit}");
    }

    #[test]
    fn made_up_agents_have_the_statistics_of_real_ones() {
        let (mean, hit) = statistics(&synthetic_agents(1), 1);
        assert!((1_750.0..2_150.0).contains(&mean), "{mean} blocks");
        assert!((0.955..0.975).contains(&hit), "{hit}");
    }

    fn file(lines: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(lines.as_bytes()).unwrap();
        file
    }

    #[test]
    fn a_mooncake_line_becomes_full_blocks_of_sixteen_tokens() {
        let lines = "{\"timestamp\":0,\"input_length\":1060,\"output_length\":40,\"hash_ids\":[0,7,9]}\n\
                     {\"timestamp\":1,\"input_length\":1024,\"output_length\":3,\"hash_ids\":[0,7]}\n";
        let conversation = read_mooncake(file(lines).path()).unwrap();
        assert_eq!(conversation.parents, [Conversation::BEGINNING, 0, 1]);
        let shape = |at: usize| {
            let request = conversation.requests[at];
            (request.last, request.last_blocks, request.answer)
        };
        assert_eq!((shape(0), shape(1)), ((2, 2, 2), (1, 32, 0)));
        assert!(read_mooncake(file("").path()).unwrap_err().to_string().contains("no requests"));
        assert!(read_mooncake(file("{}").path()).unwrap_err().to_string().contains("line 1"));
    }

    #[test]
    fn requests_of_sub_agents_are_requests() {
        let lines = "{\"tool_tokens\":64,\"system_tokens\":70,\"requests\":[{\"hash_ids\":[1,2,3],\"out\":130},\
                     {\"requests\":[{\"hash_ids\":[5],\"out\":1}]}]}\n";
        let conversations = read_agents(file(lines).path()).unwrap();
        let [conversation] = &conversations[..] else { panic!("{conversations:?}") };
        assert_eq!((conversation.common, conversation.requests.len()), (2, 2));
        assert_eq!((conversation.requests[0].answer, conversation.path(3)), (2, vec![3]));
    }
}
