"""The model card: what huggingface_hub reads in it, that its program runs as printed, and that it names no local path."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from doc_pages import ROOT
from huggingface_hub import ModelCard, constants
from models import save_tiny, tiny_tokenizer

from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.loss_traits import LOSSES
from offline_kto.train.publish.base_model import BaseModel, License
from offline_kto.train.publish.citations import PAPERS, citations_of
from offline_kto.train.publish.local_paths import LocalPaths
from offline_kto.train.publish.model_card import CardContent, write_card
from offline_kto.train.publish.usage_snippet import PLACEHOLDER
from offline_kto.train.run.train_run import train
from offline_kto.train.run_records import RunRecord

HEAD = "---\nlicense: {}\n---\n# base\n"


def program(card: Path) -> str:
    """The first program in a card."""
    found = re.search(r"```python\n(.*?)\n```", card.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def files(folder: Path, name: str = "org/base", *, local: bool = False) -> Any:
    return SimpleNamespace(name=name, folder=folder, adapter=None, is_local=local)


def manifest(**more: Any) -> Any:
    fields = {"reference": {"id": "org/base", "path": None}, "fingerprint": "f", "data": {}, "tokenization": {}}
    return SimpleNamespace(**{**fields, "judgements": {}, "objectives": [], **more})


def card(path: Path, **more: Any) -> ModelCard:
    content: dict[str, Any] = {
        "title": "run",
        "config": TrainConfig(cache=Path("refs")),
        "manifest": manifest(),
        "files": files(path.parent),
        "record": {},
        "history": [],
    }
    write_card(path, CardContent(**{**content, **more}))
    return ModelCard.load(path)


class TestOfARun:
    @pytest.fixture
    def config(self, cache: Path, tmp_path: Path) -> TrainConfig:
        return TrainConfig(cache=cache, out=tmp_path / "run", max_steps=1, batch_size=8, save_steps=0, device="cpu")

    @pytest.mark.parametrize("rank", [0, 2])
    def test_its_program_runs_as_printed(
        self,
        config: TrainConfig,
        base: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        rank: int,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = train(replace(config, lora_rank=rank))
        read = ModelCard.load(out / "README.md")
        assert read.data.to_dict()["library_name"] == ("peft" if rank else "transformers")
        assert "base_model" not in read.data.to_dict()  # a folder of this machine
        assert "Whether it is better than before training was not measured." in read.text
        assert str(tmp_path.parent) not in read.content
        assert str(base) not in read.content
        (tmp_path / PLACEHOLDER).parent.mkdir(parents=True)
        (tmp_path / PLACEHOLDER).symlink_to(out)
        (tmp_path / "path/to" / base.name).symlink_to(base)
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        assert "apply_chat_template" in program(out / "README.md")
        exec(compile(program(out / "README.md"), "card", "exec"), {})
        assert capsys.readouterr().out.strip()

    def test_of_plain_text_asks_with_plain_text(self, base: Path, feedback: Path, tmp_path: Path) -> None:
        plain = save_tiny(tmp_path / "plain", tokenizer=tiny_tokenizer(chat_template=None))
        rows = [{"prompt": f"question {i}: ", "completion": f"answer {i}", "label": i % 2 == 0} for i in range(12)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        precompute(
            PrecomputeConfig(model=str(plain), data=str(tmp_path / "rows.jsonl"), out=tmp_path / "refs", device="cpu")
        )
        config = TrainConfig(cache=tmp_path / "refs", out=tmp_path / "run", max_steps=1, save_steps=0, device="cpu")
        text = program(train(config) / "README.md")
        assert "apply_chat_template" not in text
        assert 'inputs = tokenizer("The prompt, as plain text"' in text


class TestFrontMatter:
    def test_names_a_base_of_the_hub_and_its_licence(self, tmp_path: Path) -> None:
        (tmp_path / "base").mkdir()
        (tmp_path / "base/README.md").write_text(HEAD.format("apache-2.0"))
        read = card(tmp_path / "README.md", files=files(tmp_path / "base"), repository="me/new")
        assert read.data.to_dict() == {
            "base_model": "org/base",
            "license": "apache-2.0",
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["kto", "alignment", "offline-kto"],
        }
        assert "That of the base model `org/base`: `apache-2.0`." in read.text
        assert "name = 'me/new'" in read.text

    def test_without_a_licence_it_says_where_to_look(self, tmp_path: Path) -> None:
        read = card(tmp_path / "README.md", files=files(tmp_path / "nowhere"))
        assert read.data.license is None
        assert "License: see the base model, `org/base`." in read.text

    @pytest.mark.parametrize(
        "text",
        [
            "no front matter",
            "---\n[\n---\n",
            HEAD.format("[a, b]"),
            HEAD.format("'my own'"),
            "---\n- a\n---\n",
            "\udcff",
        ],
    )
    def test_a_base_with_a_damaged_card_has_no_licence(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "README.md").write_bytes(text.encode("utf-8", "surrogateescape"))
        assert BaseModel.of(files(tmp_path)).license is None

    def test_another_licence_has_a_name_and_a_link(self, tmp_path: Path) -> None:
        link = "https://example.org/LICENSE"
        (tmp_path / "README.md").write_text(HEAD.format(f"other\nlicense_name: own-1\nlicense_link: {link}"))
        assert BaseModel.of(files(tmp_path)).license == License("other", "own-1", link)
        (tmp_path / "README.md").write_text(HEAD.format("other\nlicense_name: [x]\nlicense_link: LICENSE"))
        assert BaseModel.of(files(tmp_path)).license == License("other")

    def test_the_licence_is_found_in_the_hubs_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        snapshot = tmp_path / "models--org--base/snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "README.md").write_text(HEAD.format("mit"))
        (tmp_path / "models--org--base/refs").mkdir()
        (tmp_path / "models--org--base/refs/main").write_text("a" * 40)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        assert BaseModel.of(files(tmp_path / "nowhere")).license == License("mit")

    def test_data_sets_of_the_hub_are_named(self, tmp_path: Path) -> None:
        data = {"files": [{"name": "org/feedback"}, {"name": "rows.jsonl"}], "dropped": {"prompt_too_long": 3}}
        read = card(tmp_path / "README.md", manifest=manifest(data=data))
        assert read.data.datasets == ["org/feedback"]
        assert "- feedback: `org/feedback`, `rows.jsonl`\n- left out: 3 prompt too long\n" in read.text


def test_judgements_and_options_are_told(tmp_path: Path) -> None:
    record: RunRecord = {
        "data": {"desirable": 1234, "undesirable": 5, "desirable_mass": 10.5, "undesirable_mass": 4.0},
        "weights": [1.0, 2.5],
    }
    about = manifest(judgements={"votes": "share", "weights": True}, objectives=["helpful"])
    config = TrainConfig(cache=Path("refs"), loss="ppo_clip", training={"max_grad_norm": 2.0, "hub_token": "CRET"})
    text = card(tmp_path / "README.md", record=record, manifest=about, config=config).text
    assert "| desirable | 1,234 | 0 |" in text
    assert "mass 10.5 desirable, 4 undesirable (votes by share, row weights, objectives helpful)" in text
    assert "| clip epsilon | 0.2 |" in text
    assert "| class weights | 1 desirable, 2.5 undesirable |" in text
    assert "| training: max_grad_norm | 2.0 |" in text
    assert "CRET" not in text


class TestCitations:
    def test_are_those_of_the_page_on_losses(self) -> None:
        assert tuple(PAPERS) == LOSSES
        page = (ROOT / "docs/losses.md").read_text()
        for loss, paper in PAPERS.items():
            row = next(line for line in page.splitlines() if line.startswith(f"| `{loss}` |"))
            assert f"[{paper.arxiv}]" in row

    def test_kto_is_always_cited(self) -> None:
        assert [*citations_of("kto")] == [PAPERS["kto"].bibtex]
        assert [*citations_of("dpo")] == [PAPERS["kto"].bibtex, PAPERS["dpo"].bibtex]


class TestLocalPaths:
    @pytest.fixture
    def paths(self, tmp_path: Path) -> LocalPaths:
        config = TrainConfig(cache=Path("data/my refs"), out=Path("runs/a b"), model="org/base")
        return LocalPaths.of(config, Path("runs/a b"), files(tmp_path / "deep folder/base"), {"path": None})

    @pytest.mark.parametrize(
        ("text", "shortened"),
        [
            ("--cache 'data/my refs' --out 'runs/a b'", "--cache 'my refs' --out 'a b'"),
            ("{cwd}/data/my refs: damaged", "my refs: damaged"),
            ("see {tmp}/deep folder/base and /home/me/secret/x.json.", "see base and x.json."),
            ("~/private/x, /opt/models/y/", "x, y"),
            ("https://example.org/a/b", "https://example.org/a/b"),
            ("rewards/chosen and org/base, 3/4 </think>", "rewards/chosen and org/base, 3/4 </think>"),
        ],
    )
    def test_only_last_names_stay(self, paths: LocalPaths, tmp_path: Path, text: str, shortened: str) -> None:
        assert paths.shorten(text.format(cwd=Path.cwd(), tmp=tmp_path)) == shortened

    def test_in_all_of_a_record(self, paths: LocalPaths) -> None:
        record = {"a": ["/home/me/x", 1, None], "b": {"c": "/home/me/y"}}
        assert paths.shorten_all(record) == {"a": ["x", 1, None], "b": {"c": "y"}}
