"""All fields with their defaults.  The other files in this folder override some of them.

Not meant to be run as it is, since it describes no particular model.  Any field can be overridden
on the command line, for example `--config.model.sync_factor=0.25`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    # Seeds the initial parameters and the order of the training sequences.
    config.seed = 0

    # The architecture: what the function is.  Stored with every checkpoint and compared on restore.
    config.model = ConfigDict(
        dict(
            layers=4,
            embed_dim=256,  # D, the width of the residual stream
            heads=8,
            # Fewer than heads: grouped-query attention.  A multiple of tp_shards, or a divisor, in
            # which case consecutive shards share a head.
            kv_heads=8,
            head_dim=-1,  # -1: embed_dim / heads
            mlp_dim=768,
            vocab_size=-1,  # -1: the tokeniser's, rounded up to a multiple of tp_shards
            vocab_padding=0,  # the last ids of vocab_size, which are none: never predicted
            tied_head=False,  # True: the output matrix is the embedding
            rope_base=10_000.0,
            # Llama 3's slower rotation for longer texts (Hugging Face's rope_type "llama3"): pairs
            # of channels that turn fewer than low_turns times in original_length tokens turn
            # `factor` times slower; those that turn more than high_turns times are unchanged.
            rope_scaling_factor=1.0,  # 1: none
            rope_scaling_low_turns=1.0,
            rope_scaling_high_turns=4.0,
            rope_scaling_original_length=8192,
            norm_epsilon=1e-5,
            tp_shards=8,  # S
            sync_factor=1.0,  # p of every sublayer
            # p per layer, which replaces sync_factor if not empty: one entry per layer, each a
            # number or a pair (attention, MLP), e.g. (1.0, 0.5, (0.5, 0.0), 0.5).
            sync_factor_per_layer=(),
        )
    )

    # How the function is computed: what it is stays the same, to the rounding of these types.
    config.compute = ConfigDict(
        dict(
            dtype="float32",  # of activations and matrix products: float32 or bfloat16
            # In which type the forward partial channel-reduce travels: float32, bfloat16, or, with
            # a scale for each block of channels, int8 or float8_e4m3fn; empty: same as dtype.
            forward_wire_dtype="",
            backward_wire_dtype="float32",  # its transpose, in the backward pass; also float8_e5m2
            wire_block=128,  # the most channels of a token that share a scale
            # Round on any mesh, one device included, as on mesh.model = tp_shards: for studies of
            # the types above.  Slower where a device holds several shards.
            emulate_wires=False,
            remat=False,  # recompute each layer in the backward pass (its all-reduces excepted)
            scan_layers=True,  # False unrolls the layers: slower to compile, faster on CPUs
            # In how many parts a device's sequences pass a layer, so that one part computes while
            # another's channels are reduced; 0: chosen by platform (model/batch_parts.py).
            batch_parts=0,
            # plain, splash (the TPU kernel; interpreted elsewhere, for tests) or cudnn (NVIDIA
            # GPUs).  auto: splash on TPUs, cudnn on GPUs in bfloat16, plain otherwise.
            attention="auto",
        )
    )

    # Mesh sizes; -1 is worked out from the devices present: `model` becomes the largest divisor
    # of tp_shards that fits, then `data` takes what is left.
    config.mesh = ConfigDict(
        dict(
            data=-1,
            fsdp=1,
            model=-1,
            simulated_devices=0,  # CPU only: how many devices to simulate; 0: no simulation
        )
    )

    config.data = ConfigDict(
        dict(
            # At most one of these two; if both are empty, the source of Python's standard library.
            tfds_name="",  # a TFDS dataset prepared as array_record, e.g. "c4/en:3.0.1"
            files="",  # a glob of UTF-8 text files, one document each, e.g. "~/books/**/*.txt"
            tfds_data_dir="",  # where TFDS datasets are; empty: TFDS's own default
            text_feature="text",  # the feature of a TFDS dataset that holds the document
            train_split="train",
            # Empty: one document in holdout_every is held out of train_split for validation, chosen
            # by a digest of its text, so that identical documents are in the same split.
            eval_split="",
            holdout_every=20,
            encoding_errors="strict",  # bytes that are not UTF-8: strict, replace or ignore
            tokenizer="bytes",  # "bytes", a SentencePiece *.model or a Hugging Face tokenizer.json
            own_text=False,  # True: refuse to train on the defaults of the corpus and tokenizer
            cache_dir="~/.cache/caat_jax",  # tokenised corpora
            sequence_length=256,  # T
        )
    )

    config.optimizer = ConfigDict(
        dict(
            # After the warm-up, which is linear: cosine or linear to the final rate, constant, or
            # wsd (warm-up, stable, decay), which is constant and then linear to the final rate.
            schedule="cosine",
            peak_learning_rate=1e-3,
            final_learning_rate=1e-4,
            warmup_steps=-1,  # -1: a tenth of decay_steps
            cooldown_steps=-1,  # of wsd, the last before decay_steps; -1: a fifth of them
            decay_steps=-1,  # the step at which the final rate is reached; -1: train.steps
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-8,
            weight_decay=0.1,  # of matrices only
            gradient_clip_norm=1.0,  # inf: no clipping
        )
    )

    config.train = ConfigDict(
        dict(
            steps=100,
            global_batch=16,  # sequences in one update, over all devices and accumulation steps
            accumulation_steps=1,  # microbatches in a batch, run one after the other
            log_every=1,
            eval_every=100,  # and at the last step
            eval_sequences=256,  # validation sequences read for a validation loss; -1: all
            checkpoint_every=100,  # and at the last step
            checkpoints_to_keep=2,
            # An update is skipped if the loss or its gradient is not finite; the run ends after
            # more than this many in a row.
            skipped_updates_allowed=10,
            profile_step=-1,  # write one jax.profiler trace of this step; -1: none
            # Different synchronisation factors for the first steps: stages (last step, factor) in
            # ascending order, where a factor is a number or one entry per layer as in
            # model.sync_factor_per_layer.  After the last stage the model's own factors apply;
            # caat_jax.communication and caat_jax.step_time examine only those.  ((500, 1.0),)
            # starts synchronised; ((0, 1.0),) continues from an imported dense model, whose step 0
            # was at p = 1.
            sync_schedule=(),
            # The workdir of a dense run, p = 1, with the same tokeniser: the loss is then how far
            # the predictions are from that model's, instead of from the text's next tokens.
            teacher="",
        )
    )
    return config.lock()
