//! An authority and what it signed, made anew for each test so that none can expire.

use std::fs;
use std::path::PathBuf;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

/// PEM files of an authority, a server and a client. Deleted with the value.
#[derive(Debug)]
pub struct Certificates {
    folder: TempDir,
}

// === impl Certificates ===

impl Certificates {
    /// Makes them, for servers on `127.0.0.1` and `localhost`.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder for certificates");
        let mut authority = CertificateParams::new(Vec::new()).expect("no names");
        // Each has a name of its own: equal names of issuer and owner would mean a certificate that signs itself.
        authority.distinguished_name.push(DnType::CommonName, "an authority for tests");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_key = KeyPair::generate().expect("a key");
        let certificate = authority.self_signed(&authority_key).expect("a certificate");
        let certificates = Self { folder };
        certificates.write("ca.pem", &certificate.pem());
        let issuer = Issuer::new(authority, authority_key);
        for (file, names) in [("server", &["127.0.0.1", "localhost"][..]), ("client", &["kvatlas"])] {
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            let mut params = CertificateParams::new(names).expect("valid names");
            params.distinguished_name.push(DnType::CommonName, file);
            let key = KeyPair::generate().expect("a key");
            let signed = params.signed_by(&key, &issuer).expect("a certificate");
            certificates.write(&format!("{file}.pem"), &signed.pem());
            certificates.write(&format!("{file}.key"), &key.serialize_pem());
        }
        certificates
    }

    /// The authority's certificate.
    pub fn ca_file(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// The client's certificate and key.
    pub fn client_files(&self) -> (PathBuf, PathBuf) {
        (self.folder.path().join("client.pem"), self.folder.path().join("client.key"))
    }

    /// The server's certificate and key.
    pub fn server_files(&self) -> (PathBuf, PathBuf) {
        (self.folder.path().join("server.pem"), self.folder.path().join("server.key"))
    }

    fn write(&self, name: &str, pem: &str) {
        fs::write(self.folder.path().join(name), pem).expect("a file in our own folder");
    }
}

impl Default for Certificates {
    fn default() -> Self {
        Self::new()
    }
}
