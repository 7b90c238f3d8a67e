"""What both trainings share: a schedule, an average of the weights, a log, and checkpoints that survive a kill."""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from data import Batches


def flags(doc, steps, cooldown, lr, work):
    """The flags that both trainings have; the argument is the script's own docstring, whose first line explains it."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--cooldown", type=int, default=cooldown, help="the last steps, in which the learning rate goes to nothing")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that cut crops ahead, which a GPU wants; the same crops for any N")
    parser.add_argument("--work", type=Path, default=work)
    return parser


def trained(text):
    """A folder of a network, as an argument: without this diffusers would take one that is not there for a name to fetch."""
    if not (Path(text) / "config.json").exists():
        raise argparse.ArgumentTypeError(f"no network in {text}")
    return Path(text)


def checksum(path):
    """Of a file, or of the weights in a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def swapped_in(folder, write):
    """Has `write` fill a neighbour of `folder` that takes its place only when complete."""
    part, former = (folder.with_name(folder.name + end) for end in (".part", ".former.part"))
    if former.exists() and not folder.exists():  # a kill between the two renames below
        former.rename(folder)
    for old in (part, former):
        shutil.rmtree(old, ignore_errors=True)
    write(part)
    if folder.exists():
        folder.rename(former)
    part.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def settings(args, encoder):
    """What a run is made with, which must not change while it goes on: all flags but those that say how long, on what and where, and by their
    contents the pictures and the networks that it begins with."""
    free = ("steps", "cooldown", "device", "threads", "workers", "work", "name", "init", "start")
    found = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in free}
    found |= {"pictures": checksum(args.work / "manifest.csv"), "encoder": checksum(encoder), "--start": checksum(args.start) if args.start else None}
    return json.loads(json.dumps(found))


class Run:
    """A training run of `steps` steps, the last `cooldown` of which lower the learning rate to nothing.

    The state is saved every `every` steps, at the start of the cooldown (`trunk.pt`, from which a longer run can go on at the full
    rate) and on SIGTERM or SIGINT. It holds everything that the next step depends on, the generators included, so a run that was
    killed and started again with the same flags and tiles ends with the same weights, up to the roundings of the machine; only from a CPU
    to a GPU or back noise and timesteps are drawn anew, as their generators are of different kinds.
    """

    def __init__(self, folder, model, optimizer, args, encoder, warmup=100, average=0.998, every=250):
        self.folder, self.model, self.optimizer = Path(folder), model, optimizer
        self.steps, self.cooldown, self.seed, self.workers = args.steps, args.cooldown, args.seed, args.workers
        self.settings = settings(args, encoder)
        self.warmup, self.average, self.every = warmup, average, every
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.seed)
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        self.step, self.seconds, self.loss = 0, 0.0, None
        self.ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.stop = False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._stop)
        self._resume()

    def _stop(self, *_):
        self.stop = True

    def _resume(self):
        first_of_cooldown = self.steps - self.cooldown
        if first_of_cooldown < 0:
            raise SystemExit(f"a --cooldown of {self.cooldown} does not fit into --steps {self.steps}")
        used = False
        for name in ("state.pt", "trunk.pt"):
            path = self.folder / name
            if not path.exists():
                continue
            used = True
            state = torch.load(path, map_location=self.device, weights_only=False)
            before = state.get("settings", {})
            if other := ", ".join(name for name in self.settings if before.get(name) != self.settings[name]):
                raise SystemExit(f"the run in {self.folder} was begun with other {other}: move it away, or give this one another --name")
            # A state from within a cooldown serves that one alone, one at the full rate all that begin later.
            begun = state["cooldown_from"]
            if begun != first_of_cooldown and (begun is not None or state["step"] > first_of_cooldown):
                continue
            if state["step"] > self.steps:
                raise SystemExit(f"the run in {self.folder} is at step {state['step']}: --steps {state['step']} or more, or another --name for a shorter run")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema, self.step, self.seconds, self.loss = state["ema"], state["step"], state["seconds"], state["loss"]
            goes_on = f"goes on from {name}" + (", whose crops were drawn in another way" if "rng" in state else "")
            draws = state["generator"].cpu()
            if len(draws) == len(self.generator.get_state()):
                self.generator.set_state(draws)
            else:
                # Of another kind of device, whose generators hold another number of bytes; told by them, since older states do not name it.
                self.generator.manual_seed(int(np.random.SeedSequence((self.seed, self.step)).generate_state(1)[0]))
                goes_on += f", of another kind of device than this {self.device.type}, so noise and timesteps are drawn anew by seed and step"
            self.say(goes_on)
            return
        if used:
            raise SystemExit(f"no state in {self.folder} fits a cooldown from step {first_of_cooldown}: more --steps, or another --name for a shorter run")

    def save(self, name="state.pt"):
        first_of_cooldown = self.steps - self.cooldown
        state = dict(
            model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), ema=self.ema, step=self.step, seconds=self.seconds, loss=self.loss,
            generator=self.generator.get_state(), cooldown_from=first_of_cooldown if self.step > first_of_cooldown else None,
            settings=self.settings,
        )
        torch.save(state, self.folder / "new.pt")
        os.replace(self.folder / "new.pt", self.folder / name)

    def say(self, text, **numbers):
        line = f"step {self.step} after {self.seconds:.0f} s: {text}"
        print(line, flush=True)
        with open(self.folder / "log.jsonl", "a") as f:
            f.write(json.dumps(dict(step=self.step, seconds=round(self.seconds), text=text, **numbers)) + "\n")

    def factor(self):
        left = self.steps - self.step
        return min(1.0, (self.step + 1) / self.warmup, left / self.cooldown if self.cooldown else 1.0)

    def go(self, crops_of, loss_of, validate):
        """`crops_of(step, rng)` cuts the pictures of a step, `loss_of(run, pictures)` gives their loss, `validate(run)` a dict of numbers for the
        averaged weights."""
        trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        own, average = zip(*((v, self.ema[k]) for k, v in self.model.state_dict().items()))
        batches = iter(Batches(crops_of, self.seed, range(self.step, self.steps), self.workers, self.device))
        while self.step < self.steps and not self.stop:
            start = time.perf_counter()
            pictures = next(batches).to(self.device, non_blocking=True)
            if self.step == self.steps - self.cooldown:
                self.save("trunk.pt")
            for group, rate in zip(self.optimizer.param_groups, self.rates):
                group["lr"] = rate * self.factor()
            loss = loss_of(self, pictures)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            self.optimizer.step()
            keep = min(self.average, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(average, own, 1 - keep)
            self.step += 1
            loss = loss.detach()
            self.loss = loss if self.loss is None else 0.99 * self.loss + 0.01 * loss
            # Looked at now and then: the CPU has to wait for it.
            mean = float(self.loss) if self.step % 50 == 0 else None
            self.seconds += time.perf_counter() - start
            if mean is not None:
                self.say(f"loss {mean:.4f}", loss=mean)
            if self.step % self.every == 0 or self.step == self.steps:
                self.save()
                numbers = self.averaged(validate)
                self.say("held out: " + ", ".join(f"{k} {v}" for k, v in numbers.items()), **numbers)
        self.save()

    def finish(self, weights, write):
        """Has `write(folder)` write the averaged weights and says how it ended. Those of a run that was stopped go beside `weights`, where a shorter
        run may have left finished ones, and it exits with 3, so that no script goes on with weights that are half trained."""
        if self.step == self.steps:
            swapped_in(weights, lambda folder: self.averaged(lambda _: write(folder)))
            print("done")
            return
        stopped = weights.with_name(f"{weights.name}_stopped")
        swapped_in(stopped, lambda folder: self.averaged(lambda _: write(folder)))
        print(f"stopped at step {self.step} of {self.steps}, whose weights are in {stopped}; to go on:\n    {shlex.join(['python3', *sys.argv])}", file=sys.stderr)
        sys.exit(3)

    def averaged(self, what):
        """`what(run)` with the averaged weights in the model."""
        own = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        self.model.eval()
        try:
            with torch.no_grad():
                return what(self)
        finally:
            self.model.load_state_dict(own)
            self.model.train()
