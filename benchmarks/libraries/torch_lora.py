"""PEFT on torch: `torch_worker.py`, run by another interpreter, takes its turns with the others."""

import dataclasses
import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import results

from libraries.problem import Problem, factors, inputs, minilm_folder, weights

NAMES = {
    "lora": "PEFT on torch",
    "lora compiled": "PEFT on torch, compiled",
    "lora graphs": "PEFT on torch, compiled, CUDA graphs",
    "dora": "PEFT on torch, dora",
    "full": "full fine-tuning, torch",
    "merged": "merged, torch",
}


class Process:
    """A script of this folder, run by another interpreter; JSON lines go in and out.

    It is told its arrays, what ``start`` says, and to compute where and how JAX does. ``said`` are its first
    lines, as many as ``answers``.
    """

    def __init__(self, python: str, script: str, held: dict, start: dict, answers: int):
        path = Path(__file__).with_name(script)
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [python, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        with tempfile.TemporaryDirectory() as folder:
            arrays = f"{folder}/arrays.npz"
            np.savez(arrays, **held)
            start = {**start, "arrays": arrays, "tf32": results.products() == "TF32"}
            self.write(json.dumps({**start, "device": "cuda" if results.on_gpu() else "cpu"}))
            self.said = [self.read() for _ in range(answers)]

    def write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def read(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the torch process ended")
        return json.loads(line)

    def ask(self, command: str) -> dict:
        self.write(command)
        return self.read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Worker(Process):
    """The process, which holds all torch models of a run."""

    def __init__(self, python: str, problem: Problem, ways: list[str]):
        held = {**weights(problem), **inputs(problem)}
        for path, (a, b) in factors(problem).items():
            held |= {f"{path}/a": a, f"{path}/b": b}
        # bfloat16 is not a dtype of NumPy files: torch converts it back.
        held = {n: x if x.dtype.kind == "i" else x.astype(np.float32) for n, x in held.items()}
        sizes = {**dataclasses.asdict(problem), "linear": problem.linear}
        sizes |= {"folder": str(minilm_folder())} if problem.model == "minilm" else {}
        super().__init__(python, "torch_worker.py", held, {"problem": sizes, "ways": ways}, len(ways))
        self.answers = dict(zip(ways, self.said, strict=True))


class TorchPeer:
    """One way of the worker, with the interface of `JaxPeer`."""

    def __init__(self, worker: Worker, way: str):
        self.worker, self.way, self.answer = worker, way, worker.answers[way]
        if "failed" in self.answer:
            raise RuntimeError(self.answer["failed"])
        self.name, self.trainable = NAMES[way], self.answer["trainable"]
        self.exact, self.kind = way != "full", "dora" if way == "dora" else "lora"
        self.versions = {name: self.answer[name] for name in ("torch", "peft")}

    def compile(self) -> tuple[float, float]:
        return 0.0, self.answer["first"]  # of the first step: torch has no separate compilation

    def reset(self) -> None:
        self.worker.ask(f"reset {self.way}")

    def step(self) -> tuple[float, float]:
        answer = self.worker.ask(f"step {self.way}")
        return answer["seconds"], answer["loss"]

    def costs(self) -> dict[str, float]:
        return {of: self.answer[of] for of in ("flops", "temp bytes") if of in self.answer}

    def close(self) -> None:
        pass
