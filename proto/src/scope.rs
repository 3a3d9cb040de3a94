//! One key space: blocks of two scopes never meet.

use std::fmt;

use crate::keys::KEY_VERSION;

/// Longest model name, in bytes.
pub const MAX_MODEL_BYTES: usize = 256;
/// Longest tenant name, in bytes. An empty tenant is the default one.
pub const MAX_TENANT_BYTES: usize = 64;
/// Largest block size, in tokens. LMCache chunks reach 256; engines with context parallelism multiply theirs.
pub const MAX_BLOCK_SIZE: u32 = 65_536;

/// (model, block size, key version, tenant): one key space.
///
/// LoRA names, cache salts and multimodal hashes enter the key, not the scope.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Scope {
    model: String,
    tenant: String,
    block_size: u32,
    key_version: u16,
}

/// A scope could not be built from these parts.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidScopeError {
    /// The model name is empty or too long.
    #[error("model name must have 1 to {MAX_MODEL_BYTES} bytes, got {0}")]
    Model(usize),
    /// The tenant name is too long.
    #[error("tenant name must have at most {MAX_TENANT_BYTES} bytes, got {0}")]
    Tenant(usize),
    /// The block size is zero or implausibly large.
    #[error("block size must be 1 to {MAX_BLOCK_SIZE} tokens, got {0}")]
    BlockSize(u32),
    /// The key version is not one this build computes.
    #[error("key version {0} is not known here (this build knows version {KEY_VERSION})")]
    KeyVersion(u16),
}

/// Short, stable name of a scope for subjects and maps: XXH3-64 of its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ScopeToken(pub u64);

// === impl Scope ===

impl Scope {
    /// Validates the parts. `block_size` is in tokens; an empty `tenant` is the default tenant.
    pub fn new(
        model: impl Into<String>,
        tenant: impl Into<String>,
        block_size: u32,
        key_version: u16,
    ) -> Result<Self, InvalidScopeError> {
        let (model, tenant) = (model.into(), tenant.into());
        if model.is_empty() || model.len() > MAX_MODEL_BYTES {
            return Err(InvalidScopeError::Model(model.len()));
        }
        if tenant.len() > MAX_TENANT_BYTES {
            return Err(InvalidScopeError::Tenant(tenant.len()));
        }
        if block_size == 0 || block_size > MAX_BLOCK_SIZE {
            return Err(InvalidScopeError::BlockSize(block_size));
        }
        if key_version != KEY_VERSION {
            return Err(InvalidScopeError::KeyVersion(key_version));
        }
        Ok(Self { model, tenant, block_size, key_version })
    }

    /// Model name as the engine serves it.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Tenant, empty for the default one.
    pub fn tenant(&self) -> &str {
        &self.tenant
    }

    /// Tokens per block.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Version of the key definition.
    pub fn key_version(&self) -> u16 {
        self.key_version
    }

    /// The scope's short name. Parts are length-prefixed, so two different scopes never hash the same bytes.
    pub fn token(&self) -> ScopeToken {
        let mut bytes = Vec::with_capacity(self.model.len() + self.tenant.len() + 22);
        for part in [&self.model, &self.tenant] {
            bytes.extend_from_slice(&(part.len() as u64).to_le_bytes());
            bytes.extend_from_slice(part.as_bytes());
        }
        bytes.extend_from_slice(&self.block_size.to_le_bytes());
        bytes.extend_from_slice(&self.key_version.to_le_bytes());
        ScopeToken(xxhash_rust::xxh3::xxh3_64(&bytes))
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} tokens/v{}", self.model, self.block_size, self.key_version)?;
        if !self.tenant.is_empty() {
            write!(f, "/{}", self.tenant)?;
        }
        Ok(())
    }
}

impl fmt::Display for ScopeToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_out_of_range_are_named() {
        assert_eq!(Scope::new("", "", 16, 1), Err(InvalidScopeError::Model(0)));
        assert_eq!(Scope::new("m", "", 0, 1), Err(InvalidScopeError::BlockSize(0)));
        assert_eq!(Scope::new("m", "", 16, 9), Err(InvalidScopeError::KeyVersion(9)));
        assert_eq!(Scope::new("m", "t".repeat(65), 16, 1), Err(InvalidScopeError::Tenant(65)));
    }

    #[test]
    fn token_separates_every_part() {
        let base = Scope::new("m", "t", 16, 1).unwrap();
        for other in [("mt", "", 16), ("m", "", 16), ("m", "t", 32)] {
            assert_ne!(base.token(), Scope::new(other.0, other.1, other.2, 1).unwrap().token());
        }
    }
}
