//! What stands before every call of the Atlas service: who asks, until when, and whether there is room. The rules are in
//! [`crate::auth`] and [`crate::admission`].
//!
//! Health checks and reflection are not behind it: probes have no credentials, and the service's description is public.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::AUTHORIZATION;
use http::{HeaderValue, Request, Response};
use parking_lot::RwLock;
use tokio::time::Instant;
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tower_service::Service;

use crate::admission::{Admission, Deadline};
use crate::auth::{AuthTable, Credential, DeniedError, Identity, Right, UnknownCallerError};
use crate::incoming::Peer;
use crate::metrics::{Metrics, ReasonLabel};
use crate::status;

/// Longest time for a call whose answer is one message, its arrival included: a caller that sends its request byte by byte
/// does not keep its place.
const MAX_CALL_TIME: Duration = Duration::from_secs(30);
/// The call that stays open for many requests; each of them is admitted by itself.
const STREAMED_CALL: &str = "ScoreStream";
/// Calls by name, for metrics.
const CALLS: [&str; 8] =
    ["Score", STREAMED_CALL, "Plan", "Speculate", "ReportOutcome", "ListOwners", "Dump", "Watch"];

/// Knows who may ask.
#[derive(Debug)]
pub(crate) struct Gate {
    /// `None`: everybody may ask everything.
    table: RwLock<Option<Arc<AuthTable>>>,
    metrics: Arc<Metrics>,
}

/// Who makes a call, as it is known now; an extension of every request.
#[derive(Clone)]
pub(crate) struct Caller {
    gate: Arc<Gate>,
    credential: Credential,
    /// Who that was, by which table.
    known: Option<(Arc<AuthTable>, Arc<Identity>)>,
}

/// A service behind the gate.
#[derive(Clone)]
pub(crate) struct Guard<S> {
    inner: S,
    gate: Arc<Gate>,
    admission: Admission,
}

// === impl Gate ===

impl Gate {
    pub(crate) fn new(table: Option<AuthTable>, metrics: Arc<Metrics>) -> Self {
        Self { table: RwLock::new(table.map(Arc::new)), metrics }
    }

    /// Other identities from now on, also for streams that are open.
    pub(crate) fn replace(&self, table: AuthTable) {
        *self.table.write() = Some(Arc::new(table));
    }

    fn table(&self) -> Option<Arc<AuthTable>> {
        self.table.read().clone()
    }

    fn caller<B>(self: &Arc<Self>, request: &Request<B>) -> Result<Caller, UnknownCallerError> {
        let Some(table) = self.table() else {
            return Ok(Caller { gate: Arc::clone(self), credential: Credential::default(), known: None });
        };
        let peer = request.extensions().get::<Peer>().cloned().unwrap_or_default();
        let values = request.headers().get_all(AUTHORIZATION).iter().map(HeaderValue::as_bytes);
        let credential = Credential::new(values, peer.names)?;
        let identity = table.identify(&credential)?;
        Ok(Caller { gate: Arc::clone(self), credential, known: Some((table, identity)) })
    }

    fn unknown(&self, error: UnknownCallerError) -> Status {
        let reason = match error {
            UnknownCallerError::Missing => "missing",
            UnknownCallerError::Malformed => "malformed",
            UnknownCallerError::Token => "token",
            UnknownCallerError::Certificate => "certificate",
        };
        self.metrics.unauthenticated.get_or_create(&ReasonLabel { reason }).inc();
        error.into()
    }

    fn denied(&self, error: DeniedError) -> Status {
        let reason = match error {
            DeniedError::Right { .. } => "right",
            DeniedError::Tenant { .. } => "tenant",
            DeniedError::Model { .. } => "model",
        };
        self.metrics.denied.get_or_create(&ReasonLabel { reason }).inc();
        error.into()
    }
}

// === impl Caller ===

impl Caller {
    /// Of a request that came through the guard.
    pub(crate) fn of<T>(request: &tonic::Request<T>) -> Result<Self, Status> {
        let caller = request.extensions().get::<Self>().cloned();
        caller.ok_or_else(|| Status::internal("a call came in without passing the guard"))
    }

    /// Who that is now: on a stream that stays open, what was taken away meanwhile is gone. `None`: everybody may ask
    /// everything.
    fn identity(&self) -> Result<Option<Arc<Identity>>, Status> {
        let Some(table) = self.gate.table() else { return Ok(None) };
        match &self.known {
            Some((known_by, identity)) if Arc::ptr_eq(known_by, &table) => Ok(Some(Arc::clone(identity))),
            _ => table.identify(&self.credential).map(Some).map_err(|error| self.gate.unknown(error)),
        }
    }

    /// Whether the caller may do this to a tenant's model.
    pub(crate) fn may(&self, right: Right, model: &str, tenant: &str) -> Result<(), Status> {
        let Some(identity) = self.identity()? else { return Ok(()) };
        identity.may(right, model, tenant).map_err(|error| self.gate.denied(error))
    }

    /// Whether the caller may do this to any tenant's model, and then to which.
    pub(crate) fn sees(&self, right: Right) -> Result<impl Fn(&str, &str) -> bool + use<>, Status> {
        let identity = self.identity()?;
        if let Some(identity) = &identity {
            identity.has(right).map_err(|error| self.gate.denied(error))?;
        }
        Ok(move |model: &str, tenant: &str| {
            identity.as_ref().is_none_or(|identity| identity.may(right, model, tenant).is_ok())
        })
    }

    /// The caller's name, where callers have one.
    pub(crate) fn name(&self) -> Option<&str> {
        self.known.as_ref().map(|(_, identity)| identity.name.as_str())
    }
}

// === impl Guard ===

impl<S> Guard<S> {
    pub(crate) fn new(inner: S, gate: Arc<Gate>, admission: Admission) -> Self {
        Self { inner, gate, admission }
    }
}

impl<S: NamedService> NamedService for Guard<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<Request<B>> for Guard<S>
where
    S: Service<Request<B>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let now = Instant::now();
        let call = call_name(request.uri().path());
        let metrics = Arc::clone(&self.gate.metrics);
        let refuse = move |status: Status| {
            metrics.count_call(call, status::code_name(status.code()));
            status.into_http()
        };
        let caller = match self.gate.caller(&request) {
            Ok(caller) => caller,
            Err(error) => {
                let refused = refuse(self.gate.unknown(error));
                return Box::pin(std::future::ready(Ok(refused)));
            }
        };
        let deadline = Deadline::of(request.headers(), now);
        request.extensions_mut().insert(caller);
        request.extensions_mut().insert(deadline);
        // The clone is not ready, the service itself is.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        if call == STREAMED_CALL {
            return Box::pin(inner.call(request));
        }
        // Here and not in the future: what has arrived counts, not what the runtime has got to.
        let entered = self.admission.enter();
        let metrics = Arc::clone(&self.gate.metrics);
        Box::pin(async move {
            let until = deadline.at_most(MAX_CALL_TIME, now);
            let answered = async {
                let _admitted = entered?.admitted(until).await?;
                until.bound(inner.call(request)).await
            };
            match answered.await {
                Ok(answer) => answer,
                Err(error) => {
                    metrics.count_overload(&error);
                    Ok(refuse(error.into()))
                }
            }
        })
    }
}

/// The last part of the path if it is one of ours: metrics must not grow with what callers make up.
fn call_name(path: &str) -> &'static str {
    let name = path.rsplit('/').next().unwrap_or_default();
    CALLS.into_iter().find(|call| *call == name).unwrap_or("other")
}

#[cfg(test)]
mod tests {
    use kvatlas_proto::grpc::FILE_DESCRIPTOR_SET;

    use super::*;

    #[test]
    fn every_call_of_the_service_has_its_name_and_nothing_else_does() {
        let described = String::from_utf8_lossy(FILE_DESCRIPTOR_SET);
        for call in CALLS {
            assert!(described.contains(call), "{call}");
            assert_eq!(call_name(&format!("/kvatlas.v1.Atlas/{call}")), call);
        }
        for other in ["", "/", "/kvatlas.v1.Atlas/score", "/x/Score/"] {
            assert_eq!(call_name(other), "other", "{other}");
        }
    }
}
