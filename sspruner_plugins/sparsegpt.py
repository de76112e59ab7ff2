"""SparseGPT: zero weights of a linear layer and update the others to compensate, by optimal brain surgery.

    H = X^T X / tokens + lambda I          X (tokens, in): the layer's input; lambda = percdamp * mean live diagonal
    H^-1 = U^T U, U upper triangular       U_jj^2 = [(H_jj..)^-1]_jj, where columns j and later are still free
    for each block of columns:
        keep   chosen by W_ij^2 / U_jj^2, from the weights as updated so far
        for each column j:  e = W_j / U_jj where column j is not kept, else 0;   W_k -= e U_jk for all k >= j

Source: Frantar & Alistarh, arXiv 2301.00774, Algorithm 1 and section 3.3. Rows outside the budget's rows are not
changed. A column that is never active has H_jj = 0: its weights score 0, so they are removed first, and neither cause
nor receive an update. importance() is W_ij^2 / [H^-1]_jj, the increase of the layer's mean squared error if that one
weight is removed and all others adapt; reduce() is the algorithm above.

Cost, in fp64: tokens * in^2 for H, in^3 for U, out * in^2 for the updates; memory in^2 + out * in for each layer.
Axes: weight. Options: percdamp=0.01; block=128, columns whose zeros are chosen at once. For N:M patterns the paper
takes block = M, which is a little better; block must be a multiple of M.
"""

import torch

import sspruner


class SparseGPT(sspruner.Scorer):
    """Scorer of SparseGPT, which also updates the remaining weights."""

    name, axes, needs, granularity = "sparsegpt", {"weight"}, "activations", "tensor"
    token_sums = ("gram", "tokens")

    def __init__(self, percdamp: float = 0.01, block: int = 128) -> None:
        if not isinstance(percdamp, int | float) or isinstance(percdamp, bool) or not 0 <= percdamp < 1:
            raise sspruner.InputError(
                f"scorer 'sparsegpt': percdamp={percdamp!r}; must be a number, at least 0 and below 1"
            )
        if not isinstance(block, int) or isinstance(block, bool) or block < 1:
            raise sspruner.InputError(
                f"scorer 'sparsegpt': block={block!r}; must be a whole number of columns, at least 1"
            )
        self.percdamp, self.block, self.tokens = percdamp, block, 0
        self.gram: torch.Tensor | float = 0.0  # sum_t x x^T: fp64 (in, in)

    def observe(self, view: sspruner.SSMView) -> None:
        x = view.inputs["weight"].double()  # (tokens, in)
        if not self.tokens:
            self.weight = view.weights["weight"][..., 0].double()  # (out, in)
        self.gram = self.gram + x.T @ x
        self.tokens += len(x)

    def importance(self) -> torch.Tensor:
        factor, dead = self._factor()
        return self._saliency(self.weight, factor.square().sum(0), dead)  # diagonal of H^-1 = U^T U

    def reduce(self, choose: sspruner.Choose) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        factor, dead = self._factor()
        weight, keep = self.weight.clone(), torch.ones_like(self.weight, dtype=torch.bool)
        for start in range(0, weight.shape[1], self.block):
            now = slice(start, min(start + self.block, weight.shape[1]))
            later = slice(now.stop, None)
            corner = factor[now, now]  # (block, block)
            scores = self._saliency(weight[:, now], corner.diagonal().square(), dead[now])  # (out, block)
            keep[:, now] = choose(scores).to(keep.device)
            columns = weight[:, now].T.contiguous()  # (block, out): columns as rows, which is quicker
            errors = torch.zeros_like(columns)
            for j, kept in enumerate(keep[:, now].T):
                errors[j] = columns[j].masked_fill(kept, 0) / corner[j, j]
                columns[j:].addr_(corner[j, j:], errors[j], alpha=-1)
            weight[:, now] = columns.T
            weight[:, later] -= errors.T @ factor[now, later]
        return keep, {"weight": weight.masked_fill(~keep, 0).float()}

    def _saliency(self, weight: torch.Tensor, inverse: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
        """Return W_ij^2 / inverse_j, 0 in dead columns: (out, columns)."""
        return (weight.square() / inverse).masked_fill(dead, 0)

    def _factor(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return U (in, in), and which columns are never active (in,).

        Raises InputError if the data cannot determine U.
        """
        if not self.tokens:
            raise sspruner.InputError(
                "no calibration token reaches this layer; use more text, or leave it out with ignore"
            )
        columns = self.weight.shape[1]
        if self.tokens < columns:
            raise sspruner.InputError(
                f"{self.tokens} calibration tokens do not determine a Hessian of {columns} columns; raise --samples or "
                f"--seq-len to at least {columns} tokens in all"
            )
        hessian = torch.as_tensor(self.gram) / self.tokens
        diagonal = hessian.diagonal()  # a view
        dead = diagonal == 0
        scale = diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(())
        diagonal += self.percdamp * scale
        diagonal[dead] = scale
        # Reversing rows and columns turns H = L L^T into H = R R^T with R upper triangular: U = R^-1.
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if failed:
            raise sspruner.InputError(f"the Hessian is singular with percdamp={self.percdamp:g}; raise it")
        identity = torch.eye(columns, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True), dead


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [SparseGPT]
