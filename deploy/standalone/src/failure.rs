//! What ends the program: one line for the person who started it, and an exit code.

use std::fmt;
use std::path::Path;

/// A failure of the command as a whole.
#[derive(Debug)]
pub struct Failure {
    message: String,
    /// 1: the command ran and failed; 2: it was called or configured wrongly.
    pub exit_code: u8,
}

// === impl Failure ===

impl Failure {
    /// The command was called wrongly.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), exit_code: 2 }
    }

    /// A file says something wrong.
    pub fn config(path: &Path, problem: &str) -> Self {
        Self::usage(format!("{}: {}", path.display(), problem.trim().replace('\n', " ")))
    }

    /// A file cannot be read.
    pub fn unreadable(path: &Path, error: &std::io::Error) -> Self {
        Self::usage(format!("cannot read {}: {error}", path.display()))
    }

    /// Something went wrong while the command ran.
    pub fn run(error: impl fmt::Display) -> Self {
        Self { message: error.to_string(), exit_code: 1 }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
