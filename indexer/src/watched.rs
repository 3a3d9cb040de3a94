//! Files that are taken in anew when they change: certificates, who may ask, tenants' secrets.
//!
//! Content decides, not times: a secret that an orchestrator swaps in keeps old times or gets new ones as it likes. What
//! was taken in last stays in force while the files are unusable, and each unusable state is told once.

use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;
use std::time::Duration;

use ring::digest::{Context, SHA256};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

/// How often files are looked at: a rotated secret is in force seconds later, and reading a few kilobytes costs nothing.
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(2);
/// Largest file, bytes: thousands of identities or certificates; more is the wrong file.
pub const MAX_WATCHED_BYTES: u64 = 4 << 20;

/// A file cannot be used. Never quotes its content: it may be a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot use the {what} {files}: {problem}", files = name_all(paths))]
pub struct WatchedFileError {
    what: &'static str,
    paths: Vec<PathBuf>,
    problem: String,
}

/// Turns the files' contents, in the order of their paths, into a value, or says what is wrong without quoting them.
type Parse<T> = fn(&[Vec<u8>]) -> Result<T, String>;

/// Files with one meaning together, and what they looked like last.
#[derive(Debug)]
pub(crate) struct Watched<T> {
    what: &'static str,
    paths: Vec<PathBuf>,
    parse: Parse<T>,
    /// Of the contents, or of the reason why there are none.
    seen: Option<[u8; 32]>,
}

fn name_all(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

// === impl Watched ===

impl<T: Send + 'static> Watched<T> {
    /// Reads the files for the first time. `what` names them in errors, for example `TLS certificate`.
    pub(crate) fn open(
        what: &'static str,
        paths: Vec<PathBuf>,
        parse: Parse<T>,
    ) -> Result<(Self, T), WatchedFileError> {
        let mut watched = Self { what, paths, parse, seen: None };
        match watched.look()? {
            Some(value) => Ok((watched, value)),
            None => unreachable!("nothing was seen before, so there is no unchanged content"),
        }
    }

    /// What the files say if it is not what they said at the last look; the same for what is wrong with them.
    pub(crate) fn look(&mut self) -> Result<Option<T>, WatchedFileError> {
        let contents = self.paths.iter().map(read).collect::<Result<Vec<_>, _>>();
        let fingerprint = fingerprint(&contents);
        if self.seen.replace(fingerprint) == Some(fingerprint) {
            return Ok(None);
        }
        let error = |problem| WatchedFileError { what: self.what, paths: self.paths.clone(), problem };
        contents.and_then(|contents| (self.parse)(&contents)).map(Some).map_err(error)
    }

    /// Looks again and again until `stop`, and hands over what changed.
    pub(crate) async fn keep(
        mut self,
        take: impl Fn(Result<T, WatchedFileError>) + Send,
        stop: CancellationToken,
    ) {
        let mut interval = tokio::time::interval(RELOAD_INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                _ = interval.tick() => {}
            }
            // A file system can be slow; the runtime must not wait for it.
            let looked = tokio::task::spawn_blocking(move || {
                let looked = self.look();
                (self, looked)
            });
            // Fails only when the runtime ends.
            let Ok((back, looked)) = looked.await else { return };
            self = back;
            match looked {
                Ok(None) => {}
                Ok(Some(value)) => {
                    tracing::info!(what = self.what, files = %name_all(&self.paths), "changed, and in force from now on");
                    take(Ok(value));
                }
                Err(error) => {
                    tracing::warn!(%error, "what was taken in last stays in force");
                    take(Err(error));
                }
            }
        }
    }
}

fn read(path: &PathBuf) -> Result<Vec<u8>, String> {
    let problem = |error: std::io::Error| format!("{}: {error}", path.display());
    let mut content = Vec::new();
    let file = File::open(path).map_err(problem)?;
    file.take(MAX_WATCHED_BYTES + 1).read_to_end(&mut content).map_err(problem)?;
    if content.len() as u64 > MAX_WATCHED_BYTES {
        return Err(format!("{} has more than {MAX_WATCHED_BYTES} bytes", path.display()));
    }
    Ok(content)
}

/// A digest and not the contents, so that no second copy of a secret stays in memory.
fn fingerprint(contents: &Result<Vec<Vec<u8>>, String>) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    match contents {
        Ok(contents) => {
            for content in contents {
                context.update(&(content.len() as u64).to_le_bytes());
                context.update(content);
            }
        }
        Err(problem) => {
            context.update(b"unreadable");
            context.update(problem.as_bytes());
        }
    }
    context.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(contents: &[Vec<u8>]) -> Result<u32, String> {
        let text = String::from_utf8_lossy(&contents[0]).into_owned();
        text.trim().parse().map_err(|_| "it holds no number".to_owned())
    }

    #[test]
    fn a_file_is_taken_in_when_its_content_changes_and_each_problem_is_told_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("number");
        assert!(Watched::open("number", vec![path.clone()], number).is_err());
        std::fs::write(&path, "1").unwrap();
        let (mut watched, first) = Watched::open("number", vec![path.clone()], number).unwrap();
        assert_eq!((first, watched.look()), (1, Ok(None)));
        std::fs::write(&path, "secret").unwrap();
        let error = watched.look().unwrap_err().to_string();
        assert!(error.contains("no number") && !error.contains("secret"), "{error}");
        assert_eq!(watched.look(), Ok(None));
        std::fs::remove_file(&path).unwrap();
        assert!(watched.look().is_err());
        std::fs::write(&path, "1").unwrap();
        assert_eq!((watched.look(), watched.look()), (Ok(Some(1)), Ok(None)));
    }

    #[test]
    fn a_file_of_absurd_size_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("number");
        File::create(&path).unwrap().set_len(MAX_WATCHED_BYTES + 1).unwrap();
        let error = Watched::open("number", vec![path], number).unwrap_err().to_string();
        assert!(error.contains(&MAX_WATCHED_BYTES.to_string()), "{error}");
    }
}
