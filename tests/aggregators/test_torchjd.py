"""The bridge to TorchJD, where it is installed, and the message where it is not."""

import importlib.util

import pytest
import torch
from torch import nn

from lightning_flatmtl.aggregators import IMTLG, TorchJD

G = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


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

    def test_other_modules_are_refused(self) -> None:
        with pytest.raises(TypeError, match="of torchjd.aggregation, got Identity"):
            TorchJD(nn.Identity())
