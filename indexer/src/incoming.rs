//! Connections to the gRPC port: as many as are allowed, with TLS if there is, each with the names of its peer.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::{self, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::burst::BurstLimiter;
use crate::clock::Clock;
use crate::metrics::{Metrics, ReasonLabel};
use crate::tls::{CurrentTls, PeerNames};

/// Connections at a time, by default: a gateway replica needs one or two, and each costs some tens of kilobytes.
pub const DEFAULT_MAX_CONNECTIONS: usize = 1_024;
/// Longest time for a TLS handshake: seconds on a bad network, and a silent peer does not keep its place for longer.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that wait for the HTTP/2 server to take them.
const ACCEPTED_QUEUE: usize = 64;
/// Pause after the operating system refused a connection: it is out of file descriptors, and asking again at once would not help.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Who is at the other end of a connection; an extension of every request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peer {
    pub(crate) names: Arc<PeerNames>,
}

/// One connection. Its place is free again when it is dropped.
pub(crate) struct Connection {
    io: Io,
    peer: Peer,
    _place: OwnedSemaphorePermit,
}

enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// What the accepting task needs.
pub(crate) struct Acceptor {
    pub(crate) tls: Option<CurrentTls>,
    pub(crate) max_connections: usize,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: Clock,
}

// === impl Acceptor ===

impl Acceptor {
    /// Starts to accept; ends with `stop` or with the stream.
    pub(crate) fn start(
        self,
        listener: TcpListener,
        stop: CancellationToken,
        tasks: &mut JoinSet<()>,
    ) -> impl Stream<Item = io::Result<Connection>> + use<> {
        let (accepted, mut connections) = mpsc::channel(ACCEPTED_QUEUE);
        tasks.spawn(self.run(listener, accepted, stop));
        stream::poll_fn(move |cx| connections.poll_recv(cx).map(|connection| connection.map(Ok)))
    }

    async fn run(self, listener: TcpListener, accepted: mpsc::Sender<Connection>, stop: CancellationToken) {
        let places = Arc::new(Semaphore::new(self.max_connections));
        // As many as there are places: a handshake has one.
        let mut handshakes = JoinSet::new();
        let mut log = BurstLimiter::default();
        loop {
            let stream = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some(_) = handshakes.join_next() => continue,
                stream = listener.accept() => stream,
            };
            let stream = match stream {
                Ok((stream, _)) => stream,
                Err(error) => {
                    self.refused("accept");
                    if let Some(withheld) = log.admit(self.clock.now_ms()) {
                        tracing::warn!(%error, withheld, "a connection to the gRPC port could not be accepted");
                    }
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                self.refused("limit");
                if let Some(withheld) = log.admit(self.clock.now_ms()) {
                    let limit = self.max_connections;
                    tracing::warn!(
                        limit,
                        withheld,
                        "a connection to the gRPC port was closed: there are too many"
                    );
                }
                continue;
            };
            // Answers are small and wait for nobody; without this they may wait 40 ms for company.
            let _ = stream.set_nodelay(true);
            match &self.tls {
                None => {
                    let connection =
                        Connection { io: Io::Plain(stream), peer: Peer::default(), _place: place };
                    if accepted.send(connection).await.is_err() {
                        return;
                    }
                }
                Some(tls) => {
                    let acceptor = TlsAcceptor::from(tls.get());
                    let (accepted, metrics) = (accepted.clone(), Arc::clone(&self.metrics));
                    handshakes.spawn(async move {
                        match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                            // The server is gone if this fails; then so is the connection.
                            Ok(Ok(stream)) => drop(accepted.send(Connection::encrypted(stream, place)).await),
                            Ok(Err(error)) => {
                                metrics
                                    .connections_refused
                                    .get_or_create(&ReasonLabel { reason: "handshake" })
                                    .inc();
                                tracing::debug!(%error, "a TLS handshake failed");
                            }
                            Err(_) => {
                                let reason = "handshake_timeout";
                                metrics.connections_refused.get_or_create(&ReasonLabel { reason }).inc();
                            }
                        }
                    });
                }
            }
        }
    }

    fn refused(&self, reason: &'static str) {
        self.metrics.connections_refused.get_or_create(&ReasonLabel { reason }).inc();
    }
}

// === impl Connection ===

impl Connection {
    fn encrypted(stream: TlsStream<TcpStream>, place: OwnedSemaphorePermit) -> Self {
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        // The first is the peer's own; the others vouch for it. Read once, not for each request.
        let names = certificates.first().map(PeerNames::of).unwrap_or_default();
        Self { io: Io::Tls(Box::new(stream)), peer: Peer { names: Arc::new(names) }, _place: place }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Io::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Io::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Io::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Io::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(stream) => stream.is_write_vectored(),
            Io::Tls(stream) => stream.is_write_vectored(),
        }
    }
}
