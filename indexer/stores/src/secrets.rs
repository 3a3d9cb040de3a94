//! Who we are to a store and whom we trust, read from files at every connect, so that a replaced file is used the next time.

use std::fmt;
use std::path::{Path, PathBuf};

use kvatlas_bus::ClientIdentity;
use kvatlas_index::store::AccessError;

/// Largest secret or certificate file. Bundles of all public authorities have some 200 KB; more is the wrong file.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// How a client of Redis or Valkey proves who it is, and whom it trusts.
#[derive(Clone, Debug, Default)]
pub struct StoreAccess {
    /// User name; none is the server's default user.
    pub user: Option<String>,
    /// The user's password.
    pub password: Password,
    /// PEM file with the authorities to trust instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// This client's own certificate, where the server demands one.
    pub client_identity: Option<ClientIdentity>,
}

/// A password, or where it is.
#[derive(Clone, Default)]
pub enum Password {
    /// There is none.
    #[default]
    None,
    /// In a file; white space at its end is not part of it.
    File(PathBuf),
    /// This one.
    Given(String),
}

// === impl Password ===

impl Password {
    /// The password as it is now.
    pub(crate) async fn read(&self) -> Result<Option<String>, AccessError> {
        let path = match self {
            Self::None => return Ok(None),
            Self::Given(password) => return Ok(Some(password.clone())),
            Self::File(path) => path,
        };
        let what = "checkpoint store's password file";
        let bytes = read_file(what, path).await?;
        // The text is left out of the message: it is the secret.
        let refuse =
            |reason: &str| AccessError::Secret { what, path: path.clone(), reason: reason.to_owned() };
        let text = String::from_utf8(bytes).map_err(|_| refuse("it is not text"))?;
        match text.trim_end() {
            "" => Err(refuse("it is empty")),
            password => Ok(Some(password.to_owned())),
        }
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::File(path) => write!(f, "File({path:?})"),
            Self::Given(_) => f.write_str("Given"),
        }
    }
}

pub(crate) async fn read_file(what: &'static str, path: &Path) -> Result<Vec<u8>, AccessError> {
    let refuse = |reason: String| AccessError::Secret { what, path: path.to_owned(), reason };
    let size = tokio::fs::metadata(path).await.map_err(|error| refuse(error.to_string()))?.len();
    if size > MAX_FILE_BYTES {
        return Err(refuse(format!("it has {size} bytes, more than {MAX_FILE_BYTES}")));
    }
    tokio::fs::read(path).await.map_err(|error| refuse(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_replaced_password_file_is_read_anew_and_its_content_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        let password = Password::File(path.clone());
        let missing = password.read().await.unwrap_err();
        assert!(missing.reason() == "secret" && missing.to_string().contains("password"), "{missing}");
        for content in ["hunter2", "hunter3\n"] {
            std::fs::write(&path, content).unwrap();
            assert_eq!(password.read().await.unwrap().as_deref(), Some(content.trim_end()));
        }
        std::fs::write(&path, b"hunter\xff").unwrap();
        assert!(!password.read().await.unwrap_err().to_string().contains("hunter"));
        assert_eq!(format!("{:?}", Password::Given("hunter2".into())), "Given");
    }
}
