"""A loop over PEFT on torch: one frozen base, one adapter after another; run by an interpreter that has both.

It reads one JSON line (the problem, a file of arrays, the lanes, how many steps) and then answers each line
``go`` with the seconds by the clock and of the processor, and the last loss of each lane.
"""

import json
import sys
import time

import numpy as np
import peft
import torch
import torch.nn.functional as F
from torch_worker import TARGETS, Transformer, factors_of, fill_transformer, set_factors


def trained(base, held, lane, steps, device):
    """The plain model again, and the last loss of an adapter that was trained on it."""
    config = peft.LoraConfig(r=lane["rank"], lora_alpha=lane["alpha"], target_modules=TARGETS["transformer"])
    model = peft.get_peft_model(base, config).to(device)
    with torch.no_grad():
        for path, place in lane["factors"].items():
            set_factors(base.get_submodule(path), *factors_of(held, place))
    tx = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lane["lr"], weight_decay=1e-4)
    x, target = (torch.from_numpy(held[name]).to(device) for name in ("x", "target"))
    for _ in range(steps):
        tx.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        tx.step()
    return model.unload(), loss.item()


def main():
    start = json.loads(sys.stdin.readline())
    held, device = dict(np.load(start["arrays"])), start["device"]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = start["tf32"]
    base = Transformer(start["problem"]).eval()
    with torch.no_grad():
        fill_transformer(base, held)
    print(json.dumps({"torch": torch.__version__, "peft": peft.__version__}), flush=True)
    for _ in sys.stdin:
        clock, processor, losses = time.perf_counter(), time.process_time(), []
        for lane in start["lanes"]:
            base, loss = trained(base, held, lane, start["steps"], device)
            losses.append(loss)
        took = [time.perf_counter() - clock, time.process_time() - processor]
        print(json.dumps({"seconds": took, "losses": losses}), flush=True)


if __name__ == "__main__":
    main()
