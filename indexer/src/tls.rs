//! TLS of the gRPC port: from PEM files to a configuration that can be replaced while the server runs, and from a caller's
//! certificate to its names.
//!
//! One provider, ring. Every connection proves its certificate anew (no session resumption), so that what was rotated away
//! is gone with the connections that exist.

use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::RwLock;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use tokio_rustls::rustls::{RootCertStore, ServerConfig};
use x509_parser::extensions::GeneralName;

use crate::watched::{Watched, WatchedFileError};

/// HTTP/2, the only protocol of the port.
const ALPN: &[u8] = b"h2";

/// The PEM files of the gRPC port. They are read again when they change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate chain, its own first.
    pub certificate_file: PathBuf,
    /// The server's private key.
    pub key_file: PathBuf,
    /// The authorities of callers' certificates. If given, a caller without a certificate of theirs is refused.
    pub client_ca_file: Option<PathBuf>,
}

/// The configuration in force.
#[derive(Clone, Debug)]
pub(crate) struct CurrentTls(Arc<RwLock<Arc<ServerConfig>>>);

/// What a caller's certificate says that it is. Empty without one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PeerNames {
    /// DNS names and URIs of the subject's alternative names.
    pub(crate) alternative: Vec<String>,
    /// Common names of the subject.
    pub(crate) common: Vec<String>,
}

// === impl TlsFiles ===

impl TlsFiles {
    /// Reads the files for the first time.
    pub(crate) fn open(&self) -> Result<(Watched<Arc<ServerConfig>>, CurrentTls), WatchedFileError> {
        let own = [&self.certificate_file, &self.key_file];
        let paths = own.into_iter().chain(&self.client_ca_file).cloned().collect();
        let (watched, first) = Watched::open("TLS files", paths, server_config)?;
        Ok((watched, CurrentTls(Arc::new(RwLock::new(first)))))
    }
}

// === impl CurrentTls ===

impl CurrentTls {
    /// For the next connection.
    pub(crate) fn get(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.0.read())
    }

    pub(crate) fn replace(&self, config: Arc<ServerConfig>) {
        *self.0.write() = config;
    }
}

/// From the contents of certificate, key and possibly authorities. The problems are worded here: a parser's own words could
/// quote a key.
fn server_config(contents: &[Vec<u8>]) -> Result<Arc<ServerConfig>, String> {
    let (certificate, key, authorities) = match contents {
        [certificate, key] => (certificate, key, None),
        [certificate, key, authorities] => (certificate, key, Some(authorities)),
        _ => unreachable!("two or three paths are watched"),
    };
    let chain = certificates(certificate, "the certificate file")?;
    let key = PrivateKeyDer::from_pem_slice(key)
        .map_err(|_| "the key file holds no private key in PEM form".to_owned())?;
    let provider = Arc::new(default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let builder = match authorities {
        None => builder.with_no_client_auth(),
        Some(authorities) => {
            let mut roots = RootCertStore::empty();
            for authority in certificates(authorities, "the file of clients' authorities")? {
                roots
                    .add(authority)
                    .map_err(|error| format!("a certificate of clients' authorities: {error}"))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| error.to_string())?)
        }
    };
    let mut config = builder
        .with_single_cert(chain, key)
        .map_err(|error| format!("certificate and key do not make an identity: {error}"))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

fn certificates(pem: &[u8], what: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(format!("{what} holds no certificate in PEM form")),
    }
}

// === impl PeerNames ===

impl PeerNames {
    /// Of a verified certificate. One that cannot be read has no names: nobody then.
    pub(crate) fn of(certificate: &CertificateDer<'_>) -> Self {
        let Ok((_, certificate)) = x509_parser::parse_x509_certificate(certificate) else {
            return Self::default();
        };
        let name = |name: &GeneralName<'_>| match name {
            GeneralName::DNSName(name) | GeneralName::URI(name) => Some((*name).to_owned()),
            _ => None,
        };
        let names = certificate.subject_alternative_name().ok().flatten();
        let alternative =
            names.map_or_else(Vec::new, |names| names.value.general_names.iter().filter_map(name).collect());
        let common = certificate.subject().iter_common_name();
        let common = common.filter_map(|name| name.as_str().ok().map(str::to_owned)).collect();
        Self { alternative, common }
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    fn certificate(change: impl FnOnce(&mut CertificateParams)) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["gateway.example".to_owned()]).unwrap();
        change(&mut params);
        (params.self_signed(&key).unwrap(), key)
    }

    #[test]
    fn a_certificate_names_dns_uri_and_common_names() {
        let (certificate, _) = certificate(|params| {
            params.subject_alt_names.push(SanType::URI("spiffe://a/gateway".try_into().unwrap()));
            params.distinguished_name.push(DnType::CommonName, "gateway");
        });
        let names = PeerNames::of(certificate.der());
        assert_eq!(names.alternative, ["gateway.example", "spiffe://a/gateway"]);
        assert!(names.common.contains(&"gateway".to_owned()), "{names:?}");
        assert_eq!(PeerNames::of(&CertificateDer::from(vec![1, 2, 3])), PeerNames::default());
    }

    #[test]
    fn files_that_make_no_identity_are_refused_without_quoting_them() {
        let ((certificate, key), (_, other_key)) = (certificate(|_| ()), certificate(|_| ()));
        let pem = |text: String| text.into_bytes();
        let (chain, key) = (pem(certificate.pem()), pem(key.serialize_pem()));
        assert!(server_config(&[chain.clone(), key.clone()]).is_ok());
        assert!(server_config(&[chain.clone(), key.clone(), chain.clone()]).is_ok());
        let garbage = b"-----BEGIN hunter2".to_vec();
        for (contents, expected) in [
            (vec![chain.clone(), pem(other_key.serialize_pem())], "identity"),
            (vec![chain.clone(), garbage.clone()], "private key"),
            (vec![garbage.clone(), key.clone()], "certificate file"),
            (vec![Vec::new(), key.clone()], "certificate file"),
            (vec![chain, key, garbage], "authorities"),
        ] {
            let error = server_config(&contents).unwrap_err();
            assert!(error.contains(expected) && !error.contains("hunter2"), "{error}");
        }
    }
}
