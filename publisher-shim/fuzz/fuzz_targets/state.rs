//! Any bytes as a saved state: restoring never panics, and a state that is accepted makes a source that works: it publishes
//! what it holds, goes on with the engine, and says the same once saved again.
//!
//! The bytes are tried as they are, and as a body behind a right preamble: no mutation gets past the checksum.

#![no_main]

use bytes::Bytes;
use kvatlas_proto::frame::FrameView;
use kvatlas_proto::{InstanceId, Partition};
use kvatlas_shim::mirror::MirrorLimits;
use kvatlas_shim::source::{Source, SourceConfig};
use kvatlas_shim::state::STATE_VERSION;
use libfuzzer_sys::fuzz_target;
use xxhash_rust::xxh3::xxh3_64;

/// Block sizes that are configured (the engine's, and one that takes two of the recorded engines' pages) and numbers of shards.
const SETTINGS: [(Option<u32>, u32); 3] = [(None, 1), (Some(32), 1), (None, 3)];
/// Bounds that a short input reaches.
const HASHES: usize = 512;
const UNRESOLVED: usize = 16;
const GHOSTS: usize = 16;

fuzz_target!(|bytes: &[u8]| {
    let mut state = b"KVAS".to_vec();
    state.extend_from_slice(&STATE_VERSION.to_le_bytes());
    state.extend_from_slice(&[0; 2]);
    state.extend_from_slice(&xxh3_64(bytes).to_le_bytes());
    state.extend_from_slice(bytes);
    for (block_size, shards) in SETTINGS {
        restore(bytes, block_size, shards);
        restore(&state, block_size, shards);
    }
});

fn config(block_size: Option<u32>, shards: u32) -> SourceConfig {
    let partition = Partition::new(shards).expect("a few shards");
    let instance = InstanceId::new("a:1").expect("a plain name");
    let limits =
        MirrorLimits { hashes: HASHES, unresolved: UNRESOLVED, ghosts: GHOSTS, ..MirrorLimits::default() };
    SourceConfig { block_size, partition, has_replay: true, limits, ..SourceConfig::new("m", instance) }
}

fn restore(state: &[u8], block_size: Option<u32>, shards: u32) {
    let config = || config(block_size, shards);
    let Ok(mut source) = Source::restore(config(), state, 5) else { return };
    assert!(source.take_frames(6, true).expect("nothing is said yet").is_empty() || !source.is_unproved());
    // An engine that has published nothing is another one.
    let mut other = Source::restore(config(), state, 5).expect("it was accepted before");
    other.connected();
    other.replayed(0, &[]);
    assert!(other.last_engine_seq().is_none() && !other.is_unproved());
    // A message that nobody can compare with anything, then an honest one.
    for (seq, payload) in [(source.last_engine_seq().unwrap_or(0), &b"\x93"[..]), (0, MESSAGE)] {
        source.connected();
        source.replayed(0, &[(seq, Bytes::copy_from_slice(payload))]);
        source.live(seq, payload, true);
        for frame in source.take_frames(7, true).expect("frames are split to fit") {
            FrameView::parse(&frame.frame).expect("what the source publishes is a frame");
        }
    }
    if let Some(again) = source.save().expect("a state can be saved") {
        let restored = Source::restore(config(), &again, 8).expect("what was saved can be restored");
        for shard in source.partition().all() {
            assert_eq!(restored.mirror().digests(shard), source.mirror().digests(shard));
        }
    }
}

/// `[1, [["BlockStored", [7], nil, [1, 2, 3, 4], 4, nil]]]`
const MESSAGE: &[u8] = b"\x92\x01\x91\x96\xabBlockStored\x91\x07\xc0\x94\x01\x02\x03\x04\x04\xc0";
