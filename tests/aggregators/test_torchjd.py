"""The bridge to TorchJD, where it is installed, and the message where it is not."""

import importlib.util
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_flatmtl.aggregators import IMTLG, TorchJD

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
        with pytest.raises(TypeError, match="of torchjd.aggregation, got Identity"):
            TorchJD(nn.Identity())
