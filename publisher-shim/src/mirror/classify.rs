//! What engines' words mean: kinds of cache groups, media, extra keys.

use std::borrow::Cow;

use kvatlas_proto::ids::MAX_MEDIUM_BYTES;
use kvatlas_proto::{ExtraKey, GroupKind, Tier};

use crate::event::{Batch, ExtraValue, Stored};

/// What a cache group needs, from the engine's own word for it. Block sizes only grow: partial entries of a group
/// carry the smaller hash block size.
pub(super) fn classify_group(word: &str, event: &Stored, before: GroupKind) -> GroupKind {
    let larger = |known: u32| known.max(event.block_size);
    match (word, before) {
        ("", before) => before,
        ("full_attention" | "mla_attention" | "sink_full_attention", _) => GroupKind::Full,
        (
            "sliding_window" | "sliding_window_mla",
            GroupKind::SlidingWindow { window_tokens, block_tokens },
        ) => {
            let window_tokens = event.window_tokens.filter(|tokens| *tokens > 0).unwrap_or(window_tokens);
            GroupKind::SlidingWindow { window_tokens, block_tokens: larger(block_tokens) }
        }
        ("sliding_window" | "sliding_window_mla", _) => match event.window_tokens {
            Some(window_tokens) if window_tokens > 0 && event.block_size > 0 => {
                GroupKind::SlidingWindow { window_tokens, block_tokens: event.block_size }
            }
            _ => GroupKind::Unknown,
        },
        ("mamba", GroupKind::State { block_tokens }) => {
            GroupKind::State { block_tokens: larger(block_tokens) }
        }
        ("mamba", _) if event.block_size > 0 => GroupKind::State { block_tokens: event.block_size },
        _ => GroupKind::Unknown,
    }
}

/// Engines without tiers name no medium: that is device memory.
pub(super) fn canonical_medium(medium: &str) -> &str {
    if medium.is_empty() { "GPU" } else { medium }
}

/// Tier and kept name of a medium. Names as vLLM, SGLang and the stores behind their connectors spell them.
pub(super) fn classify_medium(medium: &str, remote: bool) -> (Tier, String) {
    let mut name = canonical_medium(medium).to_ascii_uppercase();
    if name.len() > MAX_MEDIUM_BYTES {
        let end = (0..=MAX_MEDIUM_BYTES).rev().find(|&at| name.is_char_boundary(at)).unwrap_or(0);
        name.truncate(end);
    }
    let tier = match name.as_str() {
        "GPU" => Tier::Gpu,
        "CPU" | "CPU_PINNED" if !remote => Tier::Cpu,
        "STORAGE" | "DISK" | "SSD" | "FS" if !remote => Tier::Ssd,
        "CPU" | "CPU_PINNED" | "STORAGE" | "DISK" | "SSD" | "FS" | "OBJ" | "SHARED_STORAGE" | "EXTERNAL"
        | "REMOTE" => Tier::Remote,
        _ => Tier::Unknown,
    };
    (tier, name)
}

/// The adapter of an event whose engine publishes no extra keys. Where only its number is known, it cannot match a
/// query by name: that under-reports rather than mixing adapters.
pub(super) fn unlisted_lora<'a>(batch: &'a Batch, event: &Stored) -> Option<Cow<'a, str>> {
    if event.extras.is_some() {
        return None;
    }
    match (batch.text(&event.lora_name), event.lora_id) {
        ("", None) => None,
        ("", Some(id)) => Some(Cow::Owned(format!("#id:{id}"))),
        (name, _) => Some(Cow::Borrowed(name)),
    }
}

/// The engine's untagged extra key in our terms: a bare string is the adapter's name if it equals it.
pub(super) fn extra_key<'a>(batch: &'a Batch, event: &Stored, value: &ExtraValue) -> ExtraKey<'a> {
    match value {
        ExtraValue::Text(span) => {
            let (text, lora) = (batch.text(span), batch.text(&event.lora_name));
            if !lora.is_empty() && text == lora { ExtraKey::Lora(text) } else { ExtraKey::Text(text) }
        }
        ExtraValue::Multimodal(span, offset) => {
            ExtraKey::Multimodal { identifier: batch.text(span), offset: *offset }
        }
        ExtraValue::Bytes(span) => ExtraKey::Bytes(batch.bytes(span)),
    }
}
