use proptest::prelude::*;

use super::*;

fn header(owners: usize) -> FrameHeader {
    let owner = |i: usize| FrameOwner {
        tier: Tier::ALL[i % 5],
        medium: format!("MEDIUM{i}"),
        group: CacheGroup(i as u16),
        kind: match i % 4 {
            0 => GroupKind::Full,
            1 => GroupKind::SlidingWindow { window_tokens: 64, block_tokens: 16 },
            2 => GroupKind::State { block_tokens: 64 },
            _ => GroupKind::Unknown,
        },
        load_blocks: 1 + i as u32 % 3,
    };
    FrameHeader {
        scope: Scope::new("meta-llama/Llama-3.1-8B", "", 16, 1).unwrap(),
        source: SourceId { instance: InstanceId::new("10.0.0.7:8000").unwrap(), rank: DpRank(3) },
        shard: ShardId::new(5, 64).unwrap(),
        variant: KeyVariant::default(),
        epoch: Epoch(1_795_168_931_869_788_000),
        seq: FrameSeq(7),
        part: FramePart::Live,
        health: SourceHealth::Exact,
        engine_time_ns: 5,
        owners: (0..owners).map(owner).collect(),
        digests: Vec::new(),
        reply: None,
    }
}

/// (kind, owner, parent, keys), the readable form the tests compare.
type Plain = (u8, usize, u64, Vec<u64>);

fn plain(view: &FrameView<'_>) -> Vec<Plain> {
    view.ops()
        .map(|op| match op.change {
            Change::Stored { parent, keys } => (0, op.owner, parent.0, keys.iter().map(|k| k.0).collect()),
            Change::Removed(keys) => (1, op.owner, 0, keys.iter().map(|k| k.0).collect()),
            Change::Cleared => (2, op.owner, 0, vec![]),
            Change::Bucket { slice, blocks } => (
                3,
                op.owner,
                slice.into(),
                blocks.iter().flat_map(|(parent, key)| [parent.0, key.0]).collect(),
            ),
        })
        .collect()
}

#[test]
fn consecutive_stores_of_one_chain_become_one_operation() {
    let mut ops = OpBuffer::default();
    ops.stored(0, BlockKey(1), BlockKey(2));
    ops.stored(0, BlockKey(2), BlockKey(3));
    ops.stored(1, BlockKey(3), BlockKey(4));
    ops.removed(0, BlockKey(3));
    ops.removed(0, BlockKey(2));
    ops.cleared(1);
    let bytes = header(2).encode(&mut ops).unwrap();
    assert!(ops.is_empty());
    let view = FrameView::parse(&bytes).unwrap();
    assert_eq!(view.header(), &header(2));
    assert_eq!(
        plain(&view),
        [(0, 0, 1, vec![2, 3]), (0, 1, 3, vec![4]), (1, 0, 0, vec![3, 2]), (2, 1, 0, vec![])]
    );
}

#[test]
fn a_stored_block_of_a_run_costs_about_eight_bytes() {
    let mut ops = OpBuffer::default();
    for key in 0..10_000u64 {
        ops.stored(0, BlockKey(key), BlockKey(key + 1));
    }
    let bytes = header(1).encode(&mut ops).unwrap();
    assert!(bytes.len() < 10_000 * 8 + 300, "{}", bytes.len());
}

#[test]
fn chunks_add_up_to_the_whole_in_order() {
    let mut ops = OpBuffer::default();
    for key in 0..1_000u64 {
        ops.stored(0, BlockKey(key), BlockKey(key + 1));
    }
    ops.cleared(1);
    (0..500).for_each(|key| ops.removed(1, BlockKey(key)));
    ops.stored(1, BlockKey(7), BlockKey(8));
    for max_bytes in [1, 40, 1_000, 1 << 20] {
        let (mut all, mut whole) = (Vec::new(), ops.clone());
        while !whole.is_empty() {
            let mut chunk = whole.take_chunk(max_bytes);
            let bytes = header(2).encode(&mut chunk).unwrap();
            assert!(bytes.len() < max_bytes + 400);
            all.extend(plain(&FrameView::parse(&bytes).unwrap()));
        }
        let mut stored = all.iter().filter(|op| op.0 == 0 && op.1 == 0);
        let mut next = 0;
        assert!(stored.all(|op| {
            let follows = op.2 == next && op.3[0] == next + 1;
            next = *op.3.last().unwrap();
            follows
        }));
        assert_eq!(next, 1_000);
        assert_eq!(
            all.iter().filter(|op| op.0 == 1).flat_map(|op| op.3.clone()).collect::<Vec<_>>(),
            (0..500).collect::<Vec<_>>()
        );
        assert_eq!(all.last().unwrap(), &(0, 1, 7, vec![8]));
    }
}

#[test]
fn frames_are_read_at_any_address() {
    let mut ops = OpBuffer::default();
    ops.stored(0, BlockKey(1), BlockKey(2));
    let bytes = header(1).encode(&mut ops).unwrap();
    for shift in 0..8 {
        let mut shifted = vec![0; shift];
        shifted.extend_from_slice(&bytes);
        assert!(FrameView::parse(&shifted[shift..]).is_ok());
    }
}

#[test]
fn a_frame_of_another_version_says_so() {
    let mut bytes = header(1).encode(&mut OpBuffer::default()).unwrap();
    bytes[4] = 9;
    assert!(matches!(
        FrameView::parse(&bytes),
        Err(ParseFrameError::Sealed(OpenError::Version { found: 9, .. }))
    ));
}

#[test]
fn operations_that_name_no_owner_are_refused() {
    let mut ops = OpBuffer::default();
    ops.stored(1, BlockKey(1), BlockKey(2));
    let bytes = header(1).encode(&mut ops).unwrap();
    assert!(matches!(FrameView::parse(&bytes), Err(ParseFrameError::Inconsistent(_))));
}

#[test]
fn an_oversized_frame_is_an_error_of_the_sender() {
    let mut ops = OpBuffer::default();
    for key in 0..(MAX_FRAME_BYTES as u64 / 8) {
        ops.removed(0, BlockKey(key));
    }
    assert!(matches!(header(1).encode(&mut ops), Err(EncodeFrameError::TooLarge(_))));
}

proptest! {
    #[test]
    fn frames_round_trip(
        script in proptest::collection::vec((0u8..3, 0u8..4, 0u64..6, 1u64..6), 0..60),
    ) {
        let mut ops = OpBuffer::default();
        let mut expected: Vec<Plain> = Vec::new();
        for (kind, owner, parent, key) in script {
            let (owner_index, last) = (usize::from(owner), expected.last_mut());
            match kind {
                0 => {
                    ops.stored(owner, BlockKey(parent), BlockKey(key));
                    match last {
                        Some(l) if l.0 == 0 && l.1 == owner_index && l.3.last() == Some(&parent) => l.3.push(key),
                        _ => expected.push((0, owner_index, parent, vec![key])),
                    }
                }
                1 => {
                    ops.removed(owner, BlockKey(key));
                    match last {
                        Some(l) if l.0 == 1 && l.1 == owner_index => l.3.push(key),
                        _ => expected.push((1, owner_index, 0, vec![key])),
                    }
                }
                _ => {
                    ops.cleared(owner);
                    expected.push((2, owner_index, 0, vec![]));
                }
            }
        }
        let bytes = header(4).encode(&mut ops).unwrap();
        let view = FrameView::parse(&bytes).unwrap();
        prop_assert_eq!(plain(&view), expected);
    }

    #[test]
    fn damaged_frames_are_refused_without_panic(at in any::<proptest::sample::Index>(), bit in 0u8..8) {
        let mut ops = OpBuffer::default();
        ops.stored(0, BlockKey(1), BlockKey(2));
        let mut bytes = header(2).encode(&mut ops).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        // The reserved bytes are the only ones a reader ignores.
        prop_assert_eq!(FrameView::parse(&bytes).is_ok(), (6..8).contains(&at));
    }

    #[test]
    fn any_bytes_behind_a_correct_preamble_are_refused_without_panic(
        body in proptest::collection::vec(any::<u8>(), 0..400),
    ) {
        let mut bytes = Vec::from(*b"KVAF");
        bytes.extend_from_slice(&FRAME_VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&xxhash_rust::xxh3::xxh3_64(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
        let _ = FrameView::parse(&bytes);
    }
}

#[test]
fn digests_and_the_slices_of_an_answer_survive_the_wire() {
    let mut header = header(2);
    header.part = FramePart::Repair;
    header.digests = vec![Digest::of([BlockKey(5)]), Digest::default()];
    header.reply = Some(ReplyPart { request: RequestId(8), piece: 1, pieces: 3 });
    let mut ops = OpBuffer::default();
    ops.bucket(1, 9, [(BlockKey(1), BlockKey(2)), (BlockKey(7), BlockKey(8))]);
    ops.bucket(0, 3, []);
    ops.stored(0, BlockKey(2), BlockKey(3));
    let bytes = header.encode(&mut ops).unwrap();
    let view = FrameView::parse(&bytes).unwrap();
    assert_eq!(view.header(), &header);
    assert_eq!(plain(&view), [(3, 1, 9, vec![1, 2, 7, 8]), (3, 0, 3, vec![]), (0, 0, 2, vec![3])]);
}

#[test]
fn parts_and_their_contents_must_fit_together() {
    let encode = |change: &dyn Fn(&mut FrameHeader, &mut OpBuffer)| {
        let (mut header, mut ops) = (header(1), OpBuffer::default());
        change(&mut header, &mut ops);
        FrameView::parse(&header.encode(&mut ops).unwrap()).is_ok()
    };
    assert!(!encode(&|_, ops| ops.bucket(0, 0, [])), "a slice outside an answer");
    assert!(!encode(&|header, _| header.part = FramePart::Repair), "an answer to nothing");
    assert!(!encode(&|header, _| header.part = FramePart::Start), "a start at sequence 7");
    assert!(!encode(&|header, _| header.digests = vec![Digest::default(); 2]), "more digests than owners");
    let start = |header: &mut FrameHeader| (header.part, header.seq) = (FramePart::Start, FrameSeq(0));
    assert!(encode(&|header, _| start(header)));
    assert!(
        !encode(&|header, ops| {
            start(header);
            ops.cleared(0);
        }),
        "a start with changes"
    );
}
