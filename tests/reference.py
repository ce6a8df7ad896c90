"""The float64 NumPy emulation of METHOD.md: what the project's JAX code is compared with.

Plain Python loops over the shards, no JAX, and no code shared with `caat_jax`. Each forward
function is followed by its hand-derived `_backward`. The rule in one line, for every sublayer
output y_j of shard j with D_s shared channels out of D:

    z_j[..., :D_s] = Σ_k y_k[..., :D_s]        z_j[..., D_s:] = √S · y_j[..., D_s:]

The forward functions also accept complex128 parameters, so that the backward can be checked by
complex-step differentiation (`test_reference.py`).

Axis letters, the same in comments, docstrings and einsum strings:
    B  batch                       N  layers
    T  position (of the query)     U  position of the key, U = T in size
    D  residual width              D_s  shared channels of one sublayer, the first of the D
    H  query heads                 K  key/value heads        G  query heads per key/value head
    h  width of one head           F  MLP width              V  vocabulary
    S  tensor-parallel shards; inside a shard's functions H, K, F and V are the shard's part

Parameters are a nested dict of arrays with a dense Llama's global shapes:
    embedding [V, D]
    layers: attention: norm [N, D], query [N, D, H, h], key and value [N, D, K, h],
                       output [N, H, h, D]
            mlp:       norm [N, D], gate and up [N, D, F], down [N, F, D]
    final_norm [D]
    head [D, V]      absent when tied: then the output matrix is embedding.T
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# The axis along which the S shards hold a layer's weight (the leading N already taken away);
# a weight that is not listed, `norm`, is the same one on every shard.
SHARDED_AXIS = {"query": 1, "key": 1, "value": 1, "output": 0, "gate": 1, "up": 1, "down": 0}


@dataclass(frozen=True)
class Activations:
    """Result of `forward`.

    logits [B, T, V]: the shards' vocabulary parts, put together in order.
    streams [S, B, T, D]: every shard's residual stream after the last layer, before the final norm.
    streams_after_layer [N, S, B, T, D]: the same after each layer; the last entry is `streams`.
    """

    logits: np.ndarray
    streams: np.ndarray
    streams_after_layer: np.ndarray


# ---- Building blocks of one shard -----------------------------------------------------------


def rms_norm(x, gamma, epsilon):
    """x [..., D], gamma [D] -> gamma · x / sqrt(mean(x²) + epsilon), over all D channels."""
    inverse_rms = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)
    normalised = x * inverse_rms
    return normalised * gamma, (normalised, inverse_rms, gamma)


def rms_norm_backward(d_out, saved):
    """d_out [..., D] -> gradients of x [..., D] and of gamma [D]."""
    normalised, inverse_rms, gamma = saved
    d_gamma = np.sum(d_out * normalised, axis=tuple(range(d_out.ndim - 1)))
    d_normalised = d_out * gamma
    along = np.mean(d_normalised * normalised, axis=-1, keepdims=True)
    return inverse_rms * (d_normalised - normalised * along), d_gamma


def rotary_frequency(i, h, base, scaling):
    """base^(-2i/h), or less where `scaling` is (factor, low turns, high turns, length): then pairs
    that make fewer than `low` turns in `length` tokens are slowed down, more than `high` are not,
    and between the two the frequency is interpolated."""
    frequency = base ** (-2.0 * i / h)
    if scaling is None:
        return frequency
    factor, low, high, length = scaling
    wavelength = 2 * np.pi / frequency
    if wavelength < length / high:
        return frequency
    if wavelength > length / low:
        return frequency / factor
    smooth = (length / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def rotary(x_BTHh, rope, direction=1):
    """Rotates channel pairs (i, i + h/2) by direction · position · frequency of the pair."""
    T, h = x_BTHh.shape[1], x_BTHh.shape[3]
    frequencies = [rotary_frequency(i, h, *rope) for i in range(h // 2)]
    angles = direction * np.arange(T)[:, None] * np.tile(frequencies, 2)  # [T, h]
    cosine, sine = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]  # [T, 1, h]
    rotated_half = np.concatenate([-x_BTHh[..., h // 2 :], x_BTHh[..., : h // 2]], axis=-1)
    return x_BTHh * cosine + rotated_half * sine


def rotary_backward(d_out_BTHh, rope):
    """A rotation's transpose is the rotation the other way round."""
    return rotary(d_out_BTHh, rope, direction=-1)


def causal_attention(q_BTHh, k_BUKh, v_BUKh):
    """Softmax attention of each query head i to key/value head i // G, scores over sqrt(h)."""
    (B, T, H, h), K = q_BTHh.shape, k_BUKh.shape[2]
    q_BTKGh = q_BTHh.reshape(B, T, K, H // K, h)
    scores = np.einsum("BTKGh,BUKh->BKGTU", q_BTKGh, k_BUKh, optimize=True) / np.sqrt(h)
    scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
    # The largest real part, for the sake of complex-step differentiation; any constant will do.
    unnormalised = np.exp(scores - scores.real.max(axis=-1, keepdims=True))
    probabilities = unnormalised / unnormalised.sum(axis=-1, keepdims=True)  # [B, K, G, T, U]
    out_BTKGh = np.einsum("BKGTU,BUKh->BTKGh", probabilities, v_BUKh, optimize=True)
    return out_BTKGh.reshape(B, T, H, h), (q_BTKGh, k_BUKh, v_BUKh, probabilities)


def causal_attention_backward(d_out_BTHh, saved):
    """d_out [B, T, H, h] -> gradients of q [B, T, H, h], of k and of v [B, U, K, h]."""
    q_BTKGh, k_BUKh, v_BUKh, probabilities = saved
    d_out_BTKGh = d_out_BTHh.reshape(q_BTKGh.shape)
    d_v = np.einsum("BKGTU,BTKGh->BUKh", probabilities, d_out_BTKGh, optimize=True)
    d_probabilities = np.einsum("BTKGh,BUKh->BKGTU", d_out_BTKGh, v_BUKh, optimize=True)
    along = np.sum(d_probabilities * probabilities, axis=-1, keepdims=True)
    d_scores = probabilities * (d_probabilities - along) / np.sqrt(q_BTKGh.shape[-1])
    d_q = np.einsum("BKGTU,BUKh->BTKGh", d_scores, k_BUKh, optimize=True)
    d_k = np.einsum("BKGTU,BTKGh->BUKh", d_scores, q_BTKGh, optimize=True)
    return d_q.reshape(d_out_BTHh.shape), d_k, d_v


def attention(hidden_BTD, weights, rope):
    """Attention with one shard's heads: the shard's part of the output sum, [B, T, D]."""
    q = np.einsum("BTD,DHh->BTHh", hidden_BTD, weights["query"], optimize=True)
    k = np.einsum("BTD,DKh->BTKh", hidden_BTD, weights["key"], optimize=True)
    v = np.einsum("BTD,DKh->BTKh", hidden_BTD, weights["value"], optimize=True)
    q, k = rotary(q, rope), rotary(k, rope)
    heads_BTHh, attention_saved = causal_attention(q, k, v)
    out = np.einsum("BTHh,HhD->BTD", heads_BTHh, weights["output"], optimize=True)
    return out, (hidden_BTD, heads_BTHh, attention_saved)


def attention_backward(d_out_BTD, weights, gradients, saved, rope):
    """Adds the shard's weight gradients to `gradients`; returns the gradient of hidden."""
    hidden_BTD, heads_BTHh, attention_saved = saved
    gradients["output"][...] = np.einsum("BTHh,BTD->HhD", heads_BTHh, d_out_BTD, optimize=True)
    d_heads_BTHh = np.einsum("BTD,HhD->BTHh", d_out_BTD, weights["output"], optimize=True)
    d_q, d_k, d_v = causal_attention_backward(d_heads_BTHh, attention_saved)
    d_q, d_k = rotary_backward(d_q, rope), rotary_backward(d_k, rope)
    d_hidden_BTD = np.zeros_like(hidden_BTD)
    for name, d_projected in (("query", d_q), ("key", d_k), ("value", d_v)):
        gradients[name][...] += np.einsum("BTD,BTHh->DHh", hidden_BTD, d_projected, optimize=True)
        d_hidden_BTD += np.einsum("BTHh,DHh->BTD", d_projected, weights[name], optimize=True)
    return d_hidden_BTD


def mlp(hidden_BTD, weights, rope):
    """SwiGLU with one shard's columns: its part of the output sum. No rotary: `rope` unused."""
    gate_BTF, up_BTF = hidden_BTD @ weights["gate"], hidden_BTD @ weights["up"]
    sigmoid_BTF = 1 / (1 + np.exp(-gate_BTF))
    activated_BTF = gate_BTF * sigmoid_BTF * up_BTF
    saved = (hidden_BTD, gate_BTF, up_BTF, sigmoid_BTF, activated_BTF)
    return activated_BTF @ weights["down"], saved


def mlp_backward(d_out_BTD, weights, gradients, saved, rope):
    """Writes the shard's weight gradients into `gradients`; returns the gradient of hidden."""
    hidden_BTD, gate_BTF, up_BTF, sigmoid_BTF, activated_BTF = saved
    gradients["down"][...] = np.einsum("BTF,BTD->FD", activated_BTF, d_out_BTD, optimize=True)
    d_activated_BTF = d_out_BTD @ weights["down"].T
    d_up_BTF = d_activated_BTF * gate_BTF * sigmoid_BTF
    d_gate_BTF = d_activated_BTF * up_BTF * sigmoid_BTF * (1 + gate_BTF * (1 - sigmoid_BTF))
    gradients["gate"][...] = np.einsum("BTD,BTF->DF", hidden_BTD, d_gate_BTF, optimize=True)
    gradients["up"][...] = np.einsum("BTD,BTF->DF", hidden_BTD, d_up_BTF, optimize=True)
    return d_gate_BTF @ weights["gate"].T + d_up_BTF @ weights["up"].T


# ---- The rule, and a sublayer over all shards -----------------------------------------------


def exact(x):
    """A wire that rounds nothing; others are functions of what is sent [..., d], too."""
    return x


def partial_channel_reduce(y_SBTD, sync_width, wire=exact):
    """y_j -> z_j: the first `sync_width` channels summed over shards, the others times √S.

    What the shards send is rounded by the wire, and so is their sum.
    """
    S = len(y_SBTD)
    z_SBTD = np.empty_like(y_SBTD)
    for j in range(S):
        if sync_width:
            sent = [wire(y_SBTD[k, ..., :sync_width]) for k in range(S)]
            z_SBTD[j, ..., :sync_width] = wire(sum(sent))
        z_SBTD[j, ..., sync_width:] = np.sqrt(S) * y_SBTD[j, ..., sync_width:]
    return z_SBTD


def partial_channel_reduce_backward(d_z_SBTD, sync_width, wire=exact):
    """y_j's shared part went into every shard's z_k: its gradient is the sum over those k.

    The forward's rounding counts as the identity; the gradients are rounded on their own way.
    """
    S = len(d_z_SBTD)
    d_y_SBTD = np.empty_like(d_z_SBTD)
    for j in range(S):
        if sync_width:
            sent = [wire(d_z_SBTD[k, ..., :sync_width]) for k in range(S)]
            d_y_SBTD[j, ..., :sync_width] = wire(sum(sent))
        d_y_SBTD[j, ..., sync_width:] = np.sqrt(S) * d_z_SBTD[j, ..., sync_width:]
    return d_y_SBTD


def part_of_shard(array, axis, j, S):
    """Shard j's part of `array` along `axis`, as a view: writing into it writes into `array`."""
    return np.split(array, S, axis=axis)[j]


def weights_of_shard(sublayer_weights, n, j, S):
    """Layer n's weights of one sublayer on shard j, as views."""
    parts = {}
    for name, weight in sublayer_weights.items():
        heads = weight.shape[2] if name in ("key", "value") else S
        if name == "norm":
            parts[name] = weight[n]
        elif heads < S:  # S / heads consecutive shards hold the same head
            head = j * heads // S
            parts[name] = weight[n][:, head : head + 1]
        else:
            parts[name] = part_of_shard(weight[n], SHARDED_AXIS[name], j, S)
    return parts


def sublayer(function, x_SBTD, weights_by_shard, sync_width, rope, norm_epsilon, wire):
    """x_j + z_j on every shard, where y_j = function(RMSNorm(x_j), the weights of shard j)."""
    outputs, saved = [], []
    for x_BTD, weights in zip(x_SBTD, weights_by_shard, strict=True):
        hidden_BTD, norm_saved = rms_norm(x_BTD, weights["norm"], norm_epsilon)
        out_BTD, function_saved = function(hidden_BTD, weights, rope)
        outputs.append(out_BTD)
        saved.append((norm_saved, function_saved))
    return x_SBTD + partial_channel_reduce(np.stack(outputs), sync_width, wire), saved


def sublayer_backward(
    function_backward, d_x_SBTD, weights_by_shard, gradients_by_shard, saved, sync_width, rope, wire
):
    """Gradient of the new streams -> of the old ones: through the residual and the function."""
    d_y_SBTD = partial_channel_reduce_backward(d_x_SBTD, sync_width, wire)
    d_old_x_SBTD = d_x_SBTD.copy()
    for j, (norm_saved, function_saved) in enumerate(saved):
        weights, gradients = weights_by_shard[j], gradients_by_shard[j]
        d_hidden_BTD = function_backward(d_y_SBTD[j], weights, gradients, function_saved, rope)
        d_x_BTD, d_gamma = rms_norm_backward(d_hidden_BTD, norm_saved)
        d_old_x_SBTD[j] += d_x_BTD
        gradients["norm"][...] += d_gamma  # one parameter for all shards: a sum
    return d_old_x_SBTD


# ---- Embedding, head and loss, sharded by vocabulary ----------------------------------------


def embedding_lookup(embedding_VD, tokens_BT, S):
    """Every shard looks up the tokens among its own rows; the sum over shards is [B, T, D]."""
    rows = len(embedding_VD) // S
    out_BTD = np.zeros((*tokens_BT.shape, embedding_VD.shape[1]), embedding_VD.dtype)
    for j in range(S):
        mine_BT = tokens_BT // rows == j
        out_BTD[mine_BT] += part_of_shard(embedding_VD, 0, j, S)[tokens_BT[mine_BT] - j * rows]
    return out_BTD


def embedding_lookup_backward(d_out_BTD, gradient_VD, tokens_BT, S):
    """Adds to the gradient of the rows looked up: a token that occurs twice is counted twice."""
    rows = len(gradient_VD) // S
    for j in range(S):
        mine_BT = tokens_BT // rows == j
        gradient_of_shard = part_of_shard(gradient_VD, 0, j, S)
        np.add.at(gradient_of_shard, tokens_BT[mine_BT] - j * rows, d_out_BTD[mine_BT])


def in_parts(x_BTD, S, wire):
    """x as it arrives where every shard sends its D/S channels to all, or to their owner."""
    return np.concatenate([wire(part) for part in np.split(x_BTD, S, axis=-1)], axis=-1)


def output_matrix(params):
    """[D, V]; of a tied head a view of the embedding (of its gradient, among gradients)."""
    return params["head"] if "head" in params else params["embedding"].T


def head(x_SBTD, params, norm_epsilon):
    """Shard j's logits, from its own stream with its private channels: S arrays [B, T, V/S]."""
    S = len(x_SBTD)
    logits, saved = [], []
    for j in range(S):
        hidden_BTD, norm_saved = rms_norm(x_SBTD[j], params["final_norm"], norm_epsilon)
        logits.append(hidden_BTD @ part_of_shard(output_matrix(params), 1, j, S))
        saved.append((hidden_BTD, norm_saved))
    return logits, saved


def head_backward(d_logits, params, gradients, saved):
    """Gradients of the shards' logits -> of their streams [S, B, T, D]; adds to `gradients`."""
    S = len(d_logits)
    d_streams = []
    for j, (hidden_BTD, norm_saved) in enumerate(saved):
        gradient_of_shard = part_of_shard(output_matrix(gradients), 1, j, S)
        gradient_of_shard += np.einsum("BTD,BTV->DV", hidden_BTD, d_logits[j], optimize=True)
        d_hidden_BTD = d_logits[j] @ part_of_shard(output_matrix(params), 1, j, S).T
        d_x_BTD, d_gamma = rms_norm_backward(d_hidden_BTD, norm_saved)
        d_streams.append(d_x_BTD)
        gradients["final_norm"] += d_gamma
    return np.stack(d_streams)


def cross_entropy(logits, targets_BT):
    """Mean over the targets that are not negative, in nats; `logits` S arrays [B, T, V/S]."""
    counted_BT = targets_BT >= 0
    if not counted_BT.any():
        raise ValueError("every target is negative (ignored): there is no mean to take")
    rows = logits[0].shape[-1]
    largest_BT = np.max([part.real.max(axis=-1) for part in logits], axis=0)
    exponentials = [np.exp(part - largest_BT[..., None]) for part in logits]
    total_BT = sum(part.sum(axis=-1) for part in exponentials)
    chosen_BT = np.zeros_like(total_BT)  # the target's logit, known to the shard that has its row
    is_target = []  # S arrays [B, T, V/S]
    for j, part in enumerate(logits):
        is_target.append(targets_BT[..., None] == np.arange(j * rows, (j + 1) * rows))
        chosen_BT += np.sum(part * is_target[j], axis=-1)
    losses_BT = np.log(total_BT) + largest_BT - chosen_BT
    return losses_BT[counted_BT].mean(), (exponentials, total_BT, is_target, counted_BT)


def cross_entropy_backward(saved):
    """Softmax minus one-hot, over the number of counted targets: S arrays [B, T, V/S]."""
    exponentials, total_BT, is_target, counted_BT = saved
    weight_BT1 = (counted_BT / counted_BT.sum())[..., None]
    return [
        weight_BT1 * (part / total_BT[..., None] - one_hot)
        for part, one_hot in zip(exponentials, is_target, strict=True)
    ]


def divergence(logits, teacher_BTV, targets_BT):
    """Mean KL(teacher || model) over the targets that are not negative, in nats, and its gradient
    with respect to the S logit parts."""

    def softmax(logits_BTV):
        exponentials = np.exp(logits_BTV - logits_BTV.max(axis=-1, keepdims=True))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)

    p, q = softmax(np.concatenate(logits, axis=-1)), softmax(teacher_BTV)
    counted_BT = targets_BT >= 0
    weight_BT1 = (counted_BT / counted_BT.sum())[..., None]
    mean = np.sum(weight_BT1 * q * (np.log(q) - np.log(p)))
    return mean, np.split(weight_BT1 * (p - q), len(logits), axis=-1)


# ---- The model -------------------------------------------------------------------------------

SUBLAYERS = {"attention": (attention, attention_backward), "mlp": (mlp, mlp_backward)}


def map_arrays(function, tree):
    """The nested dict with `function` applied to each array."""
    if isinstance(tree, dict):
        return {name: map_arrays(function, child) for name, child in tree.items()}
    return function(tree)


def to_float64(array):
    """As float64, or complex128 where it is complex."""
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def validate(params, tokens_BT, tp_shards, sync_widths):
    """Refuses what METHOD.md does not define."""
    layers = params["layers"]
    N, D, H, h = layers["attention"]["query"].shape
    K = layers["attention"]["key"].shape[2]
    sharded = {"heads": H, "kv heads": K} if tp_shards < 1 or tp_shards % K else {"heads": H}
    sharded |= {"MLP width": layers["mlp"]["gate"].shape[2], "vocabulary": len(params["embedding"])}
    for name, size in sharded.items():
        if tp_shards < 1 or size % tp_shards:
            raise ValueError(f"{name} {size} is not a multiple of tp_shards {tp_shards}")
    if H % K:
        raise ValueError(f"heads {H} is not a multiple of kv heads {K}")
    if h % 2:
        raise ValueError(f"head_dim {h} is odd: rotary turns pairs of channels")
    if len(sync_widths) != N or not all(0 <= w <= D for pair in sync_widths for w in pair):
        raise ValueError(f"sync_widths {sync_widths}: expected {N} pairs within 0..{D}")
    if tokens_BT.min() < 0 or tokens_BT.max() >= sharded["vocabulary"]:
        raise ValueError(f"tokens outside 0..{sharded['vocabulary'] - 1}")


def sublayers_in_order(sync_widths):
    """(layer, "attention" or "mlp", D_s) of every sublayer, first to last."""
    for n, (attention_width, mlp_width) in enumerate(sync_widths):
        yield n, "attention", attention_width
        yield n, "mlp", mlp_width


def run_forward(params, tokens_BT, S, sync_widths, rope, norm_epsilon, wire=exact):
    """-> S logit parts [B, T, V/S], streams after each sublayer, what the backward needs."""
    validate(params, tokens_BT, S, sync_widths)
    embedded_BTD = embedding_lookup(params["embedding"], tokens_BT, S)
    if "head" in params:  # an untied table's shards hold channels, a tied one's hold rows
        embedded_BTD = in_parts(embedded_BTD, S, wire)
    else:
        embedded_BTD = wire(wire(embedded_BTD))
    x_SBTD = np.stack([embedded_BTD] * S)
    streams, sublayers_saved = [], []
    for n, name, sync_width in sublayers_in_order(sync_widths):
        weights_by_shard = [weights_of_shard(params["layers"][name], n, j, S) for j in range(S)]
        x_SBTD, saved = sublayer(
            SUBLAYERS[name][0], x_SBTD, weights_by_shard, sync_width, rope, norm_epsilon, wire
        )
        streams.append(x_SBTD)
        sublayers_saved.append(saved)
    logits, head_saved = head(x_SBTD, params, norm_epsilon)
    return logits, streams, (sublayers_saved, head_saved)


def run_backward(d_logits, params, tokens_BT, S, sync_widths, rope, saved, wire=exact):
    """Gradient of the S logit parts -> gradient of every parameter."""
    sublayers_saved, head_saved = saved
    gradients = map_arrays(np.zeros_like, params)
    d_x_SBTD = head_backward(d_logits, params, gradients, head_saved)
    for n, name, sync_width in reversed(list(sublayers_in_order(sync_widths))):
        d_x_SBTD = sublayer_backward(
            SUBLAYERS[name][1],
            d_x_SBTD,
            [weights_of_shard(params["layers"][name], n, j, S) for j in range(S)],
            [weights_of_shard(gradients["layers"][name], n, j, S) for j in range(S)],
            sublayers_saved.pop(),
            sync_width,
            rope,
            wire,
        )
    # Every shard's stream began as the same embedding: all D channels are summed.
    if "head" in params:
        d_embedded_BTD = sum(in_parts(d_x_BTD, S, wire) for d_x_BTD in d_x_SBTD)
    else:
        d_embedded_BTD = wire(sum(wire(d_x_BTD) for d_x_BTD in d_x_SBTD))
    embedding_lookup_backward(d_embedded_BTD, gradients["embedding"], tokens_BT, S)
    return gradients


def forward(
    params: dict,
    tokens: np.ndarray,
    *,
    tp_shards: int,
    sync_widths: Sequence[tuple[int, int]],
    rope_base: float,
    rope_scaling: tuple | None = None,
    norm_epsilon: float,
    wire: Callable = exact,
) -> Activations:
    """The model on tokens [B, T]; `sync_widths` are (attention D_s, MLP D_s) of every layer."""
    params, tokens = map_arrays(to_float64, params), np.asarray(tokens)
    rope = (rope_base, rope_scaling)
    logits, streams, _ = run_forward(
        params, tokens, tp_shards, sync_widths, rope, norm_epsilon, wire
    )
    return Activations(np.concatenate(logits, axis=-1), streams[-1], np.stack(streams[1::2]))


def loss(
    params, inputs, targets, *, tp_shards, sync_widths, rope_base, rope_scaling=None, norm_epsilon
):
    """Mean cross-entropy in nats; arguments as `loss_and_gradients`, complex parameters too."""
    params, inputs = map_arrays(to_float64, params), np.asarray(inputs)
    rope = (rope_base, rope_scaling)
    logits, _, _ = run_forward(params, inputs, tp_shards, sync_widths, rope, norm_epsilon)
    return cross_entropy(logits, np.asarray(targets))[0]


def loss_and_gradients(
    params: dict,
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    tp_shards: int,
    sync_widths: Sequence[tuple[int, int]],
    rope_base: float,
    rope_scaling: tuple | None = None,
    norm_epsilon: float,
    wires: tuple[Callable, Callable] = (exact, exact),
    teacher: np.ndarray | None = None,
) -> tuple[float, dict]:
    """inputs [B, T], targets [B, T] (negative: ignored) -> mean cross-entropy of the counted
    targets in nats, or divergence from a teacher's logits [B, T, V], and its gradient as a nested
    dict shaped like `params`, float64."""
    params, inputs = map_arrays(to_float64, params), np.asarray(inputs)
    rope = (rope_base, rope_scaling)
    logits, _, saved = run_forward(
        params, inputs, tp_shards, sync_widths, rope, norm_epsilon, wires[0]
    )
    if teacher is None:
        mean_loss, loss_saved = cross_entropy(logits, np.asarray(targets))
        d_logits = cross_entropy_backward(loss_saved)
    else:
        mean_loss, d_logits = divergence(logits, teacher, np.asarray(targets))
    gradients = run_backward(
        d_logits, params, inputs, tp_shards, sync_widths, rope, saved, wires[1]
    )
    return float(mean_loss), gradients


# ---- The dense model, which knows no shards ---------------------------------------------------


def dense_forward(params, tokens, *, rope_base: float, norm_epsilon: float) -> np.ndarray:
    """Logits [B, T, V] of a plain Llama; on purpose it shares no arithmetic with `forward`."""
    params, tokens = map_arrays(to_float64, params), np.asarray(tokens)
    attention_weights, mlp_weights = params["layers"]["attention"], params["layers"]["mlp"]
    N, _, H, h = attention_weights["query"].shape
    K, T = attention_weights["key"].shape[2], tokens.shape[1]

    def norm(x, gamma):
        return gamma * x / np.sqrt((x**2).sum(-1, keepdims=True) / x.shape[-1] + norm_epsilon)

    def rotate(x_BHTh):
        angle = np.outer(np.arange(T), 1 / rope_base ** (np.arange(0, h, 2) / h))
        first, second = x_BHTh[..., : h // 2], x_BHTh[..., h // 2 :]
        cosine, sine = np.cos(angle), np.sin(angle)
        return np.concatenate(
            [first * cosine - second * sine, second * cosine + first * sine], axis=-1
        )

    x = params["embedding"][tokens]
    for n in range(N):
        weights = {name: weight[n] for name, weight in attention_weights.items()}
        hidden = norm(x, weights["norm"])
        q = rotate(np.einsum("BTD,DHh->BHTh", hidden, weights["query"]))
        k = rotate(np.einsum("BTD,DKh->BKTh", hidden, weights["key"])).repeat(H // K, axis=1)
        v = np.einsum("BTD,DKh->BKTh", hidden, weights["value"]).repeat(H // K, axis=1)
        scores = q @ k.swapaxes(-1, -2) * h**-0.5
        scores[..., np.triu_indices(T, 1)[0], np.triu_indices(T, 1)[1]] = -np.inf
        probabilities = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        x = x + np.einsum("BHTh,HhD->BTD", probabilities @ v, weights["output"])

        weights = {name: weight[n] for name, weight in mlp_weights.items()}
        hidden = norm(x, weights["norm"])
        gate = hidden @ weights["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (hidden @ weights["up"])) @ weights["down"]
    return norm(x, params["final_norm"]) @ params.get("head", params["embedding"].T)


def random_parameters(
    seed: int,
    *,
    layers: int,
    embed_dim: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    vocab_size: int,
    tied_head: bool,
) -> dict:
    """Random float64 parameters of a scale at which each of them matters (not the initialisation
    of METHOD.md), every value exactly a float32 value, so that casting to float32 is exact."""
    random = np.random.default_rng(seed)
    N, D, H, K, h, F = layers, embed_dim, heads, kv_heads, head_dim, mlp_dim

    def normal(*shape, std, mean=0.0):
        return (mean + std * random.standard_normal(shape)).astype(np.float32).astype(np.float64)

    params = {
        "embedding": normal(vocab_size, D, std=2 * D**-0.5),
        "layers": {
            "attention": {
                "norm": normal(N, D, std=0.2, mean=1.0),
                "query": normal(N, D, H, h, std=D**-0.5),
                "key": normal(N, D, K, h, std=D**-0.5),
                "value": normal(N, D, K, h, std=D**-0.5),
                "output": normal(N, H, h, D, std=(H * h) ** -0.5),
            },
            "mlp": {
                "norm": normal(N, D, std=0.2, mean=1.0),
                "gate": normal(N, D, F, std=D**-0.5),
                "up": normal(N, D, F, std=D**-0.5),
                "down": normal(N, F, D, std=F**-0.5),
            },
        },
        "final_norm": normal(D, std=0.2, mean=1.0),
    }
    if not tied_head:
        params["head"] = normal(D, vocab_size, std=2 * D**-0.5)
    return params
