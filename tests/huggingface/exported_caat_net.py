"""What an exported CAAT-Net must do in `transformers`; runs in any environment that has it.

    python tests/huggingface/exported_caat_net.py FOLDER...

Beside each FOLDER lies FOLDER.npz: rows [B, T] of tokens, our logits [B, T, V] and our loss.
"""

import sys
import tempfile

import numpy as np
import pytest
import torch
import transformers

SETTINGS = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)


def load(folder):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.float().eval()


def logits_of(model, rows):
    with torch.no_grad():
        return model(torch.tensor(rows, dtype=torch.long)).logits.float().numpy()


def check_logits_and_loss(model, rows, logits, loss):
    found = logits_of(model, rows)
    assert found.shape == logits.shape
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-4)
    tokens = torch.tensor(rows, dtype=torch.long)
    with torch.no_grad():
        assert abs(model(tokens, labels=tokens).loss.item() - loss) < 1e-5


def check_generation(model, rows):
    """With each kind of cache and without; and prompts that are filled up on the left."""
    prompt = torch.tensor(rows[:, :5], dtype=torch.long)
    tokens = prompt
    for _ in range(8):  # no generate, no cache
        following = logits_of(model, tokens.numpy())[:, -1].argmax(axis=-1)
        tokens = torch.cat([tokens, torch.tensor(following)[:, None]], dim=1)
    mask = torch.ones_like(prompt)
    ways = ({}, dict(use_cache=False), dict(cache_implementation="static", disable_compile=True))
    for way in ways:
        found = model.generate(prompt, attention_mask=mask, **way, **SETTINGS)
        assert found.tolist() == tokens.tolist(), way
    padded, mask = (torch.nn.functional.pad(x, (3, 0)) for x in (prompt, mask))
    found = model.generate(padded, attention_mask=mask, **SETTINGS)
    assert found[:, 3:].tolist() == tokens.tolist()
    embedded = model.get_input_embeddings()(prompt)
    found = model.generate(inputs_embeds=embedded, **SETTINGS)
    assert found.tolist() == tokens[:, 5:].tolist()


def check_arguments(model, rows):
    """Both names of the cache, the logits asked for, and what it does not know."""
    ids = torch.tensor(rows, dtype=torch.long)
    with torch.no_grad():
        whole = model(ids).logits
        for name in ("cache", "past_key_values"):
            cache = transformers.DynamicCache(config=model.config)
            parts = [model(part, **{name: cache}).logits for part in (ids[:, :7], ids[:, 7:])]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole)
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
        some = torch.tensor([1, 4])
        torch.testing.assert_close(model(ids, logits_to_keep=some).logits, whole[:, some])
        hidden = model(ids, output_hidden_states=True).hidden_states
        assert len(hidden) == model.config.num_hidden_layers + 1
    with pytest.raises(TypeError, match="cash"):
        model(ids, cash=None)
    with pytest.raises(NotImplementedError, match="cannot be resized"):
        model.resize_token_embeddings(80)


def check_saved(model, rows, folder):
    model.save_pretrained(folder)
    np.testing.assert_array_equal(logits_of(load(folder), rows), logits_of(model, rows))


def main(*folders):
    transformers.logging.set_verbosity_error()
    for folder in folders:
        stored = np.load(f"{folder}.npz")
        rows, model = stored["rows"], load(folder)
        check_logits_and_loss(model, rows, stored["logits"], stored["loss"])
        check_generation(model, rows)
        check_arguments(model, rows)
        with tempfile.TemporaryDirectory() as again:
            check_saved(model, rows, again)
        print(f"{folder} in transformers {transformers.__version__}: as it must be")


if __name__ == "__main__":
    main(*sys.argv[1:])
