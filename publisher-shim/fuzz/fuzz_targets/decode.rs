//! Any bytes as an engine's message, for every adapter: decoding never panics, what it keeps is bounded by the message's length, and
//! everything in it can be read.

#![no_main]

use kvatlas_shim::adapter::{ADAPTERS, Adapter, detect};
use kvatlas_shim::event::{Batch, Event, ExtraValue, Stored};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|message: &[u8]| {
    let _ = detect(message);
    ADAPTERS.into_iter().for_each(|adapter| decode(adapter, message));
});

fn decode(adapter: &dyn Adapter, message: &[u8]) {
    let mut batch = Batch::default();
    let decoded = adapter.decode(message, &mut batch);
    // Refused messages too: their memory was taken before anybody knew.
    let kept = batch.hashes_end() + batch.tokens_end() + batch.extras_end();
    assert!(kept as usize <= message.len(), "{kept} items of a message of {} bytes", message.len());
    assert!(batch.events.len() + batch.unknown_events as usize <= message.len());
    if decoded.is_err() {
        return;
    }
    for event in &batch.events {
        match event {
            Event::Stored(stored) => read_stored(&batch, stored),
            Event::Removed(removed) => {
                batch.hashes(&removed.hashes);
                batch.text(&removed.medium);
            }
            Event::Cleared => {}
        }
    }
    // A reused batch says the same as a fresh one.
    let (first, time, rank) = (std::mem::take(&mut batch.events), batch.time_ns, batch.rank);
    adapter.decode(message, &mut batch).expect("it was decoded before");
    assert_eq!((first, time, rank), (batch.events, batch.time_ns, batch.rank));
}

fn read_stored(batch: &Batch, event: &Stored) {
    batch.tokens(&event.tokens);
    for block in 0..batch.hashes(&event.hashes).len() {
        event.lookahead_of(batch, block);
    }
    for span in [&event.medium, &event.lora_name, &event.cache_salt, &event.group_kind] {
        assert!(!batch.text(span).is_empty() || span.is_empty(), "text is valid UTF-8");
    }
    for extra in event.extras.iter().flat_map(|span| batch.extras(span)) {
        match &extra.value {
            ExtraValue::Text(span) | ExtraValue::Multimodal(span, _) => {
                assert!(!batch.text(span).is_empty() || span.is_empty(), "text is valid UTF-8");
            }
            ExtraValue::Bytes(span) => {
                batch.bytes(span);
            }
        }
    }
}
