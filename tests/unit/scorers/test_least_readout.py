"""The orthogonal basis of a delta rule's keys: its errors by hand, its order, and what it costs on a model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner_plugins import least_readout
from sspruner_plugins.least_readout import least_readout_basis, readout_errors
from support.examples import examples
from support.scoring import calibrated
from support.tiny import tokens
from support.zoo import zoo


@st.composite
def moments(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw E[q q^T] and E[k k^T]: fp64 (G, N, N), of few tokens or many, with directions of very different sizes."""
    G, N, rows = draw(st.integers(1, 2)), draw(st.integers(2, 6)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = 10 ** (torch.rand(2, G, 1, N, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0, 2, 4])))
    X = torch.randn(2, G, rows, N, generator=generator, dtype=torch.float64) * scale
    read, written = X.mT @ X
    return read, written


@given(moments(), st.integers(0, 99))
def test_errors_are_the_traces_that_they_stand_for(drawn: tuple[torch.Tensor, torch.Tensor], seed: int) -> None:
    read, written = drawn
    G, N = read.shape[:2]
    U = torch.linalg.qr(torch.randn(G, N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    errors = readout_errors(U, read, written)
    for k in range(N):
        rest = torch.eye(N, dtype=torch.float64) - U[:, :, :k] @ U[:, :, :k].mT
        by_hand = (rest @ read @ rest @ written).diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(errors[:, k], by_hand, rtol=1e-6, atol=1e-9 * float(errors.abs().max()))


@examples(10)
@given(moments())
def test_the_basis_is_orthogonal_and_no_worse_than_where_it_starts(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    read, written = (least_readout._unit_trace(moment) for moment in drawn)
    U, errors = least_readout_basis(*drawn)
    torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[-1], dtype=torch.float64).expand_as(U), rtol=0, atol=1e-9)
    torch.testing.assert_close(errors, readout_errors(U, read, written), rtol=1e-6, atol=1e-12)
    starts = [torch.linalg.eigh(m).eigenvectors.flip(-1) for m in (read, written, read + written)]
    found = least_readout._cost(U, read, written)
    for start in starts:
        assert (found <= least_readout._cost(start, read, written) + 1e-9).all()


def test_what_is_neither_read_nor_written_goes_first() -> None:
    """Two directions that are read and written beside two that are not: the first two hold all, in any order."""
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    busy = torch.diag(torch.tensor([0.0, 4.0, 0.0, 1.0], dtype=torch.float64))
    moment = (rotation @ busy @ rotation.T)[None]
    U, errors = least_readout_basis(moment, moment)
    assert errors[0, 2] < 1e-9 * errors[0, 0]
    kept = U[0, :, :2] @ U[0, :, :2].T
    torch.testing.assert_close(kept @ rotation[:, [1, 3]], rotation[:, [1, 3]], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_5_text", "olmo_hybrid"])
def test_on_a_delta_rule_it_beats_a_random_basis(family: str) -> None:
    """KL to the dense model with half of the directions; and `weights` changes nothing there."""
    ids = tokens(6, 24)
    dense = zoo(family)(ids, use_cache=False).logits.log_softmax(-1)

    def damage(**how: object) -> float:
        model = zoo(family)
        sspruner.prune(model, "balanced", keep=3, calibration=calibrated(ids), axis="state", **how)
        logits = model(ids, use_cache=False).logits.log_softmax(-1)
        return float((dense.exp() * (dense - logits)).sum(-1).mean())

    model = zoo(family)
    scores = sspruner.score(model, "balanced", calibration=calibrated(ids), axis="state")
    for name, (encode, decode) in scores.bases.items():
        torch.testing.assert_close(encode @ decode, torch.eye(6).expand(2, 6, 6), rtol=0, atol=1e-5, msg=name)
        torch.testing.assert_close(encode, decode.mT)
    found = damage()
    assert found == damage(options={"weights": "none"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sspruner_plugins.balanced.least_readout_basis", lambda read, written: _last_first(read, written))
        assert found < damage()


def _last_first(read: torch.Tensor, written: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same basis in the wrong order."""
    U, errors = least_readout_basis(read, written)
    return U.flip(-1).contiguous(), errors
