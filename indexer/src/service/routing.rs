//! Calls that price instances or tell where a request went: Score with a preset, Plan, Speculate.

use std::time::Instant;

use kvatlas_proto::{DpRank, InstanceId, SourceId, grpc as pb};
use tonic::Status;

use super::{AtlasService, may};
use crate::admission::Deadline;
use crate::answer;
use crate::auth::Right;
use crate::cluster::Covered;
use crate::costing;
use crate::costing::score::Priced;
use crate::guard::Caller;
use crate::index::BlockSizeMismatch;
use crate::query::{ScoreAnswer, ScoreQuery};
use crate::request::{self, RequestError};
use crate::speculate::{Expected, ExpectedChain, MAX_BLOCKS};
use crate::status::{PlanRequestError, ScoreError, SpeculateRequestError};

/// Shared stores that a question considers at most.
const MAX_STORES: usize = kvatlas_planner::query::MAX_POOLS;

// === impl AtlasService ===

impl AtlasService {
    /// Who holds how much, and what is expected beyond that.
    pub(super) async fn found(
        &self,
        query: &ScoreQuery<'_>,
        deadline: Deadline,
    ) -> Result<Covered<ScoreAnswer>, BlockSizeMismatch> {
        if !self.parts.speculation.expects(query) {
            return self.score_of(query, deadline).await;
        }
        // Who is cut off may come before others once what is expected is added.
        let all = ScoreQuery { limit: None, ..query.clone() };
        let mut found = self.score_of(&all, deadline).await?;
        self.parts.speculation.add_to(&self.parts.index, &all, &mut found.answer);
        found.answer.rows.truncate(query.limit.unwrap_or(usize::MAX));
        Ok(found)
    }

    /// The same with scores of the preset.
    pub(super) async fn found_and_priced(
        &self,
        request: &pb::ScoreRequest,
        query: &ScoreQuery<'_>,
        deadline: Deadline,
    ) -> Result<(Covered<ScoreAnswer>, Vec<Priced>), ScoreError> {
        let preset = request::preset(request)?;
        if let Some(weights) = costing::score::weights_of(preset, query.weights) {
            let query = ScoreQuery { weights, ..query.clone() };
            return Ok((self.found(&query, deadline).await?, Vec::new()));
        }
        let names = self.with_stores(query);
        let all = ScoreQuery { limit: None, candidates: &names, ..query.clone() };
        let mut found = self.found(&all, deadline).await?;
        let now_ms = self.parts.clock.now_ms();
        let profiles = &self.parts.profiles;
        let mut priced = costing::score::price(profiles, (request, preset), &all, &mut found.answer, now_ms)?;
        let limit = query.limit.unwrap_or(usize::MAX);
        found.answer.rows.truncate(limit);
        priced.truncate(limit);
        Ok((found, priced))
    }

    /// The candidates and all shared stores; none if everybody is asked for.
    fn with_stores(&self, query: &ScoreQuery<'_>) -> Vec<String> {
        let mut names = query.candidates.to_vec();
        if !names.is_empty() {
            names.extend(self.parts.index.stores_of(query.model, query.tenant, MAX_STORES));
            names.sort_unstable();
            names.dedup();
        }
        names
    }

    pub(super) async fn plan_for(
        &self,
        caller: &Caller,
        deadline: Deadline,
        request: pb::PlanRequest,
    ) -> Result<pb::PlanResponse, Status> {
        let prompt = request.prompt.as_ref().ok_or(RequestError::PromptMissing)?;
        may(caller, Right::Query, &prompt.model, &prompt.tenant)?;
        let is_large = request::is_large(prompt);
        let service = self.clone();
        let answer = async move { service.answer_plan(&request, deadline).await.map_err(Status::from) };
        if is_large { self.apart(deadline, answer).await } else { answer.await }
    }

    async fn answer_plan(
        &self,
        request: &pb::PlanRequest,
        deadline: Deadline,
    ) -> Result<pb::PlanResponse, PlanRequestError> {
        let candidates: Vec<String> = request.candidates.iter().map(|one| one.instance.clone()).collect();
        let query = request::plan_query(request, &candidates, self.parts.weights, self.parts.limits)?;
        let start = Instant::now();
        let names = self.with_stores(&query);
        let query = ScoreQuery { candidates: &names, ..query };
        let found = self.found(&query, deadline).await?;
        let profiles = &self.parts.profiles;
        let now_ms = self.parts.clock.now_ms();
        let mut response = costing::plan::plan_response(profiles, request, &query, &found.answer, now_ms)?;
        let elapsed = start.elapsed();
        self.parts.metrics.plan_time.0.observe(elapsed.as_secs_f64());
        self.parts.metrics.count_plan(&response);
        response.plan_ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        let (coverage, missing) = answer::covered(found.coverage, found.missing, *self.parts.ready.borrow());
        (response.coverage, response.missing) = (coverage, missing);
        Ok(response)
    }

    pub(super) async fn speculate_for(
        &self,
        caller: &Caller,
        request: pb::SpeculateRequest,
    ) -> Result<pb::SpeculateResponse, Status> {
        let prompt = request.prompt.as_ref().ok_or(RequestError::PromptMissing)?;
        // Whoever says where a request went changes what others are told, as whoever reports outcomes does.
        may(caller, Right::Report, &prompt.model, &prompt.tenant)?;
        Ok(self.answer_speculate(caller, &request).await?)
    }

    async fn answer_speculate(
        &self,
        caller: &Caller,
        request: &pb::SpeculateRequest,
    ) -> Result<pb::SpeculateResponse, SpeculateRequestError> {
        let (query, ttl_ms) = request::speculation(request, self.parts.weights, self.parts.limits)?;
        let instance = InstanceId::new(request.instance.as_str()).map_err(RequestError::from)?;
        let source = SourceId { instance, rank: DpRank(request.data_parallel_rank) };
        let chains = self.parts.index.chains_of(&query);
        // The block size of the instance, or of any engine of the model if it is new.
        let knows = |size: &u32| self.parts.index.trust_of(&query, &source, *size).is_some();
        let sizes = || chains.iter().map(|(size, _)| *size);
        let Some(block_size) = sizes().find(knows).or_else(|| sizes().next()) else {
            // Nobody serves the model: there is nobody to whom an answer could send the next request.
            return Ok(pb::SpeculateResponse { blocks: 0 });
        };
        let chains = chains.into_iter().filter(|(size, _)| *size == block_size);
        let expected = Expected {
            // Callers with names have ids of their own.
            request: format!("{}/{}", caller.name().unwrap_or_default(), request.request),
            model: query.model.to_owned(),
            tenant: query.tenant.to_owned(),
            source,
            block_size,
            ttl_ms,
            chains: chains
                .map(|(_, mut chain)| {
                    chain.keys.truncate(MAX_BLOCKS);
                    ExpectedChain { first: chain.base.map_or(0, |(_, blocks)| blocks), keys: chain.keys }
                })
                .take(crate::speculate::MAX_CHAINS)
                .collect(),
        };
        Ok(pb::SpeculateResponse { blocks: self.parts.speculation.expect(expected).await? })
    }
}
