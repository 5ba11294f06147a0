"""Runs of training: steps, resuming after a kill, two processes, logs. Losses: test_training.py.

This file is also the script that torchrun runs: test_fit.py FOLDER.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import types
from itertools import chain

import numpy as np
import pytest
import torch
from conftest import FORKS, ROOT, TinyNetwork, free_port
from torch import nn

import checkpoints
import cli
import distributed
import history
import model as modellib
import training
import utils
import weights
from config import Config
from dataset import TorchDataset, horizontal_flip, make_loader

EPOCHS, STEPS = 3, 3
# Of the processes that are started here: this checkout's modules, whatever is installed.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Squares(utils.Dataset):
    """Two bright squares in an image of noise."""

    def __init__(self, count, seed=0):
        super().__init__()
        self.add_class("squares", 1, "square")
        for i in range(count):
            self.add_image("squares", f"square-{i}", None, seed=seed + i)
        self.prepare()

    def draw(self, image_id):
        rng = np.random.default_rng(self.image_info[image_id]["seed"])
        image = rng.integers(0, 80, (64, 64, 3), dtype=np.uint8)
        masks = np.zeros((64, 64, 2), dtype=bool)
        for n in range(2):
            y, x, side = *rng.integers(0, 36, 2), rng.integers(12, 28)
            masks[y : y + side, x : x + side, n] = True
            image[masks[..., n]] = rng.integers(120, 256, 3)
        return image, masks

    def load_image(self, image_id):
        return self.draw(image_id)[0]

    def load_mask(self, image_id):
        return self.draw(image_id)[1], np.ones(2, dtype=np.int32)


def make_config(**options):
    defaults = {
        "NUM_CLASSES": 2,
        "IMAGE_MIN_DIM": 64,
        "IMAGE_MAX_DIM": 64,
        "RPN_ANCHOR_SCALES": (8, 16, 24, 32, 64),
        "POST_NMS_ROIS_TRAINING": 100,
        "POST_NMS_ROIS_INFERENCE": 50,
        "TRAIN_ROIS_PER_IMAGE": 30,
        "STEPS_PER_EPOCH": STEPS,
        "VALIDATION_STEPS": 1,
        "NUM_WORKERS": 0,
        "TRAIN_BN": True,
        "WARMUP_STEPS": 2,
        "LR_SCHEDULE": "cosine",
    }
    return TinyNetwork(**{**defaults, **options})


def make_model(model_dir, **options):
    torch.manual_seed(0)
    return modellib.MaskRCNN(make_config(**options), model_dir)


def train(model, epochs=EPOCHS, layers="all", **options):
    options = {"augmentation": horizontal_flip, **options}
    model.train_model(Squares(5), Squares(2, seed=100), 0.02, epochs, layers, **options)


def states_equal(one, two):
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different


@pytest.fixture
def pictures():
    """Lets runs draw their curves of losses."""


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(history.History, "_plot", lambda log: None)  # half of the time


# --- Killed and resumed --------------------------------------------------------------------------


def run_alone(pipe, model_dir, resume, pause, errors):
    """A run in a process of its own; before step `pause` it says so, and waits for an answer."""
    sys.stderr = errors.open("w", buffering=1)
    logging.basicConfig()
    torch.set_num_threads(1)
    history.History._plot = lambda log: None
    model = make_model(model_dir)
    if resume:
        model.resume()
    step = training.Trainer.step

    def pausing_step(self, learning_rate):
        if model.run.epoch * STEPS + model.run.step == pause:
            pipe.send("paused")
            pipe.recv()
        return step(self, learning_rate)

    training.Trainer.step = pausing_step
    try:
        train(model)
    except KeyboardInterrupt as interrupt:
        print(interrupt, file=sys.stderr)
        sys.exit(130)


@pytest.fixture
def start(tmp_path_factory):
    """Starts a run in a process of its own, and waits until it pauses if it shall."""
    processes = []

    def start(model_dir, resume=False, pause=None):
        pipe, other = FORKS.Pipe()
        errors = tmp_path_factory.mktemp("errors") / "stderr.txt"
        arguments = (other, model_dir, resume, pause, errors)
        process = FORKS.Process(target=run_alone, args=arguments)
        process.start()
        other.close()  # so that the end of the process is the end of the pipe
        processes.append(process)
        if pause is not None:
            try:
                assert pipe.poll(300)
                pipe.recv()
            except EOFError:
                pytest.fail(f"the run ended before step {pause}: {errors.read_text()}")

        def finish():
            """Lets it go on to its end; returns its exit status and what it wrote to stderr."""
            if pause is not None:
                pipe.send("go on")
            process.join(300)
            return process.exitcode, errors.read_text()

        return types.SimpleNamespace(process=process, finish=finish)

    yield start
    for process in processes:
        process.kill()
        process.join()


def final_weights(model_dir):
    return weights.read_state_dict(checkpoints.find_checkpoints(model_dir, "tiny")[0]).state_dict


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Weights of a run that nothing stopped, and the records of its epochs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = FORKS.Process(target=run_alone, args=(None, folder, False, None, folder / "stderr"))
    process.start()
    process.join(300)
    assert process.exitcode == 0, (folder / "stderr").read_text()
    checkpoint = checkpoints.find_checkpoints(folder, "tiny")[0]
    return final_weights(folder), history.read_history(checkpoint.parent)


def without_times(records):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.mark.parametrize("step", [STEPS + 1, 2 * STEPS])
def test_a_killed_run_resumes_to_the_same_bits(start, uninterrupted, tmp_path, step):
    process = start(tmp_path, pause=step).process
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = checkpoints.find_checkpoints(tmp_path, "tiny")
    assert before

    status, errors = start(tmp_path, resume=True).finish()
    assert status == 0, errors
    folder = before[0].parent
    assert len(list(tmp_path.iterdir())) == 1, "the run goes on in its own folder"
    states_equal(final_weights(tmp_path), uninterrupted[0])
    assert without_times(history.read_history(folder)) == without_times(uninterrupted[1])
    assert not list(folder.glob(".*")), "no half-written file is left"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_amid_an_epoch_and_the_run_resumes_to_the_same_bits(
    start, uninterrupted, tmp_path, number
):
    run = start(tmp_path, pause=STEPS + 1)
    os.kill(run.process.pid, number)
    status, errors = run.finish()
    assert status == 130, errors
    last = checkpoints.find_checkpoints(tmp_path, "tiny")[0]
    assert last.name == "mask_rcnn_tiny_0001-000002.pth", "after the step that was interrupted"
    assert f"saved {last}" in errors

    status, errors = start(tmp_path, resume=True).finish()
    assert status == 0, errors
    states_equal(final_weights(tmp_path), uninterrupted[0])
    records = history.read_history(last.parent)
    assert without_times(records) == without_times(uninterrupted[1])


def test_a_truncated_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, caplog):
    model = make_model(tmp_path)
    train(model)
    first, second = checkpoints.find_checkpoints(tmp_path, "tiny")[:2]
    assert (first.name[-8:], second.name[-8:]) == ("0003.pth", "0002.pth")
    first.write_bytes(first.read_bytes()[:20_000])

    resumed = make_model(tmp_path)
    assert resumed.resume() == second
    assert resumed.epoch == 2
    assert str(first) in caplog.text
    assert "damaged" in caplog.text
    train(resumed)
    states_equal(resumed.state_dict(), model.state_dict())


def test_nothing_can_be_read(tmp_path):
    model = make_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint of a run named 'tiny'"):
        model.resume()
    folder = tmp_path / "tiny20260101T000000"
    folder.mkdir()
    (folder / "mask_rcnn_tiny_0001.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the checkpoints can be read"):
        model.resume()


@contextlib.contextmanager
def full_disk(free=300_000):
    """Inside, no file can become larger than this."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_costs_no_checkpoint(tmp_path, caplog):
    model = make_model(tmp_path)
    train(model, epochs=1)
    (saved,) = checkpoints.find_checkpoints(tmp_path, "tiny")
    content = saved.read_bytes()
    message = f"mask_rcnn_tiny_0002.pth could not be written: File too large; .* go on from {saved}"
    with full_disk(), pytest.raises(OSError, match=message):
        train(model, epochs=2)
    assert "mask_rcnn_tiny_0002.pth could not be written" in caplog.text
    assert checkpoints.find_checkpoints(tmp_path, "tiny") == [saved]
    assert saved.read_bytes() == content
    assert not list(saved.parent.glob(".*"))
    train(model, epochs=3)
    assert checkpoints.find_checkpoints(tmp_path, "tiny")[0].name == "mask_rcnn_tiny_0003.pth"


def test_a_run_that_cannot_be_saved_ends_early(tmp_path):
    model = make_model(tmp_path, STEPS_PER_EPOCH=1)
    message = "the checkpoint .*_0001.pth could not be written: .*; make room and start anew"
    with full_disk(), pytest.raises(OSError, match=message):
        train(model, epochs=9)
    assert model.epoch == 1, "none was saved, so the first epoch is the last"
    train(model, epochs=2)
    with full_disk(), pytest.raises(OSError, match=r"_0004.pth could .* go on from .*_0002.pth"):
        train(model, epochs=9)
    assert model.epoch == 4, "one may fail, but not two in a row"
    train(model, epochs=5)
    assert [record["epoch"] for record in history.read_history(model.log_dir)] == [1, 2, 3, 4, 5]


def test_a_full_disk_is_told_in_words(tmp_path, monkeypatch):
    def fail(*arguments):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:  # as torch.save does
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert history.in_words(caught.value) == "the disk is full"
    assert history.in_words(RuntimeError("one\ntwo")) == "one"
    monkeypatch.setattr(utils, "write_atomic", fail)
    with pytest.raises(RuntimeError):
        history.History(tmp_path, make_config(), 0, 0)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(utils, "write_atomic", lambda *arguments: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match=f"logs of a run .* to {tmp_path}: the disk is full; make"):
        history.History(tmp_path, make_config(), 0, 0)


def test_events_that_cannot_be_written_do_not_end_a_run(tmp_path, caplog):
    class Full:
        def add_scalar(self, *arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

    with history.History(tmp_path, make_config(), 0, 0) as log:
        log.writer.close()
        log.writer = Full()
        log.add_scalars({"loss": 1.0}, 1)
        log.add_scalars({"loss": 1.0}, 2)
    assert caplog.text.count("no more TensorBoard events: the disk is full") == 1


def test_logs_that_cannot_be_written_are_made_up_for(tmp_path, monkeypatch, caplog):
    model = make_model(tmp_path, STEPS_PER_EPOCH=1)
    write = history.History._write

    def fail_once(log):
        if len(log.records) == 1:
            raise OSError("no space left")
        write(log)

    monkeypatch.setattr(history.History, "_write", fail_once)
    train(model, 2)
    assert "the logs of epoch 1 could not be written: no space left" in caplog.text
    assert [record["epoch"] for record in history.read_history(model.log_dir)] == [1, 2]


def two_stages(model, evaluate):
    train(model, 1, layers="heads", evaluate=evaluate)
    train(model, 3, layers="all", evaluate=evaluate)


def judge(model):
    torch.rand(7)  # an evaluation that leaves something to chance
    return {"segm_AP": 0.5}


def test_a_run_that_ended_while_it_was_evaluated_resumes_to_the_same_bits(tmp_path):
    model = make_model(tmp_path / "whole")
    two_stages(model, judge)

    def judge_once(model):
        if model.epoch == 2:
            raise OSError("power cut")
        return judge(model)

    stopped = make_model(tmp_path / "stopped")
    with pytest.raises(OSError, match="power cut"):
        two_stages(stopped, judge_once)
    resumed = make_model(tmp_path / "stopped")
    assert resumed.resume().name == "mask_rcnn_tiny_0002.pth"
    two_stages(resumed, judge)
    states_equal(resumed.state_dict(), model.state_dict())
    one, two = (without_times(history.read_history(m.log_dir)) for m in (model, resumed))
    assert one == two
    # The model that was stopped can go on as well, as in a notebook.
    two_stages(stopped, judge)
    states_equal(stopped.state_dict(), model.state_dict())


def interrupting(monkeypatch, name):
    """Lets Ctrl-C be pressed while a function of training runs, the first time that it does."""
    owner = training if hasattr(training, name) else checkpoints.Run
    function, pressed = getattr(owner, name), []

    def press(*arguments):
        if not pressed:
            pressed.append(os.kill(os.getpid(), signal.SIGINT))
        return function(*arguments)

    monkeypatch.setattr(owner, name, press)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("rate_factor", "mask_rcnn_tiny_0000-000001.pth"),
        ("checkpoint_path", "mask_rcnn_tiny_0001.pth"),
    ],
)
def test_an_interrupted_model_goes_on_in_a_notebook(tmp_path, monkeypatch, name, file):
    model = make_model(tmp_path / "whole")
    train(model, 2)
    stopped = make_model(tmp_path / "stopped")
    interrupting(monkeypatch, name)
    with pytest.raises(KeyboardInterrupt, match=f"saved .*{file}"):
        train(stopped, 2)
    assert [path.name for path in stopped.log_dir.glob("mask*")] == [file]
    train(stopped, 2)
    states_equal(stopped.state_dict(), model.state_dict())
    one, two = (without_times(history.read_history(m.log_dir)) for m in (model, stopped))
    assert one == two


def test_a_stage_that_ended_early_is_over_for_a_resumed_run(tmp_path):
    model = make_model(tmp_path)
    train(model, 5, layers="heads", callbacks=[lambda record: True])
    train(model, 8, layers="all", callbacks=[lambda record: True])
    assert model.epoch == 2
    resumed = make_model(tmp_path)
    resumed.resume()
    train(resumed, 5, layers="heads")
    assert resumed.epoch == 2
    train(resumed, 3, layers="all")
    assert resumed.epoch == 3


def stopped_at(epoch, *stage, record=None, ended=()):
    """A run whose checkpoint is of this epoch and stage: layers, learning rate, epochs, start."""
    state = {"stage": dataclasses.asdict(checkpoints.Stage(*stage))}
    return checkpoints.Run(epoch=epoch, record=record or {}, state=state, ended=list(ended))


def test_which_stages_a_run_is_past_and_which_it_continues():
    heads, everything = checkpoints.Stage("heads", 0.1, 5), checkpoints.Stage("all", 0.1, 8)
    new = checkpoints.Run()
    assert not new.is_past(heads)
    assert not new.continues(heads)
    amid = stopped_at(3, "heads", 0.1, 5, 0)
    assert amid.continues(heads)
    assert not amid.is_past(heads)
    assert not amid.continues(everything)
    # At the end of a stage it depends on whether its last epoch was judged.
    assert stopped_at(5, "heads", 0.1, 5, 0).is_past(heads)
    assert not stopped_at(5, "heads", 0.1, 5, 0, record={"epoch": 5}).is_past(heads)
    # Of "all" that began after epoch 2: "heads" ended early, and is past for good.
    later = stopped_at(4, "all", 0.1, 8, 2, ended=[("heads", 5)])
    assert later.is_past(heads)
    assert later.continues(everything)
    assert not later.is_past(everything)
    # Of "all" from the beginning, which nothing preceded: "heads" may follow.
    assert not stopped_at(3, "all", 0.1, 8, 0).is_past(heads)


@pytest.mark.parametrize("second", [("all", 6), ("heads", 6)])
def test_stages_that_are_over_stay_over(tmp_path, second):
    stop = {"callbacks": [lambda record: True]}
    model = make_model(tmp_path, STEPS_PER_EPOCH=1)
    train(model, 4, layers="all", **stop)
    layers, epochs = second
    train(model, epochs, layers=layers, **stop)
    resumed = make_model(tmp_path, STEPS_PER_EPOCH=1)
    resumed.resume()
    train(resumed, 4, layers="all", **stop)  # ended early, and the other one came after it
    assert resumed.epoch == 2
    train(resumed, epochs, layers=layers, **stop)
    assert resumed.epoch == 3
    train(resumed, 5, layers="all", **stop)  # this one is new
    assert resumed.epoch == 4


def test_a_stage_that_early_stopping_ended_stays_ended_when_resumed(tmp_path):
    scores = iter([0.3, 0.2, 0.1])
    options = {"EARLY_STOPPING": 2, "STEPS_PER_EPOCH": 1, "VALIDATION_STEPS": 0}
    train(make_model(tmp_path, **options), 9, evaluate=lambda model: {"segm_AP": next(scores)})
    resumed = make_model(tmp_path, **options)
    resumed.resume()
    train(resumed, 9)
    assert resumed.epoch == 3
    resumed.config.EARLY_STOPPING = None
    resumed.resume()
    train(resumed, 4)
    assert resumed.epoch == 4


def test_a_run_is_trained_by_one_process_at_a_time(start, tmp_path):
    run = start(tmp_path, pause=STEPS + 1)
    model = make_model(tmp_path)
    path = model.resume()
    with pytest.raises(BlockingIOError, match=f"another process is training the run in {tmp_path}"):
        train(model)
    status, errors = run.finish()
    assert status == 0, errors
    # It has ended, and gone beyond the checkpoint that was loaded while it ran.
    with pytest.raises(BlockingIOError, match="has trained the run in .* since its checkpoint was"):
        train(model)
    assert not list(tmp_path.glob("*/*.old"))
    assert model.resume() != path
    train(model, EPOCHS + 1)
    assert model.find_last().name == f"mask_rcnn_tiny_{EPOCHS + 1:04}.pth"


def test_a_killed_process_leaves_no_lock_and_its_temporary_files_are_removed(tmp_path):
    """Not even while workers live on that it has forked; other processes' files stay."""
    code = """
import os, signal, sys, time
from pathlib import Path
import checkpoints

folder = Path(sys.argv[1])
with checkpoints.kept_alone(folder):
    worker = os.fork()
    if worker == 0:
        os.close(1)  # on which the test waits
        time.sleep(100)
        os._exit(0)
    for pid in os.getpid(), worker:
        (folder / f".mask_rcnn_tiny_0001.pth.{pid}.tmp").touch()
    print(worker, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    worker = int(result.stdout)
    try:
        assert result.returncode == -signal.SIGKILL
        assert len(list(tmp_path.glob(".*.tmp"))) == 2
        with checkpoints.kept_alone(tmp_path):
            names = [path.name for path in tmp_path.glob(".*.tmp")]
            assert names == [f".mask_rcnn_tiny_0001.pth.{worker}.tmp"]
    finally:
        os.kill(worker, signal.SIGKILL)


def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def fail(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checkpoints, "_lock", fail)
    with checkpoints.kept_alone(tmp_path):
        pass
    assert f"{tmp_path} cannot be locked ([Errno" in caplog.text


def test_runs_that_begin_in_one_second_have_folders_of_their_own(tmp_path):
    folders = {checkpoints.make_folder(tmp_path, "Tiny") for _ in range(2)}
    assert len(folders) == 2
    assert {path.name[:4] for path in folders} == {"tiny"}
    assert {path.parent for path in folders} == {tmp_path}


def test_going_back_to_an_earlier_checkpoint_gives_up_those_after_it(tmp_path):
    model = make_model(tmp_path, KEEP_CHECKPOINTS=2, STEPS_PER_EPOCH=1)
    scores = iter([0.3, 0.2, 0.1])
    train(model, 3, evaluate=lambda model: {"segm_AP": next(scores)})
    again = make_model(tmp_path, KEEP_CHECKPOINTS=2, STEPS_PER_EPOCH=1)
    again.resume(model.log_dir / "best.pth")
    train(again, 2, evaluate=lambda model: {"segm_AP": 0.4})
    assert model.find_last().name == "mask_rcnn_tiny_0002.pth"
    names = sorted(path.name for path in model.log_dir.glob("mask*"))
    assert names == ["mask_rcnn_tiny_0002.pth", "mask_rcnn_tiny_0003.old"]
    assert (model.log_dir / "best.pth").samefile(model.find_last())
    records = history.read_history(model.log_dir)
    assert [(r["epoch"], r["segm_AP"]) for r in records] == [(1, 0.3), (2, 0.4)]


def test_fewer_steps_than_an_interrupted_epoch_has_are_refused(tmp_path, monkeypatch):
    model = make_model(tmp_path)
    interrupting(monkeypatch, "rate_factor")
    with pytest.raises(KeyboardInterrupt):
        train(model)
    resumed = make_model(tmp_path, STEPS_PER_EPOCH=1)
    resumed.resume()
    with pytest.raises(ValueError, match="STEPS_PER_EPOCH must be above 1, .* got 1; go on with"):
        train(resumed)


def test_sixteen_bits_may_be_switched_on_in_a_resumed_run():
    one, two = (Sick(torch.zeros(1)) for _ in range(2))
    before = training.Trainer(one, make_config(), iter([]), str)
    after = training.Trainer(two, make_config(AMP="fp16"), iter([]), str)
    after.load_state_dict(before.state_dict())
    assert after.state_dict()["scaler"]["scale"] == 2**16


def test_each_process_has_a_device_with_a_number(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", chosen.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    for name, expected in (("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        with distributed.join(name) as device:
            assert str(device) == expected
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with distributed.join("cuda") as device:
        assert str(device) == "cuda:3"
    assert list(map(str, chosen)) == ["cuda:0", "cuda:1", "cuda:3", "nccl"]


# --- Steps ---------------------------------------------------------------------------------------


class Everything(TinyNetwork):
    """Options with which no anchor and no roi is left to chance."""

    NUM_CLASSES = 2
    IMAGE_MIN_DIM = IMAGE_MAX_DIM = 64
    RPN_ANCHOR_SCALES = (8, 16, 24, 32, 64)
    RPN_TRAIN_ANCHORS_PER_IMAGE = 100_000
    TRAIN_ROIS_PER_IMAGE = 10_000_000
    ROI_POSITIVE_RATIO = 1e-4
    POST_NMS_ROIS_TRAINING = 2000
    NUM_WORKERS = 0
    STEPS_PER_EPOCH = 1
    GRADIENT_CLIP_NORM = 1e6
    WEIGHT_DECAY = 0.01


def make_sure_model(seed=0, **options):
    """A model of Everything whose proposals are the anchors, nearly, so that some hit an object."""
    torch.manual_seed(seed)
    model = modellib.MaskRCNN(Everything(**options))
    with torch.no_grad():
        model.rpn.conv_bbox.weight *= 0.001
    return model


def batches_of(config, *image_ids):
    data = TorchDataset(Squares(4), config)
    from dataset import collate

    return collate([data[i] for i in image_ids])


def test_accumulation_takes_the_mean_of_the_gradients():
    model = make_sure_model(GRADIENT_ACCUMULATION=2, LEARNING_MOMENTUM=0.0)
    batches = [batches_of(model.config, i) for i in (0, 1)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = []
    for batch in batches:
        model.zero_grad()
        sum(model(*batch).values()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()

    trainer = training.Trainer(model, model.config, iter(batches), str)
    losses, images = trainer.step(0.1)
    assert images == 2
    assert list(losses) == list(model.config.LOSS_WEIGHTS)
    norms = {n for n, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    moved = 0
    for name, parameter in model.named_parameters():
        mean = (gradients[0][name] + gradients[1][name]) / 2
        decay = 0.0 if name.rpartition(".")[0] in norms else 0.01
        expected = before[name] - 0.1 * (mean + decay * before[name])
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-6, msg=name)
        moved += not torch.equal(parameter, before[name])
    assert moved == len(before)
    assert min(losses.values()) > 0


def test_gradients_do_not_depend_on_which_thread_comes_first():
    """Those of gathered rows would, where threads add to them as they come."""
    torch.manual_seed(0)
    config = Config(TOP_DOWN_PYRAMID_SIZE=64, RPN_CHANNELS=64, NUM_CLASSES=3, MASK_POOL_SIZE=4)
    rpn = modellib.RPN(config)
    features = [torch.randn(1, 64, n, n, requires_grad=True) for n in (16, 8, 4, 2, 1)]
    anchors = torch.randint(3 * 341, (2048,))  # most pixels are in many of their patches
    mask = modellib.Mask(config)
    class_ids = torch.randint(3, (700,))
    boxes = modellib.Rois(torch.rand(700, 2).repeat(1, 2) * 0.5, torch.zeros(700).long())
    boxes.boxes[:, 2:] += 0.3

    def gradients():
        logits, deltas = rpn.at(features, torch.zeros_like(anchors), anchors)
        total = logits.square().sum() + deltas.square().sum()
        total = total + mask(features[:4], boxes, class_ids, (64, 64)).square().sum()
        return torch.autograd.grad(total, [*features, mask.conv5.weight])

    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first = gradients()
        for _ in range(4):
            assert all(map(torch.equal, first, gradients()))
    finally:
        torch.set_num_threads(threads)


def test_gradients_are_clipped_once_per_step():
    model = make_sure_model(GRADIENT_CLIP_NORM=0.5, GRADIENT_ACCUMULATION=2)
    batch = batches_of(model.config, 0)
    training.Trainer(model, model.config, iter([batch, batch]), str).step(0.1)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(0.5, rel=1e-4)


def test_batchnorm_does_not_decay():
    model = make_model("unused")
    groups = training.make_optimizer(model, model.config).param_groups
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    decaying, others = (
        {
            n.rpartition(".")[0]
            for n, p in model.named_parameters()
            if any(p is q for q in g["params"])
        }
        for g in groups
    )
    assert (groups[0]["weight_decay"], groups[1]["weight_decay"]) == (0.0001, 0.0)
    assert others == norms
    assert not decaying & norms


def test_rate_of_a_stage():
    config = make_config(WARMUP_STEPS=3, LR_SCHEDULE="constant")
    rates = [training.rate_factor(step, 100, config) for step in (0, 1, 2, 3, 99)]
    assert rates == [0.25, 0.5, 0.75, 1, 1]
    config = make_config(WARMUP_STEPS=0, LR_SCHEDULE="cosine")
    rates = [training.rate_factor(step, 100, config) for step in (0, 25, 50, 75, 100)]
    assert rates == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0])
    config = make_config(WARMUP_STEPS=0, LR_SCHEDULE="step", LR_STEPS=(0.5, 0.75))
    rates = [training.rate_factor(step, 100, config) for step in (0, 49, 50, 74, 75, 99)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


class Sick(nn.Module):
    """A model whose loss is NaN for one image."""

    def __init__(self, image):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.image = image

    def forward(self, images, targets):
        sick = any(torch.equal(image, self.image) for image in images)
        loss = self.weight * (math.nan if sick else 1.0)
        return {"good_loss": self.weight.sum(), "bad_loss": loss.sum()}


def test_a_loss_that_is_not_finite_names_itself_and_the_image_and_changes_nothing():
    config = make_config(IMAGES_PER_GPU=1, GRADIENT_ACCUMULATION=3)
    data = TorchDataset(Squares(5), config)
    loader = make_loader(data, config, shuffle=False)
    model = Sick(data[4][0])
    trainer = training.Trainer(model, config, training.endless(loader, 0), data.describe)
    trainer.step(0.1)
    before = model.weight.item()
    message = r"^bad_loss is nan for the images squares\.square-4; .*learning rate"
    with pytest.raises(training.NonFiniteLossError, match=message):
        trainer.step(0.1)
    assert model.weight.item() == before < 1


class Deadly(Squares):
    """Ends the process that loads its images, as the system does when memory runs out."""

    def load_image(self, image_id):
        assert torch.utils.data.get_worker_info(), "not the process of the test"
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_told_with_the_remedy(tmp_path):
    model = make_model(tmp_path, NUM_WORKERS=1)
    message = r"a process that loads data was killed, .*\(DataLoader worker.*fewer.*NUM_WORKERS"
    with pytest.raises(training.DataWorkerError, match=message) as caught:
        model.train_model(Deadly(5), None, 0.02, 1, "all")
    assert isinstance(caught.value, cli.EXPECTED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", [0, 1, 4, 7])
def test_the_stream_of_batches_goes_on_anywhere(start):
    config = make_config()
    data = TorchDataset(Squares(5), config, horizontal_flip)

    def take(first, count):
        stream = training.endless(make_loader(data, config, shuffle=True), first)
        return [next(stream) for _ in range(count)]

    whole = take(0, 9)
    ids = [[target["image_id"] for target in targets] for _, targets in whole]
    assert sorted(chain(*ids[:3])) == sorted(chain(*ids[3:6])) == [0, 1, 2, 3, 4]
    assert ids[:3] != ids[3:6]
    rest = zip(take(start, 9 - start), whole[start:], ids[start:], strict=True)
    for (images, targets), (expected, _), image_ids in rest:
        assert [target["image_id"] for target in targets] == image_ids
        assert torch.equal(images, expected)


def test_validation_is_the_same_each_time_and_leaves_no_trace(tmp_path):
    model = make_model(tmp_path)
    loader = make_loader(TorchDataset(Squares(4), model.config), model.config, shuffle=False)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    one, two = (training.validate(model, loader, model.config) for _ in range(2))
    assert one == two
    assert one["val_loss"] == pytest.approx(sum(v for k, v in one.items() if k != "val_loss"))
    assert len(one) == 6
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    states_equal(model.state_dict(), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_the_compiled_backbone_trains_alike(tmp_path):
    losses, weights_after = {}, {}
    for compiled in (False, True):
        model = make_model(tmp_path / str(compiled), COMPILE=compiled, STEPS_PER_EPOCH=1)
        train(model, epochs=1)
        assert (model.fpn._compiled_call_impl is not None) == compiled
        losses[compiled] = history.read_history(model.log_dir)[0]["rpn_class_loss"]
        weights_after[compiled] = model.state_dict()
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    assert weights_after[True].keys() == weights_after[False].keys()


def test_bfloat16_trains(tmp_path):
    losses = {}
    for amp in (None, "bf16"):
        model = make_model(tmp_path / str(amp), AMP=amp)
        train(model, epochs=1)
        (record,) = history.read_history(model.log_dir)
        # Those of the heads jump with the proposals that rounding lets pass the threshold.
        losses[amp] = [record["rpn_class_loss"], record["rpn_bbox_loss"]]
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[None] != losses["bf16"] == pytest.approx(losses[None], rel=0.05)


# --- Several processes ---------------------------------------------------------------------------


def two_processes(folder):
    """One step in each of two processes."""
    with distributed.join("cpu"):
        model = make_sure_model(seed=distributed.rank())  # the main process's weights count
        batch = batches_of(model.config, distributed.rank())
        trainer = training.Trainer(model, model.config, iter([batch]), str)
        losses, _ = trainer.step(0.1)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        torch.save((losses, gradients), f"{folder}/rank{distributed.rank()}.pt")
        # A whole run: one folder, one history, the same weights in both processes.
        config = make_config(VALIDATION_STEPS=2, IMAGES_PER_GPU=1)
        model = modellib.MaskRCNN(config, folder)
        train(model, 2, evaluate=lambda model: {"segm_AP": 0.5} if distributed.is_main() else {})
        torch.save((model.state_dict(), model.log_dir), f"{folder}/trained{distributed.rank()}.pt")


def one_of_two(rank, port, folder):
    """Does two_processes with the environment that torchrun gives to a process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    history.History._plot = lambda log: None
    two_processes(folder)


def by_fork(folder):
    torch.multiprocessing.start_processes(
        one_of_two, (free_port(), folder), nprocs=2, start_method="forkserver"
    )


def by_torchrun(folder):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [sys.executable, *command, __file__, str(folder)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("start_two", [by_fork, pytest.param(by_torchrun, marks=pytest.mark.slow)])
def test_two_processes_do_what_one_does_with_both_images(tmp_path, start_two):
    start_two(tmp_path)
    model = make_sure_model()
    batch = batches_of(model.config, 0, 1)
    expected, _ = training.Trainer(model, model.config, iter([batch]), str).step(0.1)
    assert min(expected.values()) > 0
    for rank in (0, 1):
        losses, gradients = torch.load(tmp_path / f"rank{rank}.pt")
        assert losses == pytest.approx(expected, rel=1e-5)
        for name, parameter in model.named_parameters():
            difference = (gradients[name] - parameter.grad).norm()
            assert difference <= 1e-4 * parameter.grad.norm() + 1e-7, name

    (one, log_dir), (two, other) = (
        torch.load(tmp_path / f"trained{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert log_dir == other
    learned = [name for name, _ in modellib.MaskRCNN(make_config()).named_parameters()]
    states_equal({n: one[n] for n in learned}, {n: two[n] for n in learned})
    records = history.read_history(log_dir)
    assert [record["epoch"] for record in records] == [1, 2]
    assert [record["images"] for record in records] == [2 * STEPS, 2 * STEPS]
    assert [record["segm_AP"] for record in records] == [0.5, 0.5]
    assert len(list(log_dir.glob("mask_rcnn_tiny_*.pth"))) == 2


# --- What a run leaves ---------------------------------------------------------------------------


def test_a_run_leaves_checkpoints_history_pictures_and_events(tmp_path, pictures):
    model = make_model(tmp_path, KEEP_CHECKPOINTS=2, EVALUATE_EVERY=2)
    scores = iter([0.3, 0.2, 0.1])
    seen = []
    train(
        model,
        epochs=5,
        callbacks=[seen.append],
        evaluate=lambda model: {"segm_AP": next(scores), "bbox_AP": 0.5},
    )
    folder = model.log_dir
    assert folder.parent == tmp_path
    assert model.find_last() == folder / "mask_rcnn_tiny_0005.pth"
    names = sorted(path.name for path in folder.glob("mask_rcnn*"))
    assert names == ["mask_rcnn_tiny_0004.pth", "mask_rcnn_tiny_0005.pth"]
    best = torch.load(folder / "best.pth", weights_only=True)
    assert best["training"]["epoch"] == 2, "outlives its checkpoint"
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert records == seen
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5]
    assert [record.get("segm_AP") for record in records] == [None, 0.3, None, 0.2, 0.1]
    for record in records:
        assert record["loss"] == pytest.approx(sum(record[n] for n in model.config.LOSS_WEIGHTS))
        assert record["images"] == 5, "three steps of two images are one pass through the data"
    assert (folder / "loss.png").stat().st_size > 1000
    assert list(folder.glob("events.out.tfevents.*"))
    assert json.loads((folder / "config.json").read_text())["STEPS_PER_EPOCH"] == STEPS
    loaded = modellib.MaskRCNN.from_weights(folder / "best.pth")
    assert loaded.config.STEPS_PER_EPOCH == STEPS


def test_a_stage_that_is_done_returns_at_once_and_the_next_goes_on(tmp_path):
    model = make_model(tmp_path)
    train(model, epochs=1, layers="heads")
    folder = model.log_dir
    train(model, epochs=1, layers="heads")
    assert model.epoch == 1
    train(model, epochs=2, layers="all")
    assert (model.epoch, model.log_dir) == (2, folder)
    assert [record["epoch"] for record in history.read_history(folder)] == [1, 2]


def test_early_stopping_and_callbacks_end_a_run(tmp_path):
    scores = iter([0.1, 0.3, 0.2, 0.3, 0.5])
    model = make_model(tmp_path, EARLY_STOPPING=2, STEPS_PER_EPOCH=1, VALIDATION_STEPS=0)
    train(model, epochs=9, evaluate=lambda model: {"segm_AP": next(scores)})
    assert model.epoch == 4
    train(model, epochs=9, callbacks=[lambda record: record["epoch"] == 5, lambda record: None])
    assert model.epoch == 5


def test_early_stopping_waits_for_an_evaluation_and_for_its_stage(tmp_path):
    scores = iter([0.3, 0.2, 0.1, 0.1])
    options = {"EARLY_STOPPING": 1, "EVALUATE_EVERY": 2, "STEPS_PER_EPOCH": 1}
    model = make_model(tmp_path, **options)
    seen = []
    stage = {"callbacks": [seen.append], "evaluate": lambda model: {"segm_AP": next(scores)}}
    train(model, 9, layers="heads", **stage)
    assert [record.get("segm_AP") for record in seen] == [None, 0.3, None, 0.2]
    model.config.EARLY_STOPPING = 3
    train(model, 9, layers="all", **stage)
    assert model.epoch == 8, "epoch 6 is the second of its stage"


def test_without_validation_there_is_a_picture_and_nan_is_no_score(tmp_path, pictures):
    model = make_model(tmp_path, EARLY_STOPPING=1, STEPS_PER_EPOCH=1)
    evaluate = lambda model: {"segm_AP": math.nan, "bbox_AP": np.float32(0.5)}  # noqa: E731
    model.train_model(Squares(5), None, 0.02, 3, "all", evaluate=evaluate)
    records = history.read_history(model.log_dir)
    assert [record.get("bbox_AP") for record in records] == [0.5, 0.5, 0.5]
    assert not any("segm_AP" in record or "val_loss" in record for record in records)
    assert (model.log_dir / "best.pth").samefile(model.find_last())
    assert (model.log_dir / "loss.png").stat().st_size > 1000


def test_steps_of_tensorboard_go_on_in_the_next_stage(tmp_path, monkeypatch):
    steps = []
    tell = lambda log, values, step: steps.append(step)  # noqa: E731
    monkeypatch.setattr(history.History, "add_scalars", tell)
    model = make_model(tmp_path, STEPS_PER_EPOCH=2, VALIDATION_STEPS=0)
    train(model, 1, layers="heads")
    train(model, 2, layers="all")
    assert steps == [1, 2, 2, 3, 4, 4]


def last_of(model_dir, name="tiny"):
    return checkpoints.find_checkpoints(model_dir, name)[0]


def test_the_last_run_is_the_newest_that_has_a_checkpoint(tmp_path):
    for folder, names in {
        "my-run20250101T1010": ["mask_rcnn_my-run_0160.pth"],
        "my-run20260101T101010": ["mask_rcnn_my-run_0009.pth", "mask_rcnn_my-run_0010.pth"],
        "my-run20260202T101010": ["history.jsonl"],
        "my-run220270101T101010": ["mask_rcnn_my-run2_0010.pth"],
    }.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    folder = tmp_path / "my-run20260101T101010"
    assert last_of(tmp_path, "my-Run") == folder / "mask_rcnn_my-run_0010.pth"
    amid = folder / "mask_rcnn_my-run_0010-000050.pth"
    amid.touch()
    assert last_of(tmp_path, "my-Run") == amid
    for path in tmp_path.glob("*/*.pth"):  # as in a copy: the name decides
        os.utime(path, (0, 0))
    assert last_of(tmp_path, "my-Run") == amid


def test_the_last_run_is_the_one_that_was_written_last_whatever_the_clock_says(tmp_path):
    later = tmp_path / "tiny20990101T000000"
    later.mkdir()
    (later / "mask_rcnn_tiny_0007.pth").touch()
    assert last_of(tmp_path).parent == later
    os.utime(last_of(tmp_path), (4e9, 4e9))  # in the year 2096
    model = make_model(tmp_path, STEPS_PER_EPOCH=1)
    train(model, 2)
    assert last_of(tmp_path) == model.find_last() == model.log_dir / "mask_rcnn_tiny_0002.pth"
    os.utime(later / "mask_rcnn_tiny_0007.pth", (5e9, 5e9))
    assert last_of(tmp_path).parent == later


def test_weights_of_the_original_resume_without_an_optimizer(tmp_path, caplog):
    model = make_model(tmp_path)
    folder = tmp_path / "tiny20180101T0000"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "mask_rcnn_tiny_0002.pth")
    resumed = make_model(tmp_path)
    resumed.resume()
    assert resumed.epoch == 2
    assert "the optimizer starts anew" in caplog.text
    train(resumed, epochs=3)
    assert [record["epoch"] for record in history.read_history(folder)] == [3]


if __name__ == "__main__":
    two_processes(*sys.argv[1:])
