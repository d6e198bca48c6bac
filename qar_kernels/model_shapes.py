"""H (hidden) and I (intermediate) of the models that kernels are compiled for and measured at."""

MODEL_SHAPES = {
    "Llama-3-8B": (4096, 14336),
    "Llama-3-70B": (8192, 28672),
    "Llama-3.2-1B": (2048, 8192),
    "Llama-3.2-3B": (3072, 8192),
    "Qwen2.5-0.5B": (896, 4864),
    "Qwen2.5-1.5B": (1536, 8960),
    "Qwen2.5-7B": (3584, 18944),
    "Qwen2.5-72B": (8192, 29568),
    "Qwen3-4B": (2560, 9728),
    "SmolLM2-135M": (576, 1536),
    "SmolLM2-360M": (960, 2560),
}
