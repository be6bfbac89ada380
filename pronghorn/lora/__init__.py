"""LoRA on Pronghorn's linears: the layer, which adapter is active, and adapters on disk. Files are plain PEFT."""
