//! The HTTP port: `/metrics` for scrapers, `/healthz` (the process lives) and `/readyz` (it takes events in).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Time that open requests have to end at a shutdown.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The HTTP port of a process without an index server, such as a shim. Dropping it closes the port.
#[derive(Debug)]
pub struct HttpServer {
    addr: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// An address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for {port} on {address}: {source}; give another address or stop what uses it")]
pub struct ListenError {
    /// What the port is for.
    pub port: &'static str,
    /// The address.
    pub address: SocketAddr,
    /// Why not.
    pub source: io::Error,
}

/// What the pages show.
#[derive(Clone)]
pub(crate) struct HttpState {
    pub(crate) registry: Arc<Registry>,
    /// Called before each scrape, to bring gauges up to date.
    pub(crate) refresh: Arc<dyn Fn() + Send + Sync>,
    pub(crate) ready: watch::Receiver<bool>,
}

/// The routes of the port.
pub(crate) fn router(state: HttpState) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(state)
}

async fn metrics(State(state): State<HttpState>) -> impl IntoResponse {
    (state.refresh)();
    let mut text = String::new();
    match encode(&mut text, &state.registry) {
        Ok(()) => (StatusCode::OK, [(header::CONTENT_TYPE, OPENMETRICS)], text),
        Err(_) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            [(header::CONTENT_TYPE, "text/plain")],
            "metrics could not be written\n".to_owned(),
        ),
    }
}

async fn ready(State(state): State<HttpState>) -> impl IntoResponse {
    if *state.ready.borrow() {
        (StatusCode::OK, "ready\n")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "not yet: publishers are still found out; or the event subscription is closed\n",
        )
    }
}

/// Binds an address and says where it is.
pub(crate) async fn listen(
    port: &'static str,
    address: SocketAddr,
) -> Result<(TcpListener, SocketAddr), ListenError> {
    let failed = |source| ListenError { port, address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Serves the pages until `stop` is cancelled.
pub(crate) async fn serve(listener: TcpListener, state: HttpState, stop: CancellationToken) {
    let serving = axum::serve(listener, router(state)).with_graceful_shutdown(stop.cancelled_owned());
    if let Err(error) = serving.await {
        tracing::error!(%error, "the HTTP port failed");
    }
}

// === impl HttpServer ===

impl HttpServer {
    /// Serves these metrics. When this returns, the port is bound.
    pub async fn start(address: SocketAddr, registry: Registry) -> Result<Self, ListenError> {
        let (listener, addr) = listen("HTTP", address).await?;
        let stop = CancellationToken::new();
        // Such a process is ready as long as it lives: what it follows may come and go.
        let (_, ready) = watch::channel(true);
        let state = HttpState { registry: Arc::new(registry), refresh: Arc::new(|| {}), ready };
        let task = tokio::spawn(serve(listener, state, stop.clone()));
        Ok(Self { addr, stop, task })
    }

    /// Where the port is.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Closes the port; open requests have a second to end.
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        // A request that does not end in time is cut off by the drop.
        let _ = timeout(DRAIN_TIMEOUT, &mut self.task).await;
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.stop.cancel();
        self.task.abort();
    }
}
