//! Compares what an answer says of every engine with what the engine held.

use std::sync::Arc;

use kvatlas_proto::grpc;
use parking_lot::Mutex;
use rand::RngExt;
use rand::rngs::StdRng;

use super::churn::{BLOCK_TOKENS, ChurnEngine};
use super::fleet::Fleet;
use super::rig::MODEL;

/// The engines of a fleet, as a judge needs them.
#[derive(Clone)]
pub struct Judge {
    engines: Arc<[(String, Arc<Mutex<ChurnEngine>>)]>,
}

/// Something that an answer says of an engine and that the engine did not hold, or that it held and the answer does not say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Which engine.
    pub engine: usize,
    /// Leading blocks that the answer claims.
    pub claimed: usize,
    /// The most that it may claim.
    pub most: usize,
    /// The least that it has to.
    pub least: usize,
    /// What the answer says about how far it can be trusted; absent if it has no row.
    pub state: Option<grpc::SourceState>,
}

// === impl Judge ===

impl Judge {
    /// Judges by these engines, by instance name.
    pub fn new(engines: Vec<(String, Arc<Mutex<ChurnEngine>>)>) -> Self {
        Self { engines: engines.into() }
    }

    /// Judges by a fleet's engines.
    pub fn of(fleet: &Fleet) -> Self {
        let engines = fleet.engines().iter();
        Self::new(engines.map(|engine| (engine.name().to_owned(), Arc::clone(engine.model()))).collect())
    }

    /// The engines by name.
    pub fn engines(&self) -> &[(String, Arc<Mutex<ChurnEngine>>)] {
        &self.engines
    }

    /// The keys of a chain of the present or past of some engine; `None` if that engine has none yet.
    pub fn some_chain(&self, random: &mut StdRng) -> Option<Vec<u64>> {
        let at = random.random_range(0..self.engines.len());
        self.engines[at].1.lock().some_chain(random)
    }

    /// What is wrong with an answer. Of each engine, what it held at any time since `since_ms` may be claimed, and what it has
    /// held since then has to be.
    pub fn findings(
        &self,
        chain: &[u64],
        answer: &grpc::ScoreResponse,
        since_ms: impl Fn(usize) -> u64,
    ) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (engine, (name, model)) in self.engines.iter().enumerate() {
            let row = answer.instances.iter().find(|row| row.instance == *name);
            let claimed = row.map_or(0, |row| row.matched_blocks as usize);
            let since_ms = since_ms(engine);
            let model = model.lock();
            let (most, least) =
                (model.ledger().depth_since(chain, since_ms), model.ledger().depth_before(chain, since_ms));
            drop(model);
            let finding =
                Finding { engine, claimed, most, least, state: row.map(grpc::InstanceScore::state) };
            if finding.is_wrong() || finding.is_missed() {
                findings.push(finding);
            }
        }
        findings
    }
}

// === impl Finding ===

impl Finding {
    /// The answer claims too much.
    pub fn is_wrong(&self) -> bool {
        self.claimed > self.most
    }

    /// The answer says too little.
    pub fn is_missed(&self) -> bool {
        self.claimed < self.least
    }
}

/// Who holds how much of this chain?
pub fn question(chain: &[u64]) -> grpc::ScoreRequest {
    let prompt = grpc::Prompt {
        model: MODEL.to_owned(),
        block_size: BLOCK_TOKENS,
        input: Some(grpc::prompt::Input::BlockKeys(grpc::BlockKeys { keys: chain.to_vec() })),
        ..Default::default()
    };
    grpc::ScoreRequest { prompt: Some(prompt), ..Default::default() }
}
