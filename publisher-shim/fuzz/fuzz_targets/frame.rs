//! Any bytes as a frame: parsing never panics, and a frame that is accepted can be read whole and says the same once
//! encoded again.
//!
//! The bytes are tried as they are, and as a body behind a right preamble: no mutation gets past the checksum.

#![no_main]

use kvatlas_proto::frame::{Change, FRAME_VERSION, FrameView, OpBuffer};
use libfuzzer_sys::fuzz_target;
use xxhash_rust::xxh3::xxh3_64;

fuzz_target!(|bytes: &[u8]| {
    read(bytes);
    let mut frame = b"KVAF".to_vec();
    frame.extend_from_slice(&FRAME_VERSION.to_le_bytes());
    frame.extend_from_slice(&[0; 2]);
    frame.extend_from_slice(&xxh3_64(bytes).to_le_bytes());
    frame.extend_from_slice(bytes);
    read(&frame);
});

fn read(frame: &[u8]) {
    let Ok(view) = FrameView::parse(frame) else { return };
    let said = flatten(&view);
    assert!(said.len() <= frame.len(), "more changes than bytes");
    let mut ops = OpBuffer::default();
    for op in view.ops() {
        let owner = u8::try_from(op.owner).expect("a frame has at most 256 owners");
        match op.change {
            Change::Stored { mut parent, keys } => {
                for key in keys.iter() {
                    ops.stored(owner, parent, key);
                    parent = key;
                }
            }
            Change::Removed(keys) => keys.iter().for_each(|key| ops.removed(owner, key)),
            Change::Cleared => ops.cleared(owner),
            Change::Bucket { slice, blocks } => ops.bucket(owner, slice, blocks.iter()),
        }
    }
    let again = view.header().encode(&mut ops).expect("it was a frame before");
    let again = FrameView::parse(&again).expect("an encoded frame is valid");
    assert_eq!(again.header(), view.header());
    assert_eq!(flatten(&again), said);
}

/// Every change by itself, however they are grouped: kind, owner, parent, key.
fn flatten(view: &FrameView<'_>) -> Vec<(u8, usize, u64, u64)> {
    let mut changes = Vec::new();
    for op in view.ops() {
        assert!(op.owner < view.header().owners.len());
        match op.change {
            Change::Stored { mut parent, keys } => {
                for key in keys.iter() {
                    changes.push((0, op.owner, parent.0, key.0));
                    parent = key;
                }
            }
            Change::Removed(keys) => changes.extend(keys.iter().map(|key| (1, op.owner, 0, key.0))),
            Change::Cleared => changes.push((2, op.owner, 0, 0)),
            Change::Bucket { slice, blocks } => {
                changes.push((3, op.owner, slice.into(), blocks.len() as u64));
                changes.extend(blocks.iter().map(|(parent, key)| (4, op.owner, parent.0, key.0)));
            }
        }
    }
    changes
}
