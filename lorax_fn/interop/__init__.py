"""Files of others: PEFT adapters, Hugging Face checkpoints, Kohya files; all of them safetensors."""
