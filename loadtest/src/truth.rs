//! What an engine really held at the checkpoints of a recording: its own block table, and its own answers to probe
//! prompts. The recorder read both from the engine's memory, so they are what an index is judged by.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kvatlas_proto::keys::{MultimodalItem, PromptExtras};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::stored::{ReadFileError, read_file};

/// Largest truth file that is read, decompressed bytes. The largest of ours is 2 MB.
pub const MAX_TRUTH_BYTES: u64 = 256 << 20;

/// Endings of a truth file, in the order they are looked for.
const ENDINGS: [&str; 3] = [".truth.json", ".truth.json.zst", ".truth.json.gz"];

/// Endings of a list of expected messages, in the order they are looked for.
const EXPECTED_ENDINGS: [&str; 3] = [".expected.json", ".expected.json.zst", ".expected.json.gz"];

/// A truth file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Truth {
    /// Engine that was recorded.
    pub engine: String,
    /// Its version.
    pub engine_version: String,
    /// Prompts that were looked up at checkpoints.
    pub probes: Vec<Probe>,
    /// States, in the order of the recording's markers.
    pub checkpoints: Vec<Checkpoint>,
    /// Everything else, unchanged.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// A prompt that was looked up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// Its index in [`Truth::probes`].
    pub id: usize,
    /// The prompt.
    pub token_ids: Vec<u32>,
    /// LoRA adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<ProbeLora>,
    /// Cache salt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_salt: Option<String>,
    /// Multimodal items in prompt order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mm: Vec<ProbeItem>,
    /// A namespace of SGLang's that its events do not carry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extra_key: Option<String>,
}

/// A LoRA adapter as the engine knows it. Events carry the name and id, never the path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeLora {
    /// Name that requests use.
    pub name: String,
    /// The engine's number for it.
    pub id: i64,
    /// Where its weights come from.
    pub path: String,
}

/// A multimodal item of a probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeItem {
    /// The processed item's identifier.
    pub identifier: String,
    /// First placeholder token.
    pub offset: u32,
    /// Number of placeholder tokens.
    pub length: u32,
}

/// The state of one stream's engine at one moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Which stream.
    pub stream: u8,
    /// Last sequence number before it.
    pub after_seq: u64,
    /// What happened, for a person.
    #[serde(default)]
    pub note: String,
    /// Medium (`GPU`, `CPU`, `STORAGE`) to cache group (as text) to what is held there.
    pub tiers: BTreeMap<String, BTreeMap<String, HeldBlocks>>,
    /// Answers to probes.
    pub probes: Vec<ProbeAnswer>,
}

/// The blocks of one medium and cache group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldBlocks {
    /// Number of distinct hashes.
    pub count: usize,
    /// The hashes in lower-case hexadecimal, sorted: 16 digits for integers, two per byte for byte strings.
    pub hashes: Vec<String>,
    /// Hashes that are held in more than one physical block, and in how many.
    pub copies_gt1: BTreeMap<String, u32>,
}

/// The engine's answer to a probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeAnswer {
    /// Index in [`Truth::probes`].
    pub probe: usize,
    /// Longest cached prefix, tokens.
    pub max_hit_tokens: u32,
    /// What the engine would reuse: for vLLM at most the prompt's length less one.
    pub engine_hit_tokens: u32,
    /// Prefix held in the CPU or disk tier alone, tokens. Only where a connector was used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_prefix_tokens: Option<u32>,
}

/// Why a truth file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadTruthError {
    /// The file could not be read.
    #[error(transparent)]
    File(#[from] ReadFileError),
    /// It is not a truth file.
    #[error("{path} is not a usable truth file: {source}", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Where it differs.
        source: serde_json::Error,
    },
}

/// A recording has no truth file beside it.
#[derive(Debug, thiserror::Error)]
#[error(
    "{recording} has no truth file beside it; put NAME.truth.json (or .zst, .gz) into the same folder as NAME.kvrec",
    recording = recording.display()
)]
pub struct NoTruthError {
    recording: PathBuf,
}

/// What the messages of a recording of wire formats are: usable, or to be refused.
#[derive(Clone, Debug, Deserialize)]
pub struct ExpectedMessages {
    messages: Vec<ExpectedMessage>,
}

#[derive(Clone, Debug, Deserialize)]
struct ExpectedMessage {
    stream: usize,
    ok: bool,
}

/// The truth file beside a recording.
pub fn find_truth(recording: &Path) -> Result<PathBuf, NoTruthError> {
    beside(recording, &ENDINGS).ok_or_else(|| NoTruthError { recording: recording.to_owned() })
}

/// The first file beside a recording that has its name with one of these endings.
fn beside(recording: &Path, endings: &[&str]) -> Option<PathBuf> {
    let name = recording.file_name().unwrap_or_default().to_string_lossy();
    let stem = [".zst", ".gz"].iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(&name);
    let stem = stem.strip_suffix(".kvrec").unwrap_or(stem);
    let candidates = endings.iter().map(|ending| recording.with_file_name(format!("{stem}{ending}")));
    candidates.into_iter().find(|path| path.is_file())
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ReadTruthError> {
    let content = read_file(path, MAX_TRUTH_BYTES)?;
    serde_json::from_slice(&content)
        .map_err(|source| ReadTruthError::Format { path: path.to_owned(), source })
}

// === impl Truth ===

impl Truth {
    /// Reads a truth file: plain, gzip or zstd.
    pub fn read(path: &Path) -> Result<Self, ReadTruthError> {
        read_json(path)
    }
}

// === impl ExpectedMessages ===

impl ExpectedMessages {
    /// The list beside a recording, if there is one.
    pub fn beside(recording: &Path) -> Result<Option<Self>, ReadTruthError> {
        beside(recording, &EXPECTED_ENDINGS).map(|path| read_json(&path)).transpose()
    }

    /// How many messages of a stream are usable, and how many are to be refused.
    pub fn of_stream(&self, stream: usize) -> (u64, u64) {
        let count = |ok| self.messages.iter().filter(|m| m.stream == stream && m.ok == ok).count() as u64;
        (count(true), count(false))
    }
}

// === impl Probe ===

impl Probe {
    /// What the prompt carries beside its tokens, as a query would say it.
    pub fn extras(&self) -> PromptExtras {
        PromptExtras {
            // SGLang's extra key names an adapter; that its events leave it out is not for the query to know.
            lora_name: self.lora.as_ref().map(|lora| lora.name.clone()).or_else(|| self.extra_key.clone()),
            cache_salt: self.cache_salt.clone(),
            multimodal: self
                .mm
                .iter()
                .map(|item| MultimodalItem {
                    identifier: item.identifier.clone(),
                    offset: item.offset,
                    length: item.length,
                })
                .collect(),
        }
    }
}

// === impl HeldBlocks ===

impl HeldBlocks {
    /// Every hash with the number of physical blocks that hold it.
    pub fn copies(&self) -> impl Iterator<Item = (&str, u32)> {
        self.hashes.iter().map(|hash| (hash.as_str(), self.copies_gt1.get(hash).copied().unwrap_or(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvrec::{Marker, Recording};

    fn fixtures() -> Vec<PathBuf> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.to_string_lossy().ends_with(".kvrec.zst"))
            .collect();
        paths.sort();
        paths
    }

    #[test]
    fn every_engine_recording_has_a_truth_whose_checkpoints_its_markers_name_in_order() {
        let mut engines = 0;
        for path in fixtures() {
            let recording = Recording::read(&path).unwrap();
            if recording.header.engine == "synthetic" {
                assert!(find_truth(&path).is_err());
                continue;
            }
            engines += 1;
            let truth = Truth::read(&find_truth(&path).unwrap()).unwrap();
            let markers: Vec<_> = recording
                .records
                .iter()
                .filter_map(|record| match record.marker()? {
                    Marker::Checkpoint { index, after_seq, .. } => Some((index, record.stream, after_seq)),
                    _ => None,
                })
                .collect();
            let checkpoints: Vec<_> =
                truth.checkpoints.iter().enumerate().map(|(i, c)| (i, c.stream, c.after_seq)).collect();
            assert_eq!(markers, checkpoints, "{}", path.display());
            for held in truth.checkpoints.iter().flat_map(|c| c.tiers.values()).flat_map(BTreeMap::values) {
                assert_eq!(held.count, held.hashes.len());
                assert!(held.copies_gt1.keys().all(|hash| held.hashes.binary_search(hash).is_ok()));
            }
            for answer in truth.checkpoints.iter().flat_map(|c| &c.probes) {
                let probe = &truth.probes[answer.probe];
                assert_eq!(probe.id, answer.probe);
                assert!(answer.max_hit_tokens as usize <= probe.token_ids.len());
            }
        }
        assert_eq!(engines, 44);
    }

    #[test]
    fn a_recording_without_truth_is_named() {
        let error = find_truth(Path::new("/nowhere/a.kvrec.zst")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/a.kvrec.zst"));
    }

    #[test]
    fn a_truth_file_of_another_shape_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.truth.json");
        std::fs::write(&path, "{}").unwrap();
        assert!(Truth::read(&path).unwrap_err().to_string().contains("x.truth.json"));
    }
}
