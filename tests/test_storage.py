"""Object storage, against local servers of both protocols: a run in a bucket works like a run in a folder."""

import contextlib
import json
import logging
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import edited

from autoretouch_jax import cli
from autoretouch_jax.data import prepare, records
from autoretouch_jax.data.folders import checked_pairs
from autoretouch_jax.data.sources import whole
from autoretouch_jax.errors import BadInput, Refused
from autoretouch_jax.models.folder import load_model
from autoretouch_jax.runtime import storage
from autoretouch_jax.training import loop
from autoretouch_jax.training.checkpoints import Checkpoints, newest_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # of the servers' libraries

BUCKET = "retouch"
ACCESS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_GCE_CHECK": "true",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",  # tensorstore looks for no credentials
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # the emulator speaks no gRPC
}


def s3_server():
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    import boto3

    boto3.client("s3").create_bucket(Bucket=BUCKET)
    return server


def gcs_server():
    from gcp_storage_emulator import server as emulator
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    emulator.server.HTTPServer.handle_error = lambda *_: None  # requests that gcsfs takes back
    emulator.RequestHandler.log_message = lambda *_: None
    plain = objects.download

    def download(request, response, storage):  # with the header by which tensorstore knows what it has read
        plain(request, response, storage)
        with contextlib.suppress(KeyError, NotFound):
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]

    objects.download = download
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server._api.daemon = True
    server.start()
    address = f"http://127.0.0.1:{server._api._httpd.server_port}"
    os.environ["STORAGE_EMULATOR_HOST"] = os.environ["TENSORSTORE_GCS_HTTP_URL"] = address
    return server


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request):
    """`gs://…` or `s3://…` of an empty bucket on this machine."""
    before = dict(os.environ)
    os.environ.update(ACCESS)
    server = s3_server() if request.param == "s3" else gcs_server()
    yield f"{request.param}://{BUCKET}"
    server.stop()
    os.environ.clear()
    os.environ.update(before)


def test_a_run_in_a_bucket_stops_resumes_and_ends_as_in_a_folder(bucket, small_config, tmp_path):
    config = edited(small_config, train={"steps": 4, "checkpoint_every": 2}, optim={"decay_share": 0.0})
    there, here = f"{bucket}/runs/a", tmp_path / "run"
    assert loop.run(config, here) == 0
    assert loop.run(edited(config, train={"steps": 2}), there) == 0
    home = storage.open_path(there)
    assert newest_checkpoint(home / "checkpoints")
    assert loop.run(config, there) == 0
    assert (home / "model/model.safetensors").read_bytes() == (here / "model/model.safetensors").read_bytes()
    assert sorted(path.name for path in home.iterdir()) == sorted(path.name for path in here.iterdir())
    lines = (home / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    assert load_model(there).config == small_config.generator
    assert not list(tmp_path.glob("*:*"))


def test_a_save_that_was_not_committed_is_no_checkpoint(bucket, small_config):
    there = storage.open_path(f"{bucket}/runs/cut")
    (there / "checkpoints" / "5" / "state").mkdir(parents=True)
    (there / "checkpoints" / "5" / "state" / "d").write_bytes(b"half")
    assert not newest_checkpoint(there / "checkpoints")
    assert loop.run(edited(small_config, train={"steps": 2, "checkpoint_every": 2}), str(there)) == 0


def test_a_deletion_in_a_bucket_that_is_killed_leaves_no_checkpoint(bucket, monkeypatch):
    folder, state = storage.open_path(f"{bucket}/runs/deleted/checkpoints"), {"x": np.arange(3.0)}
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, {})
        checkpoints.wait()
        assert not (folder / "1").exists()
        monkeypatch.setattr(checkpoints._manager, "delete", lambda step: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(InterruptedError):
            checkpoints.forget_after(2)
    assert (folder / "3" / "state").exists()
    assert newest_checkpoint(folder) == 2


def test_a_bucket_that_is_not_there_is_refused_and_not_made(bucket, small_config, capsys):
    absent = bucket.replace(BUCKET, "absent")
    with pytest.raises(Refused, match=f"there is no bucket {absent}"):
        loop.run(small_config, f"{absent}/run")
    assert not storage.open_path(absent).exists()


def test_records_in_a_bucket_are_those_of_the_folder(bucket, module_pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORETOUCH_CACHE", str(tmp_path / "cache"))
    assert prepare.run(checked_pairs(*module_pairs)[0], tmp_path / "records", 1, "fail", None) == 0
    there = storage.open_path(f"{bucket}/records")
    for path in (tmp_path / "records").iterdir():
        if path.is_file():
            (there / path.name).write_bytes(path.read_bytes())
    ours, theirs = records.RecordSource(tmp_path / "records"), records.RecordSource(there)
    assert theirs.names == ours.names
    for index in range(len(ours)):
        for name, image in whole(ours[index]).items():
            np.testing.assert_array_equal(image, whole(theirs[index])[name])
    shard = there / theirs.shards[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    monkeypatch.setenv("AUTORETOUCH_CACHE", str(tmp_path / "another"))
    with pytest.raises(BadInput, match="SHA-256"):
        whole(records.RecordSource(there)[0])
    assert not list((tmp_path / "another").rglob("*.part"))


def test_the_command_line_keeps_both_slashes(bucket, module_pairs, tmp_path, capsys):
    source, target = map(str, module_pairs)
    assert cli.main(["evaluate", f"{bucket}/nothing", "--source", source, "--target", target]) == 2
    assert f"{bucket}/nothing: no model here" in capsys.readouterr().err
    assert cli.main(["retouch", source, "--model", f"{bucket}/nothing", "--out", str(tmp_path)]) == 2
    assert f"{bucket}/nothing: no model here" in capsys.readouterr().err


def test_a_store_whose_package_is_missing_is_refused_by_name():
    code = "import sys; sys.modules['s3fs'] = None\nfrom autoretouch_jax.runtime import storage\nstorage.open_path('s3://b/c')"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr
    assert re.search(r"Refused: s3://b/c: s3:// needs s3fs: pip install 'autoretouch-jax\[s3\]'", said)
