//! From what instances hold to what it would cost to serve a prompt there: rows of an answer become candidates of the cost model
//! ([`kvatlas_planner`]). Pure.
//!
//! * [`score`]: presets of a score request.
//! * [`plan`](mod@plan): plan requests and their answers.

pub(crate) mod plan;
pub(crate) mod score;

use std::cell::RefCell;
use std::sync::Arc;

use foldhash::{HashMap, HashMapExt};
use kvatlas_planner::profile::{EngineProfile, UnknownProfileError};
use kvatlas_planner::query::{MAX_INTERVALS, MAX_POOLS, QueryError};
use kvatlas_planner::{
    Candidate, CostProfile, Held, LinkOverride, Load, Location, Objective, PlanError, PlanQuery,
    PoolCoverage, Profiles, Role, Scratch,
};
use kvatlas_proto::grpc as pb;
use kvatlas_proto::{DpRank, InstanceId, Tier};

use crate::answer::age_in_steps;
use crate::query::{ScoreAnswer, ScoreQuery, ScoreRow};

/// Age of what nobody has proved, milliseconds: older than any proof of a source that is well.
const UNPROVED_AGE_MS: f64 = 60_000.0;
/// Tokens per block where neither the question nor anybody's events say: vLLM's default. Nothing is held then.
const DEFAULT_BLOCK_TOKENS: u32 = 16;
/// What names of shared stores begin with.
const STORES: [&str; 2] = ["pool:", "node:"];

thread_local! {
    /// Kept from one question to the next, so that nothing but the answer is allocated.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Why something cannot be priced.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CostError {
    #[error(transparent)]
    Profile(#[from] UnknownProfileError),
    #[error("{what}: {instance} is named twice: give each instance once")]
    Twice { what: &'static str, instance: String },
    #[error("{what}: {instance}: {number} is {value}: give {allowed}")]
    Range { what: &'static str, instance: String, number: &'static str, value: f64, allowed: &'static str },
    #[error("candidates: {instance}: role {role} is not known: give ROLE_PREFILL, ROLE_DECODE or ROLE_BOTH")]
    Role { instance: String, role: i32 },
    #[error("the prompt is empty: there is nothing to serve")]
    EmptyPrompt,
    #[error(transparent)]
    Query(#[from] QueryError),
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// Candidates and stores of one question, as the cost model wants them.
pub(crate) struct Fleet {
    pub(crate) members: Vec<Member>,
    stores: Vec<Member>,
    costs: CostProfile,
    prompt_tokens: u32,
    block_tokens: u32,
    /// What was assumed beyond what the profile says.
    assumptions: Vec<String>,
}

/// One of them: a rank of an instance, or a store.
pub(crate) struct Member {
    pub(crate) instance: InstanceId,
    pub(crate) rank: DpRank,
    /// Position of its row in the answer.
    pub(crate) row: usize,
    role: Role,
    load: Load,
    held: Vec<Held>,
    location: Location,
    engine: Option<Arc<EngineProfile>>,
    gb_per_s: Option<f64>,
    alpha_ms: Option<f64>,
}

/// Whether a name is a shared store's: nothing is served there.
pub(crate) fn is_store(instance: &str) -> bool {
    STORES.iter().any(|prefix| instance.starts_with(prefix))
}

// === impl Fleet ===

impl Fleet {
    /// The fleet that an answer is about. `loads`: how busy it is; instances without one are idle.
    pub(crate) fn new(
        profiles: &Profiles,
        query: &ScoreQuery<'_>,
        answer: &ScoreAnswer,
        loads: &[pb::PlanCandidate],
        (what, profile): (&'static str, &str),
        now_ms: u64,
    ) -> Result<Self, CostError> {
        let costs = profiles.resolve(query.model, Some(profile))?;
        let sizes = answer.rows.iter().map(|row| row.block_size).filter(|size| *size > 0);
        let block_tokens = sizes.min().or(query.block_size).unwrap_or(DEFAULT_BLOCK_TOKENS);
        let mut fleet = Self {
            members: Vec::with_capacity(answer.rows.len()),
            stores: Vec::new(),
            prompt_tokens: 0,
            block_tokens,
            costs,
            assumptions: Vec::new(),
        };
        fleet.prompt_tokens = fleet.length_of(query)?;
        let mut by_name = HashMap::with_capacity(loads.len());
        for load in loads {
            if by_name.insert(load.instance.as_str(), load).is_some() {
                return Err(CostError::Twice { what, instance: load.instance.clone() });
            }
        }
        for (at, row) in answer.rows.iter().enumerate() {
            // A name that cannot be an instance's was never in an event, and nobody can be sent there.
            let Ok(instance) = InstanceId::new(row.instance.as_str()) else { continue };
            let (held, rank) = (held(row, block_tokens, now_ms), DpRank(row.rank));
            if is_store(&row.instance) {
                fleet.add_store(profiles, instance, rank, at, held);
            } else {
                let load = by_name.get(row.instance.as_str()).copied();
                let member = member(profiles, &fleet.costs, (instance, rank, at), held, (what, load))?;
                fleet.add(member);
            }
        }
        Ok(fleet)
    }

    fn add(&mut self, member: Member) {
        // Of a rank with engines of several block sizes, what holds more counts.
        let same = |known: &&mut Member| (&known.instance, known.rank) == (&member.instance, member.rank);
        let blocks = |member: &Member| member.held.iter().map(|held| held.end_block).max();
        match self.members.iter_mut().find(same) {
            Some(known) if blocks(known) < blocks(&member) => *known = member,
            Some(_) => {}
            None => self.members.push(member),
        }
    }

    fn add_store(
        &mut self,
        profiles: &Profiles,
        instance: InstanceId,
        rank: DpRank,
        row: usize,
        held: Vec<Held>,
    ) {
        if held.is_empty() || self.stores.len() >= MAX_POOLS {
            return;
        }
        let pool = profiles.topology.pool(instance.as_str());
        self.stores.push(Member {
            location: profiles.topology.locate_pool(instance.as_str()),
            gb_per_s: pool.and_then(|pool| pool.gb_per_s),
            alpha_ms: pool.and_then(|pool| pool.alpha_ms),
            instance,
            rank,
            row,
            role: Role::Both,
            load: Load::default(),
            held,
            engine: None,
        });
    }

    fn length_of(&mut self, query: &ScoreQuery<'_>) -> Result<u32, CostError> {
        let known = query.input.tokens().map(|tokens| u32::try_from(tokens).unwrap_or(u32::MAX));
        let tokens = known.unwrap_or_else(|| {
            let tokens = query.input.blocks(self.block_tokens).saturating_mul(self.block_tokens);
            self.assumptions.push(format!(
                "The prompt's length was not given: it is taken for {tokens} tokens, its full blocks. Give prompt_tokens."
            ));
            tokens
        });
        if tokens == 0 { Err(CostError::EmptyPrompt) } else { Ok(tokens) }
    }

    /// Asks the cost model about this fleet.
    fn ask<T>(
        &self,
        links: &[LinkOverride<'_>],
        output_tokens: Option<u32>,
        asked: impl FnOnce(&PlanQuery<'_>, &mut Scratch) -> T,
    ) -> T {
        let candidates: Vec<Candidate<'_>> = self
            .members
            .iter()
            .map(|member| Candidate {
                instance: &member.instance,
                rank: member.rank,
                rank_address: None,
                role: member.role,
                load: member.load,
                held: &member.held,
                location: member.location,
                engine: member.engine.as_deref(),
            })
            .collect();
        let pools: Vec<PoolCoverage<'_>> = self
            .stores
            .iter()
            .map(|store| PoolCoverage {
                name: store.instance.as_str(),
                held: &store.held,
                location: store.location,
                transfers_out: 0,
                gb_per_s: store.gb_per_s,
                alpha_ms: store.alpha_ms,
            })
            .collect();
        let query = PlanQuery {
            prompt_tokens: self.prompt_tokens,
            block_tokens: self.block_tokens,
            candidates: &candidates,
            pools: &pools,
            links,
            output_tokens,
            costs: &self.costs,
            objective: Objective::default(),
        };
        SCRATCH.with_borrow_mut(|scratch| asked(&query, scratch))
    }
}

fn member(
    profiles: &Profiles,
    costs: &CostProfile,
    (instance, rank, row): (InstanceId, DpRank, usize),
    held: Vec<Held>,
    (what, load): (&'static str, Option<&pb::PlanCandidate>),
) -> Result<Member, CostError> {
    let topology = &profiles.topology;
    let named = topology.place_of(instance.as_str()).and_then(|place| place.profile.as_deref());
    Ok(Member {
        location: topology.locate(instance.as_str()),
        engine: named.map(|name| profiles.engine_for(name, &costs.model)).transpose()?,
        role: load.map_or(Ok(Role::Both), role_of)?,
        load: load.map_or(Ok(Load::default()), |load| load_of(what, load))?,
        instance,
        rank,
        row,
        held,
        gb_per_s: None,
        alpha_ms: None,
    })
}

fn role_of(candidate: &pb::PlanCandidate) -> Result<Role, CostError> {
    match pb::Role::try_from(candidate.role) {
        Ok(pb::Role::Unspecified | pb::Role::Both) => Ok(Role::Both),
        Ok(pb::Role::Prefill) => Ok(Role::Prefill),
        Ok(pb::Role::Decode) => Ok(Role::Decode),
        Err(_) => Err(CostError::Role { instance: candidate.instance.clone(), role: candidate.role }),
    }
}

fn load_of(what: &'static str, load: &pb::PlanCandidate) -> Result<Load, CostError> {
    if !(0.0..=1.0).contains(&load.kv_usage) {
        let (instance, value) = (load.instance.clone(), load.kv_usage);
        return Err(CostError::Range {
            what,
            instance,
            number: "kv_usage",
            value,
            allowed: "a share from 0 to 1",
        });
    }
    Ok(Load {
        waiting_requests: load.waiting_requests,
        waiting_prefill_tokens: load.waiting_prefill_tokens,
        running_requests: load.running_requests,
        kv_usage: load.kv_usage,
        ..Load::default()
    })
}

/// What a row's source holds of the prompt, in blocks of the question's size.
fn held(row: &ScoreRow, block_tokens: u32, now_ms: u64) -> Vec<Held> {
    // In the steps in which answers say ages, so that every server gives the same plan.
    let age_ms = row.verified_ms.map_or(UNPROVED_AGE_MS, |at| age_in_steps(now_ms.saturating_sub(at)) as f64);
    let size = u64::from(row.block_size);
    let scaled = |blocks: u32, up: bool| {
        let tokens = u64::from(blocks) * size;
        let blocks =
            if up { tokens.div_ceil(u64::from(block_tokens)) } else { tokens / u64::from(block_tokens) };
        u32::try_from(blocks).unwrap_or(u32::MAX)
    };
    let intervals = row.matched.tiers.iter().flat_map(|tier| {
        tier.runs.iter().map(|(first, end)| Held {
            tier: tier.tier.tier(),
            first_block: scaled(*first, true),
            end_block: scaled(*end, false),
            age_ms,
        })
    });
    let expected = row.matched.matched_blocks + row.speculative_blocks;
    // A request that was routed there is computing these now: whoever comes next finds them.
    let soon = Held {
        tier: Tier::Gpu,
        first_block: scaled(row.matched.matched_blocks, true),
        end_block: scaled(expected, false),
        age_ms: 0.0,
    };
    let intervals = intervals.chain([soon]);
    intervals.filter(|held| held.first_block < held.end_block).take(MAX_INTERVALS).collect()
}

/// Links that differ from what is configured.
fn links(given: &[pb::Link]) -> Result<Vec<LinkOverride<'_>>, CostError> {
    fn link(link: &pb::Link) -> Result<LinkOverride<'_>, CostError> {
        let refused = |number, value, allowed| {
            let instance = format!("{} to {}", link.from, link.to);
            Err(CostError::Range { what: "links", instance, number, value, allowed })
        };
        if !(link.bytes_per_second > 0.0 && link.bytes_per_second.is_finite()) {
            return refused("bytes_per_second", link.bytes_per_second, "a number above 0");
        }
        if !(link.latency_us >= 0.0 && link.latency_us.is_finite()) {
            return refused("latency_us", link.latency_us, "0 or more");
        }
        Ok(LinkOverride {
            from: &link.from,
            to: &link.to,
            alpha_ms: link.latency_us / 1_000.0,
            gb_per_s: link.bytes_per_second / 1e9,
        })
    }
    given.iter().map(link).collect()
}
