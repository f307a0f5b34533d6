//! The layout: what must be equal for two instances to share one block, and how it differs.

use serde::{Deserialize, Serialize};

use crate::key::KEY_CONTRACT_VERSION;

/// What every instance of one server must agree on, field by field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    /// Name and revision of the model.
    pub model: String,
    /// Type of one KV element: bf16, fp8_e4m3, ...
    pub dtype: String,
    /// Tokens in one block.
    pub tokens_per_block: u32,
    /// Transformer layers.
    pub layers: u32,
    /// KV heads over all ranks.
    pub kv_heads: u32,
    /// Elements of one head.
    pub head_size: u32,
    /// Tensor-parallel ranks: a block is visible when all have committed. At most 32.
    pub tp_size: u32,
    /// Pipeline-parallel stages.
    pub pp_size: u32,
    /// How a block lies in its slot.
    pub kv_layout: String,
    /// Bytes of one block over all layers and ranks: the size of a slot.
    pub block_bytes: u64,
    /// Version of the hash contract behind the keys.
    pub key_contract: u32,
}

/// Most ranks that can share a slot: the bits of its rank masks.
pub const TP_SIZE_MAX: u32 = 32;

/// Longest text of a layout.
const TEXT_BYTES_MAX: usize = 4096;

/// A field whose values differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// Name of the field.
    pub field: String,
    /// The server's value.
    pub server: String,
    /// The instance's value.
    pub instance: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: the server has {}, this instance {}", self.field, self.server, self.instance)
    }
}

impl Layout {
    /// A layout of opaque blocks: benchmarks, replays and tests.
    pub fn opaque(block_bytes: u64) -> Self {
        Self {
            model: "opaque".into(),
            dtype: "u8".into(),
            tokens_per_block: 1,
            layers: 1,
            kv_heads: 1,
            head_size: 1,
            tp_size: 1,
            pp_size: 1,
            kv_layout: "block_first".into(),
            block_bytes,
            key_contract: KEY_CONTRACT_VERSION,
        }
    }

    /// Every field in which `instance` differs from this server's layout.
    pub fn differences(&self, instance: &Self) -> Vec<Difference> {
        let fields = |layout: &Self| match serde_json::to_value(layout) {
            Ok(serde_json::Value::Object(map)) => map,
            _ => serde_json::Map::new(),
        };
        let theirs = fields(instance);
        let differing = |(field, server): (String, serde_json::Value)| {
            let instance = theirs.get(&field).cloned().unwrap_or_default();
            (server != instance).then(|| Difference {
                field,
                server: server.to_string(),
                instance: instance.to_string(),
            })
        };
        fields(self).into_iter().filter_map(differing).collect()
    }

    /// 64 bits over every field: what a disk header and a log line carry.
    pub fn fingerprint(&self) -> u64 {
        let text = serde_json::to_vec(self).unwrap_or_default();
        let hash = blake3::hash(&text);
        u64::from_le_bytes(std::array::from_fn(|i| hash.as_bytes()[i]))
    }

    /// Whether its texts are of a length that fits every message that names them.
    ///
    /// # Errors
    /// Names the field and the limit.
    pub fn check_texts(&self) -> Result<(), String> {
        let texts = [("model", &self.model), ("dtype", &self.dtype), ("kv_layout", &self.kv_layout)];
        let is_bad = |text: &str| text.len() > TEXT_BYTES_MAX || text.chars().any(char::is_control);
        match texts.iter().find(|(_, text)| is_bad(text)) {
            Some((field, text)) => Err(format!(
                "{field} has {} bytes: at most {TEXT_BYTES_MAX} are taken, and no control characters",
                text.len()
            )),
            None => Ok(()),
        }
    }

    /// The first thing that makes this layout impossible to serve, in words.
    ///
    /// # Errors
    /// Names the field, its value and what would be accepted.
    pub fn check(&self, sector_bytes: u64) -> Result<(), String> {
        self.check_texts()?;
        if self.block_bytes == 0 || !self.block_bytes.is_multiple_of(sector_bytes) {
            return Err(format!(
                "block_bytes = {} is not a multiple of the device's {sector_bytes} bytes: choose tokens_per_block so that it is",
                self.block_bytes
            ));
        }
        if self.block_bytes > 1 << 30 {
            return Err(format!(
                "block_bytes = {} is more than 1 GiB: choose fewer tokens_per_block",
                self.block_bytes
            ));
        }
        if self.tp_size == 0 || self.tp_size > TP_SIZE_MAX {
            return Err(format!("tp_size = {} is not between 1 and {TP_SIZE_MAX}", self.tp_size));
        }
        if self.key_contract != KEY_CONTRACT_VERSION {
            return Err(format!(
                "key_contract = {} is not {KEY_CONTRACT_VERSION}: use one version of kvring",
                self.key_contract
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn differences_name_both_values() {
        let ours = Layout::opaque(4096);
        let theirs = Layout { tokens_per_block: 16, dtype: "bf16".into(), ..Layout::opaque(4096) };
        let text: Vec<_> = ours.differences(&theirs).iter().map(ToString::to_string).collect();
        assert_eq!(
            text,
            [
                "dtype: the server has \"u8\", this instance \"bf16\"",
                "tokens_per_block: the server has 1, this instance 16"
            ]
        );
        assert_ne!(ours.fingerprint(), theirs.fingerprint());
        assert!(ours.differences(&ours).is_empty());
    }

    #[test]
    fn an_odd_block_size_is_refused_with_a_remedy() {
        let error = Layout::opaque(6000).check(4096).unwrap_err();
        assert!(error.contains("block_bytes = 6000") && error.contains("tokens_per_block"), "{error}");
    }
}
