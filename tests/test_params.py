"""FastTreeParams and the presets: what is taken, what warns, what is refused."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fasttree_cupy.params import PRESETS, FastTreeParams, preset


def test_documented_defaults() -> None:
    params = FastTreeParams()
    assert (params.alpha, params.beta, params.gamma) == (0.66, 0.33, 0.1)
    assert (params.TSQs, params.TSKs, params.kv_group_num) == ([64, 16], [32, 128], 1)


def test_documented_example() -> None:
    params = FastTreeParams()
    params.set_values(alpha=0.7, beta=0.35, gamma=0.12)
    params.set_kv_group_num(4)
    params.set_q_tile_sizes([32, 8])
    params.set_kv_tile_sizes([32, 96])
    assert params == FastTreeParams(0.7, 0.35, 0.12, [32, 8], [32, 96], 4)


def test_lists_are_not_shared() -> None:
    one, other, mine = FastTreeParams(), FastTreeParams(), [32, 8]
    one.set_q_tile_sizes(mine)
    mine[0] = 99
    one.TSKs[0] = 16
    assert one.TSQs == [32, 8]
    assert (other.TSQs, other.TSKs) == ([64, 16], [32, 128])
    assert FastTreeParams().TSKs == [32, 128]


def test_copies_and_pickles() -> None:
    params = FastTreeParams(TSQs=[32, 8])
    for copied in (copy.copy(params), copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert copied == params
        copied.TSQs[0] = 16
        assert params.TSQs == [32, 8]


def test_copies_of_adopted_sizes_do_not_warn() -> None:
    params = FastTreeParams()
    params.adopt_tile_sizes([2, 2], [8, 512])
    copies = [copy.copy(params), copy.deepcopy(params), pickle.loads(pickle.dumps(params)), replace(params)]
    copies += [replace(copied, alpha=0.66) for copied in copies]
    assert copies == [params] * 8
    with pytest.warns(UserWarning, match="TSQs"):
        params.TSQs = [2, 2]


def test_copies_of_what_warned_do_not_warn_again() -> None:
    with pytest.warns(UserWarning, match="gamma"):
        params = FastTreeParams(gamma=2.0, TSKs=[32, 128])
    assert copy.copy(params) == copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params


class Mine(FastTreeParams):
    """Defaults of its own."""

    alpha = 0.8
    TSQs = [32, 8]  # noqa: RUF012  # as the API reference writes it


def test_a_subclass_has_defaults_of_its_own() -> None:
    params = Mine(gamma=0.2)
    assert (params.alpha, params.gamma, params.TSQs, params.TSKs) == (0.8, 0.2, [32, 8], [32, 128])
    params.TSQs[0] = 64
    assert Mine().TSQs == [32, 8]
    assert Mine(0.7).alpha == 0.7
    assert Mine.for_gpu("H100", 4).TSQs == [16, 4]
    assert pickle.loads(pickle.dumps(params)) == params


def test_a_dataclass_of_it_has_defaults_of_its_own() -> None:
    @dataclass
    class Other(FastTreeParams):
        alpha: float = 0.8

    assert (Other().alpha, Other().beta, Other(0.7).alpha, Other().TSQs) == (0.8, 0.33, 0.7, [64, 16])


def test_wrong_defaults_of_a_subclass_are_refused() -> None:
    class Wrong(FastTreeParams):
        gamma = "0.1"  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"gamma is '0\.1', expected a number"):
        Wrong()


def test_the_class_has_the_defaults() -> None:
    assert (FastTreeParams.alpha, FastTreeParams.beta, FastTreeParams.gamma) == (0.66, 0.33, 0.1)
    assert list(FastTreeParams.TSQs) == [64, 16]
    assert weakref.ref(params := FastTreeParams())() is params


def test_other_numbers_are_taken() -> None:
    params = FastTreeParams(alpha=1, beta=np.float32(0.5), TSQs=(16, np.int32(4)), TSKs=np.array([32, 64]))  # type: ignore[arg-type]
    assert type(params.alpha) is float
    assert params.beta == 0.5
    assert params.TSQs == [16, 4]
    assert all(type(size) is int for size in params.TSQs + params.TSKs)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("alpha", "0.5", TypeError, "alpha is '0.5', expected a number"),
        ("alpha", True, TypeError, "alpha is True"),
        ("beta", float("nan"), ValueError, "beta is nan, expected a finite number"),
        ("gamma", float("inf"), ValueError, "gamma is inf"),
        ("gamma", None, TypeError, "gamma is None"),
        ("TSQs", [64], ValueError, "TSQs has 1 entries"),
        ("TSQs", [64, 16, 4], ValueError, "TSQs has 3 entries"),
        ("TSQs", 64, TypeError, "TSQs is 64"),
        ("TSQs", "64", TypeError, "TSQs is '64'"),
        ("TSQs", np.array(64), TypeError, "TSQs is 64, expected two integers"),
        ("TSKs", np.ma.array([32, 64], mask=[0, 1]), TypeError, r"TSKs\[1\] is None, expected an integer"),
        ("TSQs", [8, 16], ValueError, r"TSQs is \[8, 16\], expected TSQs\[0\] >= TSQs\[1\]"),
        ("TSQs", [64, 0], ValueError, r"TSQs\[1\] is 0"),
        ("TSQs", [64, 16.0], TypeError, r"TSQs\[1\] is 16.0"),
        ("TSKs", [-32, 128], ValueError, r"TSKs\[0\] is -32"),
        ("TSKs", [32, True], TypeError, r"TSKs\[1\] is True"),
        ("TSKs", [32, 2**31], ValueError, r"TSKs\[1\] is 2147483648"),
        ("kv_group_num", 0, ValueError, "kv_group_num is 0"),
        ("kv_group_num", 2.0, TypeError, "kv_group_num is 2.0"),
    ],
)
def test_refused(name: str, value: Any, error: type[Exception], message: str) -> None:
    params = FastTreeParams()
    with pytest.raises(error, match=message):
        setattr(params, name, value)
    assert params == FastTreeParams()
    with pytest.raises(error, match=message):
        FastTreeParams(**{name: value})


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'gama'"):
        FastTreeParams().gama = 0.1  # type: ignore[attr-defined]


def test_set_values_sets_all_or_none() -> None:
    params = FastTreeParams()
    with pytest.raises(TypeError, match="gamma"):
        params.set_values(0.5, 0.5, "0.1")  # type: ignore[arg-type]
    assert params == FastTreeParams()


def set_alpha(params: FastTreeParams) -> None:
    params.alpha = 1.5


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (set_alpha, r"alpha is 1\.5; the recommended range of alpha is 0\.0 to 1\.0"),
        (lambda params: FastTreeParams(beta=-0.5), "beta is -0.5"),
        (lambda params: params.set_values(0.5, 0.5, 0.4), "gamma is 0.4"),
        (lambda params: params.set_q_tile_sizes([2, 1]), r"TSQs is \[2, 1\]; .* TSQs\[0\] is 4 to 128"),
        (lambda params: params.set_q_tile_sizes([256, 16]), r"TSQs is \[256, 16\]"),
        (lambda params: params.set_kv_tile_sizes([32, 512]), r"TSKs is \[32, 512\]"),
        (lambda params: params.set_kv_tile_sizes([8, 128]), r"TSKs is \[8, 128\]"),
    ],
)
def test_outside_the_recommended_range_warns_at_the_caller(
    act: Callable[[FastTreeParams], object], message: str
) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        act(FastTreeParams())
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_value_outside_the_recommended_range_is_taken() -> None:
    params = FastTreeParams()
    with pytest.warns(UserWarning, match="gamma"):
        params.gamma = -10
    assert params.gamma == -10.0


@pytest.mark.parametrize(
    ("name", "group", "TSQs"),
    [
        ("H100", 1, [64, 16]),
        ("H100", 4, [16, 4]),
        ("H100", 8, [8, 2]),
        ("H100", 2, [32, 8]),
        ("H100", 16, [4, 1]),
        ("H100", 3, [21, 5]),
        ("H100", 128, [1, 1]),
        ("A100", 1, [48, 12]),
        ("A100", 4, [16, 4]),
        ("A100", 8, [8, 2]),
        ("V100", 1, [32, 8]),
        ("V100", 4, [8, 2]),
        ("V100", 8, [4, 1]),
    ],
)
def test_for_gpu(name: str, group: int, TSQs: list[int]) -> None:
    params = FastTreeParams.for_gpu(name, group)
    assert params == FastTreeParams.for_gpu(name.lower(), group)
    assert (params.TSQs, params.kv_group_num, params.TSKs) == (TSQs, group, [32, 128])


def test_presets_of_the_reference() -> None:
    assert {name: (p.para_threshs1, p.para_threshs2) for name, p in PRESETS.items()} == {
        "H100": ((132, 528), (132, 132)),
        "A100": ((100, 400), (100, 100)),
        "V100": ((80, 320), (80, 80)),
    }
    assert all(p.kv_split_sizes == (1024, 128) for p in PRESETS.values())


@pytest.mark.parametrize(("name", "error"), [("B200", ValueError), (100, TypeError)])
def test_unknown_preset(name: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected one of H100, A100, V100"):
        preset(name)


def test_an_unknown_preset_says_what_an_h200_uses() -> None:
    for ask in (preset, FastTreeParams.for_gpu):
        with pytest.raises(ValueError, match="an H200 uses H100"):
            ask("H200")


def test_for_gpu_checks_the_group() -> None:
    with pytest.raises(ValueError, match="kv_group_num is 0"):
        FastTreeParams.for_gpu("H100", 0)


def test_an_integer_beyond_float_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="alpha is 1000"):
        FastTreeParams(alpha=10**400)
