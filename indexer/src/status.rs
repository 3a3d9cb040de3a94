//! Every error of the gRPC calls and its status code, in one place.

use kvatlas_proto::grpc as pb;
use tonic::{Code, Status};

use crate::admission::OverloadError;
use crate::auth::{DeniedError, UnknownCallerError};
use crate::costing::CostError;
use crate::index::BlockSizeMismatch;
use crate::request::RequestError;
use crate::speculate::SpeculateError;

/// Why a score request has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScoreError {
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error(transparent)]
    BlockSize(#[from] BlockSizeMismatch),
    #[error(transparent)]
    Cost(#[from] CostError),
}

/// Why a plan request has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanRequestError {
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error(transparent)]
    BlockSize(#[from] BlockSizeMismatch),
    #[error(transparent)]
    Cost(#[from] CostError),
}

/// Why nothing is expected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpeculateRequestError {
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error(transparent)]
    Speculate(#[from] SpeculateError),
}

/// Why a report has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OutcomeError {
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error(transparent)]
    BlockSize(#[from] BlockSizeMismatch),
    #[error(transparent)]
    NotRemembered(#[from] NotRememberedError),
}

/// Nothing is known of what was predicted.
#[derive(Debug, thiserror::Error)]
#[error(
    "no prediction for {instance} rank {rank} is remembered under request_id {request_id} (scored elsewhere, not with \
     this instance, without a known prompt length, or too long ago): give predicted_tokens or prompt"
)]
pub(crate) struct NotRememberedError {
    pub(crate) request_id: u64,
    pub(crate) instance: String,
    pub(crate) rank: u32,
}

/// The server answers as many such calls at a time as it takes.
#[derive(Debug, thiserror::Error)]
#[error("this server has {bound} open {call} calls, its limit: retry later or on another server")]
pub(crate) struct AdmissionError {
    pub(crate) call: &'static str,
    pub(crate) bound: usize,
}

/// A call of the contract that this server does not answer yet.
#[derive(Debug, thiserror::Error)]
#[error("{call} is part of kvatlas.v1, but this server does not answer it yet; {instead}")]
pub(crate) struct NotAnsweredError {
    pub(crate) call: &'static str,
    pub(crate) instead: &'static str,
}

/// The server is going away while a stream is open.
#[derive(Debug, thiserror::Error)]
#[error("this server is stopping: open the stream again, on another server")]
pub(crate) struct StoppingError;

/// Work that was handed to another thread was abandoned half-way.
#[derive(Debug, thiserror::Error)]
#[error("the work was interrupted, as at a shutdown: ask again")]
pub(crate) struct InterruptedError;

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

impl From<ScoreError> for Status {
    fn from(error: ScoreError) -> Self {
        match error {
            ScoreError::Request(error) => error.into(),
            ScoreError::BlockSize(error) => Self::failed_precondition(error.to_string()),
            ScoreError::Cost(error) => error.into(),
        }
    }
}

impl From<PlanRequestError> for Status {
    fn from(error: PlanRequestError) -> Self {
        match error {
            PlanRequestError::Request(error) => error.into(),
            PlanRequestError::BlockSize(error) => Self::failed_precondition(error.to_string()),
            PlanRequestError::Cost(error) => error.into(),
        }
    }
}

impl From<SpeculateRequestError> for Status {
    fn from(error: SpeculateRequestError) -> Self {
        match error {
            SpeculateRequestError::Request(error) => error.into(),
            SpeculateRequestError::Speculate(SpeculateError::Full(error)) => {
                Self::resource_exhausted(error.to_string())
            }
            SpeculateRequestError::Speculate(SpeculateError::Encode(error)) => {
                Self::invalid_argument(error.to_string())
            }
        }
    }
}

impl From<CostError> for Status {
    fn from(error: CostError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

impl From<OutcomeError> for Status {
    fn from(error: OutcomeError) -> Self {
        match error {
            OutcomeError::Request(error) => error.into(),
            OutcomeError::BlockSize(error) => Self::failed_precondition(error.to_string()),
            OutcomeError::NotRemembered(error) => Self::not_found(error.to_string()),
        }
    }
}

impl From<UnknownCallerError> for Status {
    fn from(error: UnknownCallerError) -> Self {
        Self::unauthenticated(error.to_string())
    }
}

impl From<DeniedError> for Status {
    fn from(error: DeniedError) -> Self {
        Self::permission_denied(error.to_string())
    }
}

impl From<OverloadError> for Status {
    fn from(error: OverloadError) -> Self {
        match error {
            OverloadError::Full { .. } | OverloadError::Waited { .. } => {
                Self::resource_exhausted(error.to_string())
            }
            OverloadError::Deadline => Self::deadline_exceeded(error.to_string()),
        }
    }
}

impl From<AdmissionError> for Status {
    fn from(error: AdmissionError) -> Self {
        Self::resource_exhausted(error.to_string())
    }
}

impl From<NotAnsweredError> for Status {
    fn from(error: NotAnsweredError) -> Self {
        Self::unimplemented(error.to_string())
    }
}

impl From<StoppingError> for Status {
    fn from(error: StoppingError) -> Self {
        Self::unavailable(error.to_string())
    }
}

impl From<InterruptedError> for Status {
    fn from(error: InterruptedError) -> Self {
        Self::internal(error.to_string())
    }
}

/// A status as a message inside a stream that goes on.
pub(crate) fn call_error(status: &Status) -> pb::CallError {
    pb::CallError { code: status.code().into(), message: status.message().to_owned() }
}

/// Name of a code for metric labels.
pub(crate) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::InvalidArgument => "invalid_argument",
        Code::NotFound => "not_found",
        Code::FailedPrecondition => "failed_precondition",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::PermissionDenied => "permission_denied",
        Code::Unauthenticated => "unauthenticated",
        Code::ResourceExhausted => "resource_exhausted",
        Code::Unimplemented => "unimplemented",
        Code::Unavailable => "unavailable",
        _ => "other",
    }
}
