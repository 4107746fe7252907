"""GGUF files of fine-tunes: text models and vision models, with their adapters merged in float32."""
