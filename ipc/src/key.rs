//! `BlockKey` and the hash contract (WIRE.md §7).
//!
//! A key is the first 128 bits of a BLAKE3 hash chained over the contract's version, a namespace and
//! all tokens up to the block's end. It depends on no process seed, so any two instances agree; and
//! whoever does not know a namespace's parts (a tenant's salt) cannot name its blocks.

use bytemuck::{Pod, Zeroable};

/// Changes whenever the same tokens would get another key.
pub const KEY_CONTRACT_VERSION: u32 = 1;

/// Names one block: everything that its KV bytes depend on, hashed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable, Default)]
#[repr(C)]
pub struct BlockKey([u64; 2]);

impl BlockKey {
    /// From two words, as they travel.
    pub const fn from_words(words: [u64; 2]) -> Self {
        Self(words)
    }
    /// From 32 hexadecimal digits, as it is displayed.
    pub fn from_hex(text: &str) -> Option<Self> {
        let word = |part: Option<&str>| u64::from_str_radix(part?, 16).ok();
        let is_hex = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_hex { Some(Self([word(text.get(16..))?, word(text.get(..16))?])) } else { None }
    }
    /// As two words, low first.
    pub fn to_words(self) -> [u64; 2] {
        self.0
    }
}

impl std::fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}{:016x}", self.0[1], self.0[0])
    }
}

impl std::fmt::Display for BlockKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// What separates keys that must never meet, as tagged, length-prefixed parts.
///
/// Each part is hashed as tag, length and bytes, so a LoRA named "x" and a salt "x" differ, and no
/// choice of bytes in one part can imitate a boundary between two.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Namespace {
    parts: Vec<(u8, Vec<u8>)>,
}

impl Namespace {
    /// The model: name, revision, dtype; whatever makes KV bytes incompatible.
    #[must_use]
    pub fn model(self, fingerprint: &str) -> Self {
        self.part(1, fingerprint.as_bytes())
    }
    /// A LoRA adapter's name and version.
    #[must_use]
    pub fn lora(self, name: &str) -> Self {
        self.part(2, name.as_bytes())
    }
    /// A cache salt: isolates whoever does not know it.
    #[must_use]
    pub fn cache_salt(self, salt: &str) -> Self {
        self.part(3, salt.as_bytes())
    }
    /// A tenant.
    #[must_use]
    pub fn tenant(self, name: &str) -> Self {
        self.part(4, name.as_bytes())
    }

    fn part(mut self, tag: u8, bytes: &[u8]) -> Self {
        self.parts.push((tag, bytes.to_vec()));
        self
    }

    /// The key that a chain's first block has as its parent.
    pub fn root(&self) -> BlockKey {
        let mut parts: Vec<_> = self.parts.iter().collect();
        parts.sort();
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"kvring namespace");
        hasher.update(&KEY_CONTRACT_VERSION.to_le_bytes());
        for (tag, bytes) in parts {
            hasher.update(&[*tag]);
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        }
        first_128_bits(&hasher)
    }

    /// What the server knows it by.
    pub fn id(&self) -> BlockKey {
        id_of_root(self.root())
    }

    /// Keys of all full blocks of `tokens`; a partial last block has none.
    ///
    /// # Panics
    /// If `tokens_per_block` is 0.
    pub fn keys(&self, tokens: &[u32], tokens_per_block: usize) -> Vec<BlockKey> {
        let mut parent = self.root();
        tokens
            .chunks_exact(tokens_per_block)
            .map(|block| {
                parent = next_key(parent, block, &[]);
                parent
            })
            .collect()
    }
}

/// What a server knows a namespace by, and what a store of a chain's first block names as its parent. It tells nobody the
/// root, from which keys are made.
pub fn id_of_root(root: BlockKey) -> BlockKey {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"kvring namespace id");
    hasher.update(bytemuck::bytes_of(&root));
    first_128_bits(&hasher)
}

/// The key of the block with these tokens after `parent`. `extra` holds what else the block's bytes
/// depend on: hashes of images or audio in it, each tagged by its position in the slice.
pub fn next_key(parent: BlockKey, tokens: &[u32], extra: &[&[u8]]) -> BlockKey {
    let mut hasher = blake3::Hasher::new();
    hasher.update(bytemuck::bytes_of(&parent));
    hasher.update(&(tokens.len() as u64).to_le_bytes());
    hasher.update(bytemuck::cast_slice(tokens));
    hasher.update(&(extra.len() as u64).to_le_bytes());
    for bytes in extra {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    }
    first_128_bits(&hasher)
}

fn first_128_bits(hasher: &blake3::Hasher) -> BlockKey {
    let hash = hasher.finalize();
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| hash.as_bytes()[at + i]));
    BlockKey([word(0), word(8)])
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_contract_is_written_down() {
        let keys = Namespace::default().model("m").keys(&[1, 2, 3, 4, 5], 2);
        let text: Vec<_> = keys.iter().map(ToString::to_string).collect();
        assert_eq!(text, ["b780f111d0edcf0126a5f3469ff5bf4c", "5a5b6b1d40035c00e93b47c2afa854fc"]);
        assert_eq!(Namespace::default().model("m").id().to_string(), "ce63f668fc1b725f5aa8c91ad9dc8eff");
    }

    #[test]
    fn a_lora_is_not_a_salt_and_order_does_not_matter() {
        let n = Namespace::default;
        assert_ne!(n().lora("x").root(), n().cache_salt("x").root());
        assert_eq!(n().lora("x").tenant("y").root(), n().tenant("y").lora("x").root());
        assert_ne!(n().lora("xy").root(), n().lora("x").lora("y").root());
    }

    #[test]
    fn equal_tokens_after_different_prefixes_differ_and_so_do_images() {
        let a = Namespace::default().keys(&[1, 1, 7, 7], 2);
        let b = Namespace::default().keys(&[2, 2, 7, 7], 2);
        assert_ne!(a[1], b[1]);
        assert_ne!(next_key(a[0], &[7, 7], &[b"cat"]), next_key(a[0], &[7, 7], &[b"dog"]));
        assert_ne!(next_key(a[0], &[7, 7], &[b"ab"]), next_key(a[0], &[7, 7], &[b"a", b"b"]));
    }
}
