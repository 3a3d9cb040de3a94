//! Writes seeds for the shim's fuzz targets from recorded streams: `fuzz_seeds RECORDINGS OUT` makes `OUT/decode`,
//! `OUT/source`, `OUT/frame` and `OUT/state`. The inputs' forms are in the targets (`publisher-shim/fuzz/fuzz_targets`).

use std::collections::BTreeSet;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

use bytes::Bytes;
use kvatlas_loadtest::check;
use kvatlas_loadtest::kvrec::{RecordKind, Recording};
use kvatlas_proto::sealed::PREAMBLE_BYTES;
use kvatlas_proto::{InstanceId, Partition};
use kvatlas_shim::source::{Source, SourceConfig};

/// Largest seed, bytes: short inputs are mutated faster.
const SEED_BYTES: usize = 4_096;
/// Messages of each recording that become seeds of the decoder.
const PAYLOADS_EACH: usize = 2;
/// Messages after which the state is saved as a seed.
const STATE_MESSAGES: usize = 1;
/// The source's settings: block size from the engine, removals per copy, no replay, default bounds; the key space in one piece,
/// and cut.
const SETTINGS: [(&str, u8); 2] = [("whole", 0), ("cut", 16)];
/// Shards where the state of a cut key space is wanted, as in the target.
const SHARDS: u32 = 3;

fn main() -> Result<(), Box<dyn Error>> {
    let paths: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let [recordings, out] = paths.as_slice() else { return Err("usage: fuzz_seeds RECORDINGS OUT".into()) };
    for target in ["decode", "source", "frame", "state"] {
        fs::create_dir_all(out.join(target))?;
    }
    for path in check::recordings(recordings)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        write_seeds(&Recording::read(&path)?, &name, out)?;
    }
    Ok(())
}

fn write_seeds(recording: &Recording, name: &str, out: &Path) -> Result<(), Box<dyn Error>> {
    let payloads: Vec<&Bytes> = recording
        .records
        .iter()
        .filter(|record| record.kind == RecordKind::Live && record.stream == 0)
        .filter_map(|record| record.message().map(|message| message.payload))
        .filter(|payload| payload.len() <= SEED_BYTES)
        .collect();
    let mut whole = source(None, 1)?;
    // Two pages of most recorded engines make one of its blocks.
    let mut paged = source(Some(32), 1)?;
    let mut cut = source(None, SHARDS)?;
    let mut steps = Vec::new();
    let mut lengths = BTreeSet::new();
    for (seq, payload) in payloads.into_iter().enumerate() {
        // Messages of one length have one shape nearly always.
        if lengths.len() < PAYLOADS_EACH && lengths.insert(payload.len()) {
            fs::write(out.join("decode").join(format!("{name}-{seq}")), payload)?;
        }
        if steps.len() + payload.len() + 4 > SEED_BYTES {
            break;
        }
        steps.push(0);
        steps.extend_from_slice(&u16::try_from(payload.len())?.to_le_bytes());
        steps.extend_from_slice(payload);
        whole.live(seq as u64, payload, false);
        paged.live(seq as u64, payload, false);
        cut.live(seq as u64, payload, false);
        if seq == STATE_MESSAGES {
            for (kind, source) in [("blocks", &whole), ("pages", &paged), ("cut", &cut)] {
                if let Some(state) = source.save()? {
                    fs::write(out.join("state").join(format!("{name}-{kind}")), &state[PREAMBLE_BYTES..])?;
                }
            }
        }
    }
    for (kind, settings) in SETTINGS {
        fs::write(out.join("source").join(format!("{name}-{kind}")), [&[settings], &steps[..]].concat())?;
    }
    for outgoing in whole.take_frames(2, false)? {
        fs::write(out.join("frame").join(name), &outgoing.frame[PREAMBLE_BYTES..])?;
    }
    Ok(())
}

fn source(block_size: Option<u32>, shards: u32) -> Result<Source, Box<dyn Error>> {
    let partition = Partition::new(shards)?;
    let config = SourceConfig { block_size, partition, ..SourceConfig::new("m", InstanceId::new("a:1")?) };
    Ok(Source::new(config, 1)?)
}
