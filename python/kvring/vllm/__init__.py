"""kvring for vLLM. `--kv-transfer-config '{"kv_connector":"KvringConnector","kv_role":"kv_both",
"kv_connector_module_path":"kvring.vllm"}'`; see docs/INTEGRATION.md."""

from kvring.vllm.connector import KvringConnector

__all__ = ["KvringConnector"]
