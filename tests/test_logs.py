"""What commands keep from the terminal, and what they do not."""

import logging

import pytest

from caat_jax import command_line


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_plugin_that_fails_is_reported_where_a_gpu_is(has_gpu, tmp_path, monkeypatch, caplog):
    device, logger = tmp_path / "nvidiactl", logging.getLogger("jax._src.xla_bridge")
    if has_gpu:
        device.touch()
    monkeypatch.setattr(command_line, "_NVIDIA_DEVICES", (device,))
    monkeypatch.setattr(logger, "filters", [])
    command_line.quieten_logs()
    try:
        raise RuntimeError("cuDNN not found.")
    except RuntimeError:
        logger.exception("Jax plugin configuration error")
    logger.warning("a warning")
    said = ["Jax plugin configuration error"] * has_gpu + ["a warning"]
    assert [record.message for record in caplog.records] == said
