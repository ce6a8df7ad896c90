"""The paper's 1.1B model (arXiv:2506.19645), S = 8, p = 0.5.

    python train.py --config=configs/llama_1b.py --workdir=runs/1b \\
        --config.data.tfds_name=c4/en --config.data.tokenizer=tokenizer.model

Needs a corpus, a SentencePiece tokeniser with 32,000 ids, and a pod with a multiple of 8
accelerators: `model` is 8, the parameters are also sharded over `fsdp`, and the global batch of
1,024 sequences is split into 16 microbatches.
"""

from configs import llama_130m


def get_config():
    config = llama_130m.get_config()
    config.model.layers = 22
    config.model.embed_dim = 2048
    config.model.heads = 32
    config.model.kv_heads = 8
    config.model.mlp_dim = 5632
    config.model.rope_base = 500_000.0
    config.compute.remat = True
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.data.sequence_length = 2048
    config.optimizer.peak_learning_rate = 4e-4
    config.optimizer.final_learning_rate = 4e-5
    config.optimizer.epsilon = 1e-5
    config.train.steps = 937_500
    config.train.global_batch = 1024
    config.train.accumulation_steps = 16
    return config
