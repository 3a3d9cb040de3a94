//! TLS that demands a client certificate, in front of a server: the server's own where it was built with it, else a process of
//! ours that decrypts, as installations with `stunnel` or a service mesh have it.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;

use kvatlas_bus::test_server::program::free_port;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::copy_bidirectional;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use super::{ANSWER_TIMEOUT, Certificates, PASSWORD, ValkeyServer};

/// A server that is reached over TLS only by clients with a certificate.
#[derive(Debug)]
pub struct TlsServer {
    address: SocketAddr,
    // Declared before the server, so that nobody connects to what is gone.
    front: Option<TlsFront>,
    server: ValkeyServer,
}

/// Decrypts what arrives on a port and hands it on. Dropping it closes the port and its connections.
#[derive(Debug)]
pub struct TlsFront {
    address: SocketAddr,
    task: JoinHandle<()>,
}

// === impl TlsServer ===

impl TlsServer {
    /// Starts a server; `None` (and a line on standard error) where there is no binary and none is required.
    pub async fn start(certificates: &Certificates) -> Option<Self> {
        let prepared = ValkeyServer::prepare(&[])?;
        if let Some(server) = start_native(prepared, certificates) {
            return Some(Self { address: server.address(), front: None, server });
        }
        let server = ValkeyServer::start()?;
        let front = TlsFront::start(server.address(), certificates).await;
        Some(Self { address: front.address(), front: Some(front), server })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether the server itself encrypts.
    pub fn is_native(&self) -> bool {
        self.front.is_none()
    }

    /// Ends the server.
    pub fn stop(&mut self) {
        self.server.stop();
    }
}

/// `None`: the server was built without TLS, and ends when it is asked for it.
fn start_native(mut server: ValkeyServer, certificates: &Certificates) -> Option<ValkeyServer> {
    server.port = free_port();
    let (address, log) = (server.address(), server.log_path());
    let (certificate, key) = certificates.server_files();
    let mut command = server.program.command();
    command
        .args(["--bind", "127.0.0.1", "--port", "0", "--tls-port", &server.port.to_string()])
        .args(["--requirepass", PASSWORD, "--save", "", "--tls-auth-clients", "yes"])
        .arg("--tls-cert-file")
        .arg(certificate)
        .arg("--tls-key-file")
        .arg(key)
        .arg("--tls-ca-cert-file")
        .arg(certificates.ca_file())
        .arg("--dir")
        .arg(server.folder.path())
        .arg("--logfile")
        .arg(&log);
    let greets = || TcpStream::connect_timeout(&address, ANSWER_TIMEOUT).is_ok();
    server.process = Some(server.program.launch(command, &log, greets)?);
    Some(server)
}

// === impl TlsFront ===

impl TlsFront {
    /// Opens a free port in front of `server`.
    pub async fn start(server: SocketAddr, certificates: &Certificates) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free loopback port");
        let address = listener.local_addr().expect("the address of a bound socket");
        let acceptor = TlsAcceptor::from(Arc::new(server_config(certificates)));
        Self { address, task: tokio::spawn(serve(listener, acceptor, server)) }
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for TlsFront {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, acceptor: TlsAcceptor, server: SocketAddr) {
    // Dropped with this future, which ends the connections.
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let acceptor = acceptor.clone();
        connections.spawn(async move {
            // Failures end the connection, which is what the client sees of a server that refuses it.
            let Ok(mut client) = acceptor.accept(client).await else { return };
            let Ok(mut server) = tokio::net::TcpStream::connect(server).await else { return };
            let _ = copy_bidirectional(&mut client, &mut server).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

fn server_config(certificates: &Certificates) -> ServerConfig {
    let (certificate, key) = certificates.server_files();
    let mut authorities = RootCertStore::empty();
    for authority in CertificateDer::pem_file_iter(certificates.ca_file()).expect("our own file") {
        authorities.add(authority.expect("our own certificate")).expect("our own authority");
    }
    let verifier = WebPkiClientVerifier::builder(Arc::new(authorities)).build().expect("an authority");
    let chain = CertificateDer::pem_file_iter(certificate).expect("our own file");
    let chain = chain.collect::<Result<Vec<_>, _>>().expect("our own certificate");
    let key = PrivateKeyDer::from_pem_file(key).expect("our own key");
    ServerConfig::builder()
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .expect("a key that fits its certificate")
}
