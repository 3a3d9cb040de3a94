//! Hostile messages are refused in constant memory: a counting allocator watches the decoder and the source.

// A global allocator cannot be written without unsafe code; this one only counts and hands on to the system's.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use kvatlas_proto::InstanceId;
use kvatlas_shim::adapter::Adapter as _;
use kvatlas_shim::adapter::vllm::Vllm;
use kvatlas_shim::event::{Batch, MAX_BATCH_EVENTS, MAX_BATCH_EXTRAS, MAX_BATCH_HASHES, MAX_BATCH_TOKENS};
use kvatlas_shim::source::{Live, Source, SourceConfig};

/// What refusing a message may take, bytes: the error's own bookkeeping.
const REFUSAL_BYTES: usize = 4 << 10;

/// Counts what the current thread allocates; tests run in threads of their own.
struct Counting;

thread_local! {
    /// Bytes asked for since the start, ever. Memory that is given back still counts.
    static TAKEN: Cell<usize> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// === impl Counting ===

// Safety: every call is handed to the system's allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        TAKEN.set(TAKEN.get() + layout.size());
        // Safety: the caller's promises about `layout` are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // Safety: `memory` came from the system's allocator with this layout.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Bytes that `work` allocates.
fn taken<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = TAKEN.get();
    let result = work();
    (result, TAKEN.get() - before)
}

/// `[time, events, ...]` with these bytes in place of the events.
fn message(events: &[&[u8]]) -> Vec<u8> {
    let time = [0x93, 0xcb, 0x41, 0xda, 0xbf, 0, 0, 0, 0, 0];
    [&time[..], &events.concat()].concat()
}

/// A message of one stored event in map form, which ends with this field's value.
fn field(name: &str, value: &[u8]) -> Vec<u8> {
    let text = |text: &str| [&[0xa0 | text.len() as u8][..], text.as_bytes()].concat();
    message(&[&[0x91, 0x82], &text("type"), &text("BlockStored"), &text(name), value])
}

/// An array's or text's head with a 32-bit length.
fn claim(marker: u8, length: u32) -> Vec<u8> {
    [&[marker][..], &length.to_be_bytes()].concat()
}

const ARRAY: u8 = 0xdd;
const MAP: u8 = 0xdf;
const TEXT: u8 = 0xdb;
const BYTES: u8 = 0xc6;
const FIELDS: [&str; 10] = [
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "medium",
    "lora_name",
    "extra_keys",
    "kv_cache_spec_kind",
    "cache_salt",
    "lookahead_token_ids",
    "something_new",
];

/// Hostile messages with their names.
fn hostile() -> Vec<(String, Vec<u8>)> {
    let mut messages = Vec::new();
    let nested = [("arrays", vec![0x91; 1 << 20]), ("maps", [0x81, 0xa1, b'a'].repeat(1 << 20))];
    for (what, deep) in &nested {
        messages.push((format!("a million nested {what} as the message"), deep.clone()));
        messages.push((format!("a million nested {what} as the events"), message(&[deep])));
        messages.push((format!("a million nested {what} as an event"), message(&[&[0x91], deep])));
        for name in FIELDS {
            messages.push((format!("a million nested {what} as {name}"), field(name, deep)));
        }
        messages.push((
            format!("a million nested {what} as a token"),
            field("token_ids", &prefixed(&[0x91], deep)),
        ));
        messages.push((
            format!("a million nested {what} as an extra key"),
            field("extra_keys", &prefixed(&[0x91, 0x91], deep)),
        ));
    }
    let lengths = [("array", ARRAY), ("map", MAP), ("text", TEXT), ("byte string", BYTES)];
    for (what, marker) in lengths {
        let huge = claim(marker, u32::MAX);
        messages.push((format!("4 Gi {what} as the message"), huge.clone()));
        messages.push((format!("4 Gi {what} as the events"), message(&[&huge])));
        messages.push((format!("4 Gi {what} as an event"), message(&[&[0x91], &huge])));
        for name in FIELDS {
            messages.push((format!("4 Gi {what} as {name}"), field(name, &huge)));
        }
        messages.push((
            format!("4 Gi {what} as an extra key"),
            field("extra_keys", &prefixed(&[0x91, 0x91], &huge)),
        ));
    }
    // Lists that the message does hold, a byte per element, each far larger once decoded.
    let lists = [
        ("block_hashes", &[][..], MAX_BATCH_HASHES, 0u8),
        ("token_ids", &[], MAX_BATCH_TOKENS, 0),
        ("lookahead_token_ids", &[0x91], MAX_BATCH_TOKENS, 0),
        ("extra_keys", &[0x91], MAX_BATCH_EXTRAS, 0xc0),
    ];
    for (name, head, max, element) in lists {
        let list = [head, &claim(ARRAY, max as u32 + 1), &vec![element; max + 1]].concat();
        messages.push((format!("{} elements of {name}", max + 1), field(name, &list)));
    }
    let events = MAX_BATCH_EVENTS + 1;
    let many = message(&[&claim(ARRAY, events as u32), &vec![0x90; events]]);
    messages.push((format!("{events} events"), many));
    messages
}

fn prefixed(head: &[u8], rest: &[u8]) -> Vec<u8> {
    [head, rest].concat()
}

#[test]
fn hostile_messages_are_refused_in_constant_memory() {
    for (name, message) in hostile() {
        let mut batch = Batch::default();
        let (decoded, bytes) = taken(|| Vllm.decode(&message, &mut batch));
        assert!(decoded.is_err(), "{name} was accepted");
        assert!(bytes <= REFUSAL_BYTES, "{name}: {bytes} bytes for a message of {}", message.len());
    }
}

#[test]
fn a_source_spends_a_hostile_message_s_sequence_and_no_memory() {
    let config = SourceConfig::new("m", InstanceId::new("a:1").unwrap());
    let mut source = Source::new(config, 1).unwrap();
    // The first message makes room for the fingerprints of all.
    source.live(0, b"", false);
    for (seq, (name, message)) in (1..).zip(hostile()) {
        let (live, bytes) = taken(|| source.live(seq, &message, false));
        assert_eq!((live, source.last_engine_seq()), (Live::Done, Some(seq)));
        assert!(bytes <= REFUSAL_BYTES, "{name}: {bytes} bytes for a message of {}", message.len());
    }
    assert_eq!((source.counts().messages, source.mirror().visible_blocks()), (0, 0));
}
