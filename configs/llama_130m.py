"""The paper's 130M model (arXiv:2506.19645), S = 8, p = 0.5.

    python train.py --config=configs/llama_130m.py --workdir=runs/130m \\
        --config.data.tfds_name=c4/en --config.data.tokenizer=tokenizer.model

Needs a corpus, a SentencePiece tokeniser with 32,000 ids and at least one accelerator.  In the
paper's setting, `mesh.model` is 8, and each of the 4 microbatches fits into 16 GB.  The figures are
those of the authors' run script; their run stopped at step 30,010 of the 500,000 for which its
learning rate was planned.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.layers = 12
    config.model.embed_dim = 768
    config.model.heads = 16
    config.model.kv_heads = 16
    config.model.mlp_dim = 2048
    config.model.vocab_size = 32_000
    config.model.sync_factor = 0.5
    config.compute.dtype = "bfloat16"
    config.data.own_text = True
    config.data.sequence_length = 1024
    config.optimizer.peak_learning_rate = 6e-4
    config.optimizer.final_learning_rate = 6e-5
    config.optimizer.warmup_steps = 2000
    config.train.steps = 500_000
    config.train.global_batch = 256
    config.train.accumulation_steps = 4
    config.train.log_every = 10
    config.train.eval_every = 1000
    config.train.eval_sequences = 1024
    config.train.checkpoint_every = 1000
    return config
