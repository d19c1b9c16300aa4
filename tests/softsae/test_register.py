"""Architectures of the user's own: the one in README.md, and what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import softsae
from softsae import AutoencoderConfig, RegularizerConfig, TrainConfig, Trainer
from softsae.architectures import ARCHITECTURES
from softsae.cli import main
from softsae.plugins import import_plugin
from softsae.selectors.topk import TopK

ROOT = Path(softsae.__file__).parents[1]


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Nothing stays registered or imported."""
    built_in = dict(ARCHITECTURES)
    yield
    ARCHITECTURES.clear()
    ARCHITECTURES.update(built_in)
    sys.modules.pop("group_topk", None)


def examples() -> list[str]:
    """The code of README.md's section."""
    section = (
        (ROOT / "README.md").read_text().split("### A selection rule of your own\n")[1].split("\n### ")[0]
    )
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def plugin(tmp_path) -> Path:
    file = tmp_path / "group_topk.py"
    file.write_text(examples()[0])
    return file


@pytest.fixture
def activations() -> torch.Tensor:
    return torch.randn(600, 24, generator=torch.Generator().manual_seed(0))


def trained(activations, **fields):
    config = AutoencoderConfig(n=64, k=8, architecture="grouptopk", **fields)
    train = TrainConfig(steps=20, batch_size=32, dead_after=100, device="cpu", log_every=10)
    return Trainer(config, train, progress=False).fit(activations)


def test_the_example_of_the_readme_runs(plugin, activations, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import_plugin("group_topk.py")
    import_plugin(str(plugin))  # the same file: not twice
    use = examples()[1].replace("steps=1000", "steps=10, batch_size=64, device='cpu'")
    names = {"activations": activations, "x": activations[:5], "softsae": softsae}
    exec(use, names)
    sae, latents = names["sae"], names["latents"]
    assert latents.shape == (5, 512)
    assert (latents.unflatten(1, (4, 128)) != 0).sum(2).tolist() == [[4] * 4] * 5
    assert sae.config.options == names["GroupTopKConfig"](groups=4)
    assert (tmp_path / "grouped" / "sae.safetensors").is_file()
    a = torch.relu(sae.pre_activations(activations[:5]))
    for row, kept in zip(a, latents, strict=True):
        for group in range(4):
            here = slice(128 * group, 128 * (group + 1))
            assert set(row[here].topk(4).indices.tolist()) == set(kept[here].nonzero().flatten().tolist())


def test_its_loss_term_takes_part_and_all_else_works(plugin, activations):
    import_plugin(str(plugin))
    terms = []
    for weight in (0.0, 50.0):
        sae = trained(activations, options={"coherence_weight": weight}, matryoshka=[0.5, 0.5])
        rows = sae.W_dec.detach().reshape(8, 8, -1)
        pairs = [(rows[g, i] @ rows[g, j]) ** 2 for g in range(8) for i in range(8) for j in range(i)]
        terms.append((sum(pairs) / (8 * 64)).item())
        assert sae(activations).losses["coherence"].item() == pytest.approx(terms[-1], rel=1e-4)
    assert terms[1] < 0.9 * terms[0]
    assert (sae.encode(activations, k=3) != 0).sum(1).tolist() == [3] * 600
    train = TrainConfig(steps=5, batch_size=32, device="cpu", regularizer=RegularizerConfig(r1_weight=1.0))
    config = AutoencoderConfig(n=64, k=8, architecture="grouptopk")
    logged = []
    Trainer(config, train, callbacks=[lambda _, r: logged.append(r)], progress=False).fit(activations)
    assert logged[-1]["loss_r1"] > 0 and "loss_coherence" in logged[-1]


def test_a_checkpoint_says_what_to_import(plugin, activations, tmp_path):
    import_plugin(str(plugin))
    trained(activations).save(tmp_path / "sae")
    code = f"""
import sys, softsae
try:
    softsae.load({str(tmp_path / "sae")!r})
except ValueError as error:
    print(error)
sys.path.insert(0, {str(tmp_path)!r})
import group_topk
sae = softsae.load({str(tmp_path / "sae")!r})
print(type(sae.config.options).__name__, sae.config.options.groups)
"""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "sae.safetensors has the architecture 'grouptopk', which nothing has registered" in said[0]
    assert "'group_topk' when it was saved" in said[0] and said[1] == "GroupTopKConfig 8"


def test_the_command_line_trains_resumes_and_describes_it(plugin, activations, tmp_path, capsys):
    np.save(tmp_path / "x.npy", activations.numpy())
    out = tmp_path / "run"
    arguments = ["--activations", tmp_path / "x.npy", "--autoencoder.architecture", "grouptopk",
                 "--autoencoder.n=64", "--autoencoder.k=8", "--autoencoder.options.groups=2",
                 "--train.steps=12", "--train.batch_size=32", "--device=cpu"]  # fmt: skip

    def run(*words) -> int:
        ARCHITECTURES.pop("grouptopk", None)
        sys.modules.pop("group_topk", None)
        return main([str(word) for word in words])

    assert run("train", "--out", out, *arguments) == 2
    assert "architecture='grouptopk' must be one of" in capsys.readouterr().err
    assert run("train", "--out", out, "--plugin", plugin, *arguments, "--autoencoder.options.gruops=2") == 2
    assert "options of 'grouptopk': gruops is not an option; did you mean groups?" in capsys.readouterr().err
    assert run("train", "--out", out, "--plugin", plugin, *arguments) == 0
    assert run("train", "--out", out, "--resume") == 0  # config.yaml holds --plugin
    capsys.readouterr()
    assert run("info", out, "--plugin", plugin) == 0
    assert "grouptopk: d=24, n=64, k=8" in capsys.readouterr().out
    assert run("info", out) == 2
    assert "--plugin on the command line" in capsys.readouterr().err
    assert run("eval", out, "--plugin", f"[{plugin}]", "--cross_entropy_tokens=0") == 0
    assert softsae.load(out / "sae").config.options.groups == 2
    several = ["--architectures", "[grouptopk, topk]", *arguments[:2], *arguments[4:]]
    assert run("sweep", "--out", tmp_path / "sweep", "--plugin", plugin, *several) == 0
    assert (
        softsae.load(tmp_path / "sweep" / "autoencoders" / "grouptopk-k8" / "sae").config.options.groups == 2
    )
    for name, message in (
        ("no_such_module", "--plugin 'no_such_module': No module named 'no_such_module'"),
        (tmp_path / "none.py", "none.py' does not exist"),
    ):
        assert run("info", "--plugin", name) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "json.py").write_text("")
    assert run("info", "--plugin", tmp_path / "json.py") == 2
    assert "a module 'json' is there already" in capsys.readouterr().err


def test_a_plugin_is_a_module_or_a_file(plugin, monkeypatch):
    monkeypatch.syspath_prepend(str(plugin.parent))
    import_plugin("group_topk")
    assert "grouptopk" in ARCHITECTURES
    import_plugin("group_topk")
    import_plugin(str(plugin))


def test_a_plugin_that_fails_is_not_left_behind(tmp_path):
    (tmp_path / "half_written.py").write_text("import softsae\nraise ValueError('not yet')")
    for _ in range(2):
        with pytest.raises(ValueError, match="not yet"):
            import_plugin(str(tmp_path / "half_written.py"))
    assert "half_written" not in sys.modules


@dataclass
class Options(softsae.Section):
    size: int = 2

    def resolved(self, k, n, as_published):
        return type(self)(size=n)


@dataclass
class Needs(softsae.Section):
    size: int


def test_what_cannot_be_registered():
    softsae.register("mine", Options, TopK)
    for arguments, error, message in (
        (("mine", Options, TopK), ValueError, "'mine' is taken by softsae.selectors.topk.TopK"),
        (("softsae", Options, TopK), ValueError, "'softsae' is taken by softsae.selectors.softsae.SoftSAE"),
        (("matryoshka", Options, TopK), ValueError, "'matryoshka' is a field of AutoencoderConfig"),
        (("my rule", Options, TopK), ValueError, "name='my rule' must be an identifier"),
        (("other", dict, TopK), TypeError, "section=<class 'dict'> must be .* softsae.Section"),
        (("other", Options(), TopK), TypeError, "section=Options"),
        (("other", Options, torch.nn.Module), TypeError, "selector=.* softsae.Selector"),
        (("other", Needs, TopK), TypeError, "must have a default for every field"),
    ):
        with pytest.raises(error, match=message):
            softsae.register(*arguments)
    assert "other" not in ARCHITECTURES


def test_options_are_checked_and_resolved():
    softsae.register("mine", Options, TopK)
    mine = AutoencoderConfig(d=4, n=8, k=2, architecture="mine")
    assert mine.section == mine.options == Options()
    assert softsae.SparseAutoencoder(mine).config.options == Options(size=8)
    assert AutoencoderConfig(architecture="mine", options={"size": 3}).options == Options(3)
    with pytest.raises(ValueError, match="options of 'mine': sise is not an option; did you mean size?"):
        AutoencoderConfig(architecture="mine", options={"sise": 3})
    with pytest.raises(TypeError, match="options of 'mine' must be of the class Options, not SoftSAEConfig"):
        AutoencoderConfig(architecture="mine", options=softsae.SoftSAEConfig())
    with pytest.raises(
        ValueError, match="options: they are for registered architectures, 'topk' is built in"
    ):
        AutoencoderConfig(architecture="topk", options={"size": 3})
    with pytest.raises(ValueError, match="batchtopk: options are given, but the architecture is .mine"):
        AutoencoderConfig(architecture="mine", batchtopk=softsae.BatchTopKConfig(threshold_from=3))
