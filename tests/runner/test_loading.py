"""From files to a Program: what fits, what is refused, and that the weights are the file's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from octavo.backends.torch.program import TorchProgram
from octavo.config import EngineConfig, choose_backend
from octavo.errors import ConfigError, ModelFileError
from octavo.graph.tensors import StoredTensor
from octavo.runner import quantization
from octavo.runner.loading import load, name_cache, pool_blocks

TOKEN_BYTES = 2 * 2 * 2 * 16 * 2  # K and V, layers, heads, head_dim, fp16


def config(path: Path, **values: object) -> EngineConfig:
    settings = {
        "model": str(path),
        "served_name": "tiny",
        "memory_bytes": 1 << 20,
        "num_threads": 1,
        "backend": "reference",
        **values,
    }
    return EngineConfig(**settings)  # type: ignore[arg-type]


def silent(phase: str, fraction: float) -> None:
    pass


def test_load_reports_phases_and_numbers(tiny_model_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    loaded = load(config(tiny_model_path), lambda *report: seen.append(report))
    assert [phase for phase, _ in seen[:2]] == ["files", "weights"]
    assert seen[-1][0] == "cache"
    assert all(0 <= fraction <= 1 for _, fraction in seen)
    assert loaded.architecture == "LlamaForCausalLM"
    assert loaded.max_model_len == 512
    assert loaded.num_blocks == (1 << 20) // (16 * TOKEN_BYTES)
    assert loaded.program.block_bytes() == 16 * TOKEN_BYTES
    stored = safetensors.numpy.load_file(tiny_model_path / "model.safetensors")
    assert loaded.num_parameters == sum(t.size for t in stored.values())
    loaded.program.close()


def test_a_pool_is_named_by_all_that_its_bytes_depend_on(tiny_model_path: Path) -> None:
    def identity(**values: object) -> str:
        loaded = load(config(tiny_model_path, **values), silent)
        loaded.program.close()
        return loaded.cache_identity

    others: list[dict[str, object]] = [
        {"kv_dtype": "int8"}, {"block_size": 32}, {"quantization": "int8"}, {"backend": "cpu"}
    ]  # fmt: skip
    names = [identity(), *(identity(**values) for values in others)]
    assert len(set(names)) == len(names)
    assert identity(max_num_batched_tokens=64, max_num_seqs=3, served_name="x") == names[0]
    assert identity(backend="cpu", num_threads=2) == names[-1]
    assert name_cache("one", config(tiny_model_path)) != name_cache("two", config(tiny_model_path))


def test_an_int8_cache_holds_more_tokens(tiny_model_path: Path) -> None:
    settings = {"memory_bytes": 100 * TOKEN_BYTES, "kv_dtype": "int8"}
    loaded = load(config(tiny_model_path, **settings), silent)
    token_bytes = 2 * 2 * 2 * (16 + 4)  # K and V, layers, heads, head_dim and a float32 scale
    assert loaded.program.block_bytes() == 16 * token_bytes
    assert loaded.num_blocks == 100 * TOKEN_BYTES // (16 * token_bytes) > 6
    assert loaded.max_model_len == 16 * loaded.num_blocks


def test_an_unknown_kv_dtype_is_refused(tiny_model_path: Path) -> None:
    with pytest.raises(ConfigError, match="--kv-dtype must be fp16, int8 or fp8, not fp4"):
        config(tiny_model_path, kv_dtype="fp4").validate()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("option", ["kv_dtype", "quantization"])
def test_fp8_is_of_the_torch_backend(tiny_model_path: Path, backend: str, option: str) -> None:
    with pytest.raises(ConfigError, match="fp8 needs --backend torch"):
        config(tiny_model_path, **{"backend": backend, option: "fp8"}).validate()


def test_what_only_torch_knows_is_not_ignored(tiny_model_path: Path) -> None:
    for options, message in (
        ({"dtype": "bf16"}, "--dtype is of --backend torch"),
        ({"device": "cuda:1"}, "--device cuda:1 needs --backend torch"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(tiny_model_path, backend="cpu", **options).validate()


@pytest.mark.parametrize(
    ("asked", "device", "has_gpu", "backend"),
    [
        ("auto", None, False, "cpu"),
        ("auto", None, True, "torch"),
        ("auto", "cpu", True, "cpu"),
        ("auto", "cuda", False, "torch"),
        ("torch", "cpu", False, "torch"),
        ("reference", None, True, "reference"),
    ],
)
def test_the_backend_that_is_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: Any, device: str | None, has_gpu: bool,
    backend: str,
) -> None:  # fmt: skip
    driver = tmp_path / "driver"
    if has_gpu:
        driver.touch()
    monkeypatch.setattr("octavo.config._GPU_DRIVERS", (str(driver),))
    assert choose_backend(asked, device) == backend


def test_a_gpu_alone_finds_out_how_much_memory_it_has(tiny_model_path: Path) -> None:
    config(tiny_model_path, memory_bytes=None, backend="torch").validate()
    for elsewhere in ({"backend": "cpu"}, {"backend": "torch", "device": "cpu"}):
        with pytest.raises(ConfigError, match="--memory must be given"):
            config(tiny_model_path, memory_bytes=None, **elsewhere).validate()


@pytest.mark.parametrize(
    ("asked", "spare", "message"),
    [
        (101 * TOKEN_BYTES, 100 * TOKEN_BYTES, "more than the 25,600 that the device has free"),
        (
            None,
            15 * TOKEN_BYTES,
            "has 3,840 bytes free .* needs at least 4,096: lower --max-num-ba",
        ),
    ],
)
def test_what_a_device_has_is_no_more_than_it_has(
    tiny_model_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: int | None,
    spare: int,
    message: str,
) -> None:
    monkeypatch.setattr(TorchProgram, "spare_bytes", lambda program: spare)

    def options(memory_bytes: int | None) -> EngineConfig:
        place = {"backend": "torch", "device": "cpu"}
        return config(tiny_model_path, memory_bytes=memory_bytes, **place)

    with pytest.raises(ConfigError, match=message):
        load(options(asked), silent)
    monkeypatch.setattr(TorchProgram, "spare_bytes", lambda program: 100 * TOKEN_BYTES)
    assert load(options(50 * TOKEN_BYTES), silent).num_blocks == 3
    assert load(options(None), silent).max_model_len == 96


@pytest.mark.parametrize(
    ("backend", "missing", "message"),
    [
        ("torch", "torch", r"--backend torch needs torch: pip install 'octavo\[cuda\]'"),
        ("cpu", "octavo.backends.cpu", "the compiled part of Octavo is missing"),
    ],
)
def test_what_is_not_installed(
    tiny_model_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    missing: str,
    message: str,
) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"no {missing}", name=missing)

    monkeypatch.setattr("octavo.runner.loading.importlib.import_module", fail)
    with pytest.raises(ConfigError, match=message):
        load(config(tiny_model_path, backend=backend), silent)


def test_a_device_that_is_not_there(tiny_model_path: Path) -> None:
    """One sentence with its cure."""
    name = f"cuda:{torch.cuda.device_count()}"
    for device, cure in ((name, "cpu|GPUs"), ("quantum", "give cuda"), ("mps", "give cuda")):
        with pytest.raises(ConfigError, match=cure):
            load(config(tiny_model_path, backend="torch", device=device), silent)


def test_the_context_is_cut_to_the_memory(tiny_model_path: Path) -> None:
    loaded = load(config(tiny_model_path, memory_bytes=100 * TOKEN_BYTES), silent)
    assert loaded.num_blocks == 6
    assert loaded.max_model_len == 96


def test_no_more_blocks_than_can_be_used(tiny_model_path: Path) -> None:
    loaded = load(
        config(tiny_model_path, memory_bytes=1 << 28, max_num_seqs=3, max_model_len=33), silent
    )
    assert loaded.num_blocks == 3 * 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"memory_bytes": 15 * TOKEN_BYTES}, ["needed", f"{16 * TOKEN_BYTES:,}", "--memory"]),
        (
            {"memory_bytes": 64 * TOKEN_BYTES, "max_model_len": 65},
            ["64 tokens", "80", f"{80 * TOKEN_BYTES:,}", "--max-model-len"],
        ),
        ({"max_model_len": 513}, ["513", "512", "lower it"]),
    ],
)
def test_what_cannot_fit_is_refused_with_the_numbers(
    tiny_model_path: Path, values: dict[str, int], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(config(tiny_model_path, **values), silent)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_quantization_makes_smaller_weights(
    tiny_model_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, looked_up = [], []
    seen: list[float] = []
    original = quantization.QuantizedWeights.__getitem__

    def spy(weights: quantization.QuantizedWeights, name: str) -> StoredTensor:
        looked_up.append(name)
        return original(weights, name)

    monkeypatch.setattr(quantization.QuantizedWeights, "__getitem__", spy)
    for name in (None, "int8", "int4"):
        looked_up.clear()
        seen.clear()
        loaded = load(
            config(tiny_model_path, backend=backend, quantization=name),
            lambda phase, fraction: seen.append(fraction),
        )
        sizes.append(loaded.program.weights_bytes)
        loaded.program.close()
        assert max(seen) == 1
        assert len(looked_up) == len(set(looked_up)), "quantized twice"
        assert bool(looked_up) == (name is not None)
    if backend == "cpu":  # the reference unpacks codes to a byte each
        assert sizes[0] > 2 * sizes[1] and sizes[1] > 1.15 * sizes[2]


def test_an_unknown_quantization_is_a_fault() -> None:
    with pytest.raises(ConfigError, match=r"--threads.*; --quantization must be int8, int4 or fp8"):
        config(Path(), num_threads=0, quantization="int2").validate()


def test_pool_blocks_rounds_a_sequence_up() -> None:
    asked = config(Path(), memory_bytes=10_000, max_num_seqs=2, max_model_len=17)
    assert pool_blocks(asked, 10_000, 17, 100) == 4
    assert pool_blocks(asked, 10_000, 17, 3_000) == 3


def changed_copy(source: Path, folder: Path, name: str, tensor: np.ndarray | None) -> Path:
    """A copy of a model's folder with one tensor replaced, or left out."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("tensor", [None, np.zeros((64, 32), np.float32)])
def test_a_missing_or_misshapen_tensor_is_named(
    tiny_model_path: Path, tmp_path: Path, tensor: np.ndarray | None
) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    folder = changed_copy(tiny_model_path, tmp_path / "model", name, tensor)
    with pytest.raises(ModelFileError, match=name):
        load(config(folder), silent)


def test_an_unknown_architecture_names_the_known_ones(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_path, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["architectures"] = ["WhateverForCausalLM"]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelFileError, match=r"WhateverForCausalLM.*LlamaForCausalLM"):
        load(config(folder), silent)
