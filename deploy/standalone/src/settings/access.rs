//! Who reaches the gRPC port, what they may ask, and how much: `[tls]`, `[auth]` and `[limits]`.

use std::path::PathBuf;

use clap::Args;
use clap::builder::RangedU64ValueParser;
use kvatlas_index::{RequestLimits, ServingLimits, TlsFiles};
use serde::Deserialize;

use crate::failure::Failure;

/// Largest request that can be allowed, bytes: tokens of 16 million.
const MOST_REQUEST_BYTES: u64 = 128 << 20;
/// Longest prompt that can be allowed, tokens.
const MOST_PROMPT_TOKENS: u64 = 16 << 20;
/// The most of anything else; far above what one process can serve.
const MOST: u64 = 1 << 20;

/// `[tls]`: encryption of the gRPC port. The files are read again when they change.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
#[allow(clippy::struct_field_names, reason = "the names are those of the settings")]
pub struct TlsSettings {
    /// PEM file with the gRPC port's certificate chain; needs --tls-key-file. Read again when it changes. Default: no TLS.
    #[arg(long = "tls-cert-file", env = "KVATLAS_TLS_CERT_FILE", value_name = "FILE")]
    pub cert_file: Option<PathBuf>,
    /// PEM file with the private key of that certificate.
    #[arg(long = "tls-key-file", env = "KVATLAS_TLS_KEY_FILE", value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// PEM file with the authorities of callers' certificates; callers without one are then refused.
    #[arg(long = "tls-client-ca-file", env = "KVATLAS_TLS_CLIENT_CA_FILE", value_name = "FILE")]
    pub client_ca_file: Option<PathBuf>,
}

/// `[auth]`: who may ask what.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct AuthSettings {
    /// TOML file with the callers that are known and what they may ask (docs/security.md). Read again when it changes.
    /// Default: everybody may ask everything.
    #[arg(long = "auth-file", env = "KVATLAS_AUTH_FILE", value_name = "FILE")]
    pub file: Option<PathBuf>,
}

/// `[limits]`: how much callers of the gRPC port may ask for.
#[derive(Args, Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
#[allow(clippy::struct_field_names, reason = "the names are those of the settings")]
pub struct LimitSettings {
    /// Largest request, bytes. Default: 6291456.
    #[arg(long, env = "KVATLAS_MAX_REQUEST_BYTES", value_name = "BYTES", value_parser = range(MOST_REQUEST_BYTES))]
    pub max_request_bytes: Option<usize>,
    /// Longest prompt, token ids; longer ones may need --max-request-bytes too. Default: 1048576.
    #[arg(long, env = "KVATLAS_MAX_PROMPT_TOKENS", value_name = "TOKENS", value_parser = range(MOST_PROMPT_TOKENS))]
    pub max_prompt_tokens: Option<usize>,
    /// Most candidates of a request. Default: 4096.
    #[arg(long, env = "KVATLAS_MAX_CANDIDATES", value_name = "N", value_parser = range(MOST))]
    pub max_candidates: Option<usize>,
    /// Most calls open on one connection. Default: 256.
    #[arg(long, env = "KVATLAS_MAX_STREAMS_PER_CONNECTION", value_name = "N", value_parser = range(MOST))]
    pub max_streams_per_connection: Option<usize>,
    /// Most connections; further ones are closed at once. Default: 1024.
    #[arg(long, env = "KVATLAS_MAX_CONNECTIONS", value_name = "N", value_parser = range(MOST))]
    pub max_connections: Option<usize>,
    /// Most calls in flight; as many wait for a moment, further ones are refused (RESOURCE_EXHAUSTED). Default: 256.
    #[arg(long, env = "KVATLAS_MAX_INFLIGHT_QUERIES", value_name = "N", value_parser = range(MOST))]
    pub max_inflight_queries: Option<usize>,
}

fn range(most: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::from(1..=most)
}

// === impl TlsSettings ===

impl TlsSettings {
    pub(super) fn or(self, file: Self) -> Self {
        Self {
            cert_file: self.cert_file.or(file.cert_file),
            key_file: self.key_file.or(file.key_file),
            client_ca_file: self.client_ca_file.or(file.client_ca_file),
        }
    }

    /// The files to serve with, if TLS is wanted.
    pub fn files(&self) -> Result<Option<TlsFiles>, Failure> {
        match (&self.cert_file, &self.key_file) {
            (Some(certificate), Some(key)) => Ok(Some(TlsFiles {
                certificate_file: certificate.clone(),
                key_file: key.clone(),
                client_ca_file: self.client_ca_file.clone(),
            })),
            (None, None) if self.client_ca_file.is_none() => Ok(None),
            (None, None) => Err(Failure::usage(
                "client certificates need TLS: give --tls-cert-file and --tls-key-file with --tls-client-ca-file",
            )),
            _ => Err(Failure::usage("--tls-cert-file and --tls-key-file belong together")),
        }
    }
}

// === impl AuthSettings ===

impl AuthSettings {
    pub(super) fn or(self, file: Self) -> Self {
        Self { file: self.file.or(file.file) }
    }
}

// === impl LimitSettings ===

impl LimitSettings {
    pub(super) fn or(self, file: Self) -> Self {
        Self {
            max_request_bytes: self.max_request_bytes.or(file.max_request_bytes),
            max_prompt_tokens: self.max_prompt_tokens.or(file.max_prompt_tokens),
            max_candidates: self.max_candidates.or(file.max_candidates),
            max_streams_per_connection: self.max_streams_per_connection.or(file.max_streams_per_connection),
            max_connections: self.max_connections.or(file.max_connections),
            max_inflight_queries: self.max_inflight_queries.or(file.max_inflight_queries),
        }
    }

    /// The limits to serve with. A file is checked here as the command line was when it was read.
    pub fn serving(&self) -> Result<ServingLimits, Failure> {
        let defaults = ServingLimits::default();
        let checked = |name: &str, given: Option<usize>, most: u64, default: usize| match given {
            None => Ok(default),
            Some(given) if (1..=most).contains(&(given as u64)) => Ok(given),
            Some(given) => Err(Failure::usage(format!("{name} is {given}: give 1 to {most}"))),
        };
        let streams = checked(
            "max-streams-per-connection",
            self.max_streams_per_connection,
            MOST,
            defaults.streams_per_connection as usize,
        )?;
        Ok(ServingLimits {
            request_bytes: checked(
                "max-request-bytes",
                self.max_request_bytes,
                MOST_REQUEST_BYTES,
                defaults.request_bytes,
            )?,
            request: RequestLimits {
                prompt_tokens: checked(
                    "max-prompt-tokens",
                    self.max_prompt_tokens,
                    MOST_PROMPT_TOKENS,
                    defaults.request.prompt_tokens,
                )?,
                candidates: checked(
                    "max-candidates",
                    self.max_candidates,
                    MOST,
                    defaults.request.candidates,
                )?,
            },
            streams_per_connection: streams as u32,
            connections: checked("max-connections", self.max_connections, MOST, defaults.connections)?,
            inflight: checked("max-inflight-queries", self.max_inflight_queries, MOST, defaults.inflight)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_needs_its_key_and_client_certificates_need_tls() {
        let path = || Some(PathBuf::from("x"));
        let files = |cert_file, key_file, client_ca_file| {
            TlsSettings { cert_file, key_file, client_ca_file }.files().map_err(|failure| failure.to_string())
        };
        assert_eq!(files(None, None, None), Ok(None));
        assert!(files(path(), path(), path()).unwrap().is_some());
        assert!(files(path(), None, None).unwrap_err().contains("--tls-key-file"));
        assert!(files(None, path(), None).unwrap_err().contains("--tls-cert-file"));
        assert!(files(None, None, path()).unwrap_err().contains("--tls-cert-file"));
    }

    #[test]
    fn limits_that_are_not_given_are_the_documented_defaults() {
        assert_eq!(LimitSettings::default().serving().unwrap(), ServingLimits::default());
        let defaults = ServingLimits::default();
        let numbers = [
            defaults.request_bytes,
            defaults.request.prompt_tokens,
            defaults.request.candidates,
            defaults.streams_per_connection as usize,
            defaults.connections,
            defaults.inflight,
        ];
        // What the help texts say.
        assert_eq!(numbers, [6_291_456, 1_048_576, 4_096, 256, 1_024, 256]);
    }

    #[test]
    fn limits_of_zero_are_refused_by_name() {
        let limits = LimitSettings { max_connections: Some(0), ..LimitSettings::default() };
        assert!(limits.serving().unwrap_err().to_string().contains("max-connections is 0"));
    }
}
