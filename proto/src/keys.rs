//! Block keys: a 64-bit name for one block of token ids *and* everything before it.
//!
//! Definition, version 1 (`vectors/block_keys.json` has test vectors that every implementation passes):
//!
//! ```text
//! local_i = XXH3_64(tokens of block i as u32 little-endian ‖ extra keys of block i, seed)
//! root    = XXH3_64("kvatlas.v1.root", seed)
//! m0, m1  = XXH3_64("kvatlas.v1.mix0", seed), XXH3_64("kvatlas.v1.mix1", seed)
//! key_i   = fold(key_{i-1} ^ m0, local_i ^ m1) ^ rotl(key_{i-1}, 29)      with key_{-1} = root
//! fold(a, b) = low 64 bits of a*b ^ high 64 bits of a*b                   (64 x 64 -> 128 bit product)
//! ```
//!
//! Why this shape: locals do not depend on each other, so a prompt's blocks hash in parallel; only the cheap mix is
//! a chain (one multiply per block). The rotated term keeps the history of a chain alive in the one case in which a
//! factor of the product is zero. A partial block at the end of a prompt has no key.
//!
//! The seed belongs to the scope: [`KeySeed::PUBLISHED`] by default, a secret where tenants must not be able to
//! compute each other's keys ([`KeySeed::of_tenant`]). XXH3 is not a cryptographic hash: with the published seed, somebody who
//! can choose token ids can craft colliding blocks. With a secret seed nobody can who does not see keys; it has 64 bits and
//! XXH3 is no message authentication code, so whoever sees many keys of tokens of their choice may find it. Tenants never
//! depend on that: they are separate scopes, and keys of two scopes are never compared.

use bytemuck::cast_slice;
use ring::hmac;
use smallvec::SmallVec;
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

/// Version of the definition above. It is part of the scope, so keys of two versions never meet.
pub const KEY_VERSION: u16 = 1;

/// Chain key of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockKey(pub u64);

/// Hash of one block's own content, without what came before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LocalHash(pub u64);

/// Seed of a scope's keys.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KeySeed(u64);

/// Something beside the token ids that makes a block another block.
///
/// One encoding serves both directions: the shim fills these from an engine's event, the server from a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtraKey<'a> {
    /// LoRA adapter by name; on every block.
    Lora(&'a str),
    /// A multimodal item that overlaps the block, with its start relative to the block's start (tokens, may be
    /// negative). Engines that publish no offset use [`ExtraKey::Text`] instead.
    Multimodal {
        /// The processed item's identifier (a content hash).
        identifier: &'a str,
        /// Item start minus block start, tokens.
        offset: i64,
    },
    /// A cache salt (first block only), or a multimodal identifier without offset.
    Text(&'a str),
    /// An opaque digest, for example of prompt embeddings.
    Bytes(&'a [u8]),
    /// Token ids *after* the block that the engine's hash also covers (speculative decoding with EAGLE or MTP).
    Lookahead(&'a [u32]),
}

/// How one engine shapes its extra keys. Engines of one scope may differ, so it is a property of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyVariant {
    /// The engine publishes offsets of multimodal items (vLLM from 0.19).
    pub multimodal_offsets: bool,
    /// Tokens after the block that its hash covers; 0 for nearly every engine.
    pub lookahead_tokens: u8,
}

/// A multimodal item of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MultimodalItem {
    /// The processed item's identifier.
    pub identifier: String,
    /// First placeholder token, counted from the prompt's start.
    pub offset: u32,
    /// Number of placeholder tokens.
    pub length: u32,
}

/// What a prompt carries beside its token ids. The default (nothing) is the plain prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PromptExtras {
    /// LoRA adapter name.
    pub lora_name: Option<String>,
    /// Cache salt.
    pub cache_salt: Option<String>,
    /// Multimodal items in prompt order.
    pub multimodal: Vec<MultimodalItem>,
}

/// Computes keys with one seed.
#[derive(Clone, Copy)]
pub struct KeyHasher {
    seed: u64,
    root: BlockKey,
    mix0: u64,
    mix1: u64,
    /// XXH3's secret for blocks of [`COMMON_TOKENS`], with the seed worked in.
    secret: [u64; 8],
}

/// Tokens of the block size that nearly all engines use. Its hash is written out below.
const COMMON_TOKENS: usize = 16;
/// First 64 bytes of XXH3's secret.
const SECRET: [u64; 8] = [
    0xbe4b_a423_396c_feb8,
    0x1cad_21f7_2c81_017c,
    0xdb97_9083_e96d_d4de,
    0x1f67_b3b7_a4a4_4072,
    0x78e5_c0cc_4ee6_79cb,
    0x2172_ffcc_7dd0_5a82,
    0x8e24_43f7_7446_08b8,
    0x4c26_3a81_e690_35e0,
];

type Extras<'a> = SmallVec<[ExtraKey<'a>; 4]>;

// === impl KeySeed ===

impl KeySeed {
    /// The published default seed ("kvatlas1" in ASCII, big-endian).
    pub const PUBLISHED: Self = Self(0x6b76_6174_6c61_7331);

    /// A seed of the operator's choice. Treat it as a secret.
    pub const fn secret(seed: u64) -> Self {
        Self(seed)
    }

    /// The seed of a tenant with a secret of its own: the first 8 bytes, little-endian, of
    /// `HMAC-SHA256(secret, "kvatlas.v1.tenant-seed" ‖ 00 ‖ tenant)`. Whoever learns the seed learns neither the secret nor
    /// what else is derived from it.
    pub fn of_tenant(secret: &[u8], tenant: &str) -> Self {
        let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, secret));
        context.update(b"kvatlas.v1.tenant-seed\0");
        context.update(tenant.as_bytes());
        let tag = context.sign();
        let (first, _) = tag.as_ref().split_first_chunk::<8>().expect("HMAC-SHA256 has 32 bytes");
        Self(u64::from_le_bytes(*first))
    }
}

/// Never prints the seed: it may be a secret.
impl std::fmt::Debug for KeySeed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Self::PUBLISHED { "KeySeed(published)" } else { "KeySeed(secret)" })
    }
}

/// Never prints constants that would give the seed away.
impl std::fmt::Debug for KeyHasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeyHasher({:?})", KeySeed(self.seed))
    }
}

// === impl KeyVariant ===

impl Default for KeyVariant {
    fn default() -> Self {
        Self { multimodal_offsets: true, lookahead_tokens: 0 }
    }
}

// === impl ExtraKey ===

impl ExtraKey<'_> {
    /// Appends tag, length and payload. Lengths make the encoding injective over sequences of extras.
    fn write_to(&self, hasher: &mut Xxh3) {
        match self {
            Self::Lora(name) => write_tagged(hasher, b'L', name.as_bytes()),
            Self::Multimodal { identifier, offset } => {
                write_tagged(hasher, b'M', identifier.as_bytes());
                hasher.update(&offset.to_le_bytes());
            }
            Self::Text(text) => write_tagged(hasher, b'T', text.as_bytes()),
            Self::Bytes(bytes) => write_tagged(hasher, b'B', bytes),
            Self::Lookahead(tokens) => {
                hasher.update(b"A");
                hasher.update(&(tokens.len() as u32).to_le_bytes());
                update_tokens(hasher, tokens);
            }
        }
    }
}

fn write_tagged(hasher: &mut Xxh3, tag: u8, payload: &[u8]) {
    hasher.update(&[tag]);
    hasher.update(&(payload.len() as u32).to_le_bytes());
    hasher.update(payload);
}

fn update_tokens(hasher: &mut Xxh3, tokens: &[u32]) {
    if cfg!(target_endian = "little") {
        hasher.update(cast_slice(tokens));
    } else {
        tokens.iter().for_each(|token| hasher.update(&token.to_le_bytes()));
    }
}

// === impl PromptExtras ===

impl PromptExtras {
    /// The extra keys of the block that covers tokens `start..start + block_size`, in canonical order:
    /// LoRA, multimodal items in prompt order, cache salt (first block only).
    fn of_block(&self, start: u32, block_size: u32, variant: KeyVariant) -> Extras<'_> {
        let mut extras = Extras::new();
        if let Some(name) = &self.lora_name {
            extras.push(ExtraKey::Lora(name));
        }
        let end = start.saturating_add(block_size);
        for item in &self.multimodal {
            if item.offset < end && start < item.offset.saturating_add(item.length) {
                extras.push(if variant.multimodal_offsets {
                    let offset = i64::from(item.offset) - i64::from(start);
                    ExtraKey::Multimodal { identifier: &item.identifier, offset }
                } else {
                    ExtraKey::Text(&item.identifier)
                });
            }
        }
        if let (0, Some(salt)) = (start, &self.cache_salt) {
            extras.push(ExtraKey::Text(salt));
        }
        extras
    }
}

// === impl KeyHasher ===

impl Default for KeyHasher {
    fn default() -> Self {
        Self::new(KeySeed::PUBLISHED)
    }
}

impl KeyHasher {
    /// Prepares the constants of one seed.
    pub fn new(seed: KeySeed) -> Self {
        let of = |name: &str| xxh3_64_with_seed(name.as_bytes(), seed.0);
        Self {
            seed: seed.0,
            root: BlockKey(of("kvatlas.v1.root")),
            mix0: of("kvatlas.v1.mix0"),
            mix1: of("kvatlas.v1.mix1"),
            secret: std::array::from_fn(|i| {
                if i % 2 == 0 { SECRET[i].wrapping_add(seed.0) } else { SECRET[i].wrapping_sub(seed.0) }
            }),
        }
    }

    /// The parent of every first block.
    pub fn root(&self) -> BlockKey {
        self.root
    }

    /// Hash of one block's content. `tokens` must be exactly one block; extras in canonical order.
    #[inline]
    pub fn local(&self, tokens: &[u32], extras: &[ExtraKey<'_>]) -> LocalHash {
        if extras.is_empty() && cfg!(target_endian = "little") {
            if let Ok(tokens) = tokens.try_into() {
                return self.local_common(tokens);
            }
            return LocalHash(xxh3_64_with_seed(cast_slice(tokens), self.seed));
        }
        let mut hasher = Xxh3::with_seed(self.seed);
        update_tokens(&mut hasher, tokens);
        extras.iter().for_each(|extra| extra.write_to(&mut hasher));
        LocalHash(hasher.digest())
    }

    /// XXH3 of 64 bytes. The general function decides for each block anew what the seed and the length mean; for a
    /// long prompt that is most of the time.
    #[inline]
    fn local_common(&self, tokens: &[u32; COMMON_TOKENS]) -> LocalHash {
        const PRIME_1: u64 = 0x9e37_79b1_85eb_ca87;
        let word = |i: usize| u64::from(tokens[2 * i]) | u64::from(tokens[2 * i + 1]) << 32;
        let mixed = |input: usize, secret: usize| {
            let low = word(input) ^ self.secret[secret];
            let high = word(input + 1) ^ self.secret[secret + 1];
            let product = u128::from(low) * u128::from(high);
            (product as u64) ^ (product >> 64) as u64
        };
        // Pairs from the outside to the inside, as XXH3 takes inputs of 33 to 64 bytes.
        let mut hash = (4 * COMMON_TOKENS as u64).wrapping_mul(PRIME_1);
        for (input, secret) in [(2, 4), (4, 6), (0, 0), (6, 2)] {
            hash = hash.wrapping_add(mixed(input, secret));
        }
        hash = (hash ^ (hash >> 37)).wrapping_mul(0x1656_6791_9e37_79f9);
        LocalHash(hash ^ (hash >> 32))
    }

    /// Key of the block `local` that follows `parent`.
    #[inline]
    #[must_use]
    pub fn extend(&self, parent: BlockKey, local: LocalHash) -> BlockKey {
        let product = u128::from(parent.0 ^ self.mix0) * u128::from(local.0 ^ self.mix1);
        BlockKey((product as u64) ^ ((product >> 64) as u64) ^ parent.0.rotate_left(29))
    }

    /// Appends the keys of all full blocks of a prompt to `out`. A trailing partial block has no key; with a
    /// look-ahead variant the last full block has none either unless the tokens after it are there.
    ///
    /// `block_size` is in tokens and must not be 0.
    pub fn chain_into(
        &self,
        tokens: &[u32],
        block_size: u32,
        extras: &PromptExtras,
        variant: KeyVariant,
        out: &mut Vec<BlockKey>,
    ) {
        let size = block_size as usize;
        let ahead = usize::from(variant.lookahead_tokens);
        let blocks = tokens.len().saturating_sub(ahead) / size;
        out.reserve(blocks);
        let plain = *extras == PromptExtras::default();
        let mut parent = self.root;
        if plain && ahead == 0 {
            let mut key_of = |block: &[u32]| {
                parent = self.extend(parent, self.local(block, &[]));
                parent
            };
            if size == COMMON_TOKENS {
                let (blocks, _) = tokens.as_chunks::<COMMON_TOKENS>();
                out.extend(blocks.iter().map(|block| key_of(block.as_slice())));
            } else {
                out.extend(tokens.chunks_exact(size).map(key_of));
            }
            return;
        }
        for index in 0..blocks {
            let start = index * size;
            let block = &tokens[start..start + size];
            let mut keys = extras.of_block(start as u32, block_size, variant);
            if ahead > 0 {
                keys.push(ExtraKey::Lookahead(&tokens[start + size..start + size + ahead]));
            }
            parent = self.extend(parent, self.local(block, &keys));
            out.push(parent);
        }
    }

    /// The keys of a plain prompt (no extras, default variant).
    pub fn chain(&self, tokens: &[u32], block_size: u32) -> Vec<BlockKey> {
        let mut out = Vec::new();
        self.chain_into(tokens, block_size, &PromptExtras::default(), KeyVariant::default(), &mut out);
        out
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::{Deserialize, Serialize};

    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Vector {
        name: String,
        seed: String,
        block_size: u32,
        tokens: Vec<u32>,
        #[serde(default)]
        lora_name: Option<String>,
        #[serde(default)]
        cache_salt: Option<String>,
        #[serde(default)]
        multimodal: Vec<(String, u32, u32)>,
        #[serde(default = "yes")]
        multimodal_offsets: bool,
        #[serde(default)]
        lookahead_tokens: u8,
        keys: Vec<String>,
    }

    fn yes() -> bool {
        true
    }

    impl Vector {
        fn compute(&self) -> Vec<String> {
            let seed = u64::from_str_radix(&self.seed, 16).unwrap();
            let extras = PromptExtras {
                lora_name: self.lora_name.clone(),
                cache_salt: self.cache_salt.clone(),
                multimodal: self
                    .multimodal
                    .iter()
                    .map(|(identifier, offset, length)| MultimodalItem {
                        identifier: identifier.clone(),
                        offset: *offset,
                        length: *length,
                    })
                    .collect(),
            };
            let variant = KeyVariant {
                multimodal_offsets: self.multimodal_offsets,
                lookahead_tokens: self.lookahead_tokens,
            };
            let mut keys = Vec::new();
            KeyHasher::new(KeySeed::secret(seed)).chain_into(
                &self.tokens,
                self.block_size,
                &extras,
                variant,
                &mut keys,
            );
            keys.iter().map(|key| format!("{:016x}", key.0)).collect()
        }
    }

    const VECTORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/vectors/block_keys.json");

    #[test]
    fn a_tenants_seed_is_derived_as_published() {
        // printf 'kvatlas.v1.tenant-seed\0a' | openssl dgst -sha256 -mac HMAC -macopt hexkey:000102...0f
        let secret: Vec<u8> = (0..16).collect();
        assert!(KeySeed::of_tenant(&secret, "a") == KeySeed::secret(0xcf8c_c23e_29f8_5604));
        assert!(KeySeed::of_tenant(&secret, "b") != KeySeed::of_tenant(&secret, "a"));
    }

    #[test]
    fn published_vectors_hold() {
        let vectors: Vec<Vector> = serde_json::from_str(&std::fs::read_to_string(VECTORS).unwrap()).unwrap();
        assert!(vectors.len() >= 10);
        for vector in &vectors {
            assert_eq!(vector.compute(), vector.keys, "vector {:?}", vector.name);
        }
    }

    /// Rewrites `keys` in the vector file. Run by hand, and only together with a new key version.
    #[test]
    #[ignore = "rewrites the published vectors"]
    fn regenerate_published_vectors() {
        let mut vectors: Vec<Vector> =
            serde_json::from_str(&std::fs::read_to_string(VECTORS).unwrap()).unwrap();
        for vector in &mut vectors {
            vector.keys = vector.compute();
        }
        let lines: Vec<String> =
            vectors.iter().map(|vector| format!("  {}", serde_json::to_string(vector).unwrap())).collect();
        std::fs::write(VECTORS, format!("[\n{}\n]\n", lines.join(",\n"))).unwrap();
    }

    proptest! {
        #[test]
        fn the_common_block_size_hashes_as_xxh3_does(tokens: [u32; COMMON_TOKENS], seed: u64) {
            let hasher = KeyHasher::new(KeySeed::secret(seed));
            let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
            prop_assert_eq!(hasher.local(&tokens, &[]), LocalHash(xxh3_64_with_seed(&bytes, seed)));
        }
    }

    #[test]
    fn partial_tail_has_no_key_and_does_not_change_the_others() {
        let hasher = KeyHasher::default();
        let tokens: Vec<u32> = (0..40).collect();
        assert_eq!(hasher.chain(&tokens, 16).len(), 2);
        assert_eq!(hasher.chain(&tokens, 16), hasher.chain(&tokens[..32], 16));
        assert!(hasher.chain(&tokens[..15], 16).is_empty());
    }

    #[test]
    fn salt_and_lora_separate_otherwise_equal_prompts() {
        let hasher = KeyHasher::default();
        let tokens: Vec<u32> = (0..32).collect();
        let keys = |extras: PromptExtras| {
            let mut out = Vec::new();
            hasher.chain_into(&tokens, 16, &extras, KeyVariant::default(), &mut out);
            out
        };
        let plain = keys(PromptExtras::default());
        let salted = keys(PromptExtras { cache_salt: Some("a".into()), ..Default::default() });
        let lora = keys(PromptExtras { lora_name: Some("a".into()), ..Default::default() });
        for i in 0..2 {
            assert!(plain[i] != salted[i] && plain[i] != lora[i] && salted[i] != lora[i]);
        }
    }

    proptest! {
        #[test]
        fn equal_prefixes_have_equal_keys_and_the_first_difference_changes_all_later_ones(
            tokens in proptest::collection::vec(any::<u32>(), 1..200),
            at in any::<proptest::sample::Index>(),
            block_size in 1u32..20,
        ) {
            let hasher = KeyHasher::default();
            let at = at.index(tokens.len());
            let mut other = tokens.clone();
            other[at] ^= 1;
            let (a, b) = (hasher.chain(&tokens, block_size), hasher.chain(&other, block_size));
            let first = at / block_size as usize;
            for i in 0..a.len() {
                prop_assert_eq!(a[i] == b[i], i < first);
            }
        }
    }
}
