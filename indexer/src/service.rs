//! The gRPC service `kvatlas.v1.Atlas`: thin, because every rule is in [`crate::request`] and [`Index`].
//!
//! A score is microseconds of computation, so it is answered where it arrives, without a queue and without admission:
//! what bounds it is the number of streams per connection. Calls that stay open are admitted up to a named number.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{self, Stream};
use kvatlas_proto::grpc as pb;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::answer;
use crate::burst::BurstLimiter;
use crate::clock::Clock;
use crate::cluster::{Coordinator, Covered, SHARD_TIMEOUT};
use crate::index::{BlockSizeMismatch, DumpOwner, Index};
use crate::matching::TierWeights;
use crate::metrics::Metrics;
use crate::outcome::{Outcome, OutcomeMemory, Prediction, ScoredRequest};
use crate::query::{ScoreAnswer, ScoreQuery};
use crate::request::{self, OutcomeReport, RequestError};
use crate::status::{
    self, AdmissionError, DumpInterruptedError, NotAnsweredError, NotRememberedError, OutcomeError,
    ScoreError, StoppingError,
};

/// Score streams open at a time: one per gateway replica and core, with room. Each holds one request in memory.
pub const MAX_OPEN_SCORE_STREAMS: usize = 1_024;
/// Dumps open at a time. Each holds one owner's keys in memory, up to hundreds of megabytes.
pub const MAX_OPEN_DUMPS: usize = 4;
/// Keys in one chunk of a dump: half a megabyte.
pub const DUMP_CHUNK_KEYS: usize = 65_536;

/// Answers the calls.
#[derive(Clone)]
pub(crate) struct AtlasService {
    index: Arc<Index>,
    /// Present where this server is one of many.
    coordinator: Option<Arc<Coordinator>>,
    weights: TierWeights,
    metrics: Arc<Metrics>,
    clock: Clock,
    ready: watch::Receiver<bool>,
    stop: CancellationToken,
    score_streams: Arc<Semaphore>,
    dumps: Arc<Semaphore>,
    outcomes: Arc<Mutex<OutcomeMemory>>,
    broken_promises: Arc<Mutex<BurstLimiter>>,
}

type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// An open score stream.
struct ScoreStreamState {
    service: AtlasService,
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
    pub(crate) fn new(
        index: Arc<Index>,
        coordinator: Option<Arc<Coordinator>>,
        weights: TierWeights,
        metrics: Arc<Metrics>,
        clock: Clock,
        ready: watch::Receiver<bool>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            index,
            coordinator,
            weights,
            metrics,
            clock,
            ready,
            stop,
            score_streams: Arc::new(Semaphore::new(MAX_OPEN_SCORE_STREAMS)),
            dumps: Arc::new(Semaphore::new(MAX_OPEN_DUMPS)),
            outcomes: Arc::default(),
            broken_promises: Arc::default(),
        }
    }

    async fn answer_score(
        &self,
        request: &pb::ScoreRequest,
        patience: Duration,
    ) -> Result<pb::ScoreResponse, ScoreError> {
        let query = request::score_query(request, self.weights)?;
        let start = Instant::now();
        let found = self.score_of(&query, patience).await?;
        let elapsed = start.elapsed();
        self.metrics.lookup.0.observe(elapsed.as_secs_f64());
        let lookup_ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        let (now_ms, ready) = (self.clock.now_ms(), *self.ready.borrow());
        if request.request_id != 0 {
            self.remember(request.request_id, &query, &found.answer, now_ms);
        }
        Ok(answer::score_response(request.request_id, found, lookup_ns, now_ms, ready))
    }

    /// From here, or from everybody.
    async fn score_of(
        &self,
        query: &ScoreQuery<'_>,
        patience: Duration,
    ) -> Result<Covered<ScoreAnswer>, BlockSizeMismatch> {
        match &self.coordinator {
            Some(coordinator) => coordinator.score(query, patience).await,
            None => Ok(Covered { answer: self.index.score(query)?, coverage: 1.0, missing: Vec::new() }),
        }
    }

    /// Keeps what was said until somebody reports what came of it.
    fn remember(&self, request_id: u64, query: &ScoreQuery<'_>, answer: &ScoreAnswer, now_ms: u64) {
        // Without the prompt's length nothing is predicted.
        let scored = query.input.tokens().map(|_| {
            let cut_off = query.limit.is_some_and(|limit| answer.rows.len() >= limit);
            ScoredRequest::new(answer, query.candidates.is_empty() && !cut_off, now_ms)
        });
        let unreported = self.outcomes.lock().remember(request_id, scored);
        self.metrics.count_unreported(unreported);
    }

    async fn answer_outcome(
        &self,
        request: &pb::ReportOutcomeRequest,
        patience: Duration,
    ) -> Result<pb::ReportOutcomeResponse, OutcomeError> {
        let report = request::outcome_report(request, self.weights)?;
        let (prediction, source) = self.prediction(&report, patience).await?;
        let outcome = Outcome { prediction, source, reported: report.reported };
        self.metrics.count_outcome(&outcome);
        if outcome.is_broken_promise()
            && let Some(withheld) = self.broken_promises.lock().admit(self.clock.now_ms())
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
        patience: Duration,
    ) -> Result<(Prediction, pb::PredictionSource), OutcomeError> {
        let (instance, rank) = (report.instance, report.rank);
        let remembered = report.request_id.and_then(|id| self.outcomes.lock().reported(id, instance, rank));
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
        let answer = self.score_of(query, patience).await?.answer;
        let now_ms = self.clock.now_ms();
        let row = answer.rows.iter().find(|row| row.rank == rank);
        let prediction = row.map_or(Prediction::bare(0), |row| Prediction::of_row(row, now_ms));
        Ok((prediction, pb::PredictionSource::LookedUp))
    }

    /// Counts how a call ended.
    fn counted<T>(&self, call: &'static str, result: Result<T, Status>) -> Result<T, Status> {
        let code = result.as_ref().err().map_or(Code::Ok, Status::code);
        self.metrics.count_call(call, status::code_name(code));
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

    fn open_dump(&self, request: pb::DumpRequest) -> Result<DumpState, Status> {
        let filter = request::dump_filter(request)?;
        let admitted = Self::admit(&self.dumps, "Dump", MAX_OPEN_DUMPS)?;
        let owners = self.index.dump(&filter).into_iter();
        Ok(DumpState { service: self.clone(), owners, current: None, _admitted: admitted })
    }
}

#[tonic::async_trait]
impl pb::atlas_server::Atlas for AtlasService {
    async fn score(&self, request: Request<pb::ScoreRequest>) -> Result<Response<pb::ScoreResponse>, Status> {
        let answer = self.answer_score(request.get_ref(), SHARD_TIMEOUT).await.map_err(Status::from);
        self.counted("Score", answer).map(Response::new)
    }

    type ScoreStreamStream = BoxStream<pb::ScoreStreamResponse>;

    async fn score_stream(
        &self,
        request: Request<Streaming<pb::ScoreRequest>>,
    ) -> Result<Response<Self::ScoreStreamStream>, Status> {
        let admitted = Self::admit(&self.score_streams, "ScoreStream", MAX_OPEN_SCORE_STREAMS);
        let admitted = if admitted.is_err() { self.counted("ScoreStream", admitted) } else { admitted }?;
        let state =
            ScoreStreamState { service: self.clone(), requests: request.into_inner(), _admitted: admitted };
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

    async fn plan(&self, _: Request<pb::PlanRequest>) -> Result<Response<pb::PlanResponse>, Status> {
        self.not_answered("Plan", "use Score and choose by its rows")
    }

    async fn speculate(
        &self,
        _: Request<pb::SpeculateRequest>,
    ) -> Result<Response<pb::SpeculateResponse>, Status> {
        self.not_answered("Speculate", "blocks become visible when the engine reports them")
    }

    async fn report_outcome(
        &self,
        request: Request<pb::ReportOutcomeRequest>,
    ) -> Result<Response<pb::ReportOutcomeResponse>, Status> {
        let answer = self.answer_outcome(request.get_ref(), SHARD_TIMEOUT).await.map_err(Status::from);
        self.counted("ReportOutcome", answer).map(Response::new)
    }

    async fn list_owners(
        &self,
        request: Request<pb::ListOwnersRequest>,
    ) -> Result<Response<pb::ListOwnersResponse>, Status> {
        let filter = request::list_filter(request.into_inner()).map_err(Status::from);
        let filter = self.counted("ListOwners", filter)?;
        let sources = self.index.sources(&filter, self.clock.now_ms());
        Ok(Response::new(pb::ListOwnersResponse {
            sources: sources.into_iter().map(answer::source).collect(),
        }))
    }

    type DumpStream = BoxStream<pb::DumpResponse>;

    async fn dump(&self, request: Request<pb::DumpRequest>) -> Result<Response<Self::DumpStream>, Status> {
        let state = self.counted("Dump", self.open_dump(request.into_inner()))?;
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
            () = self.service.stop.cancelled() => return Err(StoppingError.into()),
            request = self.requests.message() => request?,
        };
        let Some(request) = request else { return Ok(None) };
        let answer = self.service.answer_score(&request, SHARD_TIMEOUT).await.map_err(Status::from);
        let result = match self.service.counted("ScoreStream", answer) {
            Ok(response) => pb::score_stream_response::Result::Score(response),
            Err(status) => pb::score_stream_response::Result::Error(status::call_error(&status)),
        };
        Ok(Some(pb::ScoreStreamResponse { request_id: request.request_id, result: Some(result) }))
    }
}

// === impl DumpState ===

impl DumpState {
    /// The next chunk; `None` at the end. Owners without a block have no chunk.
    async fn next(&mut self) -> Result<Option<pb::DumpResponse>, Status> {
        loop {
            if self.service.stop.is_cancelled() {
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
            let index = Arc::clone(&self.service.index);
            // Copying and sorting millions of keys takes long enough to be in the way of scores.
            let read = tokio::task::spawn_blocking(move || {
                let keys = index.keys_of(&owner);
                (owner, keys, 0)
            });
            self.current = Some(read.await.map_err(|_| DumpInterruptedError)?);
        }
    }
}
