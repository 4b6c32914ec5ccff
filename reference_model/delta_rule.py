"""The gated delta rule: a memory that is a matrix, forgets by a factor, and is corrected rather than added to.

Attention keeps every key and value, and looks at all of them again for each token. Here a head keeps one matrix S
[dk, dv] instead, whatever the number of tokens: asked with a key k of length one, it answers with the value S^T k. A
value is written under a key by adding the outer product k v^T; keys at right angles do not disturb each other, since
(k v^T)^T k' = v (k . k'). But dk keys at most are at right angles. Only adding, as linear attention does, a second
value under the same key would give the sum of both; so what is added is the difference to what the memory says
already.

For token t with query q, key k, value v, log decay g <= 0 and writing strength beta in (0, 1):

    S  <- exp(g_t) S                          forget a little of everything
    d  =  beta_t (v_t - S^T k_t)              what the memory gets wrong about k_t, times how much to believe v_t
    S  <- S + k_t d^T                         correct it: S^T k_t has moved by beta_t of the way to v_t
    o_t = S^T q_t / sqrt(dk)                  ask it

where q and k have first been divided by their L2 norms, and S starts at zero. In one line this is
``S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T`` (Yang, Kautz and Hatamizadeh 2024, "Gated Delta
Networks", arXiv 2412.06464, equation 10, transposed: their state is [dv, dk]). With beta = 1 a value replaces what was
there, with beta = 0 nothing is written; exp(g) = 0 would clear the memory, g = 0 keeps it. Keys have to be of length
one: then ``I - beta k k^T`` shrinks what is stored along k by 1 - beta and leaves the rest alone, so that nothing can
grow from step to step; a longer key would overshoot.

``recurrent_gated_delta_rule`` is these four lines, for decoding. They are T small steps, each of which waits for the
one before; ``chunked_gated_delta_rule`` computes the same for prefill, 64 tokens at a time in matrix products. They
agree to rounding.

Shapes: B batch, T tokens, Hk query/key heads, Hv value heads, dk key width, dv value width. Query/key head h serves
the Hv / Hk consecutive value heads from h * Hv / Hk on. The state is [B, Hv, dk, dv], always in at least fp32, as is
the arithmetic; the output has the dtype of v.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from reference_model.norm import widen

CHUNK = 64


def l2_normalize(x: Tensor) -> Tensor:
    """Scale the last dimension to length one: ``x / sqrt(sum(x ** 2) + 1e-6)``, in the dtype of x.

    The constant under the root makes a zero vector stay zero.
    """
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rule, one token after another.

    Args:
        q: queries [B, T, Hk, dk], not yet normalised.
        k: keys [B, T, Hk, dk], not yet normalised.
        v: values [B, T, Hv, dv].
        g: log decay [B, T, Hv], <= 0.
        beta: writing strength [B, T, Hv].
        state: memory before the first token [B, Hv, dk, dv]; ``None`` is zero.

    Returns:
        Outputs [B, T, Hv, dv] in the dtype of v, and the memory after the last token.
    """
    dtype, groups = v.dtype, v.shape[2] // q.shape[2]
    q, k, v, g, beta = (widen(x) for x in (q, k, v, g, beta))
    q = l2_normalize(q).repeat_interleave(groups, dim=2) / math.sqrt(q.shape[-1])
    k = l2_normalize(k).repeat_interleave(groups, dim=2)
    memory = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]) if state is None else state.to(v.dtype)
    outputs = []
    for t in range(v.shape[1]):
        memory = memory * g[:, t].exp()[..., None, None]
        wrong = v[:, t] - torch.einsum("bhkv,bhk->bhv", memory, k[:, t])
        memory = memory + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t].unsqueeze(-1) * wrong)
        outputs.append(torch.einsum("bhkv,bhk->bhv", memory, q[:, t]))
    return torch.stack(outputs, dim=1).to(dtype), memory


def chunked_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rule, 64 tokens at a time; arguments and results as ``recurrent_gated_delta_rule``.

    Within a chunk let c_i = g_1 + ... + g_i, and let S be the state before it. A correction d_j that was written
    under k_j has faded by exp(c_i - c_j) when token i has passed, and S itself by exp(c_i). So token i finds, after
    it has forgotten and before it writes,

        exp(c_i) S + sum_{j < i} exp(c_i - c_j) k_j d_j^T

    and its own correction, ``beta_i (v_i - what that says about k_i)``, is

        d_i = beta_i (v_i - exp(c_i) S^T k_i  -  sum_{j < i} exp(c_i - c_j) (k_i . k_j) d_j)

    Each d_i needs those before it, but only linearly. With all d_j on one side these are 64 equations (I + A) d = r
    with A_ij = beta_i exp(c_i - c_j) (k_i . k_j) below the diagonal and zero elsewhere, and r_i = beta_i (v_i -
    exp(c_i) S^T k_i): one inverse of a triangular matrix gives all corrections of the chunk at once (section 3.3 of
    arXiv 2412.06464 gets there by products of Householder-like matrices). With d known, outputs and the next state
    are sums over it:

        o_i = (exp(c_i) S^T q_i + sum_{j <= i} exp(c_i - c_j) (q_i . k_j) d_j) / sqrt(dk)
        S  <- exp(c_64) S + sum_j exp(c_64 - c_j) k_j d_j^T

    In the code 1 / sqrt(dk) is in q from the beginning. ``decay`` is exp(c_i - c_j) for j <= i, ``solve`` (I + A)^-1,
    ``attend`` holds the factors of d_j in o_i, ``read_q`` and ``read_k`` are exp(c_i) q_i and exp(c_i) k_i, and
    ``write_k`` is exp(c_64 - c_j) k_j, with tokens as columns.

    Every exponent is <= 0, so nothing overflows. A, its inverse and the q . k products need no state: they are
    computed for all chunks together. Only d = solve r and the last two formulas run chunk after chunk.
    """
    dtype, tokens = v.dtype, v.shape[1]
    # n chunks of 64: q and k [B, Hk, n, 64, dk], v [B, Hv, n, 64, dv], g and beta [B, Hv, n, 64]
    q, k, v, g, beta = (_chunks(widen(x)) for x in (q, k, v, g, beta))
    q, k = l2_normalize(q) / math.sqrt(q.shape[-1]), l2_normalize(k)
    memory = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state.to(v.dtype)

    c = g.cumsum(-1)
    earlier = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=v.device).tril()
    decay = (c.unsqueeze(-1) - c.unsqueeze(-2)).masked_fill(~earlier, -math.inf).exp()
    groups = v.shape[1] // k.shape[1]
    key_products = (k @ k.transpose(-1, -2)).repeat_interleave(groups, dim=1)
    query_products = (q @ k.transpose(-1, -2)).repeat_interleave(groups, dim=1)
    q, k = (x.repeat_interleave(groups, dim=1) for x in (q, k))

    solve = invert_unit_lower((beta.unsqueeze(-1) * decay * key_products).tril(-1))
    attend = decay * query_products
    since_start = c.exp().unsqueeze(-1)
    until_end = (c[..., -1:] - c).exp().unsqueeze(-1)
    read_q, read_k, write_k = q * since_start, k * since_start, (k * until_end).transpose(-1, -2)
    whole_chunk = c[..., -1].exp()[..., None, None]
    strength = beta.unsqueeze(-1)

    outputs = []
    for n in range(v.shape[2]):  # corrections and outputs are [B, Hv, 64, dv]
        corrections = solve[:, :, n] @ (strength[:, :, n] * (v[:, :, n] - read_k[:, :, n] @ memory))
        outputs.append(read_q[:, :, n] @ memory + attend[:, :, n] @ corrections)
        memory = whole_chunk[:, :, n] * memory + write_k[:, :, n] @ corrections
    return torch.cat(outputs, dim=2)[:, :, :tokens].transpose(1, 2).to(dtype), memory


def invert_unit_lower(a: Tensor) -> Tensor:
    """Inverse of ``I + a`` for strictly lower triangular a [..., n, n], n a power of two; in the dtype of a.

    Halves are inverted together and joined: ``[[P, 0], [C, Q]]^-1 = [[P', 0], [-Q' C P', Q']]``, which is as stable as
    substitution. The shorter product ``(I - a)(I + a^2)(I + a^4)...`` is not: when the tokens of a chunk repeat, its
    powers reach 1e17 and cancel.
    """
    n = a.shape[-1]
    if n <= 16:
        return _invert_small(a)
    half = n // 2
    p, q = invert_unit_lower(torch.stack((a[..., :half, :half], a[..., half:, half:]))).unbind()
    corner = -(q @ a[..., half:, :half] @ p)
    return torch.cat((torch.cat((p, torch.zeros_like(p)), dim=-1), torch.cat((corner, q), dim=-1)), dim=-2)


def _invert_small(a: Tensor) -> Tensor:
    """The same joining, from blocks of one up, with all corners of one size in one product of whole matrices."""
    n = a.shape[-1]
    index = torch.arange(n, device=a.device)
    inverse = torch.eye(n, dtype=a.dtype, device=a.device)
    block = 1
    while block < n:
        row, column = index[:, None] // block, index[None, :] // block
        corners = (row % 2 == 1) & (column == row - 1)
        inverse = inverse - inverse @ (a * corners) @ inverse
        block *= 2
    return inverse.expand_as(a)


def _chunks(x: Tensor) -> Tensor:
    """[B, T, H, ...] -> [B, H, T / 64, 64, ...], padded with tokens that neither decay nor write (all zeros)."""
    missing = -x.shape[1] % CHUNK
    padded = functional.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
    heads_first = padded.transpose(1, 2)
    return heads_first.reshape(*heads_first.shape[:2], -1, CHUNK, *x.shape[3:])
