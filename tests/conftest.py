"""Fixtures that several test files share: small shapes, models with random weights, and references to compare with.

Random means random everywhere: biases, and norm weights around 1. With the initial values (bias 0, norm 1) a model
whose two norms are swapped and whose biases are all dropped still agrees with the reference to 9e-8.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from experiments.parity import defects
from qwen_min import Qwen, QwenConfig, fast

# On a busy machine an example, or what draws it, may take any time.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

TINY: dict[str, Any] = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 6, "num_key_value_heads": 2, "rope_theta": 1e4, "rms_norm_eps": 1e-6}
TINY |= {"max_position_embeddings": 128, "tie_word_embeddings": False}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Products this small only wait for a second thread: with one, these tests take a quarter of the time."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_draws_in_an_empty_folder_of_its_own(tmp_path, monkeypatch) -> None:
    """What a test writes by a relative path no other one sees."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fast_again() -> Iterator[None]:
    """For tests that turn the fast ways off."""
    yield
    fast.on()


@pytest.fixture(params=["fast", "plain"])
def way(request: pytest.FixtureRequest, fast_again: None) -> str:
    """Both readings of the model: with the wing for speed, and the plain maths alone."""
    if request.param == "plain":
        fast.off()
    return request.param


@pytest.fixture(scope="session")
def make_config() -> Callable[..., QwenConfig]:
    """A tiny configuration (3 query heads to a key/value head), with any field changed."""
    return lambda **fields: QwenConfig(**(TINY | fields))


@pytest.fixture(scope="session")
def shape_of_seed() -> Callable[[int], dict[str, Any]]:
    """A random small shape: seed 0 has H = K, seed 1 has K = 1, the others draw; head tied in every other one."""

    def shape(seed: int) -> dict[str, Any]:
        draw = random.Random(seed)
        kv_heads, group = draw.choice([(1, 4), (2, 2), (2, 3), (3, 2), (1, 7), (4, 2)])
        if seed < 2:
            kv_heads, group = [(4, 1), (1, 5)][seed]
        heads = kv_heads * group
        return {
            "vocab_size": draw.randint(40, 300),
            "hidden_size": heads * draw.choice([4, 6, 8, 16]),
            "intermediate_size": draw.randint(20, 150),
            "num_hidden_layers": draw.randint(1, 4),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rope_theta": draw.choice([1e3, 1e4, 1e6]),
            "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-2]),
            "max_position_embeddings": 128,
            "tie_word_embeddings": seed % 2 == 1,
        }

    return shape


@pytest.fixture(scope="session")
def randomise() -> Callable[[torch.nn.Module, int], None]:
    return defects.randomise


@pytest.fixture
def random_model(make_config) -> Callable[..., Qwen]:
    """A tiny model of ours with random weights; fields of its configuration can be changed."""

    def build(seed: int = 0, **fields: Any) -> Qwen:
        model = Qwen(make_config(**fields)).eval()
        defects.randomise(model, seed)
        return model

    return build


@pytest.fixture
def reference(tmp_path) -> Callable[..., tuple[Path, Any]]:
    """Transformers' own Qwen2 with random weights, and the folder it was saved in.

    `generation` 5 leaves config.json as transformers 5 writes it (rope_parameters, dtype); 4 rewrites it as
    transformers 4 did (rope_theta, torch_dtype). `sharded` splits the weights into many files with an index.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def build(shape: dict[str, Any] | None = None, seed: int = 0, generation: int = 5, sharded: bool = False):
        fields = TINY | (shape or {})
        theta = fields.pop("rope_theta")
        config = Qwen2Config(**fields, rope_parameters={"rope_type": "default", "rope_theta": theta})
        model = Qwen2ForCausalLM._from_config(config, attn_implementation="eager").eval()
        defects.randomise(model, seed)
        model.generation_config.eos_token_id = None
        folder = tmp_path / f"reference-{seed}-{generation}-{sharded}"
        model.save_pretrained(folder, max_shard_size="30KB" if sharded else "5GB")
        assert (folder / "model.safetensors").is_file() != sharded, "the fixture did not write what was asked"
        if generation == 4:
            path = folder / "config.json"
            written = json.loads(path.read_text())
            del written["rope_parameters"]
            written["torch_dtype"] = written.pop("dtype")
            path.write_text(json.dumps(written | {"rope_theta": theta}))
        return folder, model

    return build


@pytest.fixture(scope="session")
def real_checkpoint() -> Path:
    """The folder of official weights that QWEN_MIN_CHECKPOINT names; without it the test is skipped."""
    folder = os.environ.get("QWEN_MIN_CHECKPOINT")
    if not folder:
        pytest.skip("QWEN_MIN_CHECKPOINT is not set: expected a folder with Qwen2.5-0.5B's weights")
    return Path(folder)


@pytest.fixture(scope="session")
def browser():
    """A chromium of this machine; a test that asks for it is skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[browser]'")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium on this machine: its package brings /usr/bin/chromium")
    with sync_api.sync_playwright() as play:
        started = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=str)
def tab(request, browser, html):
    """The page `html` of a module, opened; it may say nothing on the console, and ask for nothing but itself."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: said.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None)
    page.goto(html.as_uri())
    yield page
    assert not said
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
