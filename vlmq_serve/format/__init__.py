"""The checkpoint format: schemes, packing, config.json and safetensors shards. Needs torch and safetensors only."""
