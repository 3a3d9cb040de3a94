//! On a quiet system, every server of a cluster gives the same bytes as every other.
//!
//! One field of an answer is a measurement and not a statement: `lookup_ns`. It is cleared before answers are compared.

use kvatlas_client::Client;
use kvatlas_proto::grpc;
use kvatlas_proto::grpc::prompt::Input;
use kvatlas_proto::shard::SEGMENT_BLOCKS;
use prost::Message as _;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

use super::{Case, CaseReport, ClusterConfig, ClusterError, Details};
use crate::recovery::churn::BLOCK_TOKENS;
use crate::recovery::judge::{Judge, question};
use crate::recovery::rig::MODEL;

/// Differences that are reported in words.
const MAX_SHOWN: usize = 4;

/// What came of the comparison.
#[derive(Clone, Debug, Serialize)]
pub struct EqualDetails {
    /// Servers that were asked.
    pub servers: usize,
    /// Questions that each was asked.
    pub questions: usize,
    /// Rows in all answers of one server.
    pub rows: usize,
    /// Bytes of all answers of one server.
    pub answer_bytes: usize,
    /// Questions to which not all servers gave the same bytes.
    pub different: usize,
    /// Answers with a coverage below 1.
    pub partial: usize,
    /// The first differences, in words.
    pub shown: Vec<String>,
    /// Blocks that the engines hold and the servers have, compared one by one; a difference would be an error.
    pub blocks: u64,
}

/// Runs the case.
pub(super) async fn run(config: &ClusterConfig) -> Result<CaseReport, ClusterError> {
    let (mut rig, fleet) = config.filled(&config.rig()).await?;
    rig.settle(&fleet).await?;
    let judge = Judge::of(&fleet);
    let mut random = StdRng::seed_from_u64(config.seed);
    let names: Vec<String> = judge.engines().iter().map(|(name, _)| name.clone()).collect();
    let clients: Vec<Client> = rig.servers().iter().map(|server| server.client().clone()).collect();
    let mut details = EqualDetails {
        servers: clients.len(),
        questions: 0,
        rows: 0,
        answer_bytes: 0,
        different: 0,
        partial: 0,
        shown: Vec::new(),
        blocks: fleet.truth().values().map(|blocks| blocks.len() as u64).sum(),
    };
    while details.questions < config.equal_questions {
        let Some(chain) = judge.some_chain(&mut random) else { continue };
        let kind = Kind::ALL[details.questions % Kind::ALL.len()];
        let asked = kind.question(&chain, &names, &mut random);
        compare(kind, &asked, &clients, &mut details).await?;
        details.questions += 1;
    }
    fleet.stop().await?;
    let ok = details.different == 0 && details.partial == 0 && details.rows > 0;
    Ok(CaseReport { case: Case::Equal.name(), ok, details: Details::Equal(details) })
}

async fn compare(
    kind: Kind,
    asked: &grpc::ScoreRequest,
    clients: &[Client],
    details: &mut EqualDetails,
) -> Result<(), ClusterError> {
    let answers = clients.iter().map(|client| client.score(asked.clone()));
    let mut answers = futures_util::future::try_join_all(answers).await?;
    answers.iter_mut().for_each(|answer| answer.lookup_ns = 0);
    let bytes: Vec<Vec<u8>> = answers.iter().map(grpc::ScoreResponse::encode_to_vec).collect();
    details.rows += answers[0].instances.len();
    details.answer_bytes += bytes[0].len();
    details.partial += answers.iter().filter(|answer| answer.coverage < 1.0).count();
    if let Some(at) = bytes.iter().position(|other| *other != bytes[0]) {
        details.different += 1;
        if details.shown.len() < MAX_SHOWN {
            let said = format!("{kind:?}: {:?} / server {at}: {:?}", answers[0], answers[at]);
            details.shown.push(said);
        }
    }
    Ok(())
}

/// Ways to ask about a chain.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Keys,
    Candidates,
    Limit,
    Length,
    Suffix,
    SuffixAnywhere,
    Weights,
    OtherModel,
    Tokens,
}

// === impl Kind ===

impl Kind {
    const ALL: [Self; 9] = [
        Self::Keys,
        Self::Candidates,
        Self::Limit,
        Self::Length,
        Self::Suffix,
        Self::SuffixAnywhere,
        Self::Weights,
        Self::OtherModel,
        Self::Tokens,
    ];

    fn question(self, chain: &[u64], names: &[String], random: &mut StdRng) -> grpc::ScoreRequest {
        let mut asked = question(chain);
        let mut prompt = asked.prompt.take().unwrap_or_default();
        match self {
            Self::Keys => {}
            Self::Candidates => {
                asked.candidates = names.iter().step_by(2).cloned().collect();
                asked.candidates.push("10.255.0.1:1".to_owned());
            }
            Self::Limit => asked.limit = 1,
            Self::Length => prompt.prompt_tokens = chain.len() as u32 * BLOCK_TOKENS + 3,
            Self::Suffix | Self::SuffixAnywhere => {
                let base = random.random_range(1..chain.len().max(2)).min(chain.len());
                let first = (base - 1) - (base - 1) % SEGMENT_BLOCKS as usize;
                let knows_segment = matches!(self, Self::Suffix);
                prompt.input = Some(Input::Suffix(grpc::Suffix {
                    base_key: chain[base - 1],
                    base_blocks: base as u32,
                    keys: chain[base..].to_vec(),
                    base_segment_key: knows_segment.then(|| chain[first]),
                }));
            }
            Self::Weights => {
                asked.weights = vec![grpc::TierWeight { tier: grpc::Tier::Gpu.into(), weight: 0.5 }];
            }
            Self::OtherModel => prompt.model = format!("not-{MODEL}"),
            Self::Tokens => {
                // Nobody has these; how tokens become keys is the same everywhere.
                let ids = (0..chain.len() as u32 * BLOCK_TOKENS).collect();
                prompt.block_size = 0;
                prompt.input = Some(Input::TokenIds(grpc::TokenIds { ids }));
                asked.candidates = names.to_vec();
            }
        }
        asked.prompt = Some(prompt);
        asked
    }
}
