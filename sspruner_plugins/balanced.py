"""Balanced truncation: keep the directions of the state that are both reached and read, instead of coordinates.

In Mamba2 the decay is one number per head, so a change of basis of a group's state, shared by its heads, does not
change the layer: B' = R B, C' = R^-T C. Balanced truncation takes the basis in which each coordinate is reached by
inputs and read by outputs equally strongly, and keeps the first k. Per B/C group, over tokens t, heads k and head
channels p:

    W_c = sum w_t[k,p] h_t[k,p] h_t[k,p]^T        W_o = sum C_t C_t^T                             (N, N)
    W_c = L_c L_c^T    W_o = L_o L_o^T    L_o^T L_c = U S V^T
    decode = L_c V S^-1/2    encode = S^-1/2 U^T L_o^T    encode decode = I

S holds the empirical Hankel singular values; the importance of direction i is S_i per token. Of all projectors Pi of
rank k, decode_k encode_k minimises || L_o^T (I - Pi) L_c ||, the error of y if C and h were independent in time.

In a gated delta net k and q take the place of B and C, and the basis is orthogonal, since writing and erasing share
one key: `least_readout.py`, from E[q q^T] and E[k k^T] alone; S_i is the square root of the error that i directions
leave.

weights="output" (default): w is the squared gain from y to the mixer's output, through gate, norm and out_proj
(docs/scorers/ghost.md). weights="none": w = 1, the error of y itself.

Source: balanced truncation (Moore, IEEE TAC 26, 1981) with empirical Gramians; ours for Mamba2, see docs/balanced.md.
Cost: one Gramian for each layer and batch, with weights about as much as GHOST and half a forward; memory of one chunk;
one eigen- and singular value decomposition of (N, N) per group. Axes: state, of Mamba2-type mixers and gated delta
nets.
"""

import torch

import sspruner
from sspruner.calibrate.state import observability as second_moment
from sspruner.graph.family import DeltaProjected
from sspruner_plugins.least_readout import least_readout_basis

RIDGE = 1e-9  # relative to the mean of the diagonal: directions that no token reached or read come last in order
TINY = 1e-30  # for groups that no token reached or read at all


class Balanced(sspruner.Scorer):
    """Scorer of balanced truncation."""

    name, axes, needs, basis = "balanced", {"state"}, "activations", "balanced"
    spectrum = "Hankel singular values"
    token_sums = ("tokens", "reached", "read")

    def __init__(self, weights: str = "output") -> None:
        if weights not in ("output", "none"):
            raise sspruner.InputError(f"scorer 'balanced': weights={weights!r}; known: output, none")
        self.weights = weights
        self.tokens = 0
        self.reached: torch.Tensor | float = 0.0  # W_c, (G, N, N)
        self.read: torch.Tensor | float = 0.0  # W_o, (G, N, N)
        self.orthogonal = False  # of a delta rule: `reached` is the sum of k k^T then

    def observe(self, view: sspruner.SSMView) -> None:
        self.tokens += view.tokens
        self.orthogonal = isinstance(view.projected, DeltaProjected)
        if self.orthogonal:
            self.reached = self.reached + second_moment(view.B, view.mask)
        else:
            self.reached = self.reached + (view.weighted_gramian if self.weights == "output" else view.gramian)
        self.read = self.read + view.observability

    def importance(self) -> torch.Tensor:
        size = torch.as_tensor(self.read).shape[-1]
        if self.tokens < size:  # the Gramians have no more directions than tokens
            raise sspruner.InputError(
                f"{self.tokens} calibration tokens do not determine Gramians of {size} directions; raise --samples or "
                f"--seq-len to at least {size} tokens in all"
            )
        reached, read = torch.as_tensor(self.reached), torch.as_tensor(self.read)
        if self.orthogonal:
            self.decode, errors = least_readout_basis(read, reached)
            self.encode = self.decode.mT
            return errors.clamp_min(0).flip(-1).cummax(-1).values.flip(-1).sqrt()  # not rising, whatever the rounding
        self.encode, self.decode, values = balance(reached, read)
        return values / self.tokens

    def coordinates(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encode, self.decode


def balance(reached: torch.Tensor, read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return encode (G, N, N), decode (G, N, N) and the Hankel singular values (G, N), largest first, of two Gramians.

    reached, read: W_c and W_o, fp64 (G, N, N), symmetric, positive semidefinite up to rounding.
    """
    from_inputs, to_outputs = _root(reached), _root(read)
    U, S, Vh = torch.linalg.svd(to_outputs.mT @ from_inputs)  # (G, N, N), (G, N), (G, N, N)
    scale = S.clamp_min(TINY).rsqrt()  # (G, N)
    decode = from_inputs @ Vh.mT * scale[:, None]
    encode = scale[:, :, None] * (U.mT @ to_outputs.mT)
    return encode, decode, S


def _root(gramian: torch.Tensor) -> torch.Tensor:
    """Return L with L L^T = W, with all eigenvalues above a small floor: (G, N, N)."""
    values, vectors = torch.linalg.eigh(gramian)  # (G, N), (G, N, N)
    floor = RIDGE * gramian.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) + TINY  # (G, 1)
    root: torch.Tensor = vectors * values.maximum(floor).sqrt()[:, None]
    return root


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [Balanced]
