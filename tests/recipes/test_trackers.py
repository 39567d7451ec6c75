"""trackio and W&B without a network: the run ends well, and what they keep is what log.jsonl says."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys

import pytest
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

from tests.helpers.runs import REPO, TINY

# nothing but this process's own loopback, where the system lets us; else every proxy leads nowhere
OFFLINE = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
NOWHERE = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}


@pytest.fixture(scope="module")
def run(demo, tmp_path_factory):
    """A short run with both trackers; the folder holds run/, trackio/, wandb/."""
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "both.yaml").write_text("report_to: [trackio, wandb]\n")
    flags = ["--config", folder / "both.yaml", "--model_name_or_path", demo / "init"]
    flags += ["--dataset_name", demo / "rows/chat", "--chat_template_path", REPO / "chat_templates/qwen3.jinja"]
    flags += ["--output_dir", folder / "run", *TINY]
    command = [sys.executable, REPO / "recipes" / "qwen3_full.py", *flags]
    able = shutil.which("unshare") and subprocess.run([*OFFLINE, "true"], capture_output=True).returncode == 0
    where = {"TRACKIO_DIR": folder / "trackio", "WANDB_DIR": folder, "WANDB_MODE": "offline"}
    done = subprocess.run(
        [*(OFFLINE if able else []), *map(str, command)],
        env=os.environ | NOWHERE | {name: str(value) for name, value in where.items()},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def logged(folder):
    lines = map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["trained_tokens"]) for line in lines if "loss" in line]


def test_trackio(run):
    database = next((run / "trackio").glob("*.db"))
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, metrics FROM metrics ORDER BY step").fetchall()
    assert {name for name, _ in rows} == {"run"}
    found = [json.loads(metrics) for _, metrics in rows]
    found = [
        (line["train/global_step"], line["train/loss"], line["train/trained_tokens"])
        for line in found
        if "train/loss" in line
    ]
    assert found == logged(run) and len(found) == 4


def test_wandb(run):
    store, found = DataStore(), []
    store.open_for_scan(str(next(run.glob("wandb/offline-run-*/run-*.wandb"))))
    while (data := store.scan_data()) is not None:
        record = Record.FromString(data)
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if "train/loss" in items:
            names = ("train/global_step", "train/loss", "train/trained_tokens")
            found.append(tuple(json.loads(items[name]) for name in names))
    assert found == logged(run) and len(found) == 4
