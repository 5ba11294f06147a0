"""The bounds of comparison.py hold for every instruction set, number of threads and kernel.

    pytest -m matrix -rP

prints the largest differences of each run. The processor is asked once, so each pair of settings
has a process of its own. ATEN_CPU_CAPABILITY picks the vectors of torch and of winograd,
DNNL_MAX_CPU_ISA the most that oneDNN's convolutions may use.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from comparison import RMS, WORST
from conftest import ROOT

from winograd import is_compiled

CAPABILITIES = ("default", "avx2", "avx512")
THREADS = (1, 2, 4)
ISAS = ("SSE41", "AVX2", "AVX512_CORE")
# Each pair of two settings occurs.
RUNS = [
    (capability, isa, THREADS[(i + j) % 3])
    for i, capability in enumerate(CAPABILITIES)
    for j, isa in enumerate(ISAS)
]
CODE = """
import json
import sys

import torch
from comparison import Case, build_model

torch.set_num_threads(int(sys.argv[2]))
for winograd in (True, False):
    model = build_model("small", sys.argv[1], CPU_WINOGRAD=winograd)
    found = [(d.stage, float(d.value), d.bound) for d in Case(model, "synth").all()]
    used = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    print(json.dumps([*used, winograd, found]))
"""


def largest(differences):
    """{kind of stage: its largest difference}; all maps are one kind."""
    kinds = {RMS: "maps", WORST: "single values"}
    result = {}
    for stage, value, bound in differences:
        kind = kinds.get(bound, stage)
        result[kind] = max(result.get(kind, 0), value)
    return result


@pytest.mark.matrix
@pytest.mark.parametrize(("capability", "isa", "threads"), RUNS)
def test_bounds_hold(small_h5, capability, isa, threads):
    available = torch.backends.cpu.get_cpu_capability().lower()
    most = CAPABILITIES.index(available) if available in CAPABILITIES else 0
    if CAPABILITIES.index(capability) > most:
        pytest.skip(f"this processor has no {capability}")
    environment = {
        "ATEN_CPU_CAPABILITY": capability,
        "DNNL_MAX_CPU_ISA": isa,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(small_h5), str(threads)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    runs = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(runs) == 2
    assert (runs[0][-1] != runs[1][-1]) == bool(is_compiled())  # both kinds of kernels ran
    beyond = []
    for used, used_threads, winograd, differences in runs:
        assert used_threads == threads
        assert capability == "default" or used == capability.upper()
        name = f"{capability}, {isa}, threads {threads}, winograd {'on' if winograd else 'off'}"
        values = ", ".join(f"{k} {v:.1e}" for k, v in largest(differences).items() if v > 0)
        print(f"{name}: {values}")
        beyond += [(name, stage, v, bound) for stage, v, bound in differences if not v <= bound]
    assert not beyond
