"""bench --host: operations are counted that compute, fused weights need fewer, and figures are of
the right arm."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from yopo.bench import host
from yopo.commands.command_line import main


def test_views_are_no_operations() -> None:
    x = torch.ones(4, 6)
    with host._Operations() as seen:
        y = x.view(2, 12).t()[1:].unsqueeze(0)
        torch.cat([y, y])
        x.add_(1)
        x[2:].copy_(x[:2])
    assert seen.count == 3


def test_ratios_are_medians_of_each_round() -> None:
    stock, ours = (host.HostArm(name, list, list) for name in (host.STOCK, "ours"))
    for arm, seconds, operations in ((stock, [1, 2, 4], 40), (ours, [1, 1, 1], 10)):
        for phase in host.PHASES:
            arm.seconds[phase], arm.operations[phase] = list(seconds), operations
    figures = host.host_figures([stock, ours])[1]
    assert figures["decode_over_stock"] == 0.5 and figures["decode_ms"] == 1e3
    assert figures["prefill_operations_over_stock"] == 0.25


@pytest.mark.skipif(not hasattr(F, "rms_norm"), reason="torch has no rms_norm")
def test_fused_weights_need_fewer_operations_than_live_ones_and_steps_fewer_than_stock(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "LAYERS", 4)
    threads = torch.get_num_threads()
    assert main(["bench", "--host", "--rounds", "1"]) == 0
    assert torch.get_num_threads() == threads
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["host"]
    rows = {row["arm"]: row for row in found}
    assert next(iter(rows)) == host.STOCK and len(rows) == 7
    for mass in host.MASSES:
        fused, live = (rows[f"25 {mass}, {way}"] for way in ("fused", "live"))
        for phase in host.PHASES:
            assert fused[f"{phase}_operations"] < live[f"{phase}_operations"]
    assert rows["25 drop, fused"]["decode_operations_over_stock"] < 0.9


def test_a_plan_without_a_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--host", "--plan", "7b_16"]) != 0
    assert "with --host: 25 or 12" in capsys.readouterr().err
