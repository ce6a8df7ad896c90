"""The paper's 7B model (arXiv:2506.19645), S = 8, p = 0.5.

    python train.py --config=configs/llama_7b.py --workdir=runs/7b \\
        --config.data.tfds_name=c4/en --config.data.tokenizer=tokenizer.model

Needs a corpus, a SentencePiece tokeniser with 32,000 ids, and a pod with a multiple of 8
accelerators: `model` is 8, the parameters are also sharded over `fsdp`, and the global batch of
1,024 sequences is split into 16 microbatches.  On 64 TPU v5p the compiled step takes 19 GiB per
device.
"""

from configs import llama_1b


def get_config():
    config = llama_1b.get_config()
    config.model.layers = 32
    config.model.embed_dim = 4096
    config.model.kv_heads = 32
    config.model.mlp_dim = 11_008
    config.model.rope_base = 10_000.0
    config.data.sequence_length = 4096
    config.optimizer.peak_learning_rate = 3e-4
    config.optimizer.final_learning_rate = 3e-5
    config.optimizer.epsilon = 1e-8
    config.train.steps = 500_000
    return config
