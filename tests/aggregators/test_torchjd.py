"""The bridge to TorchJD, where it is installed, and the message where it is not."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import GLS, IMTLG, DynamicWeightAverage, TorchJD
from lightning_flatmtl.engine import TaskGradients
from tests.helpers import assert_close, assert_identical, fit, module

G = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _bridge(name: str) -> TorchJD:
    from torchjd import aggregation

    return TorchJD(getattr(aggregation, name)())


def _run(bridge: TorchJD, steps: range) -> list[Tensor]:
    found = []
    for i in steps:
        torch.manual_seed(i)
        rows = torch.randn(3, 8, dtype=torch.float64)
        found += [bridge(rows, part="loss"), bridge(2 - rows, part="flat")]
    return found


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_the_message_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_flatmtl.aggregators.torchjd.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"lightning-flatmtl\[torchjd\]\""):
        TorchJD(nn.Identity())


@pytest.mark.skipif(importlib.util.find_spec("torchjd") is None, reason="torchjd not installed")
class TestWithTorchJD:
    def test_gives_what_it_gives(self) -> None:
        from torchjd import aggregation as theirs

        torch.testing.assert_close(TorchJD(theirs.Mean())(G), G.mean(0))
        orthogonal = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        torch.testing.assert_close(TorchJD(theirs.IMTLG())(orthogonal), IMTLG()(orthogonal))

    def test_parts_have_a_copy_each(self) -> None:
        from torchjd.aggregation import Mean

        bridge = TorchJD(Mean())
        assert torch.equal(bridge(G, part="flat"), bridge(G, part="loss"))
        assert bridge._of_part["flat"] is not bridge._of_part["loss"]
        assert bridge.state_dict() == {}

    @pytest.mark.parametrize("name", ["GradVac", "ExcessMTL", "PCD"])
    def test_goes_on_from_what_was_saved(self, name: str) -> None:
        unbroken = _run(_bridge(name), range(6))
        first, second = _bridge(name), _bridge(name)
        _run(first, range(3))
        second.load_state_dict(_through_a_file(first.state_dict()))
        for got, expected in zip(_run(second, range(3, 6)), unbroken[6:], strict=True):
            assert torch.equal(got, expected)
        fresh = _run(_bridge(name), range(3, 6))
        assert not all(map(torch.equal, fresh, unbroken[6:]))

    @pytest.mark.parametrize("name", ["GradVac", "ExcessMTL", "PCD"])
    def test_what_was_saved_does_not_move_on(self, name: str) -> None:
        bridge = _bridge(name)
        _run(bridge, range(3))
        saved = bridge.state_dict()
        before = _through_a_file(saved)
        second = _bridge(name)
        second.load_state_dict(saved)
        _run(bridge, range(3, 6))
        _run(second, range(3, 6))
        assert str(saved) == str(before)

    @pytest.mark.parametrize("name", ["GradVac", "ExcessMTL", "PCD"])
    def test_forgets(self, name: str) -> None:
        bridge = _bridge(name)
        first = _run(bridge, range(3))
        bridge.reset()
        assert all(map(torch.equal, _run(bridge, range(3)), first))

    def test_settings_are_not_part_of_the_state(self) -> None:
        from torchjd.aggregation import GradVac

        first, second = TorchJD(GradVac(beta=0.1)), TorchJD(GradVac(beta=0.9))
        _run(first, range(2))
        second.load_state_dict(first.state_dict())
        assert second.aggregator.beta == 0.9

    def test_a_state_that_cannot_be_saved_is_told(self) -> None:
        from torchjd.aggregation import GradVac

        first = TorchJD(GradVac())
        _run(first, range(2))
        first.aggregator.gramian_weighting._state_key = object()  # as NashMTL's solver is
        with pytest.warns(UserWarning, match="GradVac of TorchJD cannot be saved, so it starts"):
            TorchJD(GradVac()).load_state_dict(first.state_dict())

    def test_other_modules_are_refused(self) -> None:
        with pytest.raises(TypeError, match="scalarizer of torchjd.scalarization, got Identity"):
            TorchJD(nn.Identity())

    def test_versions_with_aggregators_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchjd import aggregation

        monkeypatch.delattr(aggregation, "Weighting")
        monkeypatch.setattr(
            "lightning_flatmtl.aggregators._torchjd_kinds.find_spec", lambda _: None
        )
        torch.testing.assert_close(_bridge("Mean")(G), G.mean(0))
        with pytest.raises(TypeError, match="got MeanWeighting"):
            _bridge("MeanWeighting")


LOSSES = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torchjd", "torchjd.scalarization"))),
    reason="no torchjd with scalarizers",
)
class TestWeightingsAndScalarizers:
    @pytest.mark.parametrize("name", ["AlignedMTL", "PCGrad", "MGDA", "IMTLG"])
    def test_a_weighting_of_the_gram_needs_nothing_else(self, name: str) -> None:
        torch.manual_seed(0)
        expected = _bridge(name)(G)
        bridge = _bridge(f"{name}Weighting")
        assert bridge.requires == "gram"
        torch.manual_seed(0)
        torch.testing.assert_close(bridge(G), expected, rtol=1e-6, atol=1e-8)
        torch.manual_seed(0)
        shown = TaskGradients(torch.empty(3, 0), G @ G.T, ("0", "1", "2"))
        weights = _bridge(f"{name}Weighting").row_weights(shown)
        assert weights is not None
        torch.testing.assert_close(weights @ G, expected, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("name", ["ExcessMTL", "Mean", "Sum", "Random"])
    def test_a_weighting_of_the_matrix_sees_it(self, name: str) -> None:
        bridge = _bridge(f"{name}Weighting")
        assert bridge.requires == "matrix"
        torch.manual_seed(0)
        expected = _bridge(name)(G.float())
        torch.manual_seed(0)
        torch.testing.assert_close(bridge(G.float()), expected)

    def test_one_around_another_sees_what_that_sees(self) -> None:
        from torchjd import aggregation as theirs
        from torchjd.linalg import PSDMatrix

        smooth = TorchJD(theirs.CRMOGMWeighting(theirs.AlignedMTLWeighting()))
        assert smooth.requires == "gram"
        assert TorchJD(theirs.CRMOGMWeighting(theirs.MeanWeighting())).requires == "matrix"
        of_rows = TorchJD(theirs.AlignedMTLWeighting() << (lambda rows: rows @ rows.T))
        assert of_rows.requires == "matrix"
        torch.testing.assert_close(of_rows(G), TorchJD(theirs.AlignedMTLWeighting())(G))

        class Own(theirs.Weighting[PSDMatrix]):
            def forward(self, stat: Tensor) -> Tensor:
                return 1 / stat.diagonal().sqrt()

        torch.testing.assert_close(TorchJD(Own())(G), (G / G.norm(dim=1, keepdim=True)).sum(0))

        class Unsaid(theirs.Weighting):
            def forward(self, stat: Tensor) -> Tensor:
                return stat[0]

        with pytest.raises(TypeError, match=r"a subclass of Weighting\[PSDMatrix\] .* got Unsaid"):
            TorchJD(Unsaid())

    def test_the_weights_of_a_weighting_survive_a_restart(self) -> None:
        from torchjd.aggregation import AlignedMTLWeighting, CRMOGMWeighting

        def make() -> TorchJD:
            return TorchJD(CRMOGMWeighting(AlignedMTLWeighting(), alpha=0.5))

        unbroken = _run(make(), range(6))
        first, second = make(), make()
        _run(first, range(3))
        second.load_state_dict(_through_a_file(first.state_dict()))
        for got, expected in zip(_run(second, range(3, 6)), unbroken[6:], strict=True):
            assert torch.equal(got, expected)
        second.reset()
        assert all(map(torch.equal, _run(second, range(3)), unbroken))

    def test_a_weighting_of_the_gram_trains_without_the_matrix(self) -> None:
        found = {}
        for gradients in ("parameters", "gram"):
            found[gradients] = module(gradients=gradients)
            fit(found[gradients], [_bridge("AlignedMTLWeighting")])
        assert_close(found["gram"], found["parameters"], 1e-10)

    def test_a_scalarizer_weighs_by_its_derivatives(self) -> None:
        from torchjd import scalarization as theirs

        cases = {
            theirs.Sum(): torch.ones(3),
            theirs.Mean(): torch.full((3,), 1 / 3),
            theirs.GeometricMean(): LOSSES.prod() ** (1 / 3) / (3 * LOSSES),
            theirs.Constant(torch.tensor([1.0, 2.0, 3.0])): torch.tensor([1.0, 2.0, 3.0]),
            theirs.STCH(mu=0.5): (LOSSES / 3 / 0.5).softmax(0) / 3,
            theirs.COSMOS(0.0, torch.tensor([2.0, 0.0, 1.0])): torch.tensor([2.0, 0.0, 1.0]),
        }
        for scalarizer, weights in cases.items():
            bridge = TorchJD(scalarizer)
            assert not bridge.needs_gradients
            assert bridge.weighs_losses
            torch.testing.assert_close(bridge(G, losses=LOSSES), weights.double() @ G)
        with pytest.raises(ValueError, match="needs the losses, got none"):
            TorchJD(theirs.Mean())(G)

    @pytest.mark.parametrize("sam", [False, True])
    def test_a_scalarizer_trains_the_heads_too(self, sam: bool) -> None:
        from torchjd.scalarization import GeometricMean

        found, expected = module(), module()
        for model, method in ((found, TorchJD(GeometricMean())), (expected, GLS())):
            fit(model, [method, *([TaskSAM(0.05)] if sam else [])])
        assert_close(found, expected, 1e-10)

    def test_dwa_of_theirs_counts_epochs_and_survives_a_restart(self, tmp_path: Path) -> None:
        from torchjd.scalarization import DWA

        def make() -> TorchJD:
            return TorchJD(DWA())

        found, expected, broken, resumed = module(), module(), module(), module()
        fit(found, [make()], max_epochs=4)
        fit(expected, [DynamicWeightAverage()], max_epochs=4)
        assert_close(found, expected, 1e-10)
        path = tmp_path / "three.ckpt"
        fit(broken, [make()], max_epochs=3).save_checkpoint(path)
        fit(resumed, [make()], max_epochs=4, ckpt_path=path)
        assert_identical(resumed, found)

    @pytest.mark.parametrize(
        ("name", "own"), [("UW", "UncertaintyWeighting"), ("IMTLL", "IMTLL"), ("FAMO", "FAMO")]
    )
    def test_what_learns_by_itself_is_refused(self, name: str, own: str) -> None:
        from torchjd import scalarization

        with pytest.raises(ValueError, match=rf"nothing here would train. Use {own} of light"):
            TorchJD(getattr(scalarization, name)(2))

    @pytest.mark.parametrize("name", ["MoDo", "SDMGrad"])
    def test_what_needs_two_batches_is_refused(self, name: str) -> None:
        from torchjd import aggregation

        weighting = getattr(aggregation, f"{name}Weighting")()
        for given in (weighting, aggregation.CRMOGMWeighting(weighting)):
            with pytest.raises(ValueError, match=rf"of two batches' gradients. Use {name} of"):
                TorchJD(given)
