//! Reads a file that may be plain, gzip or zstd, up to a stated size.
//!
//! The format is told by the first bytes, not by the name, so a renamed file still reads.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::StreamingDecoder;

/// First bytes of a gzip file (RFC 1952).
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// First bytes of a zstd frame (RFC 8878).
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Why a file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadFileError {
    /// It could not be opened or read.
    #[error("cannot read {path}: {source}; check that the file exists and is readable", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// It is compressed and damaged.
    #[error(
        "{path} is damaged after {offset} decompressed bytes: {source}; fetch or record the file again",
        path = path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Decompressed bytes before the damage.
        offset: u64,
        /// What the decompressor said.
        source: io::Error,
    },
    /// It is larger than the reader accepts.
    #[error("{path} holds more than {max_bytes} bytes decompressed; use a smaller file", path = path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit, decompressed bytes.
        max_bytes: u64,
    },
}

/// The decompressed content of `path`, at most `max_bytes`.
pub fn read_file(path: &Path, max_bytes: u64) -> Result<Vec<u8>, ReadFileError> {
    let unreadable = |source| ReadFileError::Io { path: path.to_owned(), source };
    let mut file = BufReader::new(File::open(path).map_err(unreadable)?);
    let start = file.fill_buf().map_err(unreadable)?;
    let (gzip, zstd) = (start.starts_with(&GZIP_MAGIC), start.starts_with(&ZSTD_MAGIC));

    let damaged = |offset, source| ReadFileError::Damaged { path: path.to_owned(), offset, source };
    let reader: Box<dyn Read> = if gzip {
        Box::new(MultiGzDecoder::new(file))
    } else if zstd {
        Box::new(StreamingDecoder::new(file).map_err(|error| damaged(0, io::Error::other(error)))?)
    } else {
        Box::new(file)
    };

    let mut content = Vec::new();
    // One byte more than allowed tells "exactly full" from "too large".
    let result = reader.take(max_bytes.saturating_add(1)).read_to_end(&mut content);
    match result {
        Err(source) if gzip || zstd => Err(damaged(content.len() as u64, source)),
        Err(source) => Err(unreadable(source)),
        Ok(_) if content.len() as u64 > max_bytes => {
            Err(ReadFileError::TooLarge { path: path.to_owned(), max_bytes })
        }
        Ok(_) => Ok(content),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn write(name: &str, content: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        (folder, path)
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(content: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(content, ruzstd::encoding::CompressionLevel::Fastest)
    }

    #[test]
    fn plain_gzip_and_zstd_read_the_same_whatever_the_name() {
        let content: Vec<u8> = (0..50_000u32).flat_map(u32::to_le_bytes).collect();
        for stored in [content.clone(), gzip(&content), zstd(&content)] {
            let (_folder, path) = write("any.name", &stored);
            assert_eq!(read_file(&path, 1 << 20).unwrap(), content);
        }
    }

    #[test]
    fn a_file_over_the_limit_is_refused_also_when_it_is_small_on_disk() {
        let content = vec![7; 10_000];
        for stored in [content.clone(), gzip(&content), zstd(&content)] {
            let (_folder, path) = write("x", &stored);
            assert!(read_file(&path, 10_000).is_ok());
            assert!(matches!(read_file(&path, 9_999), Err(ReadFileError::TooLarge { .. })));
        }
    }

    #[test]
    fn a_cut_compressed_file_names_the_file_and_the_offset() {
        let content: Vec<u8> = (0..50_000u32).flat_map(u32::to_le_bytes).collect();
        for stored in [gzip(&content), zstd(&content)] {
            let (_folder, path) = write("cut.bin", &stored[..stored.len() / 2]);
            let error = read_file(&path, 1 << 20).unwrap_err();
            assert!(matches!(error, ReadFileError::Damaged { .. }), "{error}");
            assert!(error.to_string().contains("cut.bin"), "{error}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read_file(Path::new("/nowhere/a.kvrec"), 10).unwrap_err();
        assert!(error.to_string().contains("/nowhere/a.kvrec"));
    }
}
