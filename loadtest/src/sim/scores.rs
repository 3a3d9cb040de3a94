//! What must hold of scores at every moment: a source that is syncing or gone does not count, every other counts with what
//! it holds.
//!
//! Where the key space is cut, any index asks all that own a shard of the prompt, and puts the answers together. Then a score
//! is what the indexes that answered show; a block in a shard of which no index is up is not held by anybody, and the answer
//! says how much that is about. A source that some answer doubts is doubted in the row.

use kvatlas_index::cluster::{ShardAnswer, ShardQuestion};
use kvatlas_index::matching::TierWeights;
use kvatlas_index::sources::SourceState;
use kvatlas_index::{Index, OwnerFilter, PromptInput, ScoreAnswer, ScoreQuery, ScoreRow};
use kvatlas_proto::shard::SEGMENT_BLOCKS;
use kvatlas_proto::{BlockKey, Partition, ShardId, Tier};

use super::checks::{Claim, claim};
use super::engine::Content;
use super::prompts::{BLOCK_TOKENS, PROMPTS, Prompts};
use super::shim_side::MODEL;
use super::world::World;

/// Where the key space is cut, a comparison is of every so many-th prompt, in turns: it asks several indexes.
const PROMPT_TURNS: usize = 3;

/// Depths of a match: any tier, device alone, host alone.
type Depths = (u32, u32, u32);

/// A source as somebody shows it in one shard.
type Shown = (SourceState, Content);

/// Who answers about which shard, and what every shim looks like there.
struct Cluster {
    /// By shard.
    answers: Vec<Option<usize>>,
    /// By shim and shard.
    shown: Vec<Vec<Option<Shown>>>,
}

// === impl World: scores ===

impl World {
    /// Compares scores that an index gives with what is shown of the sources.
    pub(super) fn check_scores(&mut self, number: usize) {
        self.counts.score_checks += 1;
        let compared = if self.partition == Partition::WHOLE {
            self.compare_whole(number)
        } else {
            self.compare_cluster(number)
        };
        match compared {
            Ok(partial) => self.counts.partial_scores += partial,
            Err(what) => self.fail("scores are what visible sources hold", what),
        }
    }

    fn compare_whole(&self, number: usize) -> Result<u64, String> {
        let Some(index) = self.indexes[number].index() else { return Ok(0) };
        let shown: Vec<Vec<Option<Shown>>> =
            (0..self.shims.len()).map(|shim| vec![self.shown(number, shim, ShardId::WHOLE)]).collect();
        for prompt in 0..PROMPTS {
            let keys = Prompts::get().keys(prompt);
            // Refused while no engine has said its block size: nobody holds anything then.
            let answer = index.score(&query(&keys)).unwrap_or_default();
            compare(&answer, &keys, &shown, |_| 0)
                .map_err(|what| format!("index {number} scores #{prompt} {what}"))?;
        }
        Ok(0)
    }

    /// Returns how many answers were partial.
    fn compare_cluster(&self, number: usize) -> Result<u64, String> {
        let turn = self.counts.score_checks as usize;
        let Some(asker) = self.indexes[number].index() else { return Ok(0) };
        let cluster = self.cluster(number + turn);
        let mut partial = 0;
        for prompt in (0..PROMPTS).filter(|prompt| (prompt + turn).is_multiple_of(PROMPT_TURNS)) {
            let keys = Prompts::get().keys(prompt);
            let wrong = |what: String| format!("index {number} asks all about #{prompt}: {what}");
            let (answer, coverage) = self.ask_all(number, asker, &keys, &cluster).map_err(wrong)?;
            if !answer.scope_known {
                let sources = asker.sources(&OwnerFilter::default(), self.now_ms());
                if !sources.is_empty() || !answer.rows.is_empty() {
                    return Err(wrong(format!("it does not know the model, but {} sources", sources.len())));
                }
                continue;
            }
            let shards: Vec<u16> = segments(&keys, self.partition).collect();
            let shard_of = |at: usize| usize::from(shards[at / SEGMENT_BLOCKS as usize]);
            let answered = (0..keys.len()).filter(|at| cluster.answers[shard_of(*at)].is_some()).count();
            let expected = answered as f64 / keys.len() as f64;
            if (coverage - expected).abs() > 1e-9 {
                return Err(wrong(format!("the answer covers {coverage}, it should be {expected}")));
            }
            partial += u64::from(answered < keys.len());
            compare(&answer, &keys, &cluster.shown, shard_of).map_err(wrong)?;
        }
        Ok(partial)
    }

    /// Of several indexes that own a shard, one answers, in turns.
    fn cluster(&self, turn: usize) -> Cluster {
        let shards: Vec<ShardId> = self.partition.all().collect();
        let answers: Vec<Option<usize>> = shards
            .iter()
            .map(|shard| {
                let owners: Vec<usize> =
                    (0..self.indexes.len()).filter(|number| self.indexes[*number].owns(*shard)).collect();
                (!owners.is_empty()).then(|| owners[turn % owners.len()])
            })
            .collect();
        let shown = |shim: usize| {
            shards.iter().zip(&answers).map(|(shard, number)| self.shown((*number)?, shim, *shard)).collect()
        };
        Cluster { shown: (0..self.shims.len()).map(shown).collect(), answers }
    }

    fn shown(&self, number: usize, shim: usize, shard: ShardId) -> Option<Shown> {
        self.look(number, shim, shard).map(|(info, content)| (info.state, content))
    }

    /// The answer of all, as the shells get it, and how much of the prompt it covers.
    fn ask_all(
        &self,
        number: usize,
        asker: &Index,
        keys: &[u64],
        cluster: &Cluster,
    ) -> Result<(ScoreAnswer, f64), String> {
        let (now_ms, query) = (self.now_ms(), query(keys));
        let inquiry = asker.inquire(&query).map_err(|error| error.to_string())?;
        let mut questions: Vec<(usize, Vec<u16>)> = Vec::new();
        let mut unanswered = Vec::new();
        for shard in inquiry.shards(self.partition) {
            let to = match cluster.answers[usize::from(shard)] {
                Some(to) => to,
                // Nobody has it: either nobody is asked, or somebody who has given it up and says so.
                None if shard % 2 == 0 => {
                    unanswered.push(shard);
                    continue;
                }
                None => number,
            };
            match questions.iter_mut().find(|(known, _)| *known == to) {
                Some((_, shards)) => shards.push(shard),
                None => questions.push((to, vec![shard])),
            }
        }
        let mut answers = Vec::new();
        for (to, shards) in questions {
            let question = inquiry.question(7, |shard| shards.contains(&shard)).encode();
            let question = question.map_err(|error| error.to_string())?;
            let question = ShardQuestion::parse(&question).map_err(|error| error.to_string())?;
            let Some(index) = self.indexes[to].index() else {
                return Err("a dead index was asked".to_owned());
            };
            let answer = index.look_up(&question, |shard| index.owns(shard), now_ms).encode(&question);
            let answer = answer.map_err(|error| error.to_string())?;
            answers.push(ShardAnswer::parse(&answer, &question).map_err(|error| error.to_string())?);
        }
        let coverage = inquiry.coverage(&answers, &unanswered).share();
        Ok((asker.conclude(&query, inquiry, &answers, now_ms), coverage))
    }
}

fn query(keys: &[u64]) -> ScoreQuery<'_> {
    ScoreQuery {
        model: MODEL,
        tenant: "",
        block_size: Some(BLOCK_TOKENS),
        input: PromptInput::Keys { keys, prompt_tokens: None },
        candidates: &[],
        weights: TierWeights::default(),
        limit: None,
    }
}

/// The shards of a prompt's segments, in order.
fn segments(keys: &[u64], partition: Partition) -> impl Iterator<Item = u16> {
    keys.chunks(SEGMENT_BLOCKS as usize).map(move |segment| partition.shard_of(BlockKey(segment[0])))
}

/// Compares every shim's row with what is shown of it, where block n of the prompt is looked for in `shard_of(n)`.
fn compare(
    answer: &ScoreAnswer,
    keys: &[u64],
    shown: &[Vec<Option<Shown>>],
    shard_of: impl Fn(usize) -> usize,
) -> Result<(), String> {
    let shards: std::collections::BTreeSet<usize> = (0..keys.len()).map(&shard_of).collect();
    for (shim, shown) in shown.iter().enumerate() {
        let name = super::name(shim);
        let row = answer.rows.iter().find(|row| row.instance == name);
        let found = row.map_or((0, 0, 0), found);
        let held = |at: usize, tier: Tier| {
            let shown = shown[shard_of(at)].as_ref();
            shown.is_some_and(|(state, content)| {
                claim(*state) != Claim::Hidden && content.contains(&(tier, keys[at]))
            })
        };
        let leading =
            |holds: &dyn Fn(usize) -> bool| (0..keys.len()).take_while(|at| holds(*at)).count() as u32;
        let expected: Depths = (
            leading(&|at| held(at, Tier::Gpu) || held(at, Tier::Cpu)),
            leading(&|at| held(at, Tier::Gpu)),
            leading(&|at| held(at, Tier::Cpu)),
        );
        let states = || shards.iter().filter_map(|shard| shown[*shard].as_ref()).map(|(state, _)| *state);
        if found != expected {
            return Err(format!(
                "on {name} ({:?}): {found:?}, held are {expected:?}",
                states().collect::<Vec<_>>()
            ));
        }
        let relied = |state: SourceState| matches!(state, SourceState::Live | SourceState::Verified);
        let doubt = states().filter(|state| !relied(*state)).reduce(SourceState::worse);
        let stated = row.and_then(|row| row.state);
        let as_stated = stated.is_none_or(|stated| doubt.map_or(relied(stated), |doubt| doubt == stated));
        if !as_stated {
            return Err(format!("on {name}: it is said to be {stated:?}, and somebody shows {doubt:?}"));
        }
    }
    Ok(())
}

fn found(row: &ScoreRow) -> Depths {
    let of = |tier| {
        let depth = row.matched.tiers.iter().find(|depth| depth.tier.tier() == tier);
        depth.map_or(0, |depth| depth.matched_blocks)
    };
    (row.matched.matched_blocks, of(Tier::Gpu), of(Tier::Cpu))
}
