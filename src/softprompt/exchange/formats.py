"""The formats by name."""

PEFT = {"prompt-tuning": "PROMPT_TUNING", "prefix-tuning": "PREFIX_TUNING", "cartridge": "CARTRIDGE"}
"""What PEFT calls its methods."""

FORMATS = ("peft", *PEFT, "npy", "safetensors", "vllm")
"""What a soft prompt can be exported to; ``peft`` is the PEFT method of its kind: prompt tuning, or prefix tuning of a
trained KV prefix. ``vllm`` is a finished request and code that makes others."""

RECYCLING = ("least-squares", "nearest", "combination")
"""How a soft prompt is carried over to another base model (``exchange/recycling.py``)."""
