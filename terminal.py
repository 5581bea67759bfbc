"""What a person sees while a part runs: progress, the learning curve, aligned tables."""

import math
import sys
import time

from arguments import RunError, UsageError
from metrics import percent

FIRST_STEPS = 2  # not timed: what they load, measure or compile happens once a run
TIMED_STEPS = 10  # the next ones, from which the time of the run is estimated


class EpochMeter:
    """Iterates over an epoch's batches, and sums what its history row needs without a sync.

    The bar counts the steps of the whole run; after the first steps one line estimates its time.
    """

    def __init__(self, epoch, epochs, batches, steps):
        self.epoch = epoch
        self.batches = steps  # that there should be
        title = f"epoch {epoch + 1:3d}/{epochs}"
        self.bar = progress(batches, title, total=epochs * steps, initial=epoch * steps)
        self.loss = 0.0
        self.correct = 0
        self.images = 0
        self.steps = 0
        self.start = self.last = math.nan  # of the first batch, of the last one counted

    def __iter__(self):
        self.start = time.perf_counter()
        long = self.epoch == 0 and self.bar.total > 20 * TIMED_STEPS
        done = 0
        for done, batch in enumerate(self.bar, start=1):
            yield batch
            if long and done == FIRST_STEPS:
                float(self.loss)  # waits for the device
                timed = time.perf_counter()
            if long and done == FIRST_STEPS + TIMED_STEPS:
                float(self.loss)
                seconds = (time.perf_counter() - timed) / TIMED_STEPS * self.bar.total
                print(f"about {duration(seconds)} for {self.bar.total:,} steps", flush=True)
            if not self.bar.disable and self.steps % 10 == 1:  # waits only where a person watches
                self.bar.set_postfix_str(f"loss {self.loss / self.steps:.3f}")
        if done != self.batches:
            raise UsageError(f"an epoch had {done} batches, but steps is {self.batches}, by which "
                             "the schedule would end before the training or not at all; set steps "
                             "to the number of batches")

    def add(self, loss, labels, logits=None):
        """Counts one batch: its loss, labels (B,) and, where the loss has any, logits (B,C).

        With labels (B,C), as for mixed images, the largest counts.
        """
        if labels.ndim == 2:
            labels = labels.argmax(1)
        self.loss = self.loss + loss.detach()
        self.steps += 1
        self.images += len(labels)
        if logits is None:
            self.correct = math.nan
        else:
            self.correct = self.correct + (logits.detach().argmax(1) == labels).sum()
        self.last = time.perf_counter()

    def finish(self, evaluation_accuracy, eval_n, scheduler):
        """Prints and returns the epoch's history row, with the accuracy on `eval_n` images.

        Raises RunError if the loss is not finite.
        """
        loss = float(self.loss) / self.steps
        if not math.isfinite(loss):
            raise RunError(f"the loss became {loss} in epoch {self.epoch + 1}; try a lower --lr or "
                           "--amp off")
        rate = self.images / (self.last - self.start)
        train_accuracy = float(self.correct) / self.images
        train = f"train {train_accuracy:.3f}  " if math.isfinite(train_accuracy) else ""
        print(f"epoch {self.epoch + 1:3d}  loss {loss:6.3f}  {train}evaluation "
              f"{evaluation_accuracy:.3f} of {eval_n}  {rate:6.0f} images/s", flush=True)
        return {"epoch": self.epoch + 1, "loss": loss, "train_accuracy": train_accuracy,
                "eval_accuracy": evaluation_accuracy, "eval_n": eval_n,
                "lr": scheduler.get_last_lr()[0]}


def progress(items, title, total=None, initial=0):
    """The items, with a progress bar where a person watches."""
    from tqdm import tqdm

    return tqdm(items, title, total, leave=False, initial=initial, unit="step",
                disable=not sys.stderr.isatty())


def timed(conditions, estimate):
    """The conditions of part 2, with a bar; after the first, a line says how long the others take.

    estimate: False for none, where some are finished already.
    """
    began = time.perf_counter()
    for i, condition in enumerate(progress(conditions, "perturbations")):
        yield condition
        others = len(conditions) - 1
        if estimate and i == 0 and others > 1:
            seconds = (time.perf_counter() - began) * others
            print(f"about {duration(seconds)} for the other {others} conditions, then the attacks",
                  flush=True)


def duration(seconds):
    """Seconds in the unit a person would use."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class Clock:
    """Adds up the seconds of each stage."""

    def __init__(self):
        self.stages = []
        self.last = time.perf_counter()

    def stop(self, stage):
        now = time.perf_counter()
        self.stages.append((stage, f"{now - self.last:.0f}"))
        self.last = now

    def print(self):
        print_table("Time", ("stage", "seconds"), self.stages)


def print_table(title, header, rows):
    """An aligned table on the terminal; the first column to the left, the others to the right."""
    lines = [[str(cell) for cell in line] for line in [header, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    print(f"\n{title}")
    for line in lines:
        text = "  " + line[0].ljust(widths[0])
        for cell, width in zip(line[1:], widths[1:], strict=True):
            text += "  " + cell.rjust(width)
        print(text)


def print_accuracies(title, rows):
    lines = []
    for values in rows:
        if values["metric"] == "accuracy":
            condition = f"{values['condition']} {values['severity']}".strip()
            interval = f"{percent(values['ci_low'])} - {percent(values['ci_high'])}"
            lines.append((condition, values["split"], values["head"], percent(values["value"]),
                          interval, values["n"]))
    print_table(title, ("condition", "split", "head", "accuracy %", "95 % interval", "n"), lines)
