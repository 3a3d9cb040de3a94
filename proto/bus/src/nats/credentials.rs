//! Secrets of a broker's client, from files, read anew whenever they are needed. Problems never quote what was read.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use nkeys::KeyPair;

use super::ConnectError;

/// Largest credentials, seed or password file. They are below a kilobyte or two; more is the wrong file.
const MAX_SECRET_BYTES: u64 = 64 * 1024;
/// What stands before the two parts of a credentials file.
const JWT_BEGINS: &str = "BEGIN NATS USER JWT";
const SEED_BEGINS: &str = "BEGIN USER NKEY SEED";

/// A file and what it is for.
#[derive(Clone, Copy)]
struct Secret<'a> {
    what: &'static str,
    path: &'a Path,
}

/// The password in a file, without the line end.
pub(super) fn password(path: &Path) -> Result<String, ConnectError> {
    let password = Secret { what: "password file", path }.read()?;
    Ok(password.trim_end().to_owned())
}

/// The public nkey of the seed in a file, and its signature of `nonce`.
pub(super) fn of_seed_file(path: &Path, nonce: &[u8]) -> Result<(String, Vec<u8>), ConnectError> {
    let secret = Secret { what: "nkey seed file", path };
    let key = secret.key(secret.read()?.trim())?;
    Ok((key.public_key(), secret.sign(&key, nonce)?))
}

/// The JWT of a credentials file, and the signature of `nonce` by its seed.
pub(super) fn of_credentials_file(path: &Path, nonce: &[u8]) -> Result<(String, Vec<u8>), ConnectError> {
    let secret = Secret { what: "credentials file", path };
    let text = secret.read()?;
    let (jwt, seed) = (after(&text, JWT_BEGINS), after(&text, SEED_BEGINS));
    let (Some(jwt), Some(seed)) = (jwt, seed) else {
        return Err(secret.refuse("it does not hold a user JWT and an nkey seed"));
    };
    let signature = secret.sign(&secret.key(seed)?, nonce)?;
    Ok((jwt.to_owned(), signature))
}

/// The line after the one that says what comes.
fn after<'a>(text: &'a str, begins: &str) -> Option<&'a str> {
    let mut lines = text.lines().skip_while(|line| !line.contains(begins)).skip(1).map(str::trim);
    lines.find(|line| !line.is_empty()).filter(|line| !line.starts_with('-'))
}

// === impl Secret ===

impl Secret<'_> {
    fn read(self) -> Result<String, ConnectError> {
        let mut text = String::new();
        let file = File::open(self.path).map_err(|error| self.refuse(&error.to_string()))?;
        let read = file.take(MAX_SECRET_BYTES + 1).read_to_string(&mut text);
        read.map_err(|error| self.refuse(&error.to_string()))?;
        if text.len() as u64 > MAX_SECRET_BYTES {
            return Err(self.refuse(&format!("it has more than {MAX_SECRET_BYTES} bytes")));
        }
        Ok(text)
    }

    fn key(self, seed: &str) -> Result<KeyPair, ConnectError> {
        // The library's words are left out: they could quote the seed.
        KeyPair::from_seed(seed).map_err(|_| self.refuse("it holds no usable nkey seed"))
    }

    fn sign(self, key: &KeyPair, nonce: &[u8]) -> Result<Vec<u8>, ConnectError> {
        key.sign(nonce).map_err(|_| self.refuse("its nkey cannot sign"))
    }

    fn refuse(self, reason: &str) -> ConnectError {
        ConnectError::File { what: self.what, path: self.path.to_owned(), reason: reason.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credentials_file_gives_its_jwt_and_a_signature_by_its_seed() {
        let key = KeyPair::new_user();
        let (folder, seed) = (tempfile::tempdir().unwrap(), key.seed().unwrap());
        let path = folder.path().join("user.creds");
        let text = format!(
            "-----BEGIN NATS USER JWT-----\r\neyJ0.e30.sig\r\n------END NATS USER JWT------\r\n\r\n\
             ************************* IMPORTANT *************************\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        );
        std::fs::write(&path, text).unwrap();
        let (jwt, signature) = of_credentials_file(&path, b"nonce").unwrap();
        assert_eq!(jwt, "eyJ0.e30.sig");
        assert!(key.verify(b"nonce", &signature).is_ok());
        std::fs::write(&path, "-----BEGIN NATS USER JWT-----\n------END NATS USER JWT------\n").unwrap();
        assert!(of_credentials_file(&path, b"nonce").is_err());
    }

    #[test]
    fn a_seed_that_is_none_is_not_quoted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seed");
        std::fs::write(&path, "hunter2").unwrap();
        let error = of_seed_file(&path, b"nonce").unwrap_err().to_string();
        assert!(error.contains("seed") && !error.contains("hunter2"), "{error}");
    }

    #[test]
    fn a_password_ends_before_the_line_end_and_a_huge_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        std::fs::write(&path, "a b\n").unwrap();
        assert_eq!(password(&path).unwrap(), "a b");
        File::create(&path).unwrap().set_len(MAX_SECRET_BYTES + 1).unwrap();
        assert!(password(&path).unwrap_err().to_string().contains("more than"));
    }
}
