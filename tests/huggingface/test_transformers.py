"""What `transformers` computes, and what an import of it or an export to it computes."""

import os
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.data.loader import NOTHING_READ
from tests import models, reference
from tests.huggingface.folders_by_hand import (
    ROWS,
    SIZES,
    assert_close,
    do,
    main,
    our_logits,
    read_file,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.huggingface import exported_caat_net  # noqa: E402  (imports both)
from tests.huggingface.exported_caat_net import load, logits_of  # noqa: E402

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
LLAMAS = {
    "plain": {},
    "tied": dict(tie_word_embeddings=True, rms_norm_eps=0.01),
    "grouped queries, wide heads": dict(num_attention_heads=16, head_dim=6),
    "llama3": dict(rope_parameters=LLAMA3, head_dim=8),
    "another base": dict(rope_parameters=dict(rope_type="default", rope_theta=50.0), head_dim=8),
}


@pytest.fixture(scope="module", autouse=True)
def code_of_exports(tmp_path_factory):
    """`transformers` copies the code of each model it loads; not to the home folder here."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", list(sys.path))
        yield


@pytest.fixture(scope="module", params=LLAMAS)
def llama(request, tmp_path_factory):
    """A folder that `transformers` wrote, and the logits that it computes."""
    folder = tmp_path_factory.mktemp("llama") / "source"
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SIZES | LLAMAS[request.param])
    model = transformers.LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder, logits_of(model, ROWS)


def test_llama_there_and_back(llama, tmp_path, capsys):
    source, expected = llama
    do(capsys, "import", source, tmp_path / "run")
    for M in (1, 2, 8):
        assert_close(our_logits(tmp_path / "run", M)[0], expected)
    do(capsys, "export", tmp_path / "run", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", source)
    back = load(tmp_path / "back")
    assert isinstance(back, transformers.LlamaForCausalLM)
    np.testing.assert_array_equal(logits_of(back, ROWS), expected)


def assert_same_tensors(folder, source):
    assert read_file(folder / "model.safetensors") == read_file(source / "model.safetensors")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shorter_types_and_several_files(tmp_path, capsys, dtype):
    torch.manual_seed(2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "whole")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    do(capsys, "import", tmp_path / "source", tmp_path / "run")
    do(capsys, "export", tmp_path / "run", tmp_path / "back", f"--dtype={dtype}")
    assert_same_tensors(tmp_path / "back", tmp_path / "whole")
    assert_close(our_logits(tmp_path / "run")[0], logits_of(model.float(), ROWS))


# ---- CAAT-Nets --------------------------------------------------------------------------------

CAAT_NETS = {
    "half": dict(sync_factor=0.5),
    "nothing shared": dict(
        sync_factor=0.0, tp_shards=4, head_dim=6, vocab_size=72, vocab_padding=8
    ),
    "tied": dict(sync_factor=0.3, tied_head=True, norm_epsilon=0.01),
    "shared heads": dict(sync_factor=0.5, kv_heads=2),
    "per sublayer": dict(sync_factor_per_layer=((0.25, 0.75), 0.5), rope_base=50.0),
    "llama3": dict(
        sync_factor=0.5,
        head_dim=8,
        rope_base=100.0,
        rope_scaling_factor=8.0,
        rope_scaling_original_length=64,
    ),
}


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Of each of the nets, a run's folder with random weights."""
    folder = tmp_path_factory.mktemp("caat_nets")
    for name, fields in CAAT_NETS.items():
        config = models.small_config(model=fields)
        programs = models.programs(config)
        names = ("layers", "embed_dim", "heads", "kv_heads", "head_dim", "mlp_dim", "vocab_size")
        sizes = {name: getattr(config.model, name) for name in (*names, "tied_head")}
        parameters = models.on_mesh(programs, reference.random_parameters(7, **sizes))
        with Checkpoints(folder / name) as checkpoints:
            checkpoints.save(programs.fresh_state(parameters), 0, config, NOTHING_READ)
    return folder


@pytest.fixture(scope="module", params=CAAT_NETS)
def caat_net(request, workdirs):
    return workdirs / request.param


@pytest.fixture(scope="module")
def exported(caat_net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    main("export", caat_net, folder)
    return load(folder)


def test_caat_net_has_our_logits_and_loss(caat_net, exported):
    exported_caat_net.check_logits_and_loss(exported, ROWS, *our_logits(caat_net))


def test_caat_net_generates(exported):
    exported_caat_net.check_generation(exported, ROWS)


def test_caat_net_takes_arguments_by_all_their_names_and_no_others(exported):
    exported_caat_net.check_arguments(exported, ROWS)


def test_caat_net_saved_by_transformers_is_the_same(exported, tmp_path):
    exported_caat_net.check_saved(exported, ROWS, tmp_path / "again")


@pytest.fixture(scope="module", params=["4.57.6", "5.23.0", "newest"])
def python_with_release(request):
    """(release, Python) of an environment with that `transformers` over this one's packages.

    It stays for later sessions of pytest.
    """
    folder = request.config.cache.mkdir(f"transformers-{request.param}")
    python, installed = folder / "bin/python", folder / "installed"
    if not installed.exists() or request.param == "newest":
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        (site_packages,) = folder.glob("lib/python*/site-packages")
        (site_packages / "below.pth").write_text(sysconfig.get_paths()["purelib"])
        what = "transformers" + ("" if request.param == "newest" else f"=={request.param}")
        pip = [python, "-m", "pip", "install", "--quiet", "--upgrade", what]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{what} cannot be installed: {done.stderr.strip()[-200:]}")
        installed.touch()
    return request.param, python


@pytest.mark.slow
def test_caat_nets_in_releases_of_transformers(workdirs, python_with_release, tmp_path):
    release, python = python_with_release
    for name in CAAT_NETS:
        main("export", workdirs / name, tmp_path / name)
        logits, loss = our_logits(workdirs / name)
        np.savez(tmp_path / f"{name}.npz", rows=ROWS, logits=logits, loss=loss)
    arguments = [exported_caat_net.__file__, *(tmp_path / name for name in CAAT_NETS)]
    variables = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([python, *arguments], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": as it must be") == len(CAAT_NETS)
    assert release == "newest" or f"transformers {release}:" in done.stdout


def test_import_below_one_is_a_caat_net(tmp_path, capsys):
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "source")
    said = do(capsys, "import", tmp_path / "source", tmp_path / "run", "--sync_factor=0.5")
    assert "do not compute what they compute in the source" in said
    do(capsys, "export", tmp_path / "run", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tmp_path / "source")
    ours = our_logits(tmp_path / "run", M=2)[0]
    assert_close(logits_of(load(tmp_path / "back"), ROWS), ours)
    assert np.abs(ours - logits_of(model, ROWS)).max() > 0.1
