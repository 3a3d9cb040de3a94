//! Requests to replay: what is asked when, and which blocks its prompt is made of.
//!
//! * Mooncake JSONL: ids name places; the last one may be of a block that is not full.
//! * Claude-Code JSONL: one conversation a line; ids name places in the conversation (`local`) or contents (`global`).
//! * Azure CSV: lengths only, so every block is new.
//!
//! What is generated has no ids in these traces: it takes space while it lives and is found by nobody.

use std::path::{Path, PathBuf};

use foldhash::HashMap;
use serde::Deserialize;

use super::blocks::{BlockTree, Ids, NONE};
use crate::stored::{ReadFileError, read_file};

/// Most bytes of a trace, decompressed: the largest public ones have a few hundred megabytes.
const MAX_TRACE_BYTES: u64 = 1 << 30;
/// Tokens of an id where a line does not say.
const MOONCAKE_ID_TOKENS: u32 = 512;
/// Blocks of traces that have lengths only.
const LENGTHS_BLOCK_TOKENS: u32 = 64;

/// Requests in the order of their file.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Where it is from.
    pub name: String,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// All blocks.
    pub tree: BlockTree,
    /// All requests. Whatever one waits for comes before it.
    pub requests: Vec<TraceRequest>,
    /// Conversations whose start is not recorded; 0 if all requests have recorded times.
    pub conversations: u32,
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceRequest {
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// Tokens that are generated.
    pub output_tokens: u32,
    /// Its last block, full or not; [`NONE`] if there is none.
    pub last: u32,
    /// How many full blocks it has.
    pub full_blocks: u32,
    /// What a gateway would see as one session.
    pub session: u32,
    /// The conversation whose start counts.
    pub conversation: u32,
    /// Not before so long after the start of the trace, or of the conversation, microseconds.
    pub offset_us: u64,
    /// Not before this request has ended, and ...
    pub after: Option<u32>,
    /// ... so long after that, microseconds.
    pub think_us: u64,
}

/// How a trace is read.
#[derive(Clone, Copy, Debug, Default)]
pub struct TraceOptions {
    /// At least so many requests of the beginning are taken, whole conversations; `None`: all.
    pub limit: Option<usize>,
    /// Tokens of a block: a divisor of what the trace has. `None`: as in the trace.
    pub block_tokens: Option<u32>,
}

/// A trace cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadTraceError {
    /// It could not be read.
    #[error(transparent)]
    File(#[from] ReadFileError),
    /// A line is not of a known form.
    #[error(
        "line {line} of {path} is not a record of this trace: {problem}; known are Mooncake JSONL, Claude-Code JSONL and \
         Azure CSV",
        path = path.display()
    )]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// There is no request in it.
    #[error("{path} has no requests; synth:zipf, synth:agents and synth:chat are made up", path = path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A made-up trace of an unknown kind.
    #[error("there is no made-up trace {name:?}: give synth:zipf, synth:agents or synth:chat")]
    UnknownSynthesis {
        /// What was asked for.
        name: String,
    },
    /// Blocks cannot be cut so.
    #[error("blocks of {asked} tokens cannot be made of ids of {id_tokens}: give a divisor of it")]
    BlockTokens {
        /// Asked for.
        asked: u32,
        /// In the trace.
        id_tokens: u32,
    },
}

#[derive(Deserialize)]
struct MooncakeLine {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    block_size: Option<u32>,
    #[serde(default)]
    session: Option<String>,
    hash_ids: Vec<u64>,
}

#[derive(Deserialize)]
struct AgentLine {
    block_size: u32,
    hash_id_scope: String,
    requests: Vec<AgentRequest>,
}

/// A request, or the requests of a sub-agent.
#[derive(Deserialize)]
struct AgentRequest {
    #[serde(default)]
    t: f64,
    #[serde(default, rename = "in")]
    input: u32,
    #[serde(default)]
    out: u32,
    #[serde(default)]
    think_time: f64,
    #[serde(default)]
    hash_ids: Vec<u64>,
    #[serde(default)]
    requests: Vec<AgentRequest>,
}

/// Reads a trace under construction.
struct Reader<'a> {
    path: &'a Path,
    options: TraceOptions,
    trace: Trace,
    ids: Ids,
    sessions: HashMap<String, u32>,
    /// The session that a prompt ends in, by its last full block: a later prompt that goes on from there is of it.
    ends: HashMap<u32, u32>,
    next_session: u32,
}

/// Reads the file at `path`, in whichever known form it is.
pub fn read_trace(path: &Path, options: TraceOptions) -> Result<Trace, ReadTraceError> {
    let content = read_file(path, MAX_TRACE_BYTES)?;
    let mut reader = Reader::new(path, options);
    let lines = || content.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty());
    let first = lines().next().map(|(_, line)| line).unwrap_or_default();
    if first.starts_with(b"TIMESTAMP") {
        reader.azure(lines())?;
    } else {
        let is_mooncake = first.windows(11).any(|name| name == b"\"timestamp\"");
        for (at, line) in lines() {
            if reader.is_full() {
                break;
            }
            if is_mooncake {
                reader.mooncake(at, line)?;
            } else {
                reader.agents(at, line)?;
            }
        }
    }
    reader.finish()
}

fn us(seconds: f64) -> u64 {
    (seconds.max(0.0) * 1e6).round() as u64
}

/// Microseconds since 1970 of `2023-11-16 18:17:03.9799600`.
fn parse_time(text: &str) -> Option<u64> {
    let (date, time) = text.split_once(' ')?;
    let mut date = date.splitn(3, '-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let mut time = time.splitn(3, ':');
    let (hours, minutes) = (time.next()?.parse::<u64>().ok()?, time.next()?.parse::<u64>().ok()?);
    let seconds: f64 = time.next()?.parse().ok()?;
    // Days since 1970 in the proleptic Gregorian calendar, with years that begin in March.
    let year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    let days = year * 365 + year / 4 - year / 100 + year / 400 + day_of_year - 719_468;
    Some((u64::try_from(days).ok()? * 86_400 + hours * 3_600 + minutes * 60) * 1_000_000 + us(seconds))
}

// === impl Trace ===

impl Trace {
    /// A trace without requests.
    pub(super) fn empty(name: String, block_tokens: u32) -> Self {
        Self { name, block_tokens, tree: BlockTree::default(), requests: Vec::new(), conversations: 0 }
    }

    /// Tokens of all prompts.
    pub fn prompt_tokens(&self) -> u64 {
        self.requests.iter().map(|request| u64::from(request.prompt_tokens)).sum()
    }

    /// The full blocks of a request's prompt.
    pub fn full_path(&self, request: &TraceRequest) -> Vec<u32> {
        let mut path = self.tree.path(request.last);
        path.truncate(request.full_blocks as usize);
        path
    }

    /// What an infinite cache that all share would have of all prompts, requests in the order of the file.
    pub fn ideal_hit_tokens(&self) -> u64 {
        let mut seen = vec![false; self.tree.len()];
        let mut tokens = 0;
        for request in &self.requests {
            let path = self.full_path(request);
            let cap = (request.prompt_tokens.saturating_sub(1) / self.block_tokens) as usize;
            let hit = path.iter().take_while(|block| seen[**block as usize]).count().min(cap);
            tokens += hit as u64 * u64::from(self.block_tokens);
            path.iter().for_each(|block| seen[*block as usize] = true);
        }
        tokens
    }
}

// === impl Reader ===

impl<'a> Reader<'a> {
    fn new(path: &'a Path, options: TraceOptions) -> Self {
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        Self {
            path,
            options,
            trace: Trace::empty(name, 0),
            ids: Ids::new(1),
            sessions: HashMap::default(),
            ends: HashMap::default(),
            next_session: 0,
        }
    }

    fn is_full(&self) -> bool {
        self.options.limit.is_some_and(|limit| self.trace.requests.len() >= limit)
    }

    fn finish(self) -> Result<Trace, ReadTraceError> {
        if self.trace.requests.is_empty() {
            return Err(ReadTraceError::Empty { path: self.path.to_owned() });
        }
        Ok(self.trace)
    }

    fn bad(&self, at: usize, problem: &dyn ToString) -> ReadTraceError {
        ReadTraceError::Line { path: self.path.to_owned(), line: at + 1, problem: problem.to_string() }
    }

    /// Cuts ids of so many tokens into blocks.
    fn cut(&mut self, id_tokens: u32) -> Result<(), ReadTraceError> {
        if self.trace.block_tokens != 0 {
            return Ok(());
        }
        let asked = self.options.block_tokens.unwrap_or(id_tokens);
        if asked == 0 || !id_tokens.is_multiple_of(asked) {
            return Err(ReadTraceError::BlockTokens { asked, id_tokens });
        }
        self.trace.block_tokens = asked;
        self.ids = Ids::new(id_tokens / asked);
        Ok(())
    }

    fn mooncake(&mut self, at: usize, line: &[u8]) -> Result<(), ReadTraceError> {
        let line: MooncakeLine = serde_json::from_slice(line).map_err(|error| self.bad(at, &error))?;
        self.cut(line.block_size.unwrap_or(MOONCAKE_ID_TOKENS))?;
        let request = self.request(&line.hash_ids, line.input_length, line.output_length);
        let session = match line.session {
            Some(name) => *self.sessions.entry(name).or_insert_with(|| {
                self.next_session += 1;
                self.next_session - 1
            }),
            None => self.derived_session(&request),
        };
        self.trace.requests.push(TraceRequest { session, offset_us: us(line.timestamp / 1e3), ..request });
        Ok(())
    }

    /// Where no session is recorded, whoever goes on from another prompt's end is of its session.
    fn derived_session(&mut self, request: &TraceRequest) -> u32 {
        let path = self.trace.full_path(request);
        let continued = path.iter().rev().find_map(|block| self.ends.get(block)).copied();
        let session = continued.unwrap_or(self.next_session);
        self.next_session = self.next_session.max(session + 1);
        // The first block is everybody's, in traces with one system prompt.
        if let Some(end) = path.last().filter(|_| path.len() > 1) {
            self.ends.insert(*end, session);
        }
        session
    }

    fn agents(&mut self, at: usize, line: &[u8]) -> Result<(), ReadTraceError> {
        let line: AgentLine = serde_json::from_slice(line).map_err(|error| self.bad(at, &error))?;
        self.cut(line.block_size)?;
        if line.hash_id_scope == "local" {
            self.ids = Ids::new(line.block_size / self.trace.block_tokens);
        }
        let conversation = self.trace.conversations;
        self.trace.conversations += 1;
        self.agent(&line.requests, conversation, 0.0, None);
        Ok(())
    }

    /// The requests of an agent that begins at `begin_s` of the conversation, one after the other; sub-agents run beside.
    fn agent(&mut self, requests: &[AgentRequest], conversation: u32, begin_s: f64, mut after: Option<u32>) {
        let session = self.next_session;
        self.next_session += 1;
        for asked in requests {
            if !asked.requests.is_empty() {
                self.agent(&asked.requests, conversation, begin_s + asked.t, after);
                continue;
            }
            let request = self.request(&asked.hash_ids, asked.input, asked.out);
            let number = self.trace.requests.len() as u32;
            self.trace.requests.push(TraceRequest {
                session,
                conversation,
                offset_us: us(begin_s + asked.t),
                after,
                think_us: us(asked.think_time),
                ..request
            });
            after = Some(number);
        }
    }

    fn request(&mut self, ids: &[u64], prompt_tokens: u32, output_tokens: u32) -> TraceRequest {
        let last = self.ids.last(&mut self.trace.tree, ids);
        let blocks = ids.len() as u32 * self.ids.blocks_per_id();
        TraceRequest {
            prompt_tokens: prompt_tokens.max(1),
            output_tokens: output_tokens.max(1),
            last,
            full_blocks: (prompt_tokens / self.trace.block_tokens).min(blocks),
            session: 0,
            conversation: 0,
            offset_us: 0,
            after: None,
            think_us: 0,
        }
    }

    fn azure<'l>(&mut self, lines: impl Iterator<Item = (usize, &'l [u8])>) -> Result<(), ReadTraceError> {
        self.trace.block_tokens = self.options.block_tokens.unwrap_or(LENGTHS_BLOCK_TOKENS).max(1);
        let mut begin = None;
        for (at, line) in lines.skip(1) {
            if self.is_full() {
                break;
            }
            let text = std::str::from_utf8(line).map_err(|error| self.bad(at, &error))?.trim_end();
            let mut fields = text.split(',');
            let mut field = || fields.next();
            let mut record = || {
                let time = parse_time(field()?)?;
                Some((time, field()?.parse::<u32>().ok()?, field()?.parse::<u32>().ok()?))
            };
            let (time, input, output) =
                record().ok_or_else(|| self.bad(at, &"not TIMESTAMP,ContextTokens,GeneratedTokens"))?;
            let begin = *begin.get_or_insert(time);
            let blocks = input / self.trace.block_tokens;
            let last = (0..blocks).fold(NONE, |parent, _| self.trace.tree.add(parent));
            self.trace.requests.push(TraceRequest {
                prompt_tokens: input.max(1),
                output_tokens: output.max(1),
                last,
                full_blocks: blocks,
                session: self.trace.requests.len() as u32,
                conversation: 0,
                offset_us: time.saturating_sub(begin),
                after: None,
                think_us: 0,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "trace_tests.rs"]
mod tests;
