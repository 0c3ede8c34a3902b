"""Devices and dtypes by name."""

import pytest
import torch

from potstill.core import device
from potstill.core.device import DTYPES, compile_modules, compute_dtype, get_dtype_name, resolve_device, resolve_dtype
from potstill.core.errors import UsageError


def test_a_device_is_found_by_name_and_auto_is_one_that_works() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert torch.empty(1, device=resolve_device()).numel() == 1


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", ""])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be used here"):
        resolve_device(name)


def test_dtypes_go_by_their_names() -> None:
    assert [get_dtype_name(resolve_dtype(name)) for name in DTYPES] == ["float32", "bfloat16"]
    assert resolve_dtype("float32") == torch.float32
    assert [resolve_dtype(name, default="bfloat16") for name in ("auto", "float32")] == [
        torch.bfloat16,
        torch.float32,
    ]
    assert resolve_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(UsageError, match="'float64'; choose"):
        resolve_dtype("float64")


@pytest.mark.parametrize("name", ["float16", "fp16", "half"])
def test_half_precision_is_answered_with_what_to_give(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}.*range.*--dtype bfloat16 or float32"):
        resolve_dtype(name)


@pytest.mark.parametrize("name", ["mps", "mps:0"])
def test_mps_is_answered_with_what_to_give(name: str) -> None:
    with pytest.raises(UsageError, match=r"mps.*float64.*--device cpu"):
        resolve_device(name)


def test_auto_measures_once_and_chooses_one_of_the_two() -> None:
    chosen = resolve_dtype("auto", device_type="cpu")
    assert chosen in DTYPES.values()
    assert resolve_dtype("auto", device_type="cpu") == chosen
    assert compute_dtype("mps") == torch.float32


@pytest.mark.parametrize(
    ("slowdown", "sizes", "fastest"), [(40, [96], "float32"), (2, [96, 768], "float32"), (0.5, [96, 768], "bfloat16")]
)
def test_auto_times_no_large_product_where_bfloat16_is_many_times_slower(
    slowdown: float, sizes: list[int], fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []

    def time_product(dtype: torch.dtype, *, size: int) -> float:
        timed.append(size)
        return slowdown if dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(device, "_time_product", time_product)
    assert get_dtype_name(compute_dtype.__wrapped__("cpu")) == fastest
    assert timed == [size for size in sizes for _ in range(2)]


def test_a_compiler_that_fails_is_named_once_and_modules_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    class Doubled(torch.nn.Linear):  # torch's own modules are not compiled by themselves
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    modules, x = [Doubled(3, 3) for _ in range(2)], torch.ones(2, 3)
    plain = [module(x) for module in modules]
    with compile_modules(modules, backend="nonsense"):
        assert all(torch.equal(module(x), y) for module, y in zip(modules, plain, strict=True))
        assert [list(module.state_dict()) for module in modules] == [["weight", "bias"]] * 2
    (said,) = [one.message for one in caplog.records if one.name == "potstill"]
    assert "torch.compile fails here (" in said
    assert "nonsense" in said


def test_a_module_with_a_scale_is_compiled_since_a_restart_of_the_tracer_is_no_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Attention(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.scaling = 0.3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query = super().forward(x)
            return torch.nn.functional.scaled_dot_product_attention(query, x, x, scale=self.scaling)

    module, x = Attention(), torch.ones(1, 2, 5, 4)
    plain = module(x)
    torch._dynamo.utils.counters.clear()
    with compile_modules([module], backend="aot_eager"):
        torch.testing.assert_close(module(x), plain)
    assert not [record for record in caplog.records if record.name == "potstill"]
    assert torch._dynamo.utils.counters["aot_autograd"]["ok"] == 1
