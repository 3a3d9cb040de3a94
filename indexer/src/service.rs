//! The gRPC service `kvatlas.v1.Atlas`: thin, because every rule is in [`crate::request`] and [`Index`].
//!
//! A score is microseconds of computation, so it is answered where it arrives; a large one goes to a thread of its own, so
//! that others keep their latency. Who asks, until when, and how many at a time is decided in [`crate::guard`] before a call
//! comes here; requests inside a stream, which the guard does not see, pass the same rules here. Calls that stay open are
//! admitted up to a named number.

mod routing;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures_util::stream::{self, Stream};
use kvatlas_planner::Profiles;
use kvatlas_proto::grpc as pb;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::admission::{Admission, Deadline};
use crate::answer;
use crate::auth::Right;
use crate::burst::BurstLimiter;
use crate::clock::Clock;
use crate::cluster::{Coordinator, Covered, SHARD_TIMEOUT};
use crate::guard::Caller;
use crate::index::{BlockSizeMismatch, DumpOwner, Index};
use crate::matching::TierWeights;
use crate::metrics::Metrics;
use crate::outcome::{Outcome, OutcomeMemory, Prediction, ScoredRequest};
use crate::query::{ScoreAnswer, ScoreQuery};
use crate::request::{self, OutcomeReport, RequestError, RequestLimits};
use crate::speculate::Speculation;
use crate::status::{
    self, AdmissionError, InterruptedError, NotAnsweredError, NotRememberedError, OutcomeError, ScoreError,
    StoppingError,
};

/// Score streams open at a time: one per gateway replica and core, with room. Each holds one request in memory.
pub const MAX_OPEN_SCORE_STREAMS: usize = 1_024;
/// Dumps open at a time. Each holds one owner's keys in memory, up to hundreds of megabytes.
pub const MAX_OPEN_DUMPS: usize = 4;
/// Keys in one chunk of a dump: half a megabyte.
pub const DUMP_CHUNK_KEYS: usize = 65_536;

/// What the service works with.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) index: Arc<Index>,
    /// Present where this server is one of many.
    pub(crate) coordinator: Option<Arc<Coordinator>>,
    pub(crate) weights: TierWeights,
    /// What costs are computed from.
    pub(crate) profiles: Arc<Profiles>,
    pub(crate) speculation: Arc<Speculation>,
    pub(crate) limits: RequestLimits,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: Clock,
    pub(crate) ready: watch::Receiver<bool>,
    /// The guard's limit, for requests inside streams.
    pub(crate) admission: Admission,
    /// The limit of prompts that are looked up on threads of their own.
    pub(crate) large: Admission,
    pub(crate) stop: CancellationToken,
}

/// Answers the calls.
#[derive(Clone)]
pub(crate) struct AtlasService {
    parts: Parts,
    score_streams: Arc<Semaphore>,
    dumps: Arc<Semaphore>,
    outcomes: Arc<Mutex<OutcomeMemory>>,
    broken_promises: Arc<Mutex<BurstLimiter>>,
}

type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// An open score stream.
struct ScoreStreamState {
    service: AtlasService,
    caller: Caller,
    deadline: Deadline,
    requests: Streaming<pb::ScoreRequest>,
    _admitted: OwnedSemaphorePermit,
}

/// An open dump: owners still to come, and what is left of the current one's keys, last first.
struct DumpState {
    service: AtlasService,
    owners: std::vec::IntoIter<DumpOwner>,
    current: Option<(DumpOwner, Vec<u64>, usize)>,
    _admitted: OwnedSemaphorePermit,
}

// === impl AtlasService ===

impl AtlasService {
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            parts,
            score_streams: Arc::new(Semaphore::new(MAX_OPEN_SCORE_STREAMS)),
            dumps: Arc::new(Semaphore::new(MAX_OPEN_DUMPS)),
            outcomes: Arc::default(),
            broken_promises: Arc::default(),
        }
    }

    /// Answers a score request, in its place or, if it is large, on another thread.
    async fn score_for(
        &self,
        caller: &Caller,
        deadline: Deadline,
        request: pb::ScoreRequest,
    ) -> Result<pb::ScoreResponse, Status> {
        let prompt = request.prompt.as_ref().ok_or(RequestError::PromptMissing)?;
        may(caller, Right::Query, &prompt.model, &prompt.tenant)?;
        let memory_id = memory_id(caller, request.request_id);
        let is_large = request::is_large(prompt);
        let service = self.clone();
        let answer =
            async move { service.answer_score(&request, memory_id, deadline).await.map_err(Status::from) };
        if is_large { self.apart(deadline, answer).await } else { answer.await }
    }

    /// Has something large done where it is in nobody's way.
    async fn apart<T: Send + 'static>(
        &self,
        deadline: Deadline,
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        let admitted = self.parts.large.admit(deadline).await;
        let admitted = admitted.inspect_err(|error| self.parts.metrics.count_overload(error))?;
        let runtime = Handle::current();
        let done = tokio::task::spawn_blocking(move || {
            // Kept until it is done, also if the caller goes away meanwhile: the processor is busy until then.
            let _admitted = admitted;
            runtime.block_on(work)
        });
        done.await.map_err(|_| InterruptedError)?
    }

    async fn answer_score(
        &self,
        request: &pb::ScoreRequest,
        memory_id: u64,
        deadline: Deadline,
    ) -> Result<pb::ScoreResponse, ScoreError> {
        let query = request::score_query(request, self.parts.weights, self.parts.limits)?;
        let start = Instant::now();
        let (found, priced) = self.found_and_priced(request, &query, deadline).await?;
        let elapsed = start.elapsed();
        self.parts.metrics.lookup.0.observe(elapsed.as_secs_f64());
        let lookup_ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        let (now_ms, ready) = (self.parts.clock.now_ms(), *self.parts.ready.borrow());
        if request.request_id != 0 {
            self.remember(memory_id, &query, &found.answer, now_ms);
        }
        Ok(answer::score_response(request.request_id, found, priced, lookup_ns, now_ms, ready))
    }

    /// From here, or from everybody.
    async fn score_of(
        &self,
        query: &ScoreQuery<'_>,
        deadline: Deadline,
    ) -> Result<Covered<ScoreAnswer>, BlockSizeMismatch> {
        let index = &self.parts.index;
        match &self.parts.coordinator {
            Some(coordinator) => {
                let patience = deadline.remaining(tokio::time::Instant::now());
                coordinator.score(query, patience.unwrap_or(SHARD_TIMEOUT)).await
            }
            None => Ok(Covered { answer: index.score(query)?, coverage: 1.0, missing: Vec::new() }),
        }
    }

    /// Keeps what was said until somebody reports what came of it.
    fn remember(&self, memory_id: u64, query: &ScoreQuery<'_>, answer: &ScoreAnswer, now_ms: u64) {
        // Without the prompt's length nothing is predicted.
        let scored = query.input.tokens().map(|_| {
            let cut_off = query.limit.is_some_and(|limit| answer.rows.len() >= limit);
            ScoredRequest::new(answer, query.candidates.is_empty() && !cut_off, now_ms)
        });
        let unreported = self.outcomes.lock().remember(memory_id, scored);
        self.parts.metrics.count_unreported(unreported);
    }

    async fn report_for(
        &self,
        caller: &Caller,
        deadline: Deadline,
        request: pb::ReportOutcomeRequest,
    ) -> Result<pb::ReportOutcomeResponse, Status> {
        match &request.prompt {
            Some(prompt) => may(caller, Right::Report, &prompt.model, &prompt.tenant)?,
            // Names no tenant; what is remembered is the caller's own.
            None => drop(caller.sees(Right::Report)?),
        }
        let memory_id = memory_id(caller, request.request_id);
        let is_large = request.prompt.as_ref().is_some_and(request::is_large);
        let service = self.clone();
        let answer =
            async move { service.answer_outcome(&request, memory_id, deadline).await.map_err(Status::from) };
        if is_large { self.apart(deadline, answer).await } else { answer.await }
    }

    async fn answer_outcome(
        &self,
        request: &pb::ReportOutcomeRequest,
        memory_id: u64,
        deadline: Deadline,
    ) -> Result<pb::ReportOutcomeResponse, OutcomeError> {
        let report = request::outcome_report(request, self.parts.weights, self.parts.limits)?;
        let (prediction, source) = self.prediction(&report, memory_id, deadline).await?;
        let outcome = Outcome { prediction, source, reported: report.reported };
        self.parts.metrics.count_outcome(&outcome);
        if outcome.is_broken_promise()
            && let Some(withheld) = self.broken_promises.lock().admit(self.parts.clock.now_ms())
        {
            tracing::warn!(
                instance = report.instance, rank = report.rank, predicted = prediction.tokens,
                reported = report.reported, tier = outcome.tier(), request = ?request.request,
                request_id = request.request_id, withheld,
                "an engine had less cached than a verified source promised"
            );
        }
        Ok(answer::outcome_response(&outcome))
    }

    /// What the report is to be compared with: the first that there is.
    async fn prediction(
        &self,
        report: &OutcomeReport<'_>,
        memory_id: u64,
        deadline: Deadline,
    ) -> Result<(Prediction, pb::PredictionSource), OutcomeError> {
        let (instance, rank) = (report.instance, report.rank);
        let remembered =
            report.request_id.and_then(|_| self.outcomes.lock().reported(memory_id, instance, rank));
        if let Some(prediction) = remembered {
            return Ok((prediction, pb::PredictionSource::Remembered));
        }
        if let Some(tokens) = report.predicted {
            return Ok((Prediction::bare(tokens), pb::PredictionSource::Given));
        }
        let Some(query) = &report.lookup else {
            let request_id = report.request_id.unwrap_or_default();
            return Err(NotRememberedError { request_id, instance: instance.to_owned(), rank }.into());
        };
        if query.input.tokens().is_none() {
            return Err(RequestError::LengthMissing.into());
        }
        let answer = self.score_of(query, deadline).await?.answer;
        let now_ms = self.parts.clock.now_ms();
        let row = answer.rows.iter().find(|row| row.rank == rank);
        let prediction = row.map_or(Prediction::bare(0), |row| Prediction::of_row(row, now_ms));
        Ok((prediction, pb::PredictionSource::LookedUp))
    }

    /// Counts how a call ended.
    fn counted<T>(&self, call: &'static str, result: Result<T, Status>) -> Result<T, Status> {
        let code = result.as_ref().err().map_or(Code::Ok, Status::code);
        self.parts.metrics.count_call(call, status::code_name(code));
        result
    }

    fn admit(
        permits: &Arc<Semaphore>,
        call: &'static str,
        bound: usize,
    ) -> Result<OwnedSemaphorePermit, Status> {
        Ok(Arc::clone(permits).try_acquire_owned().map_err(|_| AdmissionError { call, bound })?)
    }

    fn not_answered<T>(&self, call: &'static str, instead: &'static str) -> Result<Response<T>, Status> {
        self.counted(call, Err(NotAnsweredError { call, instead }.into()))
    }

    fn open_dump(&self, caller: &Caller, request: pb::DumpRequest) -> Result<DumpState, Status> {
        may(caller, Right::Dump, &request.model, &request.tenant)?;
        let filter = request::dump_filter(request)?;
        let admitted = Self::admit(&self.dumps, "Dump", MAX_OPEN_DUMPS)?;
        let owners = self.parts.index.dump(&filter).into_iter();
        Ok(DumpState { service: self.clone(), owners, current: None, _admitted: admitted })
    }
}

/// Whether the caller may, once it is clear that these can be names: they will be in the refusal.
fn may(caller: &Caller, right: Right, model: &str, tenant: &str) -> Result<(), Status> {
    request::check_scope(model, tenant)?;
    caller.may(right, model, tenant)
}

/// Under which a request is remembered: callers with names have ids of their own, so that nobody reads or replaces what
/// another one asked.
fn memory_id(caller: &Caller, request_id: u64) -> u64 {
    caller.name().map_or(request_id, |name| xxh3_64_with_seed(name.as_bytes(), request_id))
}

fn deadline_of<T>(request: &Request<T>) -> Deadline {
    request.extensions().get::<Deadline>().copied().unwrap_or_default()
}

#[tonic::async_trait]
impl pb::atlas_server::Atlas for AtlasService {
    async fn score(&self, request: Request<pb::ScoreRequest>) -> Result<Response<pb::ScoreResponse>, Status> {
        let (caller, deadline) = (Caller::of(&request)?, deadline_of(&request));
        let answer = self.score_for(&caller, deadline, request.into_inner()).await;
        self.counted("Score", answer).map(Response::new)
    }

    type ScoreStreamStream = BoxStream<pb::ScoreStreamResponse>;

    async fn score_stream(
        &self,
        request: Request<Streaming<pb::ScoreRequest>>,
    ) -> Result<Response<Self::ScoreStreamStream>, Status> {
        let (caller, deadline) = (Caller::of(&request)?, deadline_of(&request));
        let admitted = Self::admit(&self.score_streams, "ScoreStream", MAX_OPEN_SCORE_STREAMS);
        let admitted = if admitted.is_err() { self.counted("ScoreStream", admitted) } else { admitted }?;
        let (service, requests) = (self.clone(), request.into_inner());
        let state = ScoreStreamState { service, caller, deadline, requests, _admitted: admitted };
        // One request at a time, so the answers are in order by construction.
        let answers = stream::unfold(Some(state), |state| async {
            let mut state = state?;
            match state.next().await {
                Ok(None) => None,
                Ok(Some(answer)) => Some((Ok(answer), Some(state))),
                Err(status) => Some((Err(status), None)),
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn plan(&self, request: Request<pb::PlanRequest>) -> Result<Response<pb::PlanResponse>, Status> {
        let (caller, deadline) = (Caller::of(&request)?, deadline_of(&request));
        let answer = self.plan_for(&caller, deadline, request.into_inner()).await;
        self.counted("Plan", answer).map(Response::new)
    }

    async fn speculate(
        &self,
        request: Request<pb::SpeculateRequest>,
    ) -> Result<Response<pb::SpeculateResponse>, Status> {
        let caller = Caller::of(&request)?;
        let answer = self.speculate_for(&caller, request.into_inner()).await;
        self.counted("Speculate", answer).map(Response::new)
    }

    async fn report_outcome(
        &self,
        request: Request<pb::ReportOutcomeRequest>,
    ) -> Result<Response<pb::ReportOutcomeResponse>, Status> {
        let (caller, deadline) = (Caller::of(&request)?, deadline_of(&request));
        let answer = self.report_for(&caller, deadline, request.into_inner()).await;
        self.counted("ReportOutcome", answer).map(Response::new)
    }

    async fn list_owners(
        &self,
        request: Request<pb::ListOwnersRequest>,
    ) -> Result<Response<pb::ListOwnersResponse>, Status> {
        let caller = Caller::of(&request)?;
        let listed = || {
            let request = request.into_inner();
            // A list of everything is a list of what the caller may see; a question about a tenant is allowed or not.
            let sees = caller.sees(Right::Observe)?;
            if !request.model.is_empty() {
                may(&caller, Right::Observe, &request.model, &request.tenant)?;
            }
            let filter = request::list_filter(request)?;
            let sources = self.parts.index.sources(&filter, self.parts.clock.now_ms());
            let seen = sources.into_iter().filter(|info| sees(info.scope.model(), info.scope.tenant()));
            Ok(Response::new(pb::ListOwnersResponse { sources: seen.map(answer::source).collect() }))
        };
        let listed = listed();
        if listed.is_err() { self.counted("ListOwners", listed) } else { listed }
    }

    type DumpStream = BoxStream<pb::DumpResponse>;

    async fn dump(&self, request: Request<pb::DumpRequest>) -> Result<Response<Self::DumpStream>, Status> {
        let caller = Caller::of(&request)?;
        let state = self.counted("Dump", self.open_dump(&caller, request.into_inner()))?;
        // Pulled by the connection: an owner's keys are read when those before are on their way.
        let chunks = stream::unfold(Some(state), |state| async {
            let mut state = state?;
            match state.next().await {
                Ok(None) => None,
                Ok(Some(chunk)) => Some((Ok(chunk), Some(state))),
                Err(status) => Some((Err(status), None)),
            }
        });
        Ok(Response::new(Box::pin(chunks)))
    }

    type WatchStream = BoxStream<pb::WatchResponse>;

    async fn watch(&self, _: Request<pb::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.not_answered("Watch", "ask ListOwners from time to time")
    }
}

// === impl ScoreStreamState ===

impl ScoreStreamState {
    /// The next answer; `None` when the caller has no more requests.
    async fn next(&mut self) -> Result<Option<pb::ScoreStreamResponse>, Status> {
        let request = tokio::select! {
            biased;
            () = self.service.parts.stop.cancelled() => return Err(StoppingError.into()),
            request = self.requests.message() => request?,
        };
        let Some(request) = request else { return Ok(None) };
        let request_id = request.request_id;
        let answer = self.answer(request).await;
        let result = match self.service.counted("ScoreStream", answer) {
            Ok(response) => pb::score_stream_response::Result::Score(response),
            Err(status) => pb::score_stream_response::Result::Error(status::call_error(&status)),
        };
        Ok(Some(pb::ScoreStreamResponse { request_id, result: Some(result) }))
    }

    /// Answers one request, by the rules that the guard applies to a call.
    async fn answer(&self, request: pb::ScoreRequest) -> Result<pb::ScoreResponse, Status> {
        let parts = &self.service.parts;
        let admitted = parts.admission.admit(self.deadline).await;
        let _admitted = admitted.inspect_err(|error| parts.metrics.count_overload(error))?;
        self.service.score_for(&self.caller, self.deadline, request).await
    }
}

// === impl DumpState ===

impl DumpState {
    /// The next chunk; `None` at the end. Owners without a block have no chunk.
    async fn next(&mut self) -> Result<Option<pb::DumpResponse>, Status> {
        loop {
            if self.service.parts.stop.is_cancelled() {
                return Err(StoppingError.into());
            }
            if let Some((owner, keys, sent)) = &mut self.current
                && *sent < keys.len()
            {
                let end = keys.len().min(*sent + DUMP_CHUNK_KEYS);
                let chunk = answer::dump_chunk(owner, &keys[*sent..end]);
                *sent = end;
                return Ok(Some(chunk));
            }
            let Some(owner) = self.owners.next() else { return Ok(None) };
            let index = Arc::clone(&self.service.parts.index);
            // Copying and sorting millions of keys takes long enough to be in the way of scores.
            let read = tokio::task::spawn_blocking(move || {
                let keys = index.keys_of(&owner);
                (owner, keys, 0)
            });
            self.current = Some(read.await.map_err(|_| InterruptedError)?);
        }
    }
}
