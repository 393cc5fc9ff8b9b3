"""Secrets in URLs, options and what libraries say: shown and written nowhere."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from offline_kto.kto_core.cache.remote_cache import local_copy
from offline_kto.kto_core.cache.remote_folder import Remote
from offline_kto.kto_core.durable_files import write_text
from offline_kto.kto_core.errors import CacheError, ConfigError, KTOError, in_one_line
from offline_kto.kto_core.models.precision import resolve_precision
from offline_kto.kto_core.redaction import (
    bare_url,
    has_credentials,
    hidden,
    hidden_url,
    secret_names,
    secrets_of,
    without_secrets,
)
from offline_kto.train.config import TrainConfig
from offline_kto.train.publish.model_card import command_of
from offline_kto.train.report.report import write_report
from offline_kto.train.run.arguments import training_arguments
from offline_kto.train.run.train_run import train
from offline_kto.train.run_files import config_text
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.space import Trials
from offline_kto.train.sweep.storage import check_storage
from offline_kto.train.sweep.study import Study
from offline_kto.train.sweep.sweep import _identity, _write_config

WITH_SECRETS = [
    "postgresql://bob:s3/CRET@127.0.0.1/db",
    "postgresql://bob:s@CRET@127.0.0.1/db",
    "postgresql+psycopg://bob:s:CRET?x@127.0.0.1:5432/db",
    "postgresql://127.0.0.1/db?user=bob&password=CRET",
    "mysql://bob@corp:CRET@h/db?ssl_key=/CRET",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3DCRET",
    "redis://:CRET@h:6379/0",
    "s3://AKIA:ab/CRET@bucket/refs",
    "simplecache::s3://KEY:CRET@bucket/refs",
    "zip://refs.zip::https://me:CRET@h/a.zip",
    "https://h/refs?X-Amz-Signature=CRET",
    "https://CRET@github.com/refs",
    "hf://CRET@datasets/refs",
    "s3:/KEY:CRET@bucket/refs",  # as a Path has it
    "gs://bucket/refs#token=CRET",
    "abfss://c@account.dfs.core.windows.net/refs?sas=CRET",
    "https://h/refs?jwt=CRET",
    "postgresql://h/db?user=bob&pass=CRET",
    "https://h/refs?sessionid=CRET",
    "https://h/refs?sentry_dsn=CRET",
    "https://h/refs?webhook_url=CRET",
]
WITHOUT = [
    "hf://datasets/me/refs@main/train",
    "hf://datasets/me/refs@refs%2Fconvert%2Fparquet",
    "abfs://container@account.dfs.core.windows.net/refs",
    "sftp://me@host/refs",
    "http://host:8080/me@home/refs",
    "s3://bucket/key=5/day=2026-11-25",
    "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/refs",
    "s3://bucket/me@home/refs",
    "memory://team/refs",
]


@pytest.mark.parametrize("url", WITH_SECRETS)
def test_a_secret_in_a_url_is_hidden_wherever_it_stands(url: str) -> None:
    for shown in (hidden_url(url), hidden(f"cannot open '{url}': no"), bare_url(url), str(KTOError(f"{url}: no"))):
        assert "CRET" not in shown
    assert "CRET" not in in_one_line(ValueError(f"Invalid bucket name {url}"))
    assert has_credentials(url)


@pytest.mark.parametrize(
    "text",
    [
        *(f"{start}{'CRET0' * 8}" for start in ("sk-proj-", "glpat-", "xoxb-", "api_org_", "github_pat_")),
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NSJ9.CRET",
        f"{{'Authorization': 'Bearer {'CRET' * 5}'}}",
        f"authorization: {'CRET' * 5}",
    ],
)
def test_a_secret_is_known_by_its_form(text: str) -> None:
    assert "CRET" not in hidden(f"the server said: {text} is not known")


def test_words_that_only_resemble_a_secret_s_name_stay() -> None:
    plain = {"author": "me", "passes": 3, "sastify": "x", "path": "refs", "keyword": "x", "authors": "us", "pwm": "x"}
    assert without_secrets(plain) == plain
    assert without_secrets({"Authorization": "x", "sas": "x", "cookie": "x", "pass": "x", "jwt": "x"}) == {}
    assert hidden("the bearer of this note, sk-learn and a pass over the data") == (
        "the bearer of this note, sk-learn and a pass over the data"
    )


@pytest.mark.parametrize("url", WITHOUT)
def test_a_url_without_secrets_stays_as_it_is(url: str) -> None:
    assert not has_credentials(url)
    assert hidden_url(url) == bare_url(url) == url


@pytest.mark.parametrize(
    "url", [url for url in WITH_SECRETS if url.startswith(("s3://", "simple", "zip", "https", "hf"))]
)
def test_a_cache_s_url_with_credentials_is_refused_without_them(url: str) -> None:
    for use in (Remote, local_copy):
        with pytest.raises(CacheError, match="remove the credentials from the URL") as refused:
            use(url)
        assert "CRET" not in str(refused.value)


def test_what_a_driver_quotes_of_a_password_is_hidden() -> None:
    url = "postgresql://bob:a%20CRET@h/db"
    assert hidden("password 'a CRET' or a%20CRET is wrong", secrets_of(url)) == "password '***' or *** is wrong"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://bob:s@CRET@127.0.0.1/db",
        "postgresql://bob:s@CRET/x@127.0.0.1/db",
        "mysql://bob:s@x:CRET@127.0.0.1/db",
        "bob:CRET@127.0.0.1",
    ],
)
def test_a_storage_that_would_be_read_otherwise_than_meant_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="%40") as refused:
        check_storage(url)
    assert "CRET" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["sqlite:////home/a@b/x.db", "postgresql://bob@corp:a%40b@h/db?options=x@y", "mysql+pymysql://h/db", "sqlite://"],
)
def test_a_good_storage_is_taken(url: str) -> None:
    check_storage(url)


def test_entries_of_a_secret_s_name_are_left_out_at_any_depth() -> None:
    table = {
        "hub_token": "CRET",
        "include_num_input_tokens_seen": "all",
        "average_tokens_across_devices": True,
        "label_names": ["keys"],
        "deepspeed": {"comet": {"api_key": "CRET", "project": "p"}, "wandb": [{"apiKey": "CRET"}, {"pad_token_id": 0}]},
        "credentials": {"user": "CRET"},
        "optim_args": "rate=1,password=CRET",
        "trackio_space_id": "https://me:CRET@h/x",
    }
    left = without_secrets(table)
    assert "CRET" not in json.dumps(left)
    assert left["deepspeed"] == {"comet": {"project": "p"}, "wandb": [{}, {"pad_token_id": 0}]}
    assert [left[name] for name in ("include_num_input_tokens_seen", "average_tokens_across_devices")] == ["all", True]
    assert left["optim_args"] == "rate=1,password=***"
    wanted = ["hub_token", "deepspeed.comet.api_key", "deepspeed.wandb.apiKey", "credentials"]
    assert secret_names(table) == wanted


def test_what_loggers_and_pickles_get_of_the_settings(tmp_path: Path) -> None:
    training = {"hub_token": "hf_CRET", "lr_scheduler_kwargs": {"api_key": "CRET", "power": 2.0}}
    config = TrainConfig(cache=tmp_path, training=training, device="cpu")
    precision = resolve_precision("float32", torch.device("cpu"))
    args = training_arguments(config, tmp_path, precision, held_out=False)
    assert (args.hub_token, args.lr_scheduler_kwargs["api_key"]) == ("hf_CRET", "CRET")
    assert "CRET" not in args.to_json_string()
    assert b"CRET" not in pickle.dumps(args)
    assert "CRET" not in config_text(config) + command_of(config)
    assert yaml.safe_load(config_text(config))["training"]["lr_scheduler_kwargs"] == {"power": 2.0}


def test_a_token_is_in_no_file_of_a_run_which_goes_on_with_it(cache: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        cache=cache, out=tmp_path / "run", batch_size=8, max_steps=1, save_steps=1, device="cpu", eval_fraction=0.3
    )
    config = replace(config, training={"hub_token": "CRETCRET", "max_grad_norm": 2.0})
    train(config)
    train(replace(config, max_steps=2, resume=True))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert [path for path in files if b"CRETCRET" in path.read_bytes()] == []
    assert not list((tmp_path / "run").rglob("training_args.bin"))
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "# training.hub_token is a secret and is left out" in text
    assert yaml.safe_load(text)["training"] == {"max_grad_norm": 2.0}


def test_a_token_is_in_no_file_of_a_sweep_which_goes_on_with_it(cache: Path, tmp_path: Path) -> None:
    settings = {"device": "cpu", "training": {"hub_token": "CRETCRET", "optim": "sgd"}}
    config = SweepConfig(cache=cache, out=tmp_path, search="grid", space={"beta": [0.1, 0.2]}, train=settings)
    trials, url = Trials.of(config), f"sqlite:///{tmp_path}/study.db"
    assert trials.config({"beta": 0.1}).training["hub_token"] == "CRETCRET"  # the workers have it
    _write_config(replace(config, storage="postgresql://me:CRETCRET@h/db"), tmp_path)
    write_text(tmp_path / "best.yaml", config_text(trials.config({"beta": 0.1})))
    for training in ({"hub_token": "CRETCRET"}, {"hub_token": "another"}, {}):  # each goes on with the same study
        again = replace(config, train={"device": "cpu", "training": {**training, "optim": "sgd"}})
        Study(again, Trials.of(again), url, _identity(again, {})).begin()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"study.db", "sweep.yaml", "best.yaml"} <= {path.name for path in files}
    assert [path for path in files if b"CRETCRET" in path.read_bytes()] == []
    assert yaml.safe_load((tmp_path / "sweep.yaml").read_text())["train"]["training"] == {"optim": "sgd"}


def test_a_report_leaves_out_what_an_older_version_wrote(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(
        json.dumps({"command": "kto-train --cache s3://me:CRET@b/refs", "reference": {"id": "https://me:CRET@h/x"}})
    )
    (tmp_path / "config.yaml").write_text("cache: s3://me:CRET@b/refs\ntraining: {hub_token: CRET, optim: sgd}\n")
    page = write_report([tmp_path]).read_text()
    assert "CRET" not in page
    assert "optim: sgd" in page
