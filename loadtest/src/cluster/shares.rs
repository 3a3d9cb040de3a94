//! How evenly servers share the work, and how much of it each has: skew and scaling.
//!
//! **Skew**: one beginning that all prompts share must not make one server carry everything. **Scaling**: with twice the servers,
//! each has half of the memory and half of the ingestion.

use serde::Serialize;

use super::conversations::{Conversations, Shape};
use super::rig::RigConfig;
use super::scrape::Scrape;
use super::stage::Stage;
use super::{Case, CaseReport, ClusterConfig, ClusterError, Details, rounded};

/// What the busiest server may carry, of the mean.
const SKEW_GOAL: f64 = 1.3;
/// How far the sum over all servers may be from what one server has.
const SCALING_GOAL: f64 = 0.15;
/// Numbers of servers that are compared with one.
const SIZES: [u32; 3] = [1, 2, 4];

/// What came of the case of one beginning.
#[derive(Clone, Debug, Serialize)]
pub struct SkewDetails {
    /// Servers.
    pub servers: u32,
    /// Each shape of requests; the goal is that of the first.
    pub shapes: Vec<SkewFigures>,
}

/// One shape of requests.
#[derive(Clone, Debug, Serialize)]
pub struct SkewFigures {
    /// Name of the shape.
    pub shape: &'static str,
    /// Blocks of the beginning that all requests share.
    pub beginning_blocks: usize,
    /// Mean of what follows it in a request, blocks.
    pub own_blocks: f64,
    /// Busiest server over the mean: blocks taken in.
    pub ingestion: f64,
    /// The same for stretches of prompts that were looked up, of questions that give all keys.
    pub queries: f64,
    /// The same for questions that give the last key and those that follow.
    pub suffix_queries: f64,
    /// Blocks that each server took in.
    pub blocks: Vec<u64>,
    /// Stretches that each looked up.
    pub pieces: Vec<u64>,
}

/// What came of the case of several sizes.
#[derive(Clone, Debug, Serialize)]
pub struct ScalingDetails {
    /// Blocks that all servers of a division hold together.
    pub blocks: usize,
    /// Each size; the first is one server with a key space in one piece.
    pub sizes: Vec<SizeFigures>,
}

/// One number of servers.
#[derive(Clone, Debug, Serialize)]
pub struct SizeFigures {
    /// Virtual shards.
    pub shards: u32,
    /// Servers.
    pub servers: u32,
    /// Of the largest server: bytes of its tables.
    pub engine_bytes: u64,
    /// Of the largest: resident memory beyond that of an empty server, bytes; absent where the system does not say.
    pub resident_bytes: Option<u64>,
    /// Of the busiest: blocks taken in.
    pub blocks: u64,
    /// Of the busiest: frames taken in. Frames of many lanes are smaller, and heartbeats are among them.
    pub frames: u64,
    /// Servers times bytes of the largest one's tables, over the bytes of one server with the same shards: 1 is ideal.
    pub engine_bytes_times_servers: f64,
    /// The same for the blocks taken in.
    pub blocks_times_servers: f64,
}

/// Runs the case of one beginning.
pub(super) async fn skew(config: &ClusterConfig) -> Result<CaseReport, ClusterError> {
    let (count, engines, seed) = (config.conversations, config.engines, config.seed);
    let mut shapes = Vec::new();
    for (name, shape) in [
        ("agents", Shape::one_beginning(count, engines, seed)),
        ("short_tails", Shape::short_tails(count * 8, engines, seed)),
    ] {
        shapes.push(skew_of(name, config, &Conversations::new(shape)).await?);
    }
    let is_even = |figures: &SkewFigures| figures.ingestion.max(figures.queries) <= SKEW_GOAL;
    let ok = shapes.first().is_some_and(is_even);
    let details = SkewDetails { servers: config.servers, shapes };
    Ok(CaseReport { case: Case::Skew.name(), ok, details: Details::Skew(details) })
}

async fn skew_of(
    shape: &'static str,
    config: &ClusterConfig,
    conversations: &Conversations,
) -> Result<SkewFigures, ClusterError> {
    const PIECES: &str = "kvatlas_cluster_answered_pieces_total";
    let rig = RigConfig { brokers: 1, replicas: 1, ..config.rig() };
    let stage = Stage::start(&rig, conversations).await?;
    let ask = async |is_suffix: bool| -> Result<Vec<u64>, ClusterError> {
        let before = stage.scrapes().await;
        for (number, one) in conversations.all().iter().enumerate() {
            let server = &stage.rig.servers()[number % stage.rig.servers().len()];
            server.client().score(if is_suffix { one.suffix() } else { one.whole() }).await?;
        }
        let after = stage.scrapes().await;
        Ok(before.iter().zip(&after).map(|(before, after)| after.more(before, PIECES) as u64).collect())
    };
    let pieces = ask(false).await?;
    let suffix_pieces = ask(true).await?;
    let blocks: Vec<u64> = stage
        .scrapes()
        .await
        .iter()
        .map(|scrape| scrape.get("kvatlas_index_blocks_stored_total") as u64)
        .collect();
    stage.stop().await;
    let beginning_blocks = conversations.shape().beginning_blocks;
    Ok(SkewFigures {
        shape,
        beginning_blocks,
        own_blocks: rounded(conversations.mean_blocks() - beginning_blocks as f64),
        ingestion: skewness(&blocks),
        queries: skewness(&pieces),
        suffix_queries: skewness(&suffix_pieces),
        blocks,
        pieces,
    })
}

/// The largest over the mean.
fn skewness(values: &[u64]) -> f64 {
    let mean = values.iter().sum::<u64>() as f64 / values.len().max(1) as f64;
    rounded(values.iter().max().map_or(0.0, |max| *max as f64) / mean.max(f64::MIN_POSITIVE))
}

/// Runs the case of several sizes.
pub(super) async fn scaling(config: &ClusterConfig) -> Result<CaseReport, ClusterError> {
    let conversations = Conversations::new(Shape::agentic(config.conversations, config.engines, config.seed));
    let base = RigConfig { brokers: 1, replicas: 1, ..config.rig() };
    let whole = size_of(&RigConfig { shards: 1, servers: 1, ..base.clone() }, &conversations).await?;
    let mut sizes = vec![whole];
    for servers in SIZES {
        let mut size = size_of(&RigConfig { servers, ..base.clone() }, &conversations).await?;
        // What shards cost by themselves shows in the sizes of one server; what servers save, against one with the same shards.
        let one = sizes.get(1).unwrap_or(&size);
        let times = |of_one: u64, of_each: u64| {
            rounded(f64::from(servers) * of_each as f64 / (of_one as f64).max(f64::MIN_POSITIVE))
        };
        let (bytes, blocks) = (times(one.engine_bytes, size.engine_bytes), times(one.blocks, size.blocks));
        (size.engine_bytes_times_servers, size.blocks_times_servers) = (bytes, blocks);
        sizes.push(size);
    }
    let is_even = |times: f64| (times - 1.0).abs() <= SCALING_GOAL;
    let ok = sizes
        .iter()
        .all(|size| is_even(size.engine_bytes_times_servers) && is_even(size.blocks_times_servers));
    let details = ScalingDetails { blocks: conversations.stored_blocks(), sizes };
    Ok(CaseReport { case: Case::Scaling.name(), ok, details: Details::Scaling(details) })
}

async fn size_of(rig: &RigConfig, conversations: &Conversations) -> Result<SizeFigures, ClusterError> {
    let stage = Stage::start(rig, conversations).await?;
    let scrapes = stage.scrapes().await;
    let most = |name: &str| scrapes.iter().map(|scrape: &Scrape| scrape.get(name) as u64).max().unwrap_or(0);
    let grown = stage.empty_bytes.iter().zip(stage.resident_bytes());
    let resident_bytes = grown.map(|(before, now)| Some(now?.saturating_sub((*before)?))).max().flatten();
    let figures = SizeFigures {
        shards: rig.shards,
        servers: rig.servers,
        engine_bytes: most("kvatlas_index_engine_bytes"),
        resident_bytes,
        blocks: most("kvatlas_index_blocks_stored_total"),
        frames: most("kvatlas_index_frames_applied_total"),
        engine_bytes_times_servers: 1.0,
        blocks_times_servers: 1.0,
    };
    stage.stop().await;
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skewness_is_the_largest_over_the_mean() {
        assert_eq!(skewness(&[10, 10, 10, 10]), 1.0);
        assert_eq!(skewness(&[4, 0, 0, 0]), 4.0);
    }
}
