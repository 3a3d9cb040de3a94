//! The bearer token of a client: from a file, read again from time to time, never shown.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

use crate::EndpointError;

/// Age at which the file is read again. An orchestrator replaces a token minutes before the old one ends.
pub const TOKEN_REREAD: Duration = Duration::from_secs(30);
/// Longest token, bytes: what servers take.
pub const MAX_TOKEN_BYTES: usize = 8_192;

/// Adds the token to each call, if there is one.
#[derive(Clone)]
pub(crate) struct Bearer(Option<Arc<TokenFile>>);

struct TokenFile {
    path: PathBuf,
    current: Mutex<(Instant, MetadataValue<Ascii>)>,
}

// === impl Bearer ===

impl Bearer {
    pub(crate) fn open(path: Option<PathBuf>) -> Result<Self, EndpointError> {
        let Some(path) = path else { return Ok(Self(None)) };
        match read(&path) {
            Ok(value) => {
                let current = Mutex::new((Instant::now(), value));
                Ok(Self(Some(Arc::new(TokenFile { path, current }))))
            }
            Err(problem) => Err(EndpointError::File { what: "token file", path, problem }),
        }
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(file) = &self.0 {
            request.metadata_mut().insert("authorization", file.value());
        }
        Ok(request)
    }
}

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(file) => write!(f, "Bearer({:?})", file.path),
            None => f.write_str("None"),
        }
    }
}

// === impl TokenFile ===

impl TokenFile {
    fn value(&self) -> MetadataValue<Ascii> {
        let mut current = self.current.lock();
        if current.0.elapsed() >= TOKEN_REREAD {
            // What worked until now is tried further if the file is unusable; the server says if it is over.
            let value = read(&self.path).unwrap_or_else(|_| current.1.clone());
            *current = (Instant::now(), value);
        }
        current.1.clone()
    }
}

/// The file's content without white space around it. Problems are worded here, so that no token is quoted.
fn read(path: &Path) -> Result<MetadataValue<Ascii>, String> {
    let mut token = String::new();
    // Room for a line end.
    let most = MAX_TOKEN_BYTES as u64 + 2;
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.take(most + 1).read_to_string(&mut token).map_err(|_| "it is not text".to_owned())?;
    let token = token.trim();
    if token.is_empty() || token.len() > MAX_TOKEN_BYTES || !token.bytes().all(|byte| byte.is_ascii_graphic())
    {
        return Err(format!("it holds no token: 1 to {MAX_TOKEN_BYTES} printable characters in one line"));
    }
    let mut value: MetadataValue<Ascii> =
        format!("Bearer {token}").parse().map_err(|_| "it holds no token".to_owned())?;
    // Kept out of debug output and of the compression table of the connection.
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(bearer: &mut Bearer) -> String {
        let request = bearer.call(Request::new(())).unwrap();
        request.metadata().get("authorization").unwrap().to_str().unwrap().to_owned()
    }

    #[tokio::test(start_paused = true)]
    async fn a_replaced_token_is_sent_after_a_while_and_an_unusable_file_keeps_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "one\n").unwrap();
        let mut bearer = Bearer::open(Some(path.clone())).unwrap();
        std::fs::write(&path, "two").unwrap();
        assert_eq!(sent(&mut bearer), "Bearer one");
        tokio::time::advance(TOKEN_REREAD).await;
        assert_eq!(sent(&mut bearer), "Bearer two");
        std::fs::remove_file(&path).unwrap();
        tokio::time::advance(TOKEN_REREAD).await;
        assert_eq!(sent(&mut bearer), "Bearer two");
    }

    #[tokio::test]
    async fn a_token_is_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        for bad in ["", "hunter2 hunter2", "hunter2\u{e9}"] {
            std::fs::write(&path, bad).unwrap();
            let error = Bearer::open(Some(path.clone())).unwrap_err().to_string();
            assert!(error.contains("no token") && !error.contains("hunter2"), "{error}");
        }
        std::fs::write(&path, "hunter2").unwrap();
        let mut bearer = Bearer::open(Some(path)).unwrap();
        let request = bearer.call(Request::new(())).unwrap();
        let shown = format!("{bearer:?} {:?}", request.metadata());
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}
