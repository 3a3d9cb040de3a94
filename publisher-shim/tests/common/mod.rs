//! Builds vLLM messages with the generic `rmpv` encoder, and a naive engine to compare the mirror with.

#![allow(dead_code, unreachable_pub)]

use kvatlas_proto::frame::{Change, FrameView};
use rmpv::Value;

/// A `BlockStored` event under construction.
#[derive(Clone, Debug)]
pub struct StoredEvent {
    pub hashes: Vec<u64>,
    pub parent: Option<u64>,
    pub tokens: Vec<u32>,
    pub block_size: u32,
    pub medium: Option<&'static str>,
    pub group: Option<u32>,
    pub kind: Option<&'static str>,
    pub window: Option<u32>,
}

impl Default for StoredEvent {
    fn default() -> Self {
        Self {
            hashes: vec![],
            parent: None,
            tokens: vec![],
            block_size: 4,
            medium: Some("GPU"),
            group: None,
            kind: None,
            window: None,
        }
    }
}

impl StoredEvent {
    /// The map form (vLLM from 0.24).
    pub fn map(&self) -> Value {
        let mut pairs = vec![
            ("type", Value::from("BlockStored")),
            ("block_hashes", integers(&self.hashes)),
            ("parent_block_hash", self.parent.map_or(Value::Nil, Value::from)),
            ("token_ids", Value::Array(self.tokens.iter().map(|&t| t.into()).collect())),
            ("block_size", self.block_size.into()),
            ("lora_id", Value::Nil),
            ("medium", self.medium.map_or(Value::Nil, Value::from)),
        ];
        if let Some(group) = self.group {
            pairs.push(("group_idx", group.into()));
        }
        if let Some(kind) = self.kind {
            pairs.push(("kv_cache_spec_kind", kind.into()));
        }
        if let Some(window) = self.window {
            pairs.push(("kv_cache_spec_sliding_window", window.into()));
        }
        map(pairs)
    }

    /// The array form (vLLM up to 0.23), up to and including `medium`.
    pub fn array(&self) -> Value {
        Value::Array(vec![
            "BlockStored".into(),
            integers(&self.hashes),
            self.parent.map_or(Value::Nil, Value::from),
            Value::Array(self.tokens.iter().map(|&t| t.into()).collect()),
            self.block_size.into(),
            Value::Nil,
            self.medium.map_or(Value::Nil, Value::from),
        ])
    }
}

pub fn removed(hashes: &[u64], medium: Option<&str>, group: Option<u32>) -> Value {
    let mut pairs = vec![
        ("type", Value::from("BlockRemoved")),
        ("block_hashes", integers(hashes)),
        ("medium", medium.map_or(Value::Nil, Value::from)),
    ];
    if let Some(group) = group {
        pairs.push(("group_idx", group.into()));
    }
    map(pairs)
}

pub fn cleared() -> Value {
    map(vec![("type", Value::from("AllBlocksCleared"))])
}

pub fn map(pairs: Vec<(&str, Value)>) -> Value {
    Value::Map(pairs.into_iter().map(|(key, value)| (key.into(), value)).collect())
}

fn integers(hashes: &[u64]) -> Value {
    Value::Array(hashes.iter().map(|&hash| hash.into()).collect())
}

/// `[time, events, rank]`, encoded.
pub fn batch(events: Vec<Value>) -> Vec<u8> {
    batch_at(1_795_168_931.5, events)
}

/// The same at another time, which makes it another message.
pub fn batch_at(time: f64, events: Vec<Value>) -> Vec<u8> {
    encode(&Value::Array(vec![time.into(), Value::Array(events), 0.into()]))
}

pub fn encode(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, value).unwrap();
    bytes
}

/// What a reader of all frames so far believes: owner -> keys. Checks sequences and epochs on the way.
#[derive(Debug, Default)]
pub struct Reader {
    pub held: std::collections::BTreeMap<(String, u16), std::collections::BTreeSet<u64>>,
    pub epoch: u64,
    pub next: u64,
    pub health: String,
    pub complete: bool,
}

impl Reader {
    pub fn read(&mut self, frame: &[u8]) {
        let view = FrameView::parse(frame).unwrap();
        let header = view.header();
        if header.epoch.0 != self.epoch {
            assert!(header.epoch.0 > self.epoch, "epochs only grow");
            *self = Self { epoch: header.epoch.0, ..Self::default() };
        }
        assert_eq!(header.seq.0, self.next, "frames are contiguous");
        self.next += 1;
        self.health = header.health.name().to_owned();
        self.complete |= header.part == kvatlas_proto::frame::FramePart::SnapshotEnd;
        for op in view.ops() {
            let owner = &header.owners[op.owner];
            let keys = self.held.entry((owner.medium.clone(), owner.group.0)).or_default();
            match op.change {
                Change::Stored { keys: run, .. } => {
                    for key in run.iter() {
                        assert!(keys.insert(key.0), "a visible block is not stored again");
                    }
                }
                Change::Removed(run) => {
                    for key in run.iter() {
                        assert!(keys.remove(&key.0), "only a visible block is removed");
                    }
                }
                Change::Cleared => keys.clear(),
            }
        }
        self.held.retain(|_, keys| !keys.is_empty());
    }
}
