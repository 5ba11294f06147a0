"""Training by torchrun on two machines, one of which is lost. Two processes: test_fit.py."""

import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from annotation_files import own_data
from conftest import ROOT, free_port, kill_all

import checkpoints
import history
import weights

STEPS, EPOCHS = 5, 4
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
ENVIRONMENT |= {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}


def records(logs):
    """The epochs of the run."""
    return [record for folder in logs.glob("coco*") for record in history.read_history(folder)]


def last_weights(logs):
    (path, *_) = checkpoints.find_checkpoints(logs, "coco")
    return weights.read_state_dict(path).state_dict


def wait_for(condition, process, log, seconds=300):
    """Returns the first value of the condition that counts as true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    return value


@pytest.mark.cluster
def test_a_run_goes_on_when_a_machine_is_lost(tmp_path):
    logs, alone = tmp_path / "logs", tmp_path / "alone"
    train = [ROOT / "coco.py", "train", *own_data(tmp_path / "photos", 10), "--device=cpu"]
    train += ["--model=shapes", "--resume", "--layers=all", f"--epochs={EPOCHS}", "--seed=0"]
    train += [f"--steps={STEPS}", "--image-dim=128", "--batch=1", "--workers=0", "--val-share=0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1"]
    torchrun += ["--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=job"]
    torchrun += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
    # The second machine is lost, so that the first must be the one where they meet: both could be,
    # since they are one.
    conf = "--rdzv-conf=last_call_timeout=10,is_host="

    agents, files = [], [tmp_path / "one.log", tmp_path / "two.log"]
    try:
        for file, host in zip(files, ("true", "false"), strict=True):
            with file.open("w") as log:
                options = {"stdout": log, "stderr": log, "env": ENVIRONMENT}
                command = [*torchrun, conf + host, "--", *train, f"--logs={logs}"]
                agents.append(subprocess.Popen(command, **options))

        def is_shared():
            return any(record["images"] == 2 * STEPS for record in records(logs))

        wait_for(is_shared, agents[0], files[0])
        assert kill_all(agents[1].pid)
        shutil.copytree(logs, alone)
        assert agents[0].wait(300) == 0, files[0].read_text()
    finally:
        for agent in agents:
            if agent.poll() is None:
                kill_all(agent.pid)

    lost = len(records(alone))
    assert 0 < lost < EPOCHS
    done = records(logs)
    assert [record["epoch"] for record in done] == [*range(1, EPOCHS + 1)]
    assert [record["images"] for record in done[lost:]] == [STEPS] * (EPOCHS - lost)
    assert len(list(logs.iterdir())) == 1, "it goes on in its own folder"

    # The same checkpoint, gone on from by one process.
    subprocess.run([sys.executable, *train, f"--logs={alone}"], env=ENVIRONMENT, check=True)
    one, two = last_weights(logs), last_weights(alone)
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]
