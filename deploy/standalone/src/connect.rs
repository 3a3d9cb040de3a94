//! How the commands that ask a running server reach it.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use kvatlas_client::{Client, ClientConfig, ClientTls};

use crate::failure::Failure;
use crate::settings::DEFAULT_GRPC;

/// Which server, and how the answer is shown.
#[derive(Args)]
pub struct ConnectArgs {
    /// gRPC address of the server.
    #[arg(long, env = "KVATLAS_SERVER", default_value = DEFAULT_GRPC, global = true, value_name = "HOST:PORT")]
    server: String,
    /// Longest wait for an answer, milliseconds.
    #[arg(long, default_value_t = 2_000, global = true, value_name = "MS")]
    deadline_ms: u64,
    /// Print JSON instead of a table.
    #[arg(long, global = true)]
    pub json: bool,
    #[command(flatten)]
    access: AccessArgs,
}

/// How to reach a server that is protected.
#[derive(Args)]
struct AccessArgs {
    /// Encrypt, and trust the system's authorities. The other TLS options imply it.
    #[arg(long, env = "KVATLAS_QUERY_TLS", global = true)]
    tls: bool,
    /// PEM file with the authorities to trust instead of the system's.
    #[arg(long, env = "KVATLAS_QUERY_CA_FILE", global = true, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// PEM file with this client's certificate; needs --key-file.
    #[arg(long, env = "KVATLAS_QUERY_CERT_FILE", global = true, value_name = "FILE")]
    cert_file: Option<PathBuf>,
    /// PEM file with the private key of that certificate.
    #[arg(long, env = "KVATLAS_QUERY_KEY_FILE", global = true, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Name to expect in the server's certificate instead of the host's.
    #[arg(long, env = "KVATLAS_QUERY_SERVER_NAME", global = true, value_name = "NAME")]
    server_name: Option<String>,
    /// File with the bearer token that says who asks.
    #[arg(long, env = "KVATLAS_QUERY_TOKEN_FILE", global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

// === impl ConnectArgs ===

impl ConnectArgs {
    /// A client of that server.
    pub fn client(&self) -> Result<Client, Failure> {
        let deadline = Duration::from_millis(self.deadline_ms);
        let (tls, token_file) = (self.access.tls()?, self.access.token_file.clone());
        let config = ClientConfig { deadline, tls, token_file, ..ClientConfig::new(&self.server) };
        Client::connect(config).map_err(|error| Failure::usage(error.to_string()))
    }
}

// === impl AccessArgs ===

impl AccessArgs {
    fn tls(&self) -> Result<Option<ClientTls>, Failure> {
        let identity = match (&self.cert_file, &self.key_file) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some((certificate.clone(), key.clone())),
            _ => return Err(Failure::usage("--cert-file and --key-file belong together")),
        };
        let tls =
            ClientTls { ca_file: self.ca_file.clone(), identity, server_name: self.server_name.clone() };
        Ok((self.tls || tls != ClientTls::default()).then_some(tls))
    }
}
