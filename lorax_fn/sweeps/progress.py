"""The progress bar of a sweep: steps of all programs, with the best lane so far."""

import sys
from typing import Any

from lorax_fn.core.errors import error


class Bar:
    """A tqdm bar; without tqdm, notes go to stderr as plain lines, unless the user required a bar."""

    def __init__(self, total: int, progress: bool | None):
        self.bar: Any = None
        self.plain = False
        if progress is False:
            return
        try:
            from tqdm import tqdm
        except ImportError:
            if progress:
                raise error(
                    "a progress bar needs tqdm.",
                    got="no module tqdm",
                    do='pip install "lorax_fn[progress]", or progress=False.',
                ) from None
            self.plain = True
            return
        self.bar = tqdm(total=total, desc="sweep", unit="step", dynamic_ncols=True)

    def skip(self, steps: int) -> None:
        if self.bar is not None:
            self.bar.update(steps)

    def step(self, best: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(best, False)
            self.bar.update(1)

    def note(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.plain:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
