"""The closed-form cost of a convolution's forms: bytes by hand, and what the device's rates make of them."""

from dataclasses import replace

import pytest
import torch

from prunetrain_kernels.cost.convolution import Convolution, Form, RoofCost, flops, traffic
from prunetrain_kernels.cost.roof import Roof, measure_roof

CONV = Convolution(2, (8, 8), (4, 4), (3, 3), (2, 2), (1, 1), (1, 1), 32, 24, 64, 40, itemsize=2)
IN, OUT = 2 * 8 * 8 * 2, 2 * 4 * 4 * 2  # bytes of one channel
UNION = Form()


@pytest.mark.parametrize(
    ("form", "places", "expected"),
    [
        (UNION, False, (3 * 32 * IN + 3 * 64 * OUT, 5 * 64 * OUT, 0)),
        (Form(True, False, "expanded"), False, (3 * 32 * IN + 3 * 64 * OUT, 5 * 64 * OUT, 0)),
        (Form(True, False, "triton"), False, (3 * 32 * IN + 3 * 64 * OUT, 56 * IN + 5 * 64 * OUT, 0)),
        (Form(True, False, "naive"), False, (3 * 24 * IN + 3 * 64 * OUT, 5 * 64 * OUT, (4 * 32 + 2 * 24) * IN)),
        (Form(False, True, "triton"), True, (3 * 32 * IN + 3 * 40 * OUT, 5 * 40 * OUT, 0)),
        (Form(False, True, "triton"), False, (3 * 32 * IN + 3 * 40 * OUT, (5 * 64 + 2 * 104) * OUT, 0)),
        (Form(False, True, "expanded"), False, (3 * 32 * IN + 3 * 40 * OUT, 5 * 64 * OUT, 2 * 104 * OUT)),
        (Form(False, True, "naive"), False, (3 * 32 * IN + 3 * 40 * OUT, 5 * 64 * OUT, (2 * 104 + 2 * 64) * OUT)),
    ],
)
def test_bytes_by_hand(form: Form, places: bool, expected: tuple[int, int, int]) -> None:
    assert traffic(replace(CONV, places=places), form) == expected


def test_flops_by_hand() -> None:
    assert flops(CONV, UNION) == 2 * 2 * 16 * 9 * 32 * 64
    assert flops(CONV, Form(True, True, "naive")) == 2 * 2 * 16 * 9 * 24 * 40
    assert flops(replace(CONV, in_live=17), Form(True, False, "naive"), 8) == 2 * 2 * 16 * 9 * 24 * 64


def test_time_follows_the_rates() -> None:
    naive = Form(True, True, "naive")
    slow_index = RoofCost(Roof(100.0, {"fp32": 1.0}, 0.0, index_gb_s=1.0))
    slow_arithmetic = RoofCost(Roof(100.0, {"fp32": 1e-3}, 0.0, index_gb_s=100.0))
    assert slow_index(CONV, naive) > slow_index(CONV, UNION)
    assert slow_arithmetic(CONV, naive) < slow_arithmetic(CONV, UNION)
    own, passes, indexed = traffic(CONV, naive)
    arithmetic = 3 * flops(CONV, naive) / 1e12  # whole multiples of 8: nothing is rounded
    assert slow_index(CONV, naive) == pytest.approx(max(own / 1e11, arithmetic) + passes / 1e11 + indexed / 1e9)
    assert "1 by index" in str(slow_index)
    # Without a rate of its own a pass by index goes at that of a copy; without an input gradient there are two kernels.
    unknown = RoofCost(Roof(100.0, {"fp32": 1e-3}, 0.0))
    assert unknown(CONV, naive) == pytest.approx(slow_arithmetic(CONV, naive))
    first = replace(CONV, input_gradient=False)
    assert slow_arithmetic(first, UNION) - slow_arithmetic(CONV, UNION) == pytest.approx(-flops(CONV, UNION) / 1e9)


def test_each_backend_has_its_price() -> None:
    """Where FLOPs decide, a convolution by index at a fifth of the rate is worth it only below a fifth of the FLOPs."""
    cost = RoofCost(Roof(1e6, {"fp32": 1.0}, 0.0))
    same_rate = replace(cost, efficiency={})
    for live, by_index_is_faster in ((2, True), (8, True), (24, False), (56, False)):
        conv = replace(CONV, in_full=64, in_live=live, out_full=64, out_live=64)
        by_index, expanded = (Form(True, False, backend) for backend in ("triton", "expanded"))
        assert (cost(conv, by_index) < cost(conv, expanded)) == by_index_is_faster
        assert same_rate(conv, by_index) < same_rate(conv, expanded)
        assert cost(conv, expanded) == same_rate(conv, expanded)
        arithmetic = 3 * flops(conv, by_index, 8) / 1e12
        assert cost(conv, by_index) - same_rate(conv, by_index) == pytest.approx(4 * arithmetic)
    assert cost(CONV, UNION) == same_rate(CONV, UNION)


def test_a_roof_is_measured() -> None:
    roof = measure_roof(torch.device("cpu"), quick=True)
    assert roof.index_gb_s is not None
    assert roof.launch_us is not None
    assert min(roof.gb_s, roof.tflop_s["fp32"], roof.index_gb_s, roof.launch_us) > 0
