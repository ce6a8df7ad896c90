"""How Orbax writes a checkpoint: to a folder that all processes share, or each to a mirror."""

from typing import Any

import jax
import orbax.checkpoint as ocp

# Of values in one object of a bucket, which is in memory as a whole.
OBJECT_BYTES = 1 << 28


def opened(*, shared: bool) -> ocp.AsyncCheckpointer:
    """One for checkpoints of the items "state", "data" and "config".

    Args:
      shared: all processes write to one folder; else each has a folder of its own.
    """
    # Weights and moments shrink by a fifth, and compressing them takes processors that a step on
    # CPUs would use.
    if shared:
        place, making = ocp.options.MultiprocessingOptions(), ocp.AsyncOptions()
        state = ocp.PyTreeCheckpointHandler(use_compression=False)
    else:
        # Each process writes all of its own folder: when the first's is made, the others' need not
        # be, and what Orbax merges in each is a part, which its validation would refuse.
        place = ocp.options.MultiprocessingOptions(primary_host=None)
        making = ocp.AsyncOptions(create_directories_asynchronously=False)
        own = ocp.BasePyTreeCheckpointHandler(
            use_compression=False, multiprocessing_options=place, enable_post_merge_validation=False
        )
        state = ocp.PyTreeCheckpointHandler(handler_impl=own, multiprocessing_options=place)
    handler = ocp.CompositeCheckpointHandler(
        state=state,
        data=ocp.JsonCheckpointHandler(multiprocessing_options=place),
        config=ocp.JsonCheckpointHandler(multiprocessing_options=place),
        composite_options=ocp.CompositeOptions(multiprocessing_options=place, async_options=making),
    )
    # Not `ocp.CheckpointManager`: in another thread it asks, for the step of the save, whether a
    # SIGTERM is to be obeyed (`processes.StopRequest`), and it deletes older checkpoints before
    # anything has been read back from the new one.
    return ocp.AsyncCheckpointer(
        handler,
        async_options=making,
        multiprocessing_options=place,
        checkpoint_metadata_store=ocp.metadata.metadata_store(
            enable_write=True, blocking_write=True
        ),
    )


def save_args(state: Any, *, shared: bool) -> ocp.args.PyTreeSave:
    """What makes it save a state; for a bucket, in files of about `OBJECT_BYTES`."""
    if shared:
        return ocp.args.PyTreeSave(state)
    chunks = ocp.SaveArgs(chunk_byte_size=OBJECT_BYTES)
    return ocp.args.PyTreeSave(
        state,
        save_args=jax.tree.map(lambda _: chunks, state),
        ocdbt_target_data_file_size=OBJECT_BYTES,
    )
