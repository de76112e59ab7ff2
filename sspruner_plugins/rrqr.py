"""RRQR: the states whose inputs span those of all others, by a QR with column pivoting of a group's B.

    X = the B_t of group g, stacked over all tokens (tokens, N);  X P = Q R,  |R_11| >= |R_22| >= ...
    S[g,n] = |R_kk| / sqrt(tokens)      state n is the k-th pivot: the RMS of what B_n adds to the earlier pivots

Source: Nazari & Rusch, "The Key to State Reduction in Linear Attention", arXiv 2602.04852, whose keys are our B; the
pivoting is that of Businger & Golub (1965). Keeping k states keeps the first k pivots: a selection that looks at the
span, not at each state alone. It sees neither C nor how long a state remembers.

X is never stored, only its Gram matrix in fp64, whose pivoted Cholesky factorisation has the pivots of the QR. A Gram
matrix squares singular values: below 1e-7 of the largest, states count as linearly dependent. They come after all
pivots, by their own energy. Of equal residuals the first state is the pivot; in fp64 S falls from pivot to pivot.

variant="energy" leaves out the pivoting: S[g,n] = sqrt(E[B_n^2]), the energy of keys. It is a bad choice, kept for
comparison (docs/scorers/rrqr.md): what is written often is not what is read.

Cost: N^2 per token and group, N^3 at the end. Axes: state. Options: variant="pivoted" (default) or "energy".
"""

import torch

import sspruner


class RRQR(sspruner.Scorer):
    """Scorer of rank-revealing QR."""

    name, axes, needs = "rrqr", {"state"}, "activations"
    token_sums = ("gram", "tokens")

    def __init__(self, variant: str = "pivoted") -> None:
        if variant not in ("pivoted", "energy"):
            raise sspruner.InputError(f"scorer 'rrqr': variant={variant!r}; known: pivoted, energy")
        self.variant = variant
        self.gram: torch.Tensor | float = 0.0  # sum_t B_t B_t^T: fp64 (G, N, N)
        self.tokens = 0

    def observe(self, view: sspruner.SSMView) -> None:
        B = view.B[view.mask].double()  # (tokens, G, N)
        self.gram = self.gram + torch.einsum("tgn,tgm->gnm", B, B)
        self.tokens += view.tokens

    def importance(self) -> torch.Tensor:
        if self.variant == "energy":
            return (torch.as_tensor(self.gram).diagonal(dim1=-2, dim2=-1) / max(self.tokens, 1)).sqrt()
        return torch.stack([pivoted(gram / max(self.tokens, 1)) for gram in torch.as_tensor(self.gram)])


def pivoted(gram: torch.Tensor) -> torch.Tensor:
    """Return |R_kk| of the QR with column pivoting of X, for each column of X: fp64 (N,). gram: X^T X, fp64 (N, N)."""
    energy = gram.diagonal()
    residual = energy.clone()  # (N,): energy of each column outside the span of the pivots so far
    waiting = torch.ones_like(energy, dtype=torch.bool)
    R = gram.new_zeros(0, len(gram))  # rows of R, its columns in the order of X's
    dependent = len(gram) * torch.finfo(gram.dtype).eps * energy.amax()  # an energy of rounding errors
    # Dependent columns: below every pivot, in the order of their own energies.
    score = 0.5 * (dependent * energy / energy.amax().clamp_min(torch.finfo(gram.dtype).tiny)).sqrt()
    last = torch.inf
    for _ in range(len(gram)):
        pivot = int(torch.where(waiting, residual, -torch.inf).argmax())
        if residual[pivot] <= dependent:
            break
        row = (gram[pivot] - R[:, pivot] @ R) / residual[pivot].sqrt()
        last = min(float(residual[pivot].sqrt()), last * (1 - 1e-6))  # strictly falling, for fp32 and equal residuals
        score[pivot], waiting[pivot] = last, False
        R, residual = torch.cat([R, row[None]]), residual - row.square()
    return score


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [RRQR]
